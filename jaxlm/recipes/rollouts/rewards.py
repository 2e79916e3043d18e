"""Rewards: functions of (prompt, completion, row) that return a number, or None where nothing can be judged.

    rewards = find_rewards(["exact_number", "overlong(longest=64, buffer=16) * 0.5", "my_rewards:polite"])

`row` has the fields of the prompt's record, its `answer`, and of the sample `tokens` (how many were drawn) and `ended`
(end, length or stop). A reward of the user's own is `module:function`, found from where the command runs.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, cast

from jaxlm.errors import UserError, did_you_mean

Row = Mapping[str, Any]
Judge = Callable[..., float | None]


class Reward(NamedTuple):
    """One reward of a run, as its config has it."""

    name: str
    options: Mapping[str, Any]
    weight: float = 1.0

    @property
    def own(self) -> bool:
        """Whether the user wrote it."""
        return ":" in self.name

    def __call__(self, prompt: str, completion: str, row: Row) -> float | None:
        return judge_of(self.name)(prompt, completion, row, **self.options)


def find_rewards(specs: Sequence[str]) -> list[Reward]:
    """The rewards of specifications `name`, `name(option=value) * weight`, `module:function`.

    Raises:
        UserError: none is named, or one does not exist or has no such option.
    """
    if not specs:
        raise UserError("rl.rewards is empty: nothing says what is good", f"known are {', '.join(REWARDS)}")
    return [_parsed(spec) for spec in specs]


def _parsed(spec: str) -> Reward:
    match = re.fullmatch(r"\s*([\w.]+(?::\w+)?)\s*(?:\((.*)\))?\s*(?:\*\s*(-?(?:\d+\.?\d*|\.\d+)))?\s*", spec)
    if not match:
        raise UserError(f"rl.rewards: {spec!r} is no reward", "write name(option=value) * weight")
    name, inside, weight = match[1], match[2] or "", float(match[3] or 1)
    try:
        call: Any = ast.parse(f"f({inside})", mode="eval").body
        options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        raise UserError(f"rl.rewards: {spec!r} is no reward", "write name(option=value) * weight") from None
    if ":" not in name:
        if name not in REWARDS:
            raise UserError(f"no reward {name!r}", did_you_mean(name, REWARDS))
        signature = inspect.signature(REWARDS[name]).parameters
        known = [key for key, value in signature.items() if value.kind is value.KEYWORD_ONLY]
        for key in options:
            if key not in known:
                raise UserError(f"the reward {name} has no option {key!r}", did_you_mean(key, known))
    if name == "reward_model":
        if not options.get("path"):
            raise UserError("the reward reward_model has no path", "reward_model(path='runs/NAME')")
        _scorer(str(options["path"]))  # a model that is not there is known before anything is sampled
    if name == "unit_tests":
        from jaxlm import sandbox

        sandbox.choose()  # and so is a machine on which nothing isolates
    judge_of(name)
    return Reward(name, options, weight)


def judge_of(name: str) -> Judge:
    """The function of a reward's name.

    Raises:
        UserError: there is none.
    """
    if name in REWARDS:
        return REWARDS[name]
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"the reward {name}: {error}", "run where the module is, or install it") from None
    except Exception as error:  # the module is the user's own code
        line = " ".join(str(error).split())
        raise UserError(f"the reward {name}: its module fails: {type(error).__name__}: {line}", "mend it") from None
    function: Any = getattr(module, function_name, None)
    if callable(function):
        return cast(Judge, function)
    raise UserError(f"the reward {name}: {module_name} has no function {function_name!r}")


_NUMBER = r"[-+]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:\s*/\s*\d+)?"
_STATED = re.compile(rf"(?:answer|result)\s*(?:is:?|:|=)\s*({_NUMBER})\s*[.!]?\s*$", re.IGNORECASE | re.MULTILINE)


def stated_answer(text: str) -> Fraction | None:
    """The number that a text states as its answer; None where it states none, or more than one.

    In this order: every `\\boxed{...}`, every line `#### ...`, every line that ends in "answer is ...", or the whole
    last line. A number somewhere in the text is no statement.
    """
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
    marked = re.findall(r"^\s*####(.*)$", text, re.MULTILINE)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for found in (boxed, marked, _STATED.findall(text), lines[-1:]):
        if found:
            numbers = {number_of(one) for one in found}
            return numbers.pop() if len(numbers) == 1 else None
    return None


def number_of(text: str) -> Fraction | None:
    """The number that a text is, whole: signs, commas between thousands, decimals, fractions, `$` and `%` around it."""
    text = text.strip().rstrip(".").removesuffix("%").strip()
    if not re.fullmatch(_NUMBER, text) or not re.search(r"\d", text):
        return None
    value, _, divisor = text.replace("$", "").replace(",", "").partition("/")
    if divisor and not int(divisor):
        return None
    return Fraction(value.strip()) / (int(divisor) if divisor else 1)


def exact_number(prompt: str, completion: str, row: Row) -> float | None:
    """1 where the stated answer is the row's answer as a number, else 0; None for a row without a number."""
    wanted = number_of(str(row.get("answer", "")))
    return None if wanted is None else float(stated_answer(completion) == wanted)


def exact_text(prompt: str, completion: str, row: Row) -> float:
    """1 where the completion is the answer, blanks around it aside."""
    return float(completion.strip() == str(row["answer"]).strip())


def right_letters(prompt: str, completion: str, row: Row) -> float:
    """The share of letters that stand in their place, counted from the left, over the longer of the two."""
    given, wanted = completion.strip(), str(row["answer"]).strip()
    return sum(a == b for a, b in zip(given, wanted, strict=False)) / max(len(given), len(wanted), 1)


def matches(prompt: str, completion: str, row: Row, *, pattern: str = ".*") -> float:
    """1 where the whole completion has the form of a regular expression."""
    return float(re.fullmatch(pattern, completion.strip(), re.DOTALL) is not None)


def json_keys(prompt: str, completion: str, row: Row, *, keys: Sequence[str] = ()) -> float:
    """1 where the completion is a JSON object with exactly these keys; without keys, any JSON."""
    try:
        value = json.loads(completion)
    except ValueError:
        return 0.0
    return float(not keys or (isinstance(value, dict) and set(value) == set(keys)))


def length(prompt: str, completion: str, row: Row, *, per_token: float = 0.01) -> float:
    """`per_token` for every token: below 0 it asks for short answers."""
    return per_token * row["tokens"]


def overlong(prompt: str, completion: str, row: Row, *, longest: int = 256, buffer: int = 64) -> float:
    """0 up to `longest - buffer` tokens, then falling in a line to -1 at `longest` (DAPO, Yu et al. 2025, eq. 13)."""
    over = row["tokens"] - (longest - buffer)
    return 0.0 if over <= 0 else -1.0 if row["tokens"] > longest else -over / buffer


def repetition(prompt: str, completion: str, row: Row, *, words: int = 3) -> float:
    """Minus the share of runs of this many words that were there before (Yeo et al. 2025, appendix B)."""
    spoken = completion.split()
    runs = [tuple(spoken[i : i + words]) for i in range(len(spoken) - words + 1)]
    return len(set(runs)) / len(runs) - 1 if runs else 0.0


def math_verify(prompt: str, completion: str, row: Row) -> float:
    """1 where the package math-verify finds the answer equal to the row's; stated as for `exact_number`, or boxed."""
    package = importlib.import_module("math_verify")
    boxed = re.findall(r"\\boxed\{.*\}", completion)
    if not boxed and stated_answer(completion) is None:
        return 0.0
    gold, given = package.parse(str(row["answer"])), package.parse(boxed[-1] if boxed else completion)
    return float(package.verify(gold, given))


def unit_tests(prompt: str, completion: str, row: Row, *, cpu_seconds: float = 2.0) -> float:
    """1 where a program passes the row's `tests`, which call its function `entry_point`, in two boxes of the sandbox.

    Code comes out of the fences of an answer; a bare body stands behind a prompt that has the function's first line.
    Tests are a program, or a list of its lines, and may also call the function `candidate`. Above a fifth of
    `rl.grader_seconds`, `cpu_seconds` may leave a program that loops for ever without a grade.
    """
    from jaxlm import sandbox
    from jaxlm.eval.code.programs import from_chat

    name, tests = str(row["entry_point"]), row["tests"]
    source = tests if isinstance(tests, str) else "\n".join(tests)
    program = from_chat(completion, prompt if f"def {name}(" in prompt else "", name)
    verdict = sandbox.grade(program, sandbox.Tests(source, names=(name,)), sandbox.Limits(cpu_seconds=cpu_seconds))
    return float(verdict.passed)


def reward_model(prompt: str, completion: str, row: Row, *, path: str = "") -> float:
    """The score of a reward model, the run at `path`, for the completion as an answer to the prompt.

    A verifier's is the probability that the answer is right.
    """
    return scores([(prompt, completion)], path=path)[0]


def scores(answers: Sequence[tuple[str, str]], *, path: str = "") -> list[float]:
    """The scores of many answers (prompt, completion) at once."""
    return [float(score) for score in _scorer(path).score(answers)]


@functools.lru_cache(maxsize=4)
def _scorer(path: str) -> Any:
    return importlib.import_module("jaxlm.infer.scores").Scorer.open(path)


REWARDS: dict[str, Judge] = {
    "exact_number": exact_number,
    "exact_text": exact_text,
    "right_letters": right_letters,
    "matches": matches,
    "json_keys": json_keys,
    "length": length,
    "overlong": overlong,
    "repetition": repetition,
    "math_verify": math_verify,
    "unit_tests": unit_tests,
    "reward_model": reward_model,
}
"""Rewards by name."""
TOGETHER: dict[str, Callable[..., Sequence[float]]] = {"reward_model": scores}
"""Those that judge many answers at once, as `(prompt, completion)`."""
QUICK = frozenset(REWARDS) - {"matches", "math_verify", "unit_tests"}
"""Those that cannot hang: they run where they are called."""
