"""Speculation changes no text: whatever is guessed, with every kind of cache, in both frameworks, in float64."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.infer.engine import Engine, Grammar, Request, Result
from jaxlm.infer.engine.draft import Draft
from jaxlm.infer.engine.growing import Growing
from jaxlm.infer.engine.on_jax.runner import JaxRunner
from jaxlm.infer.engine.speculative import Speculation
from jaxlm.models.cache import RowCache
from jaxlm.text.sampling import GREEDY, Sampling
from jaxlm.text.tokenizer import Tokenizer
from parity_tests.options import small
from parity_tests.pairs import Pair, model, pair, random_params
from parity_tests.test_engine import nearly
from parity_tests.tolerances import FLOAT64
from tests.infer.test_engine import PROMPTS, WARM, V, random_request, run, schedule
from torch_ref.infer import rows
from torch_ref.infer.runner import TorchRunner

PATTERNS: dict[str, Any] = {
    "every mixer": ("attention(window=5, keep_first=1)+mlp", "mamba", "mamba2", "attention+mlp"),
    "windows": ("attention(window=5, keep_first=1)+mlp", "attention(window=9)+mlp"),
}
SIZES: dict[str, Any] = {"rows": 3, "slots": 96, "widths": (16,), "speculates": True}


@functools.cache
def models(name: str, seed: int = 7) -> Pair:
    cfg = model(pattern=PATTERNS[name], n_layers=len(PATTERNS[name]), mamba=small(), vocab_size=V)
    return pair(cfg, random_params(cfg, np.random.default_rng(seed)))


def engine(name: str, framework: str, speculate: int = 7, **options: Any) -> Engine:
    both = models(name)
    if framework == "jax":
        runner: Any = JaxRunner(both.jax, both.params, **SIZES)
    else:
        runner = TorchRunner(both.torch, **SIZES)
    return Engine(runner, Tokenizer.bytes_level(), speculate=speculate, threaded=False, warm_up=False, **options)


class Knowing:
    """Guesses that are right for a random number of tokens, then wrong: every place of a cut, beside every other."""

    def __init__(self, texts: list[Result]) -> None:
        self.most, self._rng = 7, np.random.default_rng(0)
        self._texts = {(id(text.request), i): choice.ids for text in texts for i, choice in enumerate(text.choices)}
        self.counts = np.zeros((8, 8), int)

    def guess(self, growing: Mapping[int, tuple[int, Growing]], _: Any) -> dict[int, list[int]]:
        guesses = {}
        for row, (_, one) in growing.items():
            made = len(one.ids)
            count = min(int(self._rng.integers(0, 8)), one.limit - made - 1)
            ids = [*self._texts[id(one.request), one.index][made : made + count]]
            right = int(self._rng.integers(0, count + 1))
            if ids := ids[:right] + [(token + 1) % V for token in ids[right:]]:
                guesses[row] = ids
        return guesses

    def learn(self, key: int, guessed: int, right: int) -> None:
        self.counts[guessed, right] += 1

    def forget(self, key: int) -> None:
        pass


def requests() -> list[Request]:
    rng = np.random.default_rng(3)
    some = [random_request(rng) for _ in range(5)]
    some.append(Request(PROMPTS[4], sampling=GREEDY, max_new_tokens=24, logprobs=2))
    some.append(Request(PROMPTS[5], sampling=Sampling(repetition_penalty=1.3), max_new_tokens=24, logprobs=0))
    return some


def same(ours: list[Result], theirs: list[Result]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        for choice, twin in zip(one.choices, other.choices, strict=True):
            assert (choice.ids, choice.text, choice.finish) == (twin.ids, twin.text, twin.finish)
            for mine, its in zip(choice.log_probs, twin.log_probs, strict=True):
                assert mine.log_prob == its.log_prob or abs(mine.log_prob - its.log_prob) <= FLOAT64.allowed
                assert [token for token, _ in mine.top] == [token for token, _ in its.top]


def checked(name: str, framework: str, asked: list[Request], texts: list[Result]) -> np.ndarray:
    """The same texts when anything is guessed; returns how often so many of so many guesses were right."""
    other = engine(name, framework)
    knowing: Any = Knowing(texts)
    other._steps._speculation = knowing
    same(run(other, asked), texts)
    return knowing.counts


@functools.cache
def plain(name: str) -> tuple[list[Request], list[Result]]:
    """Requests, and their texts without speculation."""
    asked = requests()
    return asked, run(engine(name, "torch", 0), asked)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_any_guess(framework: str) -> None:
    """Rights and wrongs of every number in neighbouring rows (trap 14): texts and log-probabilities stay."""
    counts = checked("every mixer", framework, *plain("every mixer"))
    assert (counts.sum(axis=0)[:6] > 0).all() and counts.sum() > 20


def test_windows_alone() -> None:
    """Of two sizes, without a state that would be computed again."""
    assert checked("windows", "torch", *plain("windows")).sum() > 20


FAULTS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "a window without room": ("windows", lambda patch: patch.setattr(rows, "empty_rows", without_room)),
    "a state that keeps wrong guesses": (
        "every mixer",
        lambda patch: patch.setattr(rows, "has_states", lambda _: False),
    ),
    "the first guess is not checked": ("windows", lambda patch: patch.setattr(TorchRunner, "verify", believing)),
}


def without_room(decoder: Any, count: int, slots: int, room: int) -> Any:
    return empty_rows(decoder, count, slots)


def believing(runner: TorchRunner, orders: Any, guess: np.ndarray, masks: np.ndarray) -> Any:
    forced = orders.forced.copy()
    forced[0] = guess[0]
    return verify(runner, orders._replace(forced=forced), guess, masks)


empty_rows, verify = rows.empty_rows, TorchRunner.verify


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, plant = FAULTS[fault]
    asked, texts = plain(name)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        checked(name, "torch", asked, texts)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_prompt_lookup(framework: str) -> None:
    """A text that repeats itself takes fewer calls and is the same; forced tokens need no call each."""
    likely = {"logit_bias": {9: 14.0, 10: 13.5}, "sampling": Sampling(temperature=0.3, top_k=2)}
    asked = [
        Request([5, 6, 7, 8] * 8, max_new_tokens=30, logprobs=2, **likely),  # pyright: ignore[reportArgumentType]
        Request([9, 10] * 8, forced=range(20, 34), max_new_tokens=20, logprobs=1),
        Request(PROMPTS[3], sampling=WARM, max_new_tokens=10),
    ]
    calls: dict[int, list[int]] = {}
    texts = []
    for speculate in (0, 7):
        one = engine("every mixer", framework, speculate)
        calls[speculate] = count_calls(one.runner)
        texts.append([one.submit(request).result() for request in asked])
    same(texts[1], texts[0])
    usage = [text.usage for text in texts[1]]
    assert usage[0].accepted > 8 and usage[1].accepted >= 12 and usage[0].drafted >= usage[0].accepted
    assert all(text.usage.drafted == 0 for text in texts[0])
    assert sum(calls[0]) == 60 and sum(calls[7]) < 40, calls


def count_calls(runner: Any) -> list[int]:
    """The forwards of each call of a runner, as they come."""
    decode, check = runner.decode, runner.verify
    calls: list[int] = []

    def counted(orders: Any) -> Any:
        calls.append(int(orders.until))
        return decode(orders)

    def checked_once(*arguments: Any) -> Any:
        calls.append(1)
        return check(*arguments)

    runner.decode, runner.verify = counted, checked_once
    return calls


def test_grammars_with_guesses() -> None:
    """Texts that follow a grammar are the same, and what it forces takes no call of its own."""
    pytest.importorskip("llguidance", reason="the extra `grammar` is not installed")
    schema = '{"type": "object", "properties": {"name": {"enum": ["abcdefgh", "x"]}}, "required": ["name"]}'
    grammars = [Grammar(json_schema=schema), Grammar(regex="(abcdef|abczzz){2}[0-9]"), None]
    asked = [
        Request("a", grammar=one, max_new_tokens=40, sampling=Sampling(temperature=1.3), seed=i, n=1 + (i < 1))
        for i, one in enumerate(grammars)
    ]
    texts = [run(engine("windows", "torch", speculate, ends=(256,)), asked) for speculate in (0, 7)]
    same(texts[1], texts[0])
    assert texts[1][1].usage.accepted >= 6 and texts[0][1].finish == "stop"


def drafting(name: str, framework: str, seed: int, **sizes: Any) -> Any:
    """The runner of a draft: the model itself with seed 7, another one with any other."""
    both, sizes = models(name, seed), {**SIZES, **sizes}
    return JaxRunner(both.jax, both.params, **sizes) if framework == "jax" else TorchRunner(both.torch, **sizes)


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("seed", [7, 8])
def test_a_draft_model(framework: str, seed: int) -> None:
    """Texts are those without a draft; a draft that is the model itself is right but for penalties and bias."""
    asked, texts = plain("every mixer")
    found = run(engine("every mixer", framework, draft=drafting("every mixer", framework, seed)), asked)
    same(found, texts)
    drafted, accepted = (sum(getattr(one.usage, what) for one in found) for what in ("drafted", "accepted"))
    assert drafted > 20
    easy = [Request(PROMPTS[i], sampling=Sampling(top_k=40), max_new_tokens=17, seed=i) for i in range(3)]
    other = engine("every mixer", framework, draft=drafting("every mixer", framework, seed))
    usage = [one.usage for one in run(other, easy)]
    if seed == 7:
        assert [one.accepted for one in usage] == [one.drafted for one in usage]
        assert all(one.accepted + one.checks >= 16 and one.checks <= 5 for one in usage), usage
    else:
        assert accepted < drafted / 4


def test_a_draft_that_lags(monkeypatch: pytest.MonkeyPatch) -> None:
    """It catches up by a chunk a call, where texts grew without it, and where a text took another's row."""
    monkeypatch.setattr(Speculation, "guess", sometimes(Speculation.guess))
    asked = [Request([*range(i, i + 40)], sampling=WARM, max_new_tokens=20, seed=i, logprobs=1) for i in range(5)]
    asked += [Request([3, i], sampling=GREEDY, max_new_tokens=9) for i in range(4)]
    texts = run(engine("windows", "torch", 0), asked)
    found = run(engine("windows", "torch", draft=drafting("windows", "torch", 7)), asked)
    same(found, texts)
    assert all(one.usage.accepted == one.usage.drafted > 0 for one in found[5:])


def test_a_draft_that_overflowed() -> None:
    """NaN that an earlier text left in its rows reaches no later one; without finite logits it guesses nothing."""
    asked = [Request(PROMPTS[0], sampling=Sampling(top_k=40), max_new_tokens=17)]
    draft, (text,) = drafting("every mixer", "jax", 7), run(engine("every mixer", "jax"), asked)
    whole, none = draft.params, functools.partial(jax.tree.map, lambda leaf: jnp.full_like(leaf, jnp.nan))
    rows = (
        RowCache(*none(layer[:2]), layer.row) if isinstance(layer, RowCache) else layer for layer in draft.state.cache
    )
    draft.state = draft.state._replace(cache=tuple(rows))
    for params, some in ((whole, True), (none(whole), False)):
        draft.params = params
        (found,) = run(engine("every mixer", "jax", draft=draft), asked)
        assert found.choices == text.choices
        assert found.usage.accepted == found.usage.drafted and bool(found.usage.drafted) is some


def sometimes(guess: Any) -> Any:
    """The guesses of every third call are not looked at, so texts grow otherwise."""
    calls = itertools.count()

    def some(*arguments: Any) -> dict[int, list[int]]:
        guesses = guess(*arguments)
        return guesses if next(calls) % 3 else {}

    return some


def test_a_draft_with_states_that_keeps_wrong_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault. The text stays, but the draft is no longer right after it was wrong once."""
    options: dict[str, Any] = {"sampling": Sampling(top_k=40), "max_new_tokens": 24}
    (free,) = run(engine("every mixer", "torch", 0), [Request(PROMPTS[1], **options)])

    def accepted() -> int:
        made = engine("every mixer", "torch", draft=drafting("every mixer", "torch", 7))
        (found,) = run(made, [Request(PROMPTS[1], forbidden=free.ids[2:3], **options)])
        return found.usage.accepted

    whole = accepted()
    monkeypatch.setattr(Draft, "_states", lambda *_: {})
    assert accepted() < whole / 2


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 40))])
@pytest.mark.parametrize("guesses", ["lookup", "draft"])
def test_random_schedules(guesses: str, seed: int) -> None:
    """Arrivals, cancels, choices, reuse, guesses: each request as it is alone, which is as it is without guesses."""
    framework = "torch" if seed % 2 == 0 else "jax"
    options = {"draft": drafting("every mixer", framework, 7)} if guesses == "draft" else {}
    one = engine("every mixer", framework, prefix_memory=1 << 20, **options)
    schedule(one, seed, 4 if seed == 0 else 10, nearly, engine("every mixer", framework, 0))


def test_mistakes() -> None:
    with pytest.raises(UserError, match="speculate = 9"):
        engine("windows", "torch", 9)
    for sizes, line in (({"rows": 2}, "2 rows, the engine 3"), ({"slots": 90}, "90 tokens a row, the engine 96")):
        with pytest.raises(UserError, match=f"the draft has {line}"):
            engine("windows", "torch", draft=drafting("windows", "torch", 7, **sizes))
    with pytest.raises(UserError, match="speculate = 0"):
        engine("windows", "torch", 0, draft=drafting("windows", "torch", 7))
    with pytest.raises(UserError, match="no room for tokens"):
        engine("windows", "torch", draft=drafting("windows", "torch", 7, speculates=False))
    runner = TorchRunner(models("windows").torch, **{**SIZES, "speculates": False})
    with pytest.raises(UserError, match="no room for speculation"):
        Engine(runner, speculate=2)
