"""What other implementations compute and no config of ours can say: changes of torch_ref while they are entered.

Shapes: B batch, T query length, S key length, N heads, K kv heads, H head dim, F feed-forward width, E experts.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jaxlm.parity.diagnose.variant import Patch
from torch_ref.models import attention as attention_module
from torch_ref.models import layers
from torch_ref.ops import ffn, norm
from torch_ref.ops.attention import attend as attention
from torch_ref.ops.moe import experts as moe
from torch_ref.ops.moe import router
from torch_ref.ops.ssm import convolution, selective_scan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def patched(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Patch:
    """`owner.name` is what `wrap` makes of it."""
    return functools.partial(_replaced, owner, name, wrap)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


# Normalisation


def _rms_eps_outside(x: Tensor, scale: Tensor, *, eps: float) -> Tensor:
    return x / (torch.mean(x * x, dim=-1, keepdim=True).sqrt() + eps) * scale


def _layer_norm(centred: bool = True, biased: bool = True, outside: bool = False) -> Callable[..., Tensor]:
    def layer_norm(x: Tensor, scale: Tensor, bias: Tensor, *, eps: float) -> Tensor:
        x = x - torch.mean(x, dim=-1, keepdim=True) if centred else x
        variance = torch.sum(x * x, dim=-1, keepdim=True) / (x.shape[-1] - (not biased))
        return x / (variance.sqrt() + eps if outside else (variance + eps).sqrt()) * scale + bias

    return layer_norm


rms_eps_outside = patched(norm, "rms_norm", lambda original: _rms_eps_outside)
layer_eps_outside = patched(norm, "layer_norm", lambda original: _layer_norm(outside=True))
not_centred = patched(norm, "layer_norm", lambda original: _layer_norm(centred=False))
unbiased = patched(norm, "layer_norm", lambda original: _layer_norm(biased=False))


def _norm_before_gate(x: Tensor, gate: Tensor, scale: Tensor, *, eps: float, groups: int) -> Tensor:
    parts = x.unflatten(-1, (groups, -1))
    parts = parts * torch.rsqrt(torch.mean(parts * parts, dim=-1, keepdim=True) + eps)
    return parts.flatten(-2) * scale * F.silu(gate)


norm_before_gate = patched(norm, "gated_rms_norm", lambda original: _norm_before_gate)
one_norm_group = patched(
    norm,
    "gated_rms_norm",
    lambda original: lambda x, gate, scale, *, eps, groups: original(x, gate, scale, eps=eps, groups=1),
)


# Attention


def scaled_scores(factor: float) -> Patch:
    """Products of queries and keys times a factor, before soft cap and mask."""
    wrap = lambda original: lambda products, *rest: original(products * factor, *rest)  # noqa: E731
    return patched(attention, "_mix", wrap)


def _tiled_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # `repeat` lays the kv heads one after the other, 0 1 0 1; grouped queries need 0 0 1 1. Both have the right shape,
    # which is why the mistake is common.
    groups = q.shape[2] // k.shape[2]
    k, v = (x.transpose(1, 2).repeat(1, groups, 1, 1) for x in (k, v))
    return q.transpose(1, 2), k, v


tiled_heads = patched(attention, "_heads_first", lambda original: _tiled_heads)


def _visible(causal: bool, documents: bool) -> Callable[..., Tensor]:
    """Visibility by place in the row; `documents`: within one."""

    def visible(q: Any, k: Any, window: int = 0, beyond: int = 0) -> Tensor:
        # Order by place in the row instead of by position: the same within one document, but not over several, nor
        # where positions restart.
        real = (q.segments[:, :, None] != 0) & (k.segments[:, None, :] != 0)
        seen = real & (q.segments[:, :, None] == k.segments[:, None, :]) if documents else real
        rows, columns = torch.arange(q.segments.shape[1]), torch.arange(k.segments.shape[1])
        apart = (rows[:, None] - columns[None, :]).expand_as(seen)
        if causal:
            seen = seen & (apart >= beyond)
        return seen & (apart < window) if window else seen

    return visible


no_causal_mask = patched(attention, "visible", lambda original: _visible(causal=False, documents=True))
documents_joined = patched(attention, "visible", lambda original: _visible(causal=True, documents=False))


@contextlib.contextmanager
def norm_after_rotation() -> Iterator[None]:
    """Queries and keys are rotated first and normalised then."""
    waiting: list[Any] = []
    forward, rotate = attention_module.Attention.forward, attention_module.apply_rope

    def attend(self: Any, *inputs: Any) -> Any:
        if not self.config.qk_norm or inputs[2] is None:
            return forward(self, *inputs)
        # The norms are taken out of the module and applied behind the rotation, queries first, in the order in which
        # the module rotates.
        norms = self.q_norm, self.k_norm
        waiting[:] = norms
        self.q_norm = self.k_norm = torch.nn.Identity()
        try:
            return forward(self, *inputs)
        finally:
            self.q_norm, self.k_norm = norms
            waiting.clear()

    def rotated(x: Tensor, *table: Tensor, layout: Any) -> Tensor:
        x = rotate(x, *table, layout=layout)
        return waiting.pop(0)(x) if waiting else x

    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(attention_module.Attention, "forward", lambda original: attend))
        stack.enter_context(_replaced(attention_module, "apply_rope", lambda original: rotated))
        yield


# Rotary positions


def _rotating(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Patch:
    wrap = lambda original: lambda x, sin, cos, *, layout: original(x, *change(sin, cos), layout=layout)  # noqa: E731
    return patched(attention_module, "apply_rope", wrap)


other_direction = _rotating(lambda sin, cos: (-sin, cos))


def frequencies_in(dtype: str) -> Patch:
    """Rotary frequencies rounded to a narrower dtype."""
    narrow = lambda original: lambda *rope: torch.tensor(original(*rope)).to(DTYPES[dtype]).double().numpy()  # noqa: E731
    return patched(layers, "rope_frequencies", narrow)


def tables_in(dtype: str) -> Patch:
    """Angles, sines and cosines computed in a narrower dtype."""

    def wrap(original: Any) -> Any:
        def table(positions: Tensor, frequencies: Any, wide: torch.dtype, temperature: float = 1.0) -> Any:
            kind = DTYPES[dtype]
            # Positions are rounded too: in bfloat16 no two neighbours above 256 are distinct, which is the error that
            # this variant looks for.
            angles = positions[..., None].to(kind) * torch.as_tensor(frequencies).to(kind)
            return tuple((wave(angles) * temperature).to(wide) for wave in (torch.sin, torch.cos))

        return table

    return patched(layers, "rope_table", wrap)


# Feed-forwards


def activation(function: Callable[[Tensor], Tensor]) -> Patch:
    """The activation of a feed-forward of two matrices."""
    return patched(ffn, "activate", lambda original: lambda name, up: function(up))


def gate(function: Callable[[Tensor], Tensor]) -> Patch:
    """`function(gate) * up` in feed-forwards of three matrices, the experts' among them."""
    return patched(ffn, "gated", lambda original: lambda name, gate, up: function(gate) * up)


def clamped(alpha: float = 1.702, limit: float = 7.0, plus: float = 1.0) -> Patch:
    """The clamped SwiGLU with other constants."""

    def gated(name: str, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (up + plus)

    return patched(ffn, "gated", lambda original: gated)


gate_is_up = patched(ffn, "gated", lambda original: lambda name, gate, up: original(name, up, gate))


def quick_gelu(x: Tensor) -> Tensor:
    """`x sigmoid(1.702 x)`, the approximation of CLIP."""
    return x * torch.sigmoid(1.702 * x)


# Experts


def _biased_weights(original: Any) -> Any:
    def route(logits: Tensor, bias: Tensor | None = None, **options: Any) -> Any:
        routing = original(logits, bias, **options)
        if bias is None:
            return routing
        # The choice is made as before: only the weights of what is chosen include the bias.
        weights = (routing.scores + bias).gather(-1, routing.experts)
        if options["renormalize"]:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return routing._replace(weights=weights * options["scale"])

    return route


bias_in_weights = patched(router, "route", _biased_weights)


def _unweighted_bias(hidden: Tensor, weights: Tensor, one: Any) -> Tensor:
    # The product is linear, so weighting the hidden layer or the output is the same; for the bias it is not.
    y = (hidden * weights[:, None]) @ one.down
    return y if one.down_bias is None else y + one.down_bias


bias_not_weighted = patched(moe, "_down", lambda original: _unweighted_bias)


# State spaces


def step_size(function: Callable[[Tensor], Tensor]) -> Patch:
    """Another function than softplus."""
    return patched(selective_scan, "softplus", lambda original: function)


softplus_twice = patched(selective_scan, "softplus", lambda original: lambda x: original(original(x)))


def _no_reset(segments: Tensor) -> Tensor:
    # A state that begins at the first token of the row and nowhere else.
    first = torch.zeros_like(segments, dtype=torch.bool)
    first[:, 0] = True
    return first


state_goes_on = patched(selective_scan, "starts", lambda original: _no_reset)


def _crossing(before: Tensor, kernel: Tensor, bias: Tensor | None, segments: Tensor | None, original: Any) -> Tensor:
    return original(before, kernel, bias, None if segments is None else (segments != 0).int())


convolution_goes_on = patched(
    convolution,
    "_convolve",
    lambda original: lambda before, kernel, bias, segments=None: _crossing(before, kernel, bias, segments, original),
)


def _linear_convolution(original: Any) -> Any:
    def convolve(before: Tensor, kernel: Tensor, bias: Tensor | None, segments: Tensor | None = None) -> Tensor:
        taps = kernel.shape[0]
        length = before.shape[1] - taps + 1
        y = torch.zeros((), dtype=before.dtype) if bias is None else bias
        for k in range(taps):
            tap = before[:, k : k + length] * kernel[k]
            if segments is not None:
                tap = torch.where((segments[:, k : k + length] == segments[:, taps - 1 :])[..., None], tap, 0)
            y = y + tap
        return y

    return convolve


no_activation_after_convolution = patched(convolution, "_convolve", _linear_convolution)


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """Rounded to a narrower dtype and back to float64."""
    return torch.tensor(np.asarray(array, np.float64)).to(DTYPES[dtype]).double().numpy()
