"""The usual culprits inside feed-forwards, experts and state spaces; see `culprits`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from jaxlm import config
from jaxlm.parity.diagnose import torch_patches
from jaxlm.parity.diagnose.hypothesis import Try, mixes, patching, zeroed
from jaxlm.parity.diagnose.variant import Variant, blocks_with

# Feed-forwards


ACTIVATIONS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "gelu": ("the erf form of GELU", functools.partial(F.gelu, approximate="none")),
    "gelu_tanh": ("the tanh approximation of GELU", functools.partial(F.gelu, approximate="tanh")),
    "quick": ("x sigmoid(1.702 x), quick GELU", torch_patches.quick_gelu),
    "silu": ("SiLU", F.silu),
    "relu": ("ReLU", F.relu),
    "relu2": ("squared ReLU", lambda x: F.relu(x) ** 2),
}


def activation(v: Variant) -> Iterator[Try]:
    blocks = [*blocks_with(v.model, ffn="mlp"), *blocks_with(v.model, ffn="moe")]
    # Blocks may have different activations; each is questioned once.
    for ours in dict.fromkeys(block.activation for block in blocks):
        if ours in ACTIVATIONS:
            for name, (what, function) in ACTIVATIONS.items():
                if name != ours:
                    what_differs = f"the activation is {what} instead of {ACTIVATIONS[ours][0]}"
                    yield patching(v, what_differs, torch_patches.activation(function))
            continue
        yield patching(v, "gate and up are swapped: the activation is that of up", torch_patches.gate_is_up)
        for name, (what, function) in ACTIVATIONS.items():
            if (name, ours) != ("silu", "swiglu"):
                yield patching(v, f"the gate passes {what} instead of {ours}", torch_patches.gate(function))
        if ours == "swiglu_clamped":
            yield patching(
                v, "the clamped SwiGLU multiplies by up instead of (up + 1)", torch_patches.clamped(plus=0.0)
            )
            yield patching(
                v, "the clamped SwiGLU has sigmoid(x) instead of sigmoid(1.702 x)", torch_patches.clamped(alpha=1.0)
            )
            unbounded = torch_patches.clamped(limit=torch.inf)
            yield patching(v, "gate and up of the clamped SwiGLU are not clamped", unbounded)
        else:
            yield patching(v, "SwiGLU is the clamped form of gpt-oss", torch_patches.clamped())


def experts(v: Variant) -> Iterator[Try]:
    if not v.model.moes:
        return
    moe, set_to = v.model.moes[0], functools.partial(v.with_options, "moe")
    if moe.renormalize:
        what = "the weights of the chosen experts are not renormalised: softmax before top-k"
        yield what, lambda: set_to(renormalize=False)
    else:
        what = "the weights of the chosen experts are renormalised: softmax after top-k"
        yield what, lambda: set_to(renormalize=True)
    # Scores and renormalisation are often wrong together, since softmax over the chosen equals softmax over all,
    # renormalised; so both are also tried at once.
    router = "sigmoid" if moe.router == "softmax" else "softmax"
    yield f"the router's scores are a {router} instead of a {moe.router}", lambda: set_to(router=router)
    other = f"the router's scores are a {router}, {'not ' if moe.renormalize else ''}renormalised"
    yield other, lambda: set_to(router=router, renormalize=not moe.renormalize)
    for top_k in (moe.top_k - 1, moe.top_k + 1):
        yield f"top_k is {top_k} instead of {moe.top_k}", lambda k=top_k: set_to(top_k=k)
    for factor in {1.0, 2.5} - {moe.route_scale}:
        yield f"route_scale is {factor:g} instead of {moe.route_scale:g}", lambda s=factor: set_to(route_scale=s)
    if moe.n_groups > 1:
        yield "experts are chosen among all groups", lambda: set_to(n_groups=1, top_groups=1)
    if moe.capacity_factor:
        yield "no token is dropped", lambda: set_to(capacity_factor=0.0)
    if moe.selection_bias:
        yield patching(v, "the selection bias is part of the weights", torch_patches.bias_in_weights)
        yield from zeroed(v, "the selection bias is left out", "selection_bias")
    if "experts" in v.model.biases:
        yield patching(v, "the experts' output bias is not weighted", torch_patches.bias_not_weighted)
        yield from zeroed(
            v, "the experts' biases are left out", *(f"experts.{n}_proj.bias" for n in ("gate", "up", "down"))
        )
    yield from zeroed(v, "the shared experts are missing", "shared.down_proj.weight", "shared.down_proj.bias")


# State spaces


def mamba(v: Variant) -> Iterator[Try]:
    if not mixes(v, "mamba", "mamba2"):
        return
    # The parts of a scan that leave outputs plausible when they are missing: skip, bias of the step size, activation
    # behind the convolution, order of the taps.
    yield from zeroed(v, "the skip D u of the scan is missing", "mixer.D")
    yield from zeroed(v, "the bias of the step size is missing", "dt_proj.bias", "dt_bias")
    twice = lambda name, x: 2 * np.asarray(x, np.float64) if name.endswith(("mixer.dt_proj.bias", "dt_bias")) else None  # noqa: E731
    yield "the bias of the step size is added twice", lambda: v.with_tensors(twice)
    yield patching(v, "softplus is applied twice to the step size", torch_patches.softplus_twice)
    yield patching(v, "the step size has no softplus", torch_patches.step_size(lambda x: x))
    yield patching(v, "the step size is exp(x) instead of softplus(x)", torch_patches.step_size(torch.exp))
    flip = lambda name, x: x[:, ::-1].copy() if name.endswith("conv.weight") else None  # noqa: E731
    yield "the taps of the convolution are reversed", lambda: v.with_tensors(flip)
    yield patching(v, "there is no SiLU after the convolution", torch_patches.no_activation_after_convolution)
    swap = lambda name, x: np.roll(x, len(x) // 2, 0) if name.endswith(("in_proj.weight", "in_proj.bias")) else None  # noqa: E731
    yield "in_proj is split in another order: input and gate are swapped", lambda: v.with_tensors(swap)
    yield "B and C are swapped", lambda: v.with_tensors(functools.partial(_swapped_bc, v.model))
    if any(block.mamba.inner_norms for block in blocks_with(v.model, "mamba")):
        yield "the norms of step size, B and C are missing", lambda: v.with_options("mamba", inner_norms=False)
    if mixes(v, "mamba2"):
        yield patching(v, "the gate comes after the norm: norm(x) silu(z)", torch_patches.norm_before_gate)
        if any(block.mamba.n_groups > 1 for block in blocks_with(v.model, "mamba2")):
            yield patching(v, "the gated norm is over all groups together", torch_patches.one_norm_group)


def _swapped_bc(model: config.Model, name: str, x: np.ndarray) -> np.ndarray | None:
    """B and C are halves of `bc_proj` and `bc_conv` in Mamba-2, and the last 2 P rows of `x_proj` in Mamba."""
    if ".bc_proj." in name or ".bc_conv." in name:
        return np.roll(x, len(x) // 2, 0)
    if name.endswith("mixer.x_proj.weight"):
        layer = int(name.split(".")[1])
        p = model.halves(model.pattern[layer % len(model.pattern)]).mixer.mamba.d_state
        return np.concatenate([x[: -2 * p], x[-p:], x[-2 * p : -p]])
    return None
