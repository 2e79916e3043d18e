"""Our objectives against TRL 1.16.0, advantages against torchrl: the same tensors, values and gradients, float64.

Shapes: B samples or pairs, T tokens, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxlm.objectives.advantages import gae
from jaxlm.objectives.distill import distill_loss
from jaxlm.objectives.kto import kto_loss
from jaxlm.objectives.logprobs import token_logps
from jaxlm.objectives.policy import policy_loss
from jaxlm.objectives.preference import preference_loss
from jaxlm.objectives.reward import reward_loss
from jaxlm.objectives.teacher import Teacher
from parity_tests import pairs
from parity_tests.tolerances import FLOAT64, ORPO_FLOAT32

pytest.importorskip("trl", reason="trl 1.16.0 judges these losses: pip install -c constraints.txt 'jaxlm[judges]'")
from parity_tests import trl_losses as trl

B, T = 4, 9


@pytest.fixture
def completions(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Log-probabilities [2B, T] of chosen and then rejected under policy and reference, and which tokens count."""
    policy, reference = -rng.exponential(1.0, (2, 2 * B, T))
    mask = rng.random((2 * B, T)) > 0.4
    mask[:, -1] = True
    return policy, reference, mask


def judged(ours: Callable[[Any], Any], theirs: Callable[[torch.Tensor], torch.Tensor], x: np.ndarray, bound=FLOAT64):
    """Two losses of one array: values and gradients agree."""
    value, slope = jax.jit(jax.value_and_grad(ours))(jnp.asarray(x))
    tensor = torch.tensor(x, requires_grad=True)
    loss = theirs(tensor)
    loss.backward()
    assert tensor.grad is not None and tensor.grad.any()
    bound.check(pairs.error(np.asarray(value), loss.detach().double().numpy()), "loss")
    bound.check(pairs.error(np.asarray(slope), tensor.grad.numpy()), "gradient")


def pair_sums(x: Any, mask: np.ndarray) -> Any:
    """Sums [B, 2] of rows [2B, T]: each pair is a row of two segments."""
    return jnp.where(mask, x, 0).sum(1).reshape(2, B).T


def their_batch(mask: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    shifted = np.concatenate([np.zeros((len(mask), 1), bool), mask], axis=1)
    return torch.zeros(shifted.shape, dtype=torch.long), torch.tensor(shifted)


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("dpo", "sigmoid", {}),
        ("robust", "robust", {"label_noise": 0.2}),
        ("ipo", "ipo", {}),
        ("hinge", "hinge", {}),
    ],
)
def test_the_family_of_dpo(kind: Any, name: str, options: dict[str, float], completions: Any) -> None:
    policy, reference, mask = completions
    ids, completion_mask = their_batch(mask)

    def ours(x: Any) -> Any:
        sums = (pair_sums(y, mask) for y in (x, mask.astype(float), reference))
        result = preference_loss(*sums, kind=kind, beta=0.3, **options)
        return result.loss / result.weight

    noise = options.get("label_noise", 0.0)
    judged(ours, lambda x: trl.dpo(name, x, torch.tensor(reference), ids, completion_mask, 0.3, noise), policy)


def test_cdpo(completions: Any) -> None:
    """TRL keeps this loss for CPO only: the same formula of log-probabilities instead of log ratios."""
    policy, reference, mask = completions

    def ours(x: Any) -> Any:
        sums = (pair_sums(y, mask) for y in (x, mask.astype(float), reference))
        result = preference_loss(*sums, kind="cdpo", beta=0.3, label_noise=0.2)
        return result.loss / result.weight

    def theirs(x: torch.Tensor) -> torch.Tensor:
        return trl.cdpo(*((x - torch.tensor(reference)) * torch.tensor(mask)).sum(1).reshape(2, B), 0.3, 0.2).mean()

    judged(ours, theirs, policy)


def test_simpo_and_orpo(completions: Any) -> None:
    policy, _, mask = completions
    counts = pair_sums(mask.astype(float), mask)

    def ours(x: Any, **options: Any) -> Any:
        result = preference_loss(pair_sums(x, mask), counts, None, **options)
        return result.loss / result.weight

    def means(x: torch.Tensor) -> torch.Tensor:
        return ((x * torch.tensor(mask)).sum(1) / torch.tensor(mask).sum(1)).reshape(2, B)

    judged(lambda x: ours(x, kind="simpo", beta=2.0), lambda x: trl.simpo(*means(x)).mean(), policy)
    judged(
        lambda x: ours(x, kind="orpo", odds_weight=0.1),
        lambda x: -means(x)[0].mean() - trl.orpo(*means(x)).mean(),
        policy,
        ORPO_FLOAT32,
    )


def test_kto(completions: Any, rng: np.random.Generator) -> None:
    policy, reference, mask = completions
    labels, ratios = rng.random(2 * B) > 0.5, rng.standard_normal(2 * B) + 1
    ids, completion_mask = their_batch(mask)

    def ours(x: Any) -> Any:
        own, frozen = (jnp.where(mask, y, 0).sum(1) for y in (x, reference))
        rows = (jnp.stack([y, z], 1) for y, z in ((own, jnp.asarray(ratios)), (frozen, jnp.zeros(2 * B))))
        signs = jnp.asarray(np.where(labels, 1, -1)[:, None], jnp.int32)
        result = kto_loss(
            *rows, signs, jnp.asarray(ratios.mean()), beta=0.3, desirable_weight=1.3, undesirable_weight=0.8
        )
        return result.loss / result.weight

    rest = (torch.tensor(ratios), ids, completion_mask, torch.tensor(labels), 0.3, 1.3, 0.8)
    judged(ours, lambda x: trl.kto(x, torch.tensor(reference), *rest), policy)


@pytest.mark.parametrize("margin", [False, True])
def test_the_reward_model(margin: bool, rng: np.random.Generator) -> None:
    scores, margins = rng.standard_normal((2 * B, 1)), rng.random(B) if margin else None

    def ours(x: Any) -> Any:
        rows = x.reshape(2, B).T
        asked = None if margins is None else jnp.asarray(margins[:, None])
        result = reward_loss(rows, jnp.ones(rows.shape, bool), asked, centring=0.05)
        return result.loss / result.weight

    judged(ours, lambda x: trl.reward(x, None if margins is None else torch.tensor(margins), 0.05), scores)


KINDS = [
    ("grpo", {"divisor": "sequence"}, {}),
    ("dapo", {"divisor": "token"}, {}),
    ("dr_grpo", {"divisor": "constant", "longest": 12}, {"longest": 12}),
    ("grpo", {"divisor": "sequence", "dual": 1.4}, {"delta": 1.4}),
    ("grpo", {"divisor": "sequence", "kl_weight": 0.1}, {"beta": 0.1}),
    ("grpo", {"divisor": "sequence", "kl_weight": 0.1, "kl_kind": "unbiased"}, {"beta": 0.1, "bias": True}),
    ("cispo", {"divisor": "token", "clipping": "cispo", "low": 1.0, "high": 0.1}, {"high": 1.1}),
]


@pytest.mark.parametrize(
    ("kind", "ours", "theirs", "level"),
    # TRL multiplies KL by the ratio of the level: by sequence its estimate is not the unbiased one.
    [(*case, level) for case in KINDS for level in ("token", "sequence") if level == "token" or "bias" not in case[2]],
)
def test_grpo_and_relatives(kind: str, level: Any, ours: Any, theirs: Any, rng: np.random.Generator) -> None:
    policy = -rng.exponential(1.0, (B, T))
    old, reference = policy + 0.3 * rng.standard_normal((2, B, T))
    mask, gains = rng.random((B, T)) > 0.3, rng.standard_normal(B)
    mask[:, 0] = True
    options = {"low": 0.2, "high": 0.28} | ours

    def our_loss(x: Any) -> Any:
        arrays = jnp.asarray(old), jnp.asarray(gains[:, None].repeat(T, 1)), jnp.asarray(mask.astype(float))
        result = policy_loss(x, *arrays, jnp.asarray(reference), ratio=level, **options)
        return result.loss / result.weight

    theirs = dict(theirs)
    theirs |= {"use_bias_correction_kl": theirs.pop("bias", False)}
    tensors = [torch.tensor(x) for x in (old, reference, gains)]
    judged(our_loss, lambda x: trl.grpo(kind, level, x, *tensors, torch.tensor(mask).long(), **theirs), policy)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_distillation(beta: float, rng: np.random.Generator) -> None:
    student, teacher = rng.standard_normal((2, B, T, 13))
    targets, weights = rng.integers(0, 13, (B, T)), rng.random((B, T)) > 0.3
    labels = torch.tensor(np.where(weights, targets, -100))

    def ours(x: Any) -> Any:
        taught = Teacher(jnp.asarray(teacher), jnp.eye(13))
        where = jnp.asarray(targets, jnp.int32), jnp.asarray(weights.astype(float))
        options = {"beta": beta, "hard_weight": 0.0, "temperature": 1.5, "block": 12}
        result = distill_loss(x, jnp.eye(13), None, taught, *where, **options)
        return result.loss / result.weight

    judged(ours, lambda x: 1.5**2 * trl.jsd(x, torch.tensor(teacher), labels, beta, 1.5), student)


def test_log_probabilities_and_entropy(rng: np.random.Generator) -> None:
    logits, targets = rng.standard_normal((B, T, 13)), rng.integers(0, 13, (B, T)).astype(np.int32)
    result = token_logps(jnp.asarray(logits), jnp.eye(13), None, jnp.asarray(targets), temperature=0.7, block=5)
    tempered = torch.tensor(logits) / 0.7
    theirs = trl.selective_log_softmax(tempered, torch.tensor(targets).long()), trl.entropy_from_logits(tempered)
    for a, b in zip(result, theirs, strict=True):
        FLOAT64.check(pairs.error(np.asarray(a), b.numpy()), "log-probability or entropy")


@pytest.mark.parametrize("ended", [True, False])
def test_generalised_advantages(ended: bool, rng: np.random.Generator) -> None:
    """torchrl's, of rows without gaps: the last state has its own value, which counts unless the row ended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchrl's own imports
        functional = pytest.importorskip(
            "torchrl.objectives.value.functional",
            reason="torchrl 0.14.1 judges advantages; docs/dependencies.md says how to install it",
        )
    rewards, values = rng.standard_normal((2, B, T))
    last = rng.standard_normal(B)
    following = np.concatenate([values[:, 1:], last[:, None]], axis=1)
    done = np.arange(T)[None, :, None].repeat(B, 0) == T - 1
    tensors = [torch.tensor(x[..., None]) for x in (values, following, rewards)]
    flags = torch.tensor(done), torch.tensor(done & ended)
    torch.set_default_dtype(torch.float64)  # it multiplies the discount by integers, in the default dtype
    try:
        theirs = functional.generalized_advantage_estimate(0.97, 0.9, *tensors, *flags)
    finally:
        torch.set_default_dtype(torch.float32)
    bootstrap = jnp.zeros(B) if ended else jnp.asarray(last)
    ours = gae(*map(jnp.asarray, (rewards, values)), jnp.ones((B, T)), bootstrap, discount=0.97, lam=0.9)
    for a, b in zip(ours, theirs, strict=True):
        FLOAT64.check(pairs.error(np.asarray(a), b[..., 0].numpy()), "advantage or return")
