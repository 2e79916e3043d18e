"""Every objective in both frameworks, value and gradient, in float64; and the faults that the literature reports."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from parity_tests import pairs
from parity_tests.objective_cases import Case, all_cases
from parity_tests.tolerances import FLOAT64

CASES = all_cases()  # numpy arrays: no framework makes one at import
TREES = ("Teacher", "LikeliestTokens", "Moments")


def handed(value: Any, module: Any, as_array: Any) -> Any:
    """An argument in a framework: an array, a named tuple of arrays, or what it is."""
    if isinstance(value, tuple):
        kind, values = value if isinstance(value[0], str) else ("Moments", value)
        return getattr(module, kind)(*map(as_array, values))
    return value if value is None else as_array(value)


def numbers(result: Any) -> list[np.ndarray]:
    """A result as arrays; what stands where nothing counts is infinite in both or in neither."""
    fields = result if isinstance(result, tuple) else (result,)
    return [np.asarray(x.detach() if isinstance(x, torch.Tensor) else x, np.float64) for x in fields]


def slopes_of(result: Any) -> list[np.ndarray]:
    """The numbers by which each result that has a gradient is multiplied before they are added."""
    fields = result if isinstance(result, tuple) else (result,)
    many = [x for x in fields if x.ndim] or list(fields[:1])
    return [np.random.default_rng(7).standard_normal(tuple(x.shape)) for x in many]


@functools.cache
def in_jax(name: str) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    case = CASES[name]
    module = importlib.import_module(f"jaxlm.objectives.{case.module}")
    arrays = {key: handed(value, module, jnp.asarray) for key, value in case.arrays.items()}
    function = getattr(module, case.function)

    @jax.jit
    def whole(learned: Any, rest: Any) -> Any:
        def scalar(learned: Any) -> Any:
            result = function(**{key: (learned | rest)[key] for key in arrays}, **case.options)
            fields = result if isinstance(result, tuple) else (result,)
            many = [x for x in fields if x.ndim] or list(fields[:1])
            return sum(jnp.sum(x * w) for x, w in zip(many, slopes_of(result), strict=True)), result

        if not learned:
            return {}, scalar({})[1]
        return jax.grad(scalar, has_aux=True)(learned)

    learned = {key: arrays[key] for key in case.learned}
    gradients, result = whole(learned, {key: value for key, value in arrays.items() if key not in learned})
    return numbers(result), {key: np.asarray(value) for key, value in gradients.items()}


def in_torch(case: Case, module: Any) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    arrays = {key: handed(value, module, torch.tensor) for key, value in case.arrays.items()}
    for key in case.learned:
        arrays[key].requires_grad_()
    result = getattr(module, case.function)(**arrays, **case.options)
    if case.learned:
        fields = result if isinstance(result, tuple) else (result,)
        many = [x for x in fields if x.ndim] or list(fields[:1])
        sum((x * torch.tensor(w)).sum() for x, w in zip(many, slopes_of(result), strict=True)).backward()
    return numbers(result), {key: arrays[key].grad.numpy() for key in case.learned}


def compare(name: str, module: Any) -> None:
    """Torch, by this module, against JAX."""
    (ours, slopes), (theirs, their_slopes) = in_jax(name), in_torch(CASES[name], module)
    assert len(ours) == len(theirs)
    for number, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        assert np.isfinite(a).all() and np.isfinite(b).all()
        assert np.array_equal(a == 0, b == 0), (
            f"{name}, result {number}: what is exactly 0 in one framework is not in the other"
        )
        FLOAT64.check(pairs.error(a, b), f"{name}, result {number}")
    for key in CASES[name].learned:
        assert np.isfinite(slopes[key]).all() and np.any(slopes[key])
        FLOAT64.check(pairs.error(their_slopes[key], slopes[key]), f"{name}, gradient of {key}")


@pytest.mark.parametrize("name", CASES)
def test_both_frameworks_agree(name: str) -> None:
    compare(name, importlib.import_module(f"torch_ref.objectives.{CASES[name].module}"))


@pytest.mark.parametrize("name", sorted({case.module for case in CASES.values()} | {"blocks", "lm"}))
def test_the_mirror_has_the_same_names(name: str) -> None:
    ours, theirs = (importlib.import_module(f"{root}.objectives.{name}") for root in ("jaxlm", "torch_ref"))

    def public(module: Any) -> dict[str, list[str]]:
        mine = {
            key: value for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__
        }
        return {key: list(inspect.signature(value).parameters) for key, value in mine.items() if key[0] != "_"}

    assert public(ours) == public(theirs)


# The number of the trap in shared/research/post-training.md, the case that must see it, and the fault.
FAULTS = [
    (9, "segment sums", "weights_BT != 0, x_BT * weights_BT", "segments_BT != 0, x_BT"),
    (10, "segment sums", "torch.arange(1, segments + 1", "torch.arange(segments"),
    (12, "ipo", "side.ratio / side.tokens", "side.ratio"),
    (12, "simpo", "self.logps / self.tokens", "self.logps"),
    (14, "token rewards", "so_far_BT == so_far_BT[:, -1:]", "so_far_BT < 0"),
    (14, "gae", "torch.where(trained_B, value_B, value_after_B)", "value_B"),
    (14, "gae", "torch.where(trained_B, advantage_B, advantage_after_B)", "torch.where(trained_B, advantage_B, 0)"),
    (15, "value", "torch.maximum(error_BT**2, (near_BT - returns_BT) ** 2)", "(near_BT - returns_BT) ** 2"),
    (16, "logps at T = 0.6", "+ bias_V) / temperature", "+ bias_V)"),
    (16, "logps at T = 0.6", "dlogps_BC[..., None]) / temperature", "dlogps_BC[..., None])"),
    (21, "unbiased", 'k3_BT if kind == "k3"', 'k3_BT if kind != ""'),
    (21, "k2", "x_BT = logps_BT - reference_BT", "x_BT = (logps_BT - reference_BT).detach()"),
    (21, "grpo", "torch.exp(-x_BT) - 1 + x_BT", "torch.exp(x_BT) - 1 - x_BT"),
    (22, "advantages by group", "valid_GN & (most_G1 > least_G1)", "valid_GN"),
    (22, "advantages by group", "count_G1 = torch.sum(valid_GN,", "count_G1 = torch.sum(valid_GN | True,"),
    (23, "grpo", "total_B / torch.where(length_B > 0, length_B, 1)", "total_B"),
    (23, "dr grpo", "samples * longest", "torch.sum(length_B)"),
    (23, "gspo", "/ length_B1.clamp(min=1)", "/ weights_BT.shape[1]"),
    (24, "ppo", "torch.sum(loss_BT * weights_BT, dim=1)", "torch.sum(loss_BT, dim=1)"),
    (24, "whiten", "torch.where(trained_BT, x_BT - mean, 0)", "(x_BT - mean)"),
    (29, "forward", "return _kl(teacher_BTV, logp_BTV)", "return _kl(logp_BTV, teacher_BTV)"),
    (29, "forward", "temperature**2 * ", ""),
    (29, "reverse of 4", "logp_BCV.scatter(-1, ids_BCK, -torch.inf)", "logp_BCV"),
    (29, "forward", "hard_weight * nll_BC + (1 - hard_weight)", "(1 - hard_weight) * nll_BC + hard_weight"),
]


@pytest.mark.parametrize(("trap", "name", "old", "new"), FAULTS)
def test_a_planted_fault_is_seen(trap: int, name: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mirror is read, changed and run: whoever makes this mistake in one framework fails."""
    wanted = f"torch_ref.objectives.{CASES[name].module}"
    modules = [wanted, *({"torch_ref.objectives.teacher"} if CASES[name].module == "distill" else set())]
    sources = {key: inspect.getsource(importlib.import_module(key)) for key in modules}
    assert any(old in source for source in sources.values()), f"trap {trap}: the source has changed, plant it anew"
    for key in reversed(modules):
        broken = types.ModuleType(key)
        monkeypatch.setitem(sys.modules, key, broken)
        exec(compile(sources[key].replace(old, new), key, "exec"), broken.__dict__)
    with pytest.raises(AssertionError):
        compare(name, sys.modules[wanted])


LOSSES = [name for name, case in CASES.items() if case.learned and case.function.endswith("_loss")]


@pytest.mark.parametrize("name", LOSSES)
def test_microbatches_add_up(name: str) -> None:
    """Trap 7. Sums of rows one by one are the sums of the batch: nothing is a mean before the end."""
    case = CASES[name]
    module = importlib.import_module(f"jaxlm.objectives.{case.module}")
    whole, _ = in_jax(name)
    batch = {key for key, value in case.arrays.items() if hasattr(value, "shape") and "_B" in key}
    rows = next(len(case.arrays[key]) for key in batch)

    def part(key: str, value: Any, row: int) -> Any:
        if key == "teacher":
            kind, values = value
            values = [x[row : row + 1] if kind == "LikeliestTokens" or not i else x for i, x in enumerate(values)]
            return kind, tuple(values)
        return value[row : row + 1] if key in batch else value

    sums = [np.zeros(())] * len(whole)
    for row in range(rows):
        arrays = {key: handed(part(key, value, row), module, jnp.asarray) for key, value in case.arrays.items()}
        options = case.options | ({"block": 5} if "block" in case.options else {})
        result = numbers(getattr(module, case.function)(**arrays, **options))
        sums = [total + x for total, x in zip(sums, result, strict=True)]
    for total, x in zip(sums, whole, strict=True):
        np.testing.assert_allclose(total, x, rtol=1e-12, atol=1e-13)
