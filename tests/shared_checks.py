"""Makes jaxtyping's checks cheaper without leaving one out.

Its import hook decorates inner functions too, each time their outer function runs: a thousandth of a second for each
`def` that is reached. The checks depend on the code and on the annotations alone, so all functions of one `def` share
those of the first (an axis that is named by an argument, `{size}`, would need more; there is none). And each call finds
out which argument belongs to which parameter, for which messages alone ask.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import jaxtyping


class Waiting(threading.local):
    """The functions of each thread whose arguments are being checked, the innermost last."""

    def __init__(self) -> None:
        self.functions: list[Callable[..., Any]] = []


def sharing(jaxtyped: Callable[..., Any]) -> Callable[..., Any]:
    """`jaxtyping.jaxtyped` with its checks shared by the inner functions of one `def`."""
    made: dict[tuple[str, CodeType], tuple[Callable[..., Any], Waiting]] = {}

    @functools.wraps(jaxtyped)
    def decorator(*fn: Any, **options: Any) -> Any:
        if fn:  # an older form, which the import hook does not use
            return jaxtyped(*fn, **options)
        decorate = jaxtyped(**options)

        def shared(fn: Any) -> Any:
            if not is_inner(fn):
                return unbound(decorate, fn)
            key = fn.__module__, fn.__code__
            if key not in made:
                waiting = Waiting()
                made[key] = unbound(decorate, stand_in(fn, waiting)), waiting
            return with_checks(fn, *made[key])

        return shared

    return decorator


def is_inner(fn: Any) -> bool:
    """True for a function made in another whose annotations are text, which means the same in each of them."""
    if not isinstance(fn, FunctionType) or "<locals>" not in fn.__qualname__:
        return False
    return all(isinstance(annotation, str) for annotation in fn.__annotations__.values())


def stand_in(fn: FunctionType, waiting: Waiting) -> FunctionType:
    """A function with the signature of `fn`, in whose module its annotations are read; it calls the one that waits."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return waiting.functions.pop()(*args, **kwargs)

    named: Any = FunctionType(call.__code__, fn.__globals__, fn.__name__, None, call.__closure__)
    functools.update_wrapper(named, fn)
    del named.__wrapped__  # it would keep alive what the first function refers to
    named.__signature__ = inspect.signature(fn)
    return named


def with_checks(fn: FunctionType, checked: Callable[..., Any], waiting: Waiting) -> Callable[..., Any]:
    """`fn`, called by way of the checks."""

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        outer = len(waiting.functions)
        waiting.functions.append(fn)
        try:
            return checked(*args, **kwargs)
        finally:
            del waiting.functions[outer:]  # arguments that are refused leave it there

    return call


class UnboundSignature(inspect.Signature):
    """A signature that assigns arguments to parameters when a message asks for them."""

    @classmethod
    def of(cls, fn: Callable[..., Any]) -> UnboundSignature:
        """The signature of a function."""
        found = inspect.signature(fn)
        return cls([*found.parameters.values()], return_annotation=found.return_annotation)

    def bind(self, /, *args: Any, **kwargs: Any) -> Any:
        """A promise of what `inspect.Signature.bind` returns."""
        return Promise(functools.partial(super().bind, *args, **kwargs))


class Promise:
    """The arguments of a call. They are asked for before the checks, in vain, and again after one has failed."""

    def __init__(self, bind: Callable[[], inspect.BoundArguments]) -> None:
        self._bind, self._asked = bind, False

    def apply_defaults(self) -> None:
        """Leave it for later."""

    @property
    def arguments(self) -> dict[str, Any]:
        """None at first; then those of the call, with defaults."""
        if not self._asked:
            self._asked = True
            return {}
        bound = self._bind()
        bound.apply_defaults()
        return bound.arguments


def unbound(decorate: Callable[[Any], Any], fn: Any) -> Any:
    """`decorate(fn)`, with a signature of `fn` that binds late; classes and the like are decorated as they are."""
    if not isinstance(fn, FunctionType):
        return decorate(fn)
    named: Any = fn
    named.__signature__ = UnboundSignature.of(fn)
    checked = decorate(fn)
    del named.__signature__
    checked.__dict__.pop("__signature__", None)  # a copy
    return checked


def share_checks() -> None:
    """Let the import hook decorate by `sharing`; called before the packages that it decorates are imported."""
    jaxtyping.jaxtyped = sharing(jaxtyping.jaxtyped)
