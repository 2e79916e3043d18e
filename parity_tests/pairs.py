"""One model in both frameworks with the same weights, the batch it is shown, and how two results are compared."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxlm import config
from jaxlm.convert.native import to_torch
from jaxlm.models import decoder as jax_decoder
from jaxlm.numerics import Policy as JaxPolicy
from jaxlm.objectives import lm as jax_lm
from jaxlm.train import expert_balance as jax_balance
from torch_ref.models import decoder as torch_decoder
from torch_ref.numerics import Policy as TorchPolicy
from torch_ref.objectives import lm as torch_lm
from torch_ref.train import expert_balance as torch_balance

Arrays = dict[str, np.ndarray]
Params = jax_decoder.Params

BASE = {
    "vocab_size": 97,
    "d_model": 32,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 40,
    "max_seq_len": 512,
    "layer_loop": "scan",
    "attention_impl": "xla",  # compiles fastest; the options of the tests have the others
}
SMALL = 1e-5  # a tensor this much smaller than all tensors together is judged against their norm: see `error`
ZERO = 1e-14  # the norm of a float64 gradient that is zero in exact arithmetic lies below this


def model(**options: Any) -> config.Model:
    """The base model with these options; sections may be given as dicts."""
    sections = {"rope_scaling": config.RopeScaling, "moe": config.MoE, "mamba": config.Mamba}
    made = {name: sections[name](**value) if isinstance(value, dict) else value for name, value in options.items()}
    return config.Model(**{**BASE, **made})


@dataclass(frozen=True)
class Pair:
    """The same decoder in both frameworks."""

    jax: jax_decoder.Decoder
    params: Params
    torch: torch_decoder.Decoder


@dataclass(frozen=True)
class Result:
    """What a framework made of a batch, widened to float64; gradients by the name of their parameter."""

    logits: np.ndarray
    sums: Arrays
    gradients: Arrays


def pair(cfg: config.Model, values: Params, params: str = "float64", compute: str = "float64") -> Pair:
    """Both decoders with these values."""
    numerics = config.Numerics(params=params, compute=compute, matmul="highest")
    values = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, jnp.dtype(params))), values)
    mirror = torch_decoder.Decoder(cfg, TorchPolicy.from_config(numerics))
    mirror.load_state_dict(state_dict(values, cfg), strict=True)
    return Pair(jax_decoder.Decoder(cfg, JaxPolicy.from_config(numerics)), values, mirror.eval())


def random_params(cfg: config.Model, rng: np.random.Generator) -> Params:
    """Values of their own in every leaf, norms and biases too, so that no swap can hide; activations of order 1.

    They are float32, so that every dtype from there on holds the same model.
    """

    def leaf(path: tuple, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        values = rng.standard_normal(shape.shape).astype(np.float32)
        kind = path[-1].key
        if kind == "scale":
            return 1 + np.float32(0.3) * values
        return values * np.float32(1.2 * cfg.d_model**-0.5 if kind == "kernel" else 0.4)

    return jax.tree_util.tree_map_with_path(leaf, jax_decoder.abstract_params(jax_decoder.Decoder(cfg))[0])


def state_dict(params: Params, cfg: config.Model) -> dict[str, torch.Tensor]:
    """The converted parameters as tensors."""
    return {name: torch.tensor(np.asarray(array)) for name, array in to_torch(params, cfg)}


def packed_batch(cfg: config.Model, rng: np.random.Generator, t: int = 512) -> Arrays:
    """Two packed rows: padding on both sides and three documents; padding on the right and two documents."""
    segments, positions = np.zeros((2, t), np.int32), np.zeros((2, t), np.int32)
    for row, (start, documents) in enumerate([(13, (t // 3 - 1, 1, t // 2)), (0, (t // 5, t // 2 + 5))]):
        for number, length in enumerate(documents, start=1):
            segments[row, start : start + length] = number
            positions[row, start : start + length] = np.arange(length)
            start += length
        assert start < t, "too short for these documents"
    tokens = rng.integers(0, cfg.vocab_size, (2, t), dtype=np.int32)
    targets = rng.integers(0, cfg.vocab_size, (2, t), dtype=np.int32)
    tokens[:, 17::29] = cfg.vocab_size - 1
    targets[:, 19::31] = cfg.vocab_size - 1
    weights = np.where(segments > 0, rng.choice([0.0, 0.5, 1.0], (2, t)), 0.0).astype(np.float32)
    return {"tokens": tokens, "positions": positions, "segments": segments, "targets": targets, "weights": weights}


def run_jax(decoder: jax_decoder.Decoder, params: Params, batch: Arrays, **options: float) -> Result:
    """Logits, loss and gradients of every parameter."""
    sums, logits, gradients = _run_jax(decoder, tuple(options.items()), params, batch)
    return Result(_wide(logits), {k: _wide(v) for k, v in sums._asdict().items()}, torch_names(gradients, decoder))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_jax(decoder: jax_decoder.Decoder, options: tuple, params: Params, batch: Any) -> Any:
    places = batch["tokens"], batch["positions"], batch["segments"]

    def loss(params: Params) -> Any:
        (hidden, _), told = decoder.apply({"params": params}, *places, method="hidden", mutable=["routing"])
        kernel, bias = decoder.apply({"params": params}, method="unembedding")
        sums = jax_lm.lm_loss(hidden, kernel, bias, batch["targets"], batch["weights"], block=300, **dict(options))
        logits = decoder.apply({"params": params}, hidden, method="unembed")  # as `__call__`, without the layers again
        auxiliary = jax_balance.collect(told["routing"], decoder.config).loss if decoder.config.moes else 0
        return sums.loss / sums.weight + auxiliary, (sums, logits)

    gradients, (sums, logits) = jax.grad(loss, has_aux=True)(params)
    return sums, logits, gradients


def run_torch(decoder: torch_decoder.Decoder, batch: Arrays, **options: float) -> Result:
    """Logits, loss and gradients of every parameter."""
    arrays = tensors(batch)
    places = arrays["tokens"], arrays["positions"], arrays["segments"]
    decoder.zero_grad()
    hidden, _ = decoder.hidden(*places)
    sums = torch_lm.lm_loss(hidden, *decoder.unembedding(), arrays["targets"], arrays["weights"], block=300, **options)
    auxiliary = torch_balance.collect(decoder).loss if decoder.config.moes else 0
    (sums.loss / sums.weight + auxiliary).backward()
    with torch.no_grad():
        logits, _ = decoder(*places)
    gradients = {
        name: np.zeros(parameter.shape) if parameter.grad is None else _wide(parameter.grad)
        for name, parameter in decoder.named_parameters()
    }
    return Result(_wide(logits), {k: _wide(v) for k, v in sums._asdict().items()}, gradients)


def torch_names(tree: Params, decoder: jax_decoder.Decoder) -> Arrays:
    """A tree shaped like the parameters under the names and in the shapes of torch, in float64."""
    return {name: _wide(array) for name, array in to_torch(tree, decoder.config)}


def tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The same values in torch."""
    return {name: torch.tensor(np.asarray(array)) for name, array in arrays.items()}


def error(a: np.ndarray, b: np.ndarray, scale: float = 0.0) -> float:
    """Norm of the difference, relative to `b`, or to `scale` when `b` is smaller than that.

    Some gradients are zero in exact arithmetic (the bias of the keys without rotation: softmax ignores it) and noise in
    any other, so a relative error of their own says nothing.
    """
    assert a.shape == b.shape, f"shapes {a.shape} and {b.shape}"
    size = max(float(np.linalg.norm(b)), scale)
    difference = float(np.linalg.norm(a - b))
    return difference / size if size else difference


def cosine_distance(a: np.ndarray, b: np.ndarray) -> float:
    """1 - cos of the angle between two tensors, from their unit vectors' difference: exact near zero."""
    a, b = (x / np.linalg.norm(x) for x in (a, b))
    return float(np.sum((a - b) ** 2)) / 2


def differences(a: Arrays, b: Arrays) -> Iterator[tuple[str, float, float]]:
    """Name, error and cosine distance (0 for one judged by the scale of all) of every tensor of `a` against `b`."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    scale = SMALL * float(np.sqrt(sum(np.sum(x**2) for x in b.values())))
    for name, x in b.items():
        angle = cosine_distance(a[name], x) if np.linalg.norm(x) > scale and np.any(a[name]) else 0.0
        yield name, error(a[name], x, scale), angle


def _wide(x: Any) -> np.ndarray:
    if isinstance(x, torch.Tensor):
        return x.detach().double().numpy()
    return np.asarray(x, np.float64)
