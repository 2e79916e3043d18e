"""Examples of the families with state spaces."""

from __future__ import annotations

from parity_tests.families import Example

EXAMPLES: tuple[Example, ...] = ()
