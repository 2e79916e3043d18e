"""transformers in full float64: what its models compute in float32 whatever their dtype is computed in float64.

    with Lifted():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
        logits = model(tokens).logits

Norms, rotary angles, routers, state spaces and softmax are cast to float32 in the source of transformers. With that
lifted, only different mathematics is left to be seen. The model must be made so too: rotary frequencies are buffers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Lifted(TorchFunctionMode):
    """Computes in float64 what is asked for in float32, in this thread."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `TorchFunctionMode`."""
        # `x.float()` names no dtype, so it is caught by itself; all other casts pass a dtype among their arguments.
        if func is torch.Tensor.float:
            return args[0].double()
        lift = lambda value: torch.float64 if value is torch.float32 else value  # noqa: E731
        return func(*map(lift, args), **{key: lift(value) for key, value in (kwargs or {}).items()})
