"""What a linear map does besides its own product: an adapter beside it, a frozen kernel in four bits.

    y = x W + s (x A) B                 LoRA (Hu et al. 2021, eq. 3)
    y = m / |W + s A B| * (x W + s (x A) B)     DoRA (Liu et al. 2024, eq. 5), the norm of each output detached (4.3)

Without the collections `adapters` and `nf4` nothing of it happens. `models/lora.py` makes the first, `four_bits.py` the
second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jaxlm.numerics import wide
from jaxlm.ops import quantized
from jaxlm.ops.low_rank import low_rank

ADAPTERS, SCALES, NF4 = "adapters", "adapter_scale", "nf4"
"""Collections: what is trained, what scales it, and frozen kernels in four bits."""

VARIABLE_AXES: Mapping[str, int] = {ADAPTERS: 0, SCALES: 0, NF4: 0}
"""Along which axis the repeats of a scanned pattern lie in each collection."""


class Adapted(NamedTuple):
    """Parameters of a model of which only adapters are trained, and perhaps whole modules outside the layers."""

    adapters: Any
    base: Mapping[str, Any]
    """The collections that are frozen: `params`, `adapter_scale` and, of a base in four bits, `nf4`."""


def variables(params: Any) -> dict[str, Any]:
    """The Flax variables of a model: of its tree of parameters, or of adapters beside their base."""
    if not isinstance(params, Adapted):
        return {"params": params}
    inside, saved = split(params.adapters)
    return {**params.base, "params": {**params.base["params"], **saved}, ADAPTERS: inside}


def base_of(params: Adapted) -> Adapted:
    """The base without its adapters, as what was trained has not moved it."""
    return Adapted({}, params.base)


def split(trained: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is trained beside a base: adapters, all of which lie in the layers, and whole modules outside them."""
    inside = {name: tree for name, tree in trained.items() if name.startswith("layers")}
    return inside, {name: tree for name, tree in trained.items() if name not in inside}


def stored_kernel(module: nn.Module, shape: tuple[int, ...], inputs: int) -> Float32[Array, "..."] | None:
    """The kernel [in..., out...] of a linear map that is stored in four bits; None where it is a parameter."""
    if not module.has_variable(NF4, "codes"):
        return None
    names = [name for name in ("codes", "scales", "block_scales", "offset") if module.has_variable(NF4, name)]
    return unpacked({name: module.get_variable(NF4, name) for name in names}, shape, inputs)


def unpacked(leaves: Mapping[str, Array], shape: tuple[int, ...], inputs: int) -> Float32[Array, "..."]:
    """The kernel [in..., out...] of this shape."""
    scales = leaves["scales"]
    if "offset" in leaves:
        eight = quantized.Scales8(scales, leaves["block_scales"], leaves["offset"])
        scales = quantized.dequantize_scales(eight)
    weight = quantized.dequantize(quantized.NF4(leaves["codes"], scales))
    return jnp.moveaxis(weight, -1, 0).reshape(shape)


def adapted(module: nn.Module, x: Array, y: Array, kernel: Array, *, inputs: int, compute: Any) -> Float[Array, "..."]:
    """What a linear map gives with its adapter, if it has one.

    Args:
        x: its input, the last `inputs` axes of which the kernel takes.
        y: what the frozen kernel makes of it, without a bias.
        kernel: in the compute dtype.
    """
    if not module.has_variable(ADAPTERS, "a"):
        return y
    a, b = (module.get_variable(ADAPTERS, name).astype(compute) for name in ("a", "b"))
    scale = module.get_variable(SCALES, "scale").astype(compute)
    if module.has_variable(SCALES, "dropout") and module.has_rng("dropout"):
        rate = module.get_variable(SCALES, "dropout")
        kept = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, x.shape)
        x = jnp.where(kept, x / (1 - rate).astype(x.dtype), 0)
    y = y + scale * low_rank(x.astype(compute), a, b)
    if not module.has_variable(ADAPTERS, "magnitude"):
        return y
    magnitude = module.get_variable(ADAPTERS, "magnitude")
    norm = column_norm(kernel, a, b, scale, inputs)
    return (magnitude.astype(norm.dtype) / jax.lax.stop_gradient(norm)).astype(compute) * y


def adapted_kernel(module: nn.Module, kernel: Float[Array, "e i o"], *, compute: Any) -> Float[Array, "e i o"]:
    """The kernels of all experts with their adapters: which tokens an expert gets is known only inside the op."""
    if not module.has_variable(ADAPTERS, "a"):
        return kernel
    a, b = (module.get_variable(ADAPTERS, name).astype(compute) for name in ("a", "b"))
    scale = module.get_variable(SCALES, "scale").astype(compute)
    whole = kernel + scale * jnp.einsum("eir,ero->eio", a, b)
    if not module.has_variable(ADAPTERS, "magnitude"):
        return whole
    width = wide(compute)
    norm_EO = jnp.sqrt(jnp.sum(jnp.square(whole.astype(width)), axis=1))
    magnitude_EO = module.get_variable(ADAPTERS, "magnitude").astype(width)
    return whole * (magnitude_EO / jax.lax.stop_gradient(norm_EO)).astype(compute)[:, None]


def column_norm(kernel: Array, a: Array, b: Array, scale: Array, inputs: int) -> Array:
    """Norm over the inputs of each output of `W + s A B`, in float32 or wider."""
    width = wide(kernel.dtype)
    whole = kernel.astype(width) + scale.astype(width) * jnp.tensordot(a.astype(width), b.astype(width), axes=1)
    return jnp.sqrt(jnp.sum(jnp.square(whole), axis=tuple(range(inputs))))
