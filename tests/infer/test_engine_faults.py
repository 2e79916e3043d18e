"""Faults planted in the engine, each seen by the test that is there for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jaxlm.infer.engine import Engine, Grammar, Request
from jaxlm.infer.engine.on_jax import programs
from jaxlm.infer.engine.on_jax.runner import JaxRunner
from jaxlm.infer.engine.orders import RowOrders
from jaxlm.infer.engine.prefix import PrefixTable
from jaxlm.infer.engine.runner import Orders
from jaxlm.infer.engine.structured import Guide
from jaxlm.text.tokenizer import Tokenizer
from tests.infer.test_engine import engine, runner, schedule
from tests.infer.test_structured import NumpyRunner

__all__ = ["engine", "runner"]  # fixtures

Plant = Callable[[pytest.MonkeyPatch, Any], None]


def a_number_by_row(patch: pytest.MonkeyPatch, runner: JaxRunner) -> None:
    make = RowOrders.make

    def shifted(*arguments: Any) -> Any:
        orders, steps = make(*arguments)
        orders.uniforms[:] = (orders.uniforms + np.arange(runner.rows) / 7) % 1
        return orders, steps

    patch.setattr(RowOrders, "make", shifted)


def a_snapshot_one_token_late(patch: pytest.MonkeyPatch, runner: JaxRunner) -> None:
    keep = runner.keep

    def late(row: int, start: int) -> Any:
        own = keep(row, start)
        runner.prefill(row, [7], start + runner.widths[-1], runner.widths[0])
        kept = keep(row, start)
        runner.put_back(row, start, own)
        return kept

    patch.setattr(runner, "keep", late)


def a_row_that_is_not_emptied(patch: pytest.MonkeyPatch, runner: JaxRunner) -> None:
    patch.setattr(runner, "reset", lambda *_, **__: None)


@pytest.mark.parametrize(
    ("plant", "harmless"),  # where every layer has slots with positions, which are masked
    [(a_number_by_row, False), (a_snapshot_one_token_late, True), (a_row_that_is_not_emptied, True)],
)
def test_faults_in_rows(
    plant: Plant, harmless: bool, engine: Engine, runner: JaxRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traps 4, 12 and 13. What is left of another text harms states only: slots behind the text are never seen."""
    engine.prefixes.memory = 1 << 20
    plant(monkeypatch, runner)
    lives = lambda: [schedule(engine, seed) for seed in range(3)]  # noqa: E731
    if harmless and "mamba" not in runner.decoder.config.pattern:
        lives()
        return
    with pytest.raises(AssertionError):
        lives()


def test_a_salt_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 24."""
    asked = [Request([5] * 40, max_new_tokens=1, tenant=tenant) for tenant in ("a", "b")]

    def hits() -> int:
        numpy_runner: Any = NumpyRunner(300)
        numpy_runner.kept_bytes = lambda _: 1
        made = Engine(numpy_runner, prefix_memory=1 << 10, threaded=False)
        for request in asked:  # one after the other
            made.submit(request).result()
        return made.prefixes.counts.hits

    assert hits() == 0
    names = PrefixTable.names
    monkeypatch.setattr(PrefixTable, "names", lambda table, ids, tenant: names(table, ids, ""))
    assert hits() > 0


def test_a_mask_one_step_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a grammar allowed before the newest token is not what it allows now."""
    pytest.importorskip("llguidance", reason="the extra `grammar` is not installed")
    tokenizer = Tokenizer.bytes_level()
    request = Request("a", grammar=Grammar(regex="[a-f]{2,5}-[0-9]{1,3}"), max_new_tokens=30)

    def text() -> str:
        numpy_runner: Any = NumpyRunner(tokenizer.vocab_size)
        with Engine(numpy_runner, tokenizer, ends=[tokenizer.special("eot")], threaded=False) as made:
            return made.submit(request).result().text

    assert re.fullmatch("[a-f]{2,5}-[0-9]{1,3}", text())
    allow, before = Guide.allow, []

    def late(guide: Guide, mask: np.ndarray, row: int) -> str:
        allow(guide, mask, row)
        before.append(mask[row].copy())
        mask[row] = before[-2:][0]
        return ""

    monkeypatch.setattr(Guide, "allow", late)
    assert not re.fullmatch("[a-f]{2,5}-[0-9]{1,3}", text())


def test_no_cache_is_copied(runner: JaxRunner) -> None:
    """The compiled step writes each cache in place: no copy of a whole one."""
    orders = Orders.empty(runner.rows, runner.vocab)
    lowered = programs.decode.lower(programs.Placed(runner.decoder), runner.params, runner.state, orders)
    text = lowered.compile().as_text() or ""
    slots = runner.slots
    assert not re.search(rf"= f32\[{runner.rows},2,({slots},8|8,{slots})\]\S* copy\(", text)
