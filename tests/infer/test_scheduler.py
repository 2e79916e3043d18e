"""The scheduler against what it promises, over random lives; the prefix table's names and memory."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxlm.errors import UserError
from jaxlm.infer.engine.prefix import PrefixTable
from jaxlm.infer.engine.scheduler import HEAD_START, Scheduler, next_piece

WIDTHS = (4, 16)


def cut(length: int) -> list[int]:
    """Tokens of the pieces of a prompt."""
    pieces = []
    while length:
        count, width = next_piece(length, WIDTHS)
        assert 0 < count <= width and (count == width or count > width // 2 or width == WIDTHS[0])
        pieces.append(count)
        length -= count
    return pieces


class Life(RuleBasedStateMachine):
    """Texts come, are given rows, take their prompts, draw and go, in any order."""

    @initialize(rows=st.integers(1, 4), budget=st.sampled_from([0, 4, 40]))
    def begin(self, rows: int, budget: int) -> None:
        self.scheduler, self.rows = Scheduler(rows, WIDTHS, budget=budget, most_waiting=12), rows
        self.budget = budget or WIDTHS[-1]
        self.length: dict[int, int] = {}
        self.done: dict[int, list[int]] = {}
        self.row: dict[int, int] = {}
        self.after: dict[int, int] = {}
        self.next = 0

    @precondition(lambda self: len(self.scheduler.waiting) < 12)
    @rule(length=st.integers(0, 60), priority=st.integers(-1, 2), tenant=st.sampled_from("ab"), follow=st.booleans())
    def add(self, length: int, priority: int, tenant: str, follow: bool) -> None:
        after = max(self.length) if follow and self.length else None
        self.scheduler.add(self.next, length, priority=priority, tenant=tenant, after=after)
        if after is not None:
            self.after[self.next] = after
        self.length[self.next] = length
        self.next += 1

    @rule()
    def admit(self) -> None:
        admitted = self.scheduler.admit()
        if admitted is None:
            held = [key for key in self.scheduler.waiting if self.after.get(key) in self.length]
            assert len(self.row) == self.rows or len(held) == len(self.scheduler.waiting)
            return
        key, row = admitted
        assert row not in self.row.values() and 0 <= row < self.rows
        leader = self.after.get(key)
        assert leader not in self.length or sum(self.done.get(leader, [-1])) == self.length[leader]
        self.row[key], self.done[key] = row, []

    @rule()
    def step(self) -> None:
        drawing = any(sum(self.done[key]) == self.length[key] for key in self.row)
        plan = self.scheduler.plan()
        total = 0
        for piece in plan.pieces:
            assert piece.start == sum(self.done[piece.key]) and piece.row == self.row[piece.key]
            self.done[piece.key].append(piece.count)
            total += piece.count
        budget = self.budget if drawing else self.budget * len(self.row)
        assert total <= max(budget, plan.pieces[0].count if plan.pieces else 0)
        assert plan.pieces or all(sum(self.done[key]) == self.length[key] for key in self.row)
        assert dict(plan.draws) == {k: r for k, r in self.row.items() if sum(self.done[k]) == self.length[k]}

    @precondition(lambda self: self.length)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.length)))
        assert self.scheduler.remove(key) == self.row.pop(key, None)
        self.done.pop(key, None)
        del self.length[key]

    @invariant()
    def nobody_is_lost(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        assert {*self.scheduler.waiting} | {*self.row} == {*self.length}
        assert self.scheduler.running == self.row
        for key, pieces in self.done.items():
            assert pieces == cut(self.length[key])[: len(pieces)]


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_texts_that_came_together_begin_together() -> None:
    """The budget of a step counts from the moment that somebody would wait for his next token."""
    scheduler = Scheduler(4, WIDTHS, budget=40)
    for key in range(4):
        scheduler.add(key, 40)
        scheduler.admit()
    assert len(scheduler.plan().draws) == 4
    scheduler.remove(0)
    scheduler.remove(1)
    for key in (4, 5):
        scheduler.add(key, 40)
        scheduler.admit()
    assert len(scheduler.plan().draws) == 3


def test_nobody_starves() -> None:
    """A text waits while those of a higher priority keep coming, but not for ever."""
    scheduler = Scheduler(1, WIDTHS)
    scheduler.add(0, 1)
    for key in range(1, 4 * HEAD_START):
        scheduler.add(key, 1, priority=2)
        admitted = scheduler.admit()
        assert admitted is not None
        scheduler.remove(admitted[0])
        if admitted[0] == 0:
            assert key > HEAD_START
            return
    raise AssertionError("starved")


def test_tenants_take_turns() -> None:
    scheduler = Scheduler(1, WIDTHS)
    for key in range(20):
        scheduler.add(key, 1, tenant="many")
    scheduler.add(20, 1, tenant="few")
    order = []
    while (admitted := scheduler.admit()) is not None:
        order.append(admitted[0])
        scheduler.remove(admitted[0])
    assert order.index(20) <= 2 and sorted(order) == [*range(21)]


def test_bounds() -> None:
    with pytest.raises(UserError, match="rows = 0"):
        Scheduler(0, WIDTHS)
    scheduler = Scheduler(1, WIDTHS, most_waiting=1)
    scheduler.add(0, 1)
    with pytest.raises(UserError, match="queue is full"):
        scheduler.add(1, 1)


def test_prefixes_are_whole_texts_of_one_tenant() -> None:
    """Trap 24: no hit across tenants. A chunk's name tells all that stands before it."""
    table = PrefixTable(4, 100, "model")
    names = table.names(range(11), "a")
    assert len(names) == 2 and len({*names, *table.names(range(11), "b")}) == 4
    assert table.names([9, *range(1, 8)], "a")[1] != names[1]
    assert PrefixTable(4, 100, "another").names(range(11), "a")[0] != names[0]

    for i, name in enumerate(names):
        table.put(name, i, 40)
    assert table.find(names) == [0, 1] and table.counts.hits == 2
    table.find(names[:1])
    table.put(b"other", 2, 40)
    assert table.counts.bytes == 80 and table.counts.evicted == 1
    assert table.find(names) == [0]  # the least recently used one has left
    table.put(b"large", 3, 101)
    assert b"large" not in table
    table.clear()
    assert table.find(names) == [] and table.counts.bytes == 0
