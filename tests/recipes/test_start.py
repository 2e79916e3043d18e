"""A pass over all rows before training: what it shows."""

import contextlib
import io
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from rich.console import Console

from jaxlm.config import Config, Model, Train
from jaxlm.recipes import init_from, start
from jaxlm.run import progress
from jaxlm.train.backend import Engine
from jaxlm.train.loop import FrozenFile
from jaxlm.train.recipe import Models, Objective, Recipe, RowFunction


class TwoSets:
    """A source with two sets of rows, three batches and two."""

    tokenizer: Any = None
    updates_per_phase = 1
    identity = batches = held_out = begin_phase = lambda *_: None

    def cache(self, facts: Any, compute: Any, engine: Any) -> None:
        self.numbers = [np.concatenate(list(compute(iter([np.arange(4.0)] * count)))) for count in (3, 2)]


def test_a_frozen_model_tells_once_and_has_one_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    bars: list[str] = []
    rows: list[int] = []

    @contextlib.contextmanager
    def counting(what: str, *, quiet: bool):
        bars.append(what)
        yield rows.append

    monkeypatch.setattr(start, "tell", lines.append)
    monkeypatch.setattr(start, "counting", counting)
    engine, source, nothing = Mock(spec=Engine), TwoSets(), lambda *_: None
    engine.process_index, engine.map_rows = 0, lambda function, batches, trees: batches
    objective = Objective(nothing, nothing, cached=RowFunction(nothing, nothing))
    recipe = Recipe({}, Models({}), objective, nothing, nothing)
    bases = {"base": FrozenFile("", "ab")}
    start._cache_numbers(Config(), recipe, source, engine, None, bases)  # pyright: ignore
    assert [len(numbers) for numbers in source.numbers] == [12, 8] and sum(rows) == 20
    assert len(lines) == len(bars) == 1 and "the frozen base" in lines[0] and "the frozen base" in bars[0]


@pytest.mark.parametrize("shown", [True, False])
def test_a_bar_counts_and_a_library_is_quiet(monkeypatch: pytest.MonkeyPatch, shown: bool) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda *, stderr: Console(file=screen, force_terminal=True))
    monkeypatch.setattr(progress, "shown", lambda: shown)
    with progress.counting("rows of x") as advance:
        for _ in range(3):
            advance(500)
    assert ("rows of x" in screen.getvalue() and "1,500" in screen.getvalue()) if shown else not screen.getvalue()


@pytest.mark.parametrize("head", ["lm", "reward"])
def test_the_model_of_the_start_is_taken_and_a_head_may_be_asked(monkeypatch: pytest.MonkeyPatch, head: Any) -> None:
    base = Config(model=Model(d_model=24, n_layers=3, n_heads=2, n_kv_heads=1, d_ff=40, head=head))
    there, opened = base.model, Mock(config=base, tokenizer_path=None)
    monkeypatch.setattr(init_from, "open_model", lambda path: opened)
    begin = Train(init_from="there")
    assert init_from.with_base(Config(train=begin)).model == there, "a config that says nothing has its head too"
    taken = init_from.with_base(Config(train=begin, model=Model(head="reward"))).model
    assert taken.d_model == 24 and taken.n_layers == 3 and taken.head == "reward"
    other = Config(train=begin, model=Model(d_model=48, head="reward"))
    assert init_from.with_base(other) is other, "a model of its own"
