"""Mixture of experts: routing of both frameworks choice for choice, and updates that move the selection bias."""

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
from jaxlm.ops.moe import router as jax_router
from jaxlm.train.optim import decay_mask
from parity_tests import pairs
from parity_tests.test_optimiser import Trace, check_changes, check_same, run_jax, run_torch
from parity_tests.tolerances import FLOAT64
from torch_ref.ops.moe import router as torch_router
from torch_ref.train import optim as torch_optim
from torch_ref.train import step as torch_step

T, E = 400, 12
ROUTES: dict[str, dict[str, Any]] = {
    "softmax": {"top_k": 3},
    "switch": {"top_k": 1, "renormalize": False},
    "sigmoid": {"top_k": 4, "router": "sigmoid", "scale": 2.5},
    "groups": {"top_k": 4, "router": "sigmoid", "n_groups": 4, "top_groups": 2},
    "all": {"top_k": E, "scale": 0.5},
}


def jax_routing(logits: Any, noise: Any, normal: Any, bias: Any, real: Any, **options: Any) -> Any:
    logits = jax_router.add_noise(logits, noise, normal)
    chosen = jax_router.mask_padding(jax_router.route(logits, bias, **options), real)
    kept = jax_router.drop_overflow(chosen, 0.9)
    return kept, jax_router.balance(logits, chosen, kept, real)


def torch_routing(logits: Any, noise: Any, normal: Any, bias: Any, real: Any, **options: Any) -> Any:
    logits = torch_router.add_noise(logits, noise, normal)
    chosen = torch_router.mask_padding(torch_router.route(logits, bias, **options), real)
    kept = torch_router.drop_overflow(chosen, 0.9)
    return kept, torch_router.balance(logits, chosen, kept, real)


def objective(routing: Any, terms: Any, mix: Any) -> Any:
    """One number that everything with a gradient is part of."""
    return (routing.weights * mix).sum() + terms.balance + 2 * terms.importance + 3 * terms.z + 5 * terms.entropy


@pytest.mark.parametrize("name", ROUTES)
def test_routing(name: str, rng: np.random.Generator) -> None:
    """Noise, choice, drops and terms, and their gradients; a quarter of the tokens is full of ties."""
    options = ROUTES[name]
    logits, noise, normal = rng.standard_normal((3, T, E)) * np.array([1.5, 8.0, 1.0])[:, None, None]
    logits[::4] = np.round(logits[::4])
    noise[::4], normal[::4], bias = 0, 0, rng.integers(0, 3, E) / 5 * (name != "softmax")
    real, mix = np.arange(T) % 7 != 0, rng.standard_normal((T, options["top_k"]))

    def total(*inputs: Any) -> Any:
        found = jax_routing(*inputs, jnp.asarray(real), **options)
        return objective(*found, mix), found

    inputs = [torch.tensor(x, requires_grad=True) for x in (logits, noise, normal, bias)]
    ours = torch_routing(*inputs, torch.tensor(real), **options)
    objective(*ours, torch.tensor(mix)).backward()
    run = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))
    gradients, theirs = run(*map(jnp.asarray, (logits, noise, normal, bias)))
    np.testing.assert_array_equal(ours[0].experts, theirs[0].experts)
    assert (np.asarray(theirs[0].experts)[~real] == E).all()
    for part, mine, other in zip(("routing", "balance"), ours, theirs, strict=True):
        for field in mine._fields:
            a, b = getattr(mine, field).detach().double().numpy(), np.asarray(getattr(other, field), float)
            FLOAT64.check(pairs.error(a, b), f"{part}.{field}")
    for i, (mine, other) in enumerate(zip(inputs, gradients, strict=False)):
        FLOAT64.check(pairs.error(mine.grad.numpy(), np.asarray(other)), f"gradient {i}")
    assert inputs[3].grad is None


def ties_to_the_higher(values: torch.Tensor, k: int) -> torch.Tensor:
    flipped = torch.sort(values.flip(-1), dim=-1, descending=True, stable=True).indices[..., :k]
    return values.shape[-1] - 1 - flipped


def biased_weights(logits: torch.Tensor, bias: torch.Tensor, **options: Any) -> torch_router.Routing:
    right = ROUTE(logits, bias, **options)
    return right._replace(weights=right.weights + bias[right.experts])


def padding_is_routed(routing: torch_router.Routing, real: torch.Tensor) -> torch_router.Routing:
    return routing


def last_come_first(routing: torch_router.Routing, factor: float) -> torch_router.Routing:
    kept = DROP(routing._replace(experts=routing.experts.flip(0)), factor)
    return kept._replace(experts=kept.experts.flip(0))


ROUTE, DROP = torch_router.route, torch_router.drop_overflow
FAULTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "ties to the higher index": ("_top_k", ties_to_the_higher),
    "the selection bias in the weights": ("route", biased_weights),
    "padding takes places": ("mask_padding", padding_is_routed),
    "the first tokens are dropped": ("drop_overflow", last_come_first),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wrong = FAULTS[fault]
    monkeypatch.setattr(torch_router, name, wrong)
    with pytest.raises(AssertionError):
        test_routing("groups", rng)


OPTIONS = {"d_model": 16, "n_layers": 2, "d_ff": 24, "pattern": ("attention+moe(n_experts=6)", "attention+moe")}
BALANCED = {"selection_bias": True, "bias_update_rate": 0.02, "router": "sigmoid", "impl": "naive"}
TERMS = {"balance_loss": 0.01, "importance_loss": 0.1, "z_loss": 1e-2}
TRAIN = {"steps": 20, "batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 4}


@functools.cache
def updates(run: Callable[..., Trace], microbatches: int, loop: str = "unroll", **options: Any) -> Trace:
    """A few updates of a model with two kinds of mixtures, on packed rows; 12 of 80 tokens are padding."""
    moe = {**BALANCED, **options}
    cfg = pairs.model(**OPTIONS, layer_loop=loop, moe=moe, biases=("router", "experts"))
    rng = np.random.default_rng(5)
    values = pairs.random_params(cfg, rng)
    parts = [[pairs.packed_batch(cfg, rng, 80) for _ in range(4)] for _ in range(3)]
    batches = [{name: np.concatenate([part[name] for part in four]) for name in four[0]} for four in parts]
    return run(pairs.pair(cfg, values), config.Train(**TRAIN, microbatches=microbatches), batches)


@pytest.mark.parametrize(
    ("microbatches", "loop", "options"),
    [(4, "unroll", {}), (1, "scan", {"capacity_factor": 1.0, "n_shared": 1, "impl": "blocks", **TERMS})],
)
def test_updates(microbatches: int, loop: str, options: dict[str, Any]) -> None:
    """Every parameter, moment and metric after one update and three, the selection bias and the load among them."""
    theirs = updates(run_jax, microbatches, loop=loop, **options)
    check_same(updates(run_torch, microbatches, loop=loop, **options), theirs)
    for number in (1, 3):
        change = theirs.changes[number]["update"]["layers.1.ffn.router.selection_bias"]
        assert np.allclose(change / 0.02, np.round(change / 0.02)) and np.abs(change).max() > 0.01
        assert not theirs.changes[number]["first moment"]["layers.1.ffn.router.selection_bias"].any()
    last = theirs.metrics[-1]
    assert np.shape(last["expert_load"]) == (2, 8) and np.all(np.array(last["expert_load"])[0, 6:] == 0)
    assert (last["dropped"] > 0) == ("capacity_factor" in options)
    assert last["load_max"] > 1 and last["bias_range"] > 0 and 0 < last["router_entropy"] < np.log(8)


def test_microbatches_move_the_bias_once() -> None:
    """By the load of all of them together: one microbatch or four, the same bits."""
    one, four = updates(run_jax, 1), updates(run_jax, 4)
    for layer in (0, 1):
        name = f"layers.{layer}.ffn.router.selection_bias"
        for number in (1, 3):
            a, b = (trace.changes[number]["update"][name] for trace in (one, four))
            np.testing.assert_array_equal(a, b)


def test_a_bias_that_nobody_moves_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_step, "update_biases", lambda decoder, load_LE: None)
    wrong = updates.__wrapped__(run_torch, 4)
    with pytest.raises(AssertionError, match=r"update of .*selection_bias after 1"):
        check_changes(wrong, updates(run_jax, 4))


def test_the_same_parameters_decay() -> None:
    cfg = pairs.model(**OPTIONS, moe={**BALANCED, "noisy": True}, biases=("router", "experts"))
    pair = pairs.pair(cfg, pairs.random_params(cfg, np.random.default_rng(0)))
    mask = torch_optim.decay_mask(pair.torch)
    tree = jax.tree.map(lambda leaf, decays: np.full(leaf.shape, decays), pair.params, decay_mask(pair.params))
    assert mask == {name: bool(array.all()) for name, array in pairs.torch_names(tree, pair.jax).items()}
    ffn = {name.partition(".ffn.")[2] for name, decays in mask.items() if decays}
    assert {"router.weight", "router.noise.weight", "experts.down_proj.weight"} < ffn
    assert not any("bias" in name for name in ffn)
