"""The wheels of jaxlib hold no types. Without these, `jnp.zeros` and all that takes a device has an unknown type."""

from typing import Any

Device = Any

def __getattr__(name: str) -> Any: ...
