"""jaxlm: one language model, provably the same in JAX and in PyTorch. The front door:

    model = jaxlm.load("runs/quickstart")                       # a run, a Hugging Face or torch_ref folder, a hub name
    print(model.generate("def add(a, b):", max_new_tokens=32).text)
    logits = model([5, 8, 2])                                   # and model.log_probs, model.hidden, model.to_torch
    engine = model.engine(rows=8)                               # many requests at once: engine.submit(Request(...))
    run = jaxlm.train(jaxlm.load_config("quickstart.toml"))     # a Run: run.metrics, run.checkpoints, run.model()
    jaxlm.convert("runs/quickstart", "exported", to="llama")
    assert jaxlm.check_parity("runs/quickstart").same

Importing the package loads neither jax nor torch; each name loads what it needs when it is first used. Using the
library prints nothing: its messages go to the logger `jaxlm`, and INFO there also shows progress.
"""

from __future__ import annotations

import importlib
import logging
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxlm.config.toml import load as load_config
    from jaxlm.convert.write_model import convert
    from jaxlm.errors import UserError
    from jaxlm.infer.engine import Request
    from jaxlm.infer.load import load
    from jaxlm.infer.model import Model
    from jaxlm.infer.trained_run import Run
    from jaxlm.parity.check import check as check_parity
    from jaxlm.recipes.train import train
    from jaxlm.text.sampling import Sampling

__version__ = "0.1.0"
__all__ = [
    "Model",
    "Request",
    "Run",
    "Sampling",
    "UserError",
    "check_parity",
    "convert",
    "load",
    "load_config",
    "train",
]

_PLACES = {
    "Model": ("jaxlm.infer.model", "Model"),
    "Request": ("jaxlm.infer.engine", "Request"),
    "Run": ("jaxlm.infer.trained_run", "Run"),
    "Sampling": ("jaxlm.text.sampling", "Sampling"),
    "UserError": ("jaxlm.errors", "UserError"),
    "check_parity": ("jaxlm.parity.check", "check"),
    "convert": ("jaxlm.convert.write_model", "convert"),
    "load": ("jaxlm.infer.load", "load"),
    "load_config": ("jaxlm.config.toml", "load"),
    "train": ("jaxlm.recipes.train", "train"),
}
_ROOMS = ("convert", "train")  # functions of the front door whose name a folder of jaxlm has too

logging.getLogger(__name__).addHandler(logging.NullHandler())  # else Python prints warnings by itself


def _named(name: str) -> Any:
    module, attribute = _PLACES[name]
    return getattr(importlib.import_module(module), attribute)


class _Room(types.ModuleType):
    """A folder of jaxlm that is also a function: `jaxlm.train(config)` beside `jaxlm.train.step`."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return _named(self.__name__.rpartition(".")[2])(*args, **options)

    @property
    def __signature__(self) -> Any:
        import inspect

        return inspect.signature(_named(self.__name__.rpartition(".")[2]))


class _FrontDoor(types.ModuleType):
    """The package: loads a name when it is first asked for, and makes functions of the folders of the same name."""

    def __getattr__(self, name: str) -> Any:
        if name in _ROOMS:
            return importlib.import_module(f"{__name__}.{name}")
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = _named(name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _ROOMS and isinstance(value, types.ModuleType):  # Python sets a folder once it is imported
            value.__class__ = _Room
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _FrontDoor
