"""Rung 5: updates. Each framework steps its own optimiser from the same weights, on the same batches, in float64.

What is compared is what a step changes: parameter differences, first and second moments, and the metrics. A bound on
the parameters themselves would hide an error as small as the learning rate. Each planted fault is seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from jaxlm import config
from jaxlm.recipes import pretrain
from jaxlm.run.metrics import plain
from jaxlm.train import optim as jax_optim
from jaxlm.train import step as jax_step
from parity_tests import pairs
from parity_tests.tolerances import COSINE64, FLOAT64
from torch_ref.recipes import pretrain as torch_pretrain
from torch_ref.train import optim as torch_optim
from torch_ref.train import step as torch_step

STEPS = 20
# Every kind of parameter: kernels, embeddings, norm scales and biases, biases of linear maps and of the head.
CFG = pairs.model(
    d_model=16,
    n_layers=2,
    d_ff=24,
    norm="layernorm",
    activation="gelu",
    qk_norm=True,
    biases=("qkv", "attention_out", "mlp", "head"),
    tie_embeddings=False,
)
BASE = {"steps": STEPS, "batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 4, "final_lr_fraction": 0.05}
CASES: dict[str, dict[str, Any]] = {
    "cosine, clip active": {"clip_norm": 0.05},
    "linear, no clip": {"schedule": "linear", "clip_norm": 0.0},
    "wsd, clip idle, microbatches": {"schedule": "wsd", "decay_fraction": 0.5, "clip_norm": 1e3, "microbatches": 4},
    "constant, all else": {
        "schedule": "constant",
        "warmup_steps": 0,
        "clip_norm": 0.05,
        "microbatches": 4,
        "z_loss": 1e-2,
        "label_smoothing": 0.1,
        "beta1": 0.8,
        "beta2": 0.9,
        "eps": 1e-5,
        "weight_decay": 0.5,
    },
}


@dataclasses.dataclass
class Trace:
    """What a run of updates did: metrics of each, and what had changed after some of them, by parameter."""

    metrics: list[dict[str, Any]]
    changes: dict[int, dict[str, pairs.Arrays]]


def run_jax(pair: pairs.Pair, train: config.Train, batches: Sequence[pairs.Arrays]) -> Trace:
    """Updates by jaxlm."""
    optimizer = jax_optim.make_optimizer(train)
    options: dict[str, Any] = {"seed": 0, "matmul": "highest", "model": pair.jax.config}
    step = jax.jit(jax_step.make_step(pretrain.loss_fn(pair.jax, train), optimizer, train, **options))
    state, trace = jax_step.init_state(pair.params, optimizer), Trace([], {})
    for number, batch in enumerate(batches, start=1):
        state, metrics = step(state, {}, batch)
        trace.metrics.append(plain(metrics))
        if number in (1, len(batches)):
            trees = {
                "update": jax.tree.map(jnp.subtract, state.params, pair.params),
                "first moment": optax.tree.get(state.opt_state, "mu"),
                "second moment": optax.tree.get(state.opt_state, "nu"),
            }
            trace.changes[number] = {kind: pairs.torch_names(tree, pair.jax) for kind, tree in trees.items()}
    return trace


Plant = Callable[[torch.optim.AdamW], torch.optim.AdamW]


def run_torch(
    pair: pairs.Pair,
    train: config.Train,
    batches: Sequence[pairs.Arrays],
    plant: Plant = lambda optimizer: optimizer,
    wrap: Callable[[torch_step.LossFn], torch_step.LossFn] = lambda loss_fn: loss_fn,
) -> Trace:
    """Updates by torch_ref, of `pair.torch` in place; `plant` and `wrap` may break something."""
    optimizer = plant(torch_optim.make_optimizer(pair.torch, train))
    step = torch_step.make_step(
        wrap(torch_pretrain.loss_fn(pair.torch, train)), optimizer, train, seed=0, decoder=pair.torch
    )
    state, trace = torch_step.TrainState(), Trace([], {})
    before = {name: parameter.detach().clone() for name, parameter in pair.torch.named_parameters()}
    for number, batch in enumerate(batches, start=1):
        state, metrics = step(state, pairs.tensors(batch))
        trace.metrics.append(plain(metrics))
        if number in (1, len(batches)):
            parameters = dict(pair.torch.named_parameters())
            tensors = {"update": {name: (p - before[name]).detach() for name, p in parameters.items()}}
            for kind, key in (("first moment", "exp_avg"), ("second moment", "exp_avg_sq")):
                tensors[kind] = {name: optimizer.state[p][key] for name, p in parameters.items()}
            trace.changes[number] = {
                kind: {name: tensor.double().numpy().copy() for name, tensor in named.items()}
                for kind, named in tensors.items()
            }
    return trace


def check_same(ours: Trace, theirs: Trace) -> None:
    """Metrics and changes agree to float64's rounding."""
    for number, (mine, other) in enumerate(zip(ours.metrics, theirs.metrics, strict=True), start=1):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            np.testing.assert_equal(np.isfinite(mine[name]), np.isfinite(value))
            if np.all(np.isfinite(value)):
                FLOAT64.check(pairs.error(np.array(mine[name]), np.array(value)), f"{name} of step {number}")
    check_changes(ours, theirs)


def check_changes(ours: Trace, theirs: Trace) -> None:
    """Updates and moments alone."""
    assert ours.changes.keys() == theirs.changes.keys()
    for number, changes in theirs.changes.items():
        for kind, arrays in changes.items():
            for name, distance, angle in pairs.differences(ours.changes[number][kind], arrays):
                FLOAT64.check(distance, f"{kind} of {name} after {number}")
                COSINE64.check(angle, f"angle of the {kind} of {name} after {number}")


def make_batches(rng: np.random.Generator, count: int = STEPS) -> list[pairs.Arrays]:
    """Batches of eight packed and padded rows, with different numbers of targets in each row."""
    return [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in ([pairs.packed_batch(CFG, rng, 80) for _ in range(4)] for _ in range(count))
    ]


@pytest.fixture(scope="module")
def values() -> pairs.Params:
    return pairs.random_params(CFG, np.random.default_rng(3))


@pytest.fixture(scope="module")
def batches() -> list[pairs.Arrays]:
    return make_batches(np.random.default_rng(4))


@pytest.mark.parametrize("case", CASES)
def test_updates(case: str, values: pairs.Params, batches: list[pairs.Arrays]) -> None:
    """One update and twenty, with each schedule, clip active and idle, one microbatch and four, and every loss."""
    train, pair = config.Train(**{**BASE, **CASES[case]}), pairs.pair(CFG, values)
    theirs, ours = run_jax(pair, train, batches), run_torch(pair, train, batches)
    check_same(ours, theirs)
    clipped = [0 < train.clip_norm < metrics["grad_norm"] for metrics in theirs.metrics]
    assert all(clipped) == any(clipped) == ("active" in case or "all else" in case)


def test_the_same_parameters_decay(values: pairs.Params) -> None:
    pair = pairs.pair(CFG, values)
    mask = jax_optim.decay_mask(pair.params)
    tree = jax.tree.map(lambda leaf, decays: np.full(leaf.shape, decays, np.float64), pair.params, mask)
    theirs = {name: bool(array.all()) for name, array in pairs.torch_names(tree, pair.jax).items()}
    assert torch_optim.decay_mask(pair.torch) == theirs
    assert {name.rpartition(".")[2] for name, decays in theirs.items() if not decays} == {"weight", "bias"}


@pytest.mark.parametrize("run", [run_jax, run_torch])
def test_microbatches_make_the_update_of_the_large_batch(
    run: Callable[..., Trace], values: pairs.Params, batches: list[pairs.Arrays]
) -> None:
    traces = [
        run(pairs.pair(CFG, values), config.Train(**{**BASE, "z_loss": 1e-2, "microbatches": m}), batches[:3])
        for m in (1, 4)
    ]
    check_same(*traces)


def test_both_skip_the_step_that_is_not_finite(values: pairs.Params, batches: list[pairs.Arrays]) -> None:
    """Two NaN weights in a row: nothing changes but the counter, and what follows is the run without these batches."""
    train = config.Train(**{**BASE, "microbatches": 4})
    weights = batches[0]["weights"].copy()
    weights[5, 30] = np.nan
    bad = batches[0] | {"weights": weights}
    disturbed = [*batches[:3], bad, bad, *batches[3:6]]
    theirs, ours = (
        run_jax(pairs.pair(CFG, values), train, disturbed),
        run_torch(pairs.pair(CFG, values), train, disturbed),
    )
    assert [metrics["skipped"] for metrics in ours.metrics] == [0, 0, 0, 1, 2, 0, 0, 0]
    check_same(ours, theirs)
    alone = run_torch(pairs.pair(CFG, values), train, batches[:6])
    for kind, arrays in alone.changes[6].items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(ours.changes[8][kind][name], array)


class Textbook(torch.optim.AdamW):
    """Algorithm 2 of Loshchilov & Hutter 2019, word for word, with two of its usual mistakes to choose from."""

    def __init__(self, optimizer: torch.optim.AdamW, *, eps_inside: bool = False, correct: bool = True) -> None:
        super().__init__(optimizer.param_groups)
        self.state, self.eps_inside, self.correct = optimizer.state, eps_inside, correct

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            (b1, b2), rate = group["betas"], group["lr"]
            for p in group["params"]:
                state = self.state[p]
                state["step"] += 1
                state["exp_avg"].mul_(b1).add_((1 - b1) * p.grad)
                state["exp_avg_sq"].mul_(b2).add_((1 - b2) * p.grad**2)
                t = int(state["step"])
                c1, c2 = (1 - b1**t, 1 - b2**t) if self.correct else (1, 1)
                m, v = state["exp_avg"] / c1, state["exp_avg_sq"] / c2
                root = (v + group["eps"]).sqrt() if self.eps_inside else v.sqrt() + group["eps"]
                p.sub_(rate * (m / root + group["weight_decay"] * p))


def decay_of_all(optimizer: torch.optim.AdamW) -> torch.optim.AdamW:
    for group in optimizer.param_groups:
        group["weight_decay"] = max(group["weight_decay"] for group in optimizer.param_groups)
    return optimizer


def clip_without_epsilon(optimizer: torch.optim.AdamW) -> torch.optim.AdamW:
    """The gradients, clipped, have a norm of exactly `clip_norm`."""

    def rescale(*_: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        scale = CASES["cosine, clip active"]["clip_norm"] / torch.nn.utils.get_total_norm(grads)
        for grad in grads:
            grad.mul_(scale)

    optimizer.register_step_pre_hook(rescale)
    return optimizer


def rate_of_the_step_before(optimizer: torch.optim.AdamW) -> torch.optim.AdamW:
    def late(*_: Any) -> None:
        train = config.Train(**{**BASE, **CASES["cosine, clip active"]})
        for group in optimizer.param_groups:
            group["lr"] = float(torch_optim.learning_rate(train, torch_optim.updates_made(optimizer) - 1))

    optimizer.register_step_pre_hook(late)
    return optimizer


FAULTS: dict[str, tuple[Plant, str]] = {
    "decay of norms": (decay_of_all, "update of .*norm.*"),
    "eps inside the root": (lambda optimizer: Textbook(optimizer, eps_inside=True), "update of .*"),
    "no bias correction": (lambda optimizer: Textbook(optimizer, correct=False), "update of .*"),
    "clip without epsilon": (clip_without_epsilon, "update of .*"),
    "learning rate off by one": (rate_of_the_step_before, "update of .*"),
}


@pytest.fixture(scope="module")
def truth(values: pairs.Params, batches: list[pairs.Arrays]) -> tuple[config.Train, Trace]:
    """Three updates by jaxlm."""
    train = config.Train(**{**BASE, **CASES["cosine, clip active"]})
    return train, run_jax(pairs.pair(CFG, values), train, batches[:3])


def test_the_textbook_agrees(
    truth: tuple[config.Train, Trace], values: pairs.Params, batches: list[pairs.Arrays]
) -> None:
    """A third implementation, without a fault."""
    train, right = truth
    check_same(run_torch(pairs.pair(CFG, values), train, batches[:3], Textbook), right)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(
    fault: str, truth: tuple[config.Train, Trace], values: pairs.Params, batches: list[pairs.Arrays]
) -> None:
    (train, right), (plant, where) = truth, FAULTS[fault]
    wrong = run_torch(pairs.pair(CFG, values), train, batches[:3], plant)
    with pytest.raises(AssertionError, match=f"^{where} after 1: error"):
        check_changes(wrong, right)


def test_the_mean_of_means_is_seen(values: pairs.Params, batches: list[pairs.Arrays]) -> None:
    """Microbatches with different numbers of targets, each divided by its own."""
    train = config.Train(**{**BASE, "microbatches": 4})

    def own_mean(loss_fn: torch_step.LossFn) -> torch_step.LossFn:
        def compute(batch: torch_step.Batch) -> tuple[torch.Tensor, torch_step.Sums]:
            loss, sums = loss_fn(batch)
            return loss / sums["weight"] * batches[0]["weights"].sum() / 4, sums

        return compute

    right = run_jax(pairs.pair(CFG, values), train, batches[:1])
    wrong = run_torch(pairs.pair(CFG, values), train, batches[:1], wrap=own_mean)
    with pytest.raises(AssertionError, match=r"^update of .* after 1: error"):
        check_changes(wrong, right)


def test_the_norm_of_a_large_gradient_is_exact() -> None:
    """Two million equal float32 numbers: a sum that adds one after the other rounds the same way each time."""
    large = torch.nn.Parameter(torch.zeros(2_000_000))

    def loss_fn(batch: torch_step.Batch) -> tuple[torch.Tensor, torch_step.Sums]:
        loss = 1e-4 * large.sum()
        return loss, {"loss": loss.detach(), "weight": batch["weights"].sum()}

    train = config.Train(**BASE)
    step = torch_step.make_step(loss_fn, torch_optim.adamw([(large, True)], train), train, seed=0)
    _, metrics = step(torch_step.TrainState(), {"weights": torch.ones(1, 1)})
    assert abs(metrics["grad_norm"].item() / (1e-4 * 2_000_000**0.5) - 1) < 1e-6
