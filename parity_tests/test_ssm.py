"""Rungs 1 and 2 for state spaces: each scan of both frameworks, forward and backward, and the mixers, in float64.

Packed rows, padding, a state handed over in the middle, exact zeros across documents; each planted fault is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxlm import config
from jaxlm.models import decoder as jax_decoder
from jaxlm.models import mamba as jax_mamba
from jaxlm.ops import norm as jax_norm
from jaxlm.ops.ssm import convolution as jax_convolution
from jaxlm.ops.ssm import selective_scan as jax_selective_scan
from jaxlm.ops.ssm import ssd as jax_ssd
from jaxlm.train import optim as jax_optim
from parity_tests import pairs
from parity_tests.options import MAMBA, small
from parity_tests.test_layers import Case, check_module
from parity_tests.tolerances import FLOAT64
from torch_ref.models import decoder as torch_decoder
from torch_ref.ops import norm as torch_norm
from torch_ref.ops.ssm import convolution as torch_convolution
from torch_ref.ops.ssm import selective_scan as torch_selective_scan
from torch_ref.ops.ssm import ssd as torch_ssd
from torch_ref.train import optim as torch_optim

B, T, F, P, N, G, H, K = 2, 83, 6, 3, 4, 2, 5, 4
IMPLS = ("sequential", "chunked")


def segments(rng: np.random.Generator, t: int = T) -> np.ndarray:
    return pairs.packed_batch(pairs.model(), rng, t)["segments"]


def scan_inputs(rng: np.random.Generator, t: int = T) -> list[np.ndarray]:
    """u, dt, A, B, C, D of `selective_scan`; a step size of padding, too, is positive."""
    u, dt = rng.standard_normal((2, B, t, F))
    b, c = rng.standard_normal((2, B, t, P))
    return [u, np.exp(dt - 1), -np.exp(rng.standard_normal((F, P))), b, c, rng.standard_normal(F)]


def ssd_inputs(rng: np.random.Generator, t: int = T) -> list[np.ndarray]:
    """x, dt, A, B, C, D of `ssd`."""
    x, dt = rng.standard_normal((B, t, N, H)), rng.standard_normal((B, t, N))
    b, c = rng.standard_normal((2, B, t, G, P))
    return [x, np.exp(dt - 1), -np.exp(rng.standard_normal(N)), b, c, rng.standard_normal(N)]


def conv_inputs(rng: np.random.Generator, t: int = T) -> list[np.ndarray]:
    """x, kernel, bias of `causal_conv`."""
    return [rng.standard_normal(shape) for shape in ((B, t, F), (K, F), (F,))]


OPS: dict[str, tuple[Any, Any, Callable, tuple[int, ...]]] = {
    "scan": (jax_selective_scan.selective_scan, torch_selective_scan.selective_scan, scan_inputs, (B, P, F)),
    "ssd": (jax_ssd.ssd, torch_ssd.ssd, ssd_inputs, (B, N, H, P)),
    "conv": (jax_convolution.causal_conv, torch_convolution.causal_conv, conv_inputs, (B, K - 1, F)),
}


def run_jax(op: Callable, arrays: list[np.ndarray], where: np.ndarray, dys: list[np.ndarray], **options: Any) -> list:
    """Outputs and gradients; the last of seven (four for the convolution) arrays is the state."""

    @jax.jit
    def run(arrays: list[jax.Array]) -> Any:
        outs, pull = jax.vjp(lambda *x: split(op, x, jnp.asarray(where), options)[: len(dys)], *arrays)
        return *outs, *pull(tuple(map(jnp.asarray, dys[: len(outs)])))

    return [np.asarray(x) for x in run([jnp.asarray(x) for x in arrays])]


def run_torch(op: Callable, arrays: list[np.ndarray], where: np.ndarray, dys: list[np.ndarray], **options: Any) -> list:
    inputs = [torch.tensor(x, requires_grad=True) for x in arrays]
    outs = split(op, inputs, torch.tensor(where), options)[: len(dys)]
    gradients = torch.autograd.grad(outs, inputs, [torch.tensor(dy) for dy in dys[: len(outs)]])
    return [x.detach().numpy() for x in (*outs, *gradients)]


def split(op: Callable, arrays: Any, where: Any, options: dict[str, Any]) -> tuple:
    n = 3 if op in (jax_convolution.causal_conv, torch_convolution.causal_conv) else 6
    return tuple(out for out in op(*arrays[:n], where, *arrays[n:], **options) if out is not None)


def compare(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        FLOAT64.check(pairs.error(a, b), f"array {i}")


@pytest.mark.parametrize("handed", [False, True], ids=["packed", "handed a state"])
@pytest.mark.parametrize("name", OPS)
def test_ops(name: str, handed: bool, rng: np.random.Generator) -> None:
    """Every implementation of both frameworks, with chunks that do not divide the length."""
    jax_op, torch_op, inputs, state = OPS[name]
    arrays, where = inputs(rng) + [rng.standard_normal(state)] * handed, segments(rng)
    dys = [rng.standard_normal(arrays[0].shape), rng.standard_normal(state)]
    if name == "conv":
        return compare(run_torch(torch_op, arrays, where, dys), run_jax(jax_op, arrays, where, dys))
    golden = run_torch(torch_op, arrays, where, dys, impl="sequential")
    compare(run_torch(torch_op, arrays, where, dys, impl="chunked", chunk=9), golden)
    for impl, chunk in (("sequential", 1), ("chunked", 7), ("chunked", 100 if name == "ssd" else 8)):
        compare(run_jax(jax_op, arrays, where, dys, impl=impl, chunk=chunk), golden)


@pytest.mark.parametrize(
    ("name", "impl"), [(name, impl) for name in ("scan", "ssd") for impl in IMPLS] + [("conv", "")]
)
def test_a_state_handed_over(name: str, impl: str, rng: np.random.Generator) -> None:
    """A document in pieces, with padding on either side of each, forward and backward: as in one piece without."""
    op, _, inputs, state = OPS[name]
    options = {} if name == "conv" else {"impl": impl, "chunk": 8}
    arrays = inputs(rng, 30)
    tokens = [0] if name == "conv" else [0, 1, 3, 4]  # all but A and D
    cuts = [[0, 11, 12, 30], [0, 9, 20, 30]]  # of each row

    def whole(arrays: list[jax.Array]) -> jax.Array:
        return op(*arrays, jnp.ones((B, 30), jnp.int32), jnp.zeros(state), **options)[0]

    def pieces(arrays: list[jax.Array]) -> jax.Array:
        h, found = jnp.zeros(state), [[], []]
        for i in range(3):
            segments = np.zeros((B, 25), np.int32)
            spread = [jnp.full((B, 25, *x.shape[2:]), 0.7) if j in tokens else x for j, x in enumerate(arrays)]
            for row in range(B):
                (start, end), left = cuts[row][i : i + 2], 2 * i + row
                segments[row, left : left + end - start] = 1
                for j in tokens:
                    spread[j] = spread[j].at[row, left : left + end - start].set(arrays[j][row, start:end])
            y, h = op(*spread, jnp.asarray(segments), h, **options)
            for row in range(B):
                found[row].append(y[row][segments[row] != 0])
        return jnp.stack([jnp.concatenate(row) for row in found])

    dy = jnp.asarray(rng.standard_normal(arrays[0].shape))
    results = []
    for way in (whole, pieces):

        @jax.jit
        def run(arrays: list[jax.Array], way: Callable = way) -> list[jax.Array]:
            y, pull = jax.vjp(way, arrays)
            return [y, *pull(dy)[0]]

        results.append([np.asarray(x) for x in run([jnp.asarray(x) for x in arrays])])
    compare(results[1], results[0])


@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("name", OPS)
def test_nothing_crosses_a_document(name: str, framework: str, rng: np.random.Generator) -> None:
    """The gradient of a later document in an earlier one, and in padding, is zero exactly; so is what it computes."""
    jax_op, torch_op, inputs, _ = OPS[name]
    arrays, where = inputs(rng), segments(rng)
    later = where == 2
    for impl in IMPLS if name != "conv" else ("",):
        options = {"impl": impl} if impl else {}
        op, run = (jax_op, run_jax) if framework == "jax" else (torch_op, run_torch)
        dy = np.where(later.reshape(*later.shape, *(1,) * (arrays[0].ndim - 2)), 1.0, 0.0) + 0 * arrays[0]
        result = run(op, arrays, where, [dy], **options)
        y, dx = result[0], result[1]
        assert np.all(dx[~later] == 0) and np.all(np.any(dx[later].reshape(later.sum(), -1), axis=1))
        alone = [x[:, where[0] == 2] if x.ndim > 2 else x for x in arrays]
        ones = np.ones((B, (where[0] == 2).sum()), np.int32)
        again = run(op, alone, ones, [alone[0]], **options)[0]
        FLOAT64.check(pairs.error(y[0, where[0] == 2], again[0]), "the document alone")


def test_gated_norm(rng: np.random.Generator) -> None:
    x, gate, dy = rng.standard_normal((3, 2, 5, 12))
    arrays = [x, gate, rng.standard_normal(12)]
    out, pull = jax.vjp(lambda *a: jax_norm.gated_rms_norm(*a, eps=0.1, groups=3), *map(jnp.asarray, arrays))
    inputs = [torch.tensor(a, requires_grad=True) for a in arrays]
    ours = torch_norm.gated_rms_norm(*inputs, eps=0.1, groups=3)
    gradients = torch.autograd.grad(ours, inputs, torch.tensor(dy))
    compare([a.detach().numpy() for a in (ours, *gradients)], [np.asarray(a) for a in (out, *pull(jnp.asarray(dy)))])


def test_softplus(rng: np.random.Generator) -> None:
    """Above 20 too, where PyTorch's own function is the identity."""
    x = np.linspace(-60.0, 60.0, 241)
    y, pull = jax.vjp(jax_selective_scan.softplus, jnp.asarray(x))
    mine = torch.tensor(x, requires_grad=True)
    ours = torch_selective_scan.softplus(mine)
    (gradient,) = torch.autograd.grad(ours.sum(), mine)
    np.testing.assert_allclose(ours.detach().numpy(), np.asarray(y), rtol=1e-13)
    np.testing.assert_allclose(gradient.numpy(), np.asarray(pull(jnp.ones_like(y))[0]), rtol=1e-13)


MIXER = "layers.0.mixer"
MODULES = {
    "mamba": Case(MIXER, jax_mamba.Mamba, {"positions": "none", "pattern": ("mamba",)}, placed=True),
    "mamba, inner norms, biases": Case(
        MIXER,
        jax_mamba.Mamba,
        {"positions": "none", "pattern": ("mamba",), "mamba": small(inner_norms=True, proj_bias=True)},
        placed=True,
    ),
    "mamba2": Case(
        MIXER,
        jax_mamba.Mamba2,
        {"positions": "none", "pattern": ("mamba2",), "mamba": config.Mamba(head_dim=16)},
        placed=True,
    ),
    "mamba2, groups, biases": Case(
        MIXER,
        jax_mamba.Mamba2,
        {"positions": "none", "pattern": ("mamba2",), "mamba": small(n_groups=4, proj_bias=True)},
        placed=True,
    ),
}


def resolved(case: Case) -> Case:
    """The mixer sees the options of its half of the block."""
    make = lambda cfg, policy: case.make(cfg.halves(cfg.pattern[0]).mixer, policy)  # noqa: E731
    return Case(case.path, make, case.options, case.shape, case.placed)


@pytest.mark.parametrize("name", MODULES)
def test_mixers(name: str, rng: np.random.Generator) -> None:
    check_module(resolved(MODULES[name]), rng)


@pytest.mark.parametrize("name", ["mamba biases", "mamba2 biases", "jamba"])
def test_the_same_parameters_decay(name: str, rng: np.random.Generator) -> None:
    """Kernels decay; A_log, D, dt_bias, norms and biases do not."""
    cfg = pairs.model(**MAMBA[name])
    pair = pairs.pair(cfg, pairs.random_params(cfg, rng))
    mask = jax_optim.decay_mask(pair.params)
    tree = jax.tree.map(lambda leaf, decays: np.full(leaf.shape, decays, np.float64), pair.params, mask)
    theirs = {key: bool(value.any()) for key, value in pairs.torch_names(tree, pair.jax).items()}
    assert torch_optim.decay_mask(pair.torch) == theirs
    still = {key.rpartition(".")[2] for key, decays in theirs.items() if not decays}
    assert {"A_log", "D"} <= still <= {"A_log", "D", "dt_bias", "bias", "weight"}
    assert theirs[f"{MIXER}.conv.weight"] and not theirs.get(f"{MIXER}.norm.weight", False)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_first_values(kind: str) -> None:
    """Both frameworks draw from the same distributions: constants are equal, quantiles of the others close."""
    mamba = config.Mamba(d_state=64, head_dim=1, conv_bias=True, inner_norms=True, dt_rank=32)
    cfg = pairs.model(d_model=256, n_layers=1, layer_loop="unroll", pattern=(kind,), mamba=mamba, positions="none")
    params = jax_decoder.init_params(jax_decoder.Decoder(cfg), jax.random.key(5))
    ours = torch_decoder.init_params(torch_decoder.Decoder(cfg), seed=5)
    for name, theirs in pairs.torch_names(params, jax_decoder.Decoder(cfg)).items():
        mine, at = ours.get_parameter(name).detach().double().numpy(), [0.02, 0.25, 0.5, 0.75, 0.98]
        spread = np.std(theirs)
        assert np.abs(np.quantile(mine, at) - np.quantile(theirs, at)).max() <= 0.25 * spread, name
        assert spread > 0 or np.array_equal(mine, theirs), name


def reverse_taps(decoder: torch_decoder.Decoder) -> None:
    weight = decoder.get_parameter(f"{MIXER}.conv.weight")
    weight.data = weight.data.flip(1).clone()


def gate_for_input(decoder: torch_decoder.Decoder) -> None:
    weight = decoder.get_parameter(f"{MIXER}.in_proj.weight")
    weight.data = weight.data.roll(weight.shape[0] // 2, 0).clone()


def swap_b_and_c(decoder: torch_decoder.Decoder) -> None:
    weight = decoder.get_parameter(f"{MIXER}.bc_proj.weight")
    weight.data = weight.data.roll(weight.shape[0] // 2, 0).clone()


def one_group(decoder: torch_decoder.Decoder) -> None:
    decoder.get_submodule(f"{MIXER}.norm").groups = 1


def no_skip(decoder: torch_decoder.Decoder) -> None:
    decoder.get_parameter(f"{MIXER}.D").data.zero_()


def a_of_positive_sign(decoder: torch_decoder.Decoder) -> None:
    decoder.get_parameter(f"{MIXER}.A_log").data.neg_()


FAULTS = {
    "taps reversed": ("mamba", reverse_taps),
    "gate for input": ("mamba", gate_for_input),
    "no skip": ("mamba", no_skip),
    "sign of A_log": ("mamba", a_of_positive_sign),
    "B for C": ("mamba2, groups, biases", swap_b_and_c),
    "norm over all groups": ("mamba2, groups, biases", one_group),
    "gate for input, mamba2": ("mamba2", gate_for_input),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str, rng: np.random.Generator) -> None:
    name, plant = FAULTS[fault]
    with pytest.raises(AssertionError, match="output: error"):
        check_module(resolved(MODULES[name]), rng, plant)


SPOILT = {
    "dt without B": lambda u, dt, a, b, c, d, where: torch_selective_scan.selective_scan(
        u, dt, a, b / dt[..., :1], c, d, where
    ),
    "zero-order hold of B": lambda u, dt, a, b, c, d, where: torch_selective_scan.selective_scan(
        u * ((dt * a[:, 0]).expm1() / (dt * a[:, 0])), dt, a, b, c, d, where
    ),
    "no documents": lambda *args: torch_selective_scan.selective_scan(*args[:-1], torch.ones_like(args[-1])),
    "the state restarts one token late": lambda *args: torch_selective_scan.selective_scan(
        *args[:-1], args[-1].roll(1, 1)
    ),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_spoilt_scan_is_seen(fault: str, rng: np.random.Generator) -> None:
    arrays, where = scan_inputs(rng), segments(rng)
    golden = np.asarray(jax_selective_scan.selective_scan(*map(jnp.asarray, arrays), jnp.asarray(where))[0])
    spoilt = SPOILT[fault](*map(torch.tensor, arrays), torch.tensor(where))[0].numpy()
    real = where != 0
    with pytest.raises(AssertionError, match="output: error"):
        FLOAT64.check(pairs.error(spoilt[real], golden[real]), "output")
