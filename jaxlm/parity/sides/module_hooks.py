"""What arrives at the modules of a PyTorch model and what they return: watched and exchanged by hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Arrive = Callable[[str, tuple, dict[str, Any]], tuple[tuple, dict[str, Any]] | None]
Return = Callable[[str, Any], None]


@contextmanager
def watched(modules: Iterable[tuple[str, nn.Module]], returns: Return, arrives: Arrive | None = None) -> Iterator[None]:
    """Calls `arrives` with the name, the arguments and the keywords of each module, whose result replaces them, and
    `returns` with its name and output, in the order of computation."""

    def before(name: str) -> Callable[..., Any]:
        return lambda module, args, kwargs: arrives(name, args, kwargs) if arrives else None

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            returns(name, output)

        return hook

    # Hooks are removed whatever happens: the module is used again for the next dtype, and a hook left behind would
    # write into an old comparison.
    handles = []
    for name, module in modules:
        if arrives:
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first(output: Any) -> Tensor:
    """Of several outputs: a cache or scores may stand beside it."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def half_of_the_threads() -> Iterator[None]:
    """For torch, for a while: jaxlm is at work on the other half."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // 2))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def array_of(tensor: Tensor) -> np.ndarray:
    """On the host; bfloat16, which numpy has not, widened."""
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
