"""Inner functions of one `def` share their checks: every call is checked, and each runs its own function."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable

import jaxtyping
import numpy as np
import pytest
from beartype import beartype
from jaxtyping import Float, TypeCheckError

from tests.shared_checks import sharing

decorations: list[str] = []


def counted(fn: Callable) -> Callable:
    decorations.append(fn.__name__)
    return beartype(fn)


shared = sharing(inspect.unwrap(jaxtyping.jaxtyped))(typechecker=counted)


def adder(number: int) -> Callable:
    @shared
    def add(x: Float[np.ndarray, "rows 3"], *, again: int = number) -> Float[np.ndarray, "rows 3"]:
        return x[:1] if number < 0 else add(x, again=0) + again if again else x + number

    return add


def test_each_runs_its_own_function_with_its_own_default() -> None:
    x = np.zeros((2, 3))
    one, two = adder(1), adder(20)
    made = len(decorations)
    assert (two(x) == 40).all() and (one(x) == 2).all() and (adder(300)(x) == 600).all()
    assert len(decorations) == made, "the third is not decorated anew"
    assert inspect.signature(two).parameters["again"].default == 20 and two.__name__ == "add"


def test_each_call_is_checked() -> None:
    adder(1)
    later = adder(5)
    for wrong in (np.zeros((2, 4)), np.zeros(3), [0.0] * 3):
        with pytest.raises(TypeCheckError):
            later(wrong)
    with pytest.raises(TypeCheckError):
        adder(-1)(np.zeros((2, 3)))  # its rows are not those of x
    assert (later(np.zeros((2, 3))) == 10).all(), "after those that were refused"


@shared
def scaled(x: Float[np.ndarray, "rows 3"], by: float, *, again: bool = False) -> Float[np.ndarray, "rows 3"]:
    return (x * by)[:, :2] if again else x * by


def test_messages_name_the_arguments() -> None:
    x = np.ones((2, 3))
    assert (scaled(x, 2.0) == 2).all() and str(inspect.signature(scaled)) == str(
        inspect.signature(inspect.unwrap(scaled))
    )
    assert type(inspect.signature(scaled)) is inspect.Signature
    with pytest.raises(TypeCheckError, match=r"(?s)parameter 'by'.*'x': .*'by': 'two'.*'again': False"):
        scaled(x, "two")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeCheckError, match=r"(?s)return value .*'again': True"):
        scaled(x, 2.0, again=True)
    with pytest.raises(TypeError, match="missing a required argument: 'by'"):
        scaled(x)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="unexpected keyword argument 'twice'"):
        adder(1)(x, twice=True)


def test_threads_do_not_mix() -> None:
    functions = [adder(number) for number in range(1, 9)]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(200):
            if (functions[number - 1](np.zeros((1, 3))) != 2 * number).any():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_packages_are_decorated_so() -> None:
    assert jaxtyping.jaxtyped is not inspect.unwrap(jaxtyping.jaxtyped)
