"""Inputs for every objective: gaps, padding on both sides, ties, absent pairs, and garbage where nothing counts.

Shapes: B batch, T length, D width, E width of the teacher, V vocabulary, M segments of a row, P pairs, G groups,
N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

B, T, D, E, V, M = 3, 14, 6, 5, 11, 4
Arrays = dict[str, Any]


class Case(NamedTuple):
    """A call of one function, the same in both frameworks."""

    name: str
    module: str
    function: str
    arrays: Arrays
    """By name of the parameter; None and plain numbers are handed on as they are."""
    options: dict[str, Any]
    learned: tuple[str, ...] = ()
    """By which of the arrays the first result is differentiated."""


def rows(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Weights and segments: padding left and right, a gap inside a segment, a row of one segment, a missing segment."""
    segments, weights = np.zeros((B, T), np.int32), np.zeros((B, T))
    segments[0, 2:12] = [1, 1, 1, 1, 2, 2, 2, 3, 3, 4]
    segments[1, :9] = [1, 1, 1, 1, 1, 2, 2, 2, 2]
    segments[2, 1:14] = [1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4]
    weights[0, [3, 5, 7, 8, 9, 10, 11]] = 1
    weights[1, [1, 2, 4, 6, 8]] = 1
    weights[2, [2, 3, 5, 6, 7, 9, 10, 11, 13]] = 1
    return weights, segments


def logps(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return -rng.exponential(1.2, shape)


def token_cases(rng: np.random.Generator) -> Iterator[Case]:
    weights, segments = rows(rng)
    hidden, kernel, bias = (rng.standard_normal(shape) for shape in ((B, T, D), (D, V), (V,)))
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    targets[:, 3] = V - 1
    model: Arrays = {"hidden_BTD": hidden, "kernel_DV": kernel, "bias_V": bias, "targets_BT": targets}
    learned = ("hidden_BTD", "kernel_DV", "bias_V")
    yield Case("logps", "logprobs", "token_logps", model, {"block": 8}, learned)
    yield Case("logps at T = 0.6", "logprobs", "token_logps", model, {"block": 8, "temperature": 0.6}, learned)
    yield Case("no bias", "logprobs", "token_logps", {**model, "bias_V": None}, {"block": 50}, learned[:2])
    x = np.where(weights != 0, logps(rng, B, T), -np.inf)  # whatever stands at a prompt or at padding
    sums = {"x_BT": x, "weights_BT": weights, "segments_BT": segments}
    yield Case("segment sums", "logprobs", "segment_sums", sums, {"segments": M}, ("x_BT",))


def preference_cases(rng: np.random.Generator) -> Iterator[Case]:
    counts = np.array([[2, 3, 1, 1], [4, 2, 0, 0], [1, 3, 5, 0]], float)  # two pairs are not there
    policy, reference = logps(rng, B, M) * np.maximum(counts, 1), logps(rng, B, M) * np.maximum(counts, 1)
    reference[0] = policy[0, 0]  # a pair without a margin
    policy[0, 1:2] = policy[0, 0]
    arrays = {"logps_BM": policy, "counts_BM": counts, "reference_BM": reference}
    for kind, options in {
        "dpo": {}, "cdpo": {"label_noise": 0.15}, "robust": {"label_noise": 0.2}, "ipo": {}, "hinge": {"beta": 0.9},
        "simpo": {"gamma": 0.7, "beta": 2.0}, "orpo": {"odds_weight": 0.3},
    }.items():  # fmt: skip
        case = arrays | ({"reference_BM": None} if kind in ("simpo", "orpo") else {})
        options = {"kind": kind, "beta": 0.4} | options
        yield Case(kind, "preference", "preference_loss", case, options, ("logps_BM",))
    options = {"kind": "dpo", "sft_weight": 0.3}
    yield Case("dpo with sft", "preference", "preference_loss", arrays, options, ("logps_BM",))
    yield Case("kto's z", "kto", "kto_divergence", arrays | {"reference_BM": reference - 2}, {})
    labels = np.array([[1, -1], [-1, 0], [1, 1]], np.int32)
    kto = {"logps_BM": policy, "reference_BM": reference, "labels_BP": labels, "divergence": np.array(0.37)}
    options = {"beta": 0.4, "desirable_weight": 1.3, "undesirable_weight": 0.7}
    yield Case("kto", "kto", "kto_loss", kto, options, ("logps_BM",))


def reward_cases(rng: np.random.Generator) -> Iterator[Case]:
    scores = rng.standard_normal((B, M))
    present = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], bool)
    scores[0, 2:], scores[1, :2] = 30.0, [25.0, -1.5]  # a tie in scores; a pair far apart
    arrays = {"scores_BM": scores, "present_BM": present}
    margins, ties = rng.random((B, M // 2)), np.array([[0, 0], [0, 0], [1, 0]], bool)
    both = arrays | {"margins_BP": margins, "ties_BP": ties}
    yield Case("reward", "reward", "reward_loss", arrays, {}, ("scores_BM",))
    options = {"centring": 0.01, "label_smoothing": 0.1}
    yield Case("reward with margins", "reward", "reward_loss", both, options, ("scores_BM",))
    yield Case("reward hinge", "reward", "reward_loss", both, {"kind": "hinge"}, ("scores_BM",))
    moments = {"moments": (np.array(5.0), np.array(0.3), np.array(2.5))}
    samples, valid = rng.standard_normal(9), np.arange(9) % 4 != 0
    yield Case("moments", "reward", "add_moments", moments | {"rewards_N": samples, "valid_N": valid}, {})
    shaped = moments | {"rewards_N": samples, "lengths_N": np.arange(9.0)}
    yield Case("shaped", "reward", "shape_rewards", shaped, {"clip": 1.5, "length_weight": 0.01})


def policy_cases(rng: np.random.Generator) -> Iterator[Case]:
    weights, _ = rows(rng)
    weights = np.concatenate([weights, np.zeros((1, T))])  # a sample without a trained token
    shape = weights.shape
    policy = logps(rng, *shape)
    old, reference = policy + 0.3 * rng.standard_normal(shape), policy + 0.5 * rng.standard_normal(shape)
    advantages, entropy = rng.standard_normal((4, 1)).repeat(T, 1), rng.random(shape)
    advantages[2] = 0
    for x in (policy, old, reference):
        x[weights == 0] = -1e5  # no number that may count
    arrays: Arrays = {"logps_BT": policy, "old_BT": old, "advantages_BT": advantages, "weights_BT": weights}
    full = arrays | {"reference_BT": reference, "entropy_BT": entropy, "correction_BT": 1 + entropy}
    for name, case, options in [
        ("ppo", arrays, {}),
        ("one update", arrays | {"old_BT": None}, {"divisor": "sequence"}),
        ("grpo", full, {"divisor": "sequence", "kl_weight": 0.1, "high": 0.28, "entropy_weight": 0.01}),
        ("dr grpo", arrays, {"divisor": "constant", "longest": 20}),
        ("gspo", full, {"ratio": "sequence", "divisor": "sequence", "low": 0.01, "high": 0.02}),
        ("cispo", arrays, {"clipping": "cispo", "high": 0.1}),
        ("dual clip", arrays, {"dual": 1.3, "low": 0.1}),
        ("k1", full, {"kl_weight": 0.2, "kl_kind": "k1"}),
        ("k2", full, {"kl_weight": 0.2, "kl_kind": "k2"}),
        ("unbiased", full, {"kl_weight": 0.2, "kl_kind": "unbiased"}),
    ]:
        learned = ("logps_BT", "entropy_BT") if "entropy_weight" in options else ("logps_BT",)
        yield Case(name, "policy", "policy_loss", case, options, learned)
    sampler = {"trainer_BT": policy, "sampler_BT": old, "weights_BT": weights}
    for correction, level in (("truncate", "token"), ("mask", "token"), ("mask", "sequence"), ("none", "token")):
        options = {"correction": correction, "level": level, "cap": 1.2}
        yield Case(f"{correction} {level}", "policy", "correction_weights", sampler, options)
    yield Case("mismatch", "policy", "mismatch", sampler, {})
    values = {"values_BT": policy, "old_BT": old, "returns_BT": reference, "weights_BT": weights}
    yield Case("value", "value", "value_loss", values, {"clip": 0.1}, ("values_BT",))
    yield Case("value without a clip", "value", "value_loss", values, {"clip": 0.0}, ("values_BT",))
    rewarded = {"old_BT": old, "reference_BT": reference, "rewards_B": advantages[:, 0], "weights_BT": weights}
    yield Case("token rewards", "advantages", "token_rewards", rewarded, {"kl_weight": 0.1})
    bootstrap = {
        "rewards_BT": entropy,
        "values_BT": policy,
        "weights_BT": weights,
        "bootstrap_B": np.array([0, 1, 0, 2.0]),
    }
    yield Case("gae", "advantages", "gae", bootstrap, {"discount": 0.97, "lam": 0.9})
    yield Case("whiten", "advantages", "whiten", {"x_BT": policy, "weights_BT": weights}, {})
    rewards, valid = rng.integers(0, 3, (4, 6)).astype(float), rng.random((4, 6)) > 0.2
    valid[1], valid[2] = True, np.arange(6) == 0
    rewards[1], rewards[~valid] = 0.1, np.nan  # six times 0.1 has a rounded mean
    for scaling in ("group", "batch", "none", "rloo"):
        case = {"rewards_GN": rewards, "valid_GN": valid}
        yield Case(f"advantages by {scaling}", "advantages", "advantages", case, {"scaling": scaling})


def distill_cases(rng: np.random.Generator) -> Iterator[Case]:
    weights, _ = rows(rng)
    hidden, kernel, bias = (rng.standard_normal(shape) for shape in ((B, T, D), (D, V), (V,)))
    whole = rng.standard_normal((B, T, E)), rng.standard_normal((E, V)), rng.standard_normal(V)
    x = whole[0] @ whole[1] / 1.7
    logp = x - np.log(np.exp(x).sum(-1, keepdims=True))
    ids = np.argsort(-logp, axis=-1, kind="stable")[..., :4]
    kept = np.take_along_axis(logp, ids, -1)
    likeliest = kept, ids.astype(np.int64), np.log1p(-np.exp(kept).sum(-1))
    arrays: Arrays = {"hidden_BTD": hidden, "kernel_DV": kernel, "bias_V": bias}
    arrays |= {"targets_BT": rng.integers(0, V, (B, T)).astype(np.int32), "weights_BT": weights}
    learned = ("hidden_BTD", "kernel_DV", "bias_V")
    for name, beta in {"forward": 0.0, "reverse": 1.0, "jsd": 0.3}.items():
        options = {"beta": beta, "hard_weight": 0.4, "temperature": 1.7, "block": 8}
        yield Case(name, "distill", "distill_loss", arrays | {"teacher": ("Teacher", whole)}, options, learned)
        case = arrays | {"teacher": ("LikeliestTokens", likeliest)}
        yield Case(f"{name} of 4", "distill", "distill_loss", case, options, learned)
    hints = {"student_BTD": hidden, "teacher_BTE": whole[0], "projection_DE": rng.standard_normal((D, E))}
    hints |= {"weights_BT": weights}
    yield Case("hidden", "distill", "hidden_loss", hints, {}, ("student_BTD", "projection_DE"))
    yield Case(
        "likeliest", "teacher", "likeliest_tokens", {"teacher": ("Teacher", whole)}, {"k": 4, "temperature": 1.7}
    )


MAKERS: tuple[Callable[[np.random.Generator], Iterator[Case]], ...]
MAKERS = token_cases, preference_cases, reward_cases, policy_cases, distill_cases


def all_cases() -> dict[str, Case]:
    """Every case by its name."""
    return {case.name: case for seed, maker in enumerate(MAKERS) for case in maker(np.random.default_rng(seed))}
