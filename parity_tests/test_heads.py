"""Value, reward and classification heads in both frameworks, float64; the last token of a document is never padding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxlm import config
from jaxlm.convert import native
from jaxlm.errors import UserError
from jaxlm.models import decoder as jax_decoder
from jaxlm.numerics import Policy as JaxPolicy
from jaxlm.ops import pooling as jax_pooling
from parity_tests import pairs
from parity_tests.tolerances import FLOAT64
from torch_ref.models import decoder as torch_decoder
from torch_ref.numerics import Policy as TorchPolicy
from torch_ref.ops import pooling as torch_pooling

DOCUMENTS = 4  # one more than a row of `pairs.packed_batch` has
MODELS: dict[str, dict[str, Any]] = {
    "value": {"head": "value"},
    "verifier": {"head": "verifier"},
    "reward": {"head": "reward"},
    "classes": {"head": "classes", "classes": 5},
    "classes, mean": {"head": "classes", "classes": 5, "pooling": "mean"},
}
OF_TOKENS = ("value", "verifier")
CFG = {"n_layers": 2, "tie_embeddings": False, "biases": ("head",)}
JAX64 = JaxPolicy(np.dtype("float64"), np.dtype("float64"), "highest")
LAST_TOKEN = torch_pooling.last_token
TORCH64 = TorchPolicy(torch.float64, torch.float64)


def both(name: str, rng: np.random.Generator, **changes: Any) -> tuple[Any, Any, Any]:
    """A model in JAX, its parameters, and its mirror with them."""
    cfg = pairs.model(**(CFG | MODELS[name] | changes))
    ours = jax_decoder.Decoder(cfg, JAX64)
    params = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape), jax_decoder.abstract_params(ours)[0])
    mirror = torch_decoder.Decoder(cfg, TORCH64)
    mirror.load_state_dict({key: torch.tensor(x) for key, x in native.to_torch(params, cfg)}, strict=True)
    return ours, params, mirror


def places(batch: pairs.Arrays) -> list[np.ndarray]:
    return [batch[name] for name in ("tokens", "positions", "segments")]


def of_documents(cfg: config.Model) -> bool:
    return cfg.head not in OF_TOKENS


@functools.partial(jax.jit, static_argnums=0)
def apply(ours: Any, params: Any, *inputs: Any) -> Any:
    """Scores of tokens with the cache after them, or of documents and which there are."""
    if not of_documents(ours.config):
        return ours.apply({"params": params}, *inputs)
    return ours.apply({"params": params}, *inputs, DOCUMENTS, method="score_documents")


def torch_apply(mirror: Any, inputs: Any) -> Any:
    tensors = [torch.tensor(x) for x in inputs]
    return mirror.score_documents(*tensors, DOCUMENTS) if of_documents(mirror.config) else mirror(*tensors)


@functools.partial(jax.jit, static_argnums=0)
def jax_outputs(ours: Any, params: Any, batch: Any, weights: Any) -> Any:
    """Scores, and the gradients of their weighted sum."""

    def loss(params: Any) -> Any:
        scores, _ = apply(ours, params, *batch)
        return (scores * weights).sum(), scores

    return jax.grad(loss, has_aux=True)(params)


def check_same(ours: Any, params: Any, mirror: Any, batch: pairs.Arrays, rng: np.random.Generator) -> None:
    inputs = places(batch)
    theirs, _ = torch_apply(mirror, inputs)
    weights = rng.standard_normal(tuple(theirs.shape))
    gradients, scores = jax_outputs(ours, params, inputs, weights)
    FLOAT64.check(pairs.error(theirs.detach().numpy(), np.asarray(scores)), "scores")
    (theirs * torch.tensor(weights)).sum().backward()
    found = {name: np.asarray(p.grad) for name, p in mirror.named_parameters()}
    wanted = {name: np.asarray(x) for name, x in native.to_torch(gradients, ours.config)}
    for name, distance, _ in pairs.differences(found, wanted):
        FLOAT64.check(distance, f"gradient of {name}")


@pytest.mark.parametrize("name", MODELS)
def test_scores_and_gradients(name: str, rng: np.random.Generator) -> None:
    ours, params, mirror = both(name, rng)
    check_same(ours, params, mirror, pairs.packed_batch(ours.config, rng, 96), rng)


def test_layernorm_trunk_with_biases(rng: np.random.Generator) -> None:
    """The trunk is any decoder: GPT-2's, tied, scanned."""
    options = {"norm": "layernorm", "positions": "learned", "biases": ("qkv", "mlp"), "tie_embeddings": True}
    ours, params, mirror = both("reward", rng, layer_loop="scan", **options)
    check_same(ours, params, mirror, pairs.packed_batch(ours.config, rng, 96), rng)


@pytest.mark.parametrize("name", MODELS)
def test_padding_and_neighbours_change_nothing(name: str, rng: np.random.Generator) -> None:
    """A document alone, padded left, padded right, and packed between others has the same score."""
    ours, params, mirror = both(name, rng)
    a, b = (rng.integers(0, 97, length, dtype=np.int32) for length in (11, 7))
    left, right, packed = np.zeros((3, 3, 24), np.int32)
    for row, pieces in ((left, [(13, a, 1)]), (right, [(0, a, 1)]), (packed, [(2, b, 1), (9, a, 2)])):
        for start, tokens, segment in pieces:
            row[:, start : start + len(tokens)] = tokens, np.arange(len(tokens)), np.full(len(tokens), segment)
    rows = np.stack([left, right, packed]).swapaxes(0, 1)
    rows[0][rows[2] == 0] = 96  # what stands at padding is of no account
    alone, _ = apply(ours, params, *np.stack([a, np.arange(11), np.ones(11)])[:, None].astype(np.int32))
    scores, shown = apply(ours, params, *rows)
    if name in OF_TOKENS:
        found = [scores[0, 13:], scores[1, :11], scores[2, 9:20]]
        assert not np.any(np.asarray(scores)[rows[2] == 0])
        wanted = alone[0]
    else:
        assert shown.tolist() == [[True, False, False, False]] * 2 + [[True, True, False, False]]
        assert not np.any(np.asarray(scores)[~np.asarray(shown)])
        found, wanted = [scores[0, 0], scores[1, 0], scores[2, 1]], alone[0, 0]
    theirs, _ = torch_apply(mirror, rows)
    FLOAT64.check(pairs.error(theirs.detach().numpy(), np.asarray(scores)), "torch")
    for one, how in zip(found, ("left", "right", "packed"), strict=True):
        FLOAT64.check(pairs.error(np.asarray(one), np.asarray(wanted)), how)


def test_values_with_a_cache_are_those_without(rng: np.random.Generator) -> None:
    ours, params, mirror = both("value", rng)
    tokens = rng.integers(0, 97, (2, 9), dtype=np.int32)
    positions, ones = np.tile(np.arange(9, dtype=np.int32), (2, 1)), np.ones((2, 9), np.int32)
    whole, _ = apply(ours, params, tokens, positions, ones)
    cache, theirs = jax_decoder.init_cache(ours, 2, 9), torch_decoder.init_cache(mirror, 2, 9)
    for part in (slice(0, 5), *(slice(i, i + 1) for i in range(5, 9))):
        inputs = [np.ascontiguousarray(x[:, part]) for x in (tokens, positions, ones)]
        values, cache = apply(ours, params, *inputs, cache)
        other, theirs = mirror(*map(torch.tensor, inputs), theirs)
        FLOAT64.check(pairs.error(np.asarray(values), np.asarray(whole[:, part])), f"cached {part}")
        FLOAT64.check(pairs.error(other.detach().numpy(), np.asarray(values)), f"torch {part}")


def test_the_score_takes_the_place_of_the_output_matrix(rng: np.random.Generator) -> None:
    """All other parameters have the names of a language model; the way to torch_ref and back is bit for bit."""
    ours, params, _ = both("classes", rng)
    language = jax_decoder.Decoder(pairs.model(**CFG), JAX64)
    assert params.keys() == jax_decoder.abstract_params(language)[0].keys() - {"head"} | {"score"}
    named = dict(native.to_torch(params, ours.config))
    assert named["score.weight"].shape == (5, 32) and named["score.bias"].shape == (5,)
    jax.tree.map(np.testing.assert_array_equal, native.from_torch(named, ours.config), params)
    with pytest.raises(UserError, match=r"1 tensor of another shape: score.bias \[4\] for \[5\]"):
        native.from_torch(named | {"score.bias": np.zeros(4)}, ours.config)


@pytest.mark.parametrize("pool", ["last_token", "mean"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pooling_in_narrow_dtypes(pool: str, dtype: str, rng: np.random.Generator) -> None:
    """The last token is copied; a mean is summed in float32 and rounded once, by both alike."""
    batch = pairs.packed_batch(pairs.model(), rng, 130)
    x = rng.standard_normal((2, 130, 6)).astype(np.float32)
    ours = getattr(jax_pooling, pool)(jnp.asarray(x, dtype), jnp.asarray(batch["segments"]), DOCUMENTS)
    theirs = getattr(torch_pooling, pool)(
        torch.tensor(x).to(getattr(torch, dtype)), torch.tensor(batch["segments"]), DOCUMENTS
    )
    assert (str(ours.dtype), theirs.dtype) == (dtype, getattr(torch, dtype))
    exact = pool == "last_token"
    rounding = {"float32": 1e-6, "bfloat16": 2**-8}[dtype]
    np.testing.assert_allclose(
        np.asarray(ours, np.float32), theirs.float().numpy(), rtol=0 if exact else rounding, atol=0 if exact else 1e-7
    )


def row_end(x: torch.Tensor, segments: torch.Tensor, documents: int) -> torch.Tensor:
    """The fault of S2-32: the last position of the row, padding or not."""
    return x[:, -1:].expand(-1, documents, -1)


def first_token(x: torch.Tensor, segments: torch.Tensor, documents: int) -> torch.Tensor:
    return LAST_TOKEN(x.flip(1), segments.flip(1), documents)


def mean_of_the_row(x: torch.Tensor, segments: torch.Tensor, documents: int) -> torch.Tensor:
    return x.mean(1, keepdim=True).expand(-1, documents, -1)


@pytest.mark.parametrize("fault", [row_end, first_token, mean_of_the_row])
def test_a_planted_fault_is_seen(
    fault: Callable[..., torch.Tensor], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "classes, mean" if fault is mean_of_the_row else "reward"
    ours, params, mirror = both(name, rng)
    batch = pairs.packed_batch(ours.config, rng, 96)
    monkeypatch.setattr(torch_decoder.pooling, "mean" if "mean" in name else "last_token", fault)
    with pytest.raises(AssertionError, match="scores"):
        check_same(ours, params, mirror, batch, rng)
