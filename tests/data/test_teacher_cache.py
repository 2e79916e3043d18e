"""A teacher's cache: rows get what belongs to them, making goes on, everything that is of something else is refused."""

import dataclasses
import json
import threading
from typing import Any

import numpy as np
import pytest

from jaxlm.data.rows import teacher_cache
from jaxlm.data.rows.teacher_cache import TaughtRows, TeacherCache
from jaxlm.data.rows.validation import HeldOut
from jaxlm.errors import UserError
from jaxlm.text.tokenizer import Tokenizer

T, K, BATCH = 6, 3, 4
ABOUT = {"teacher": "ab12", "temperature": 1.5, "size": K, "tokens": 50, "dtype": "float32"}


def rows_of(numbers: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Rows by number."""
    made = [np.random.default_rng([seed, int(number)]).integers(0, 50, T, np.int32) for number in numbers]
    places = np.broadcast_to(np.arange(T, dtype=np.int32), (len(made), T))
    return {"tokens": np.stack(made), "positions": places, "segments": np.ones_like(places)}


class Numbered:
    """Batches whose state is the number of the next one."""

    def __init__(self, seed: int, batch_size: int, share: np.ndarray) -> None:
        self._seed, self._batch_size, self._share, self._next = seed, batch_size, share, 0

    def __next__(self) -> dict[str, np.ndarray]:
        self._next += 1
        return rows_of((self._next - 1) * self._batch_size + self._share, self._seed)

    def get_state(self) -> dict[str, Any]:
        return {"next_index": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        self._next = state["next_index"]


@dataclasses.dataclass
class Numbers:
    """A source of rows that are functions of their numbers."""

    seed: int = 0
    tokenizer: Tokenizer = dataclasses.field(default_factory=Tokenizer.bytes_level)
    updates_per_phase: int = 1
    side_files: dict = dataclasses.field(default_factory=dict)

    def identity(self) -> dict[str, str]:
        return {"corpus": str(self.seed)}

    def batches(self, *, batch_size: int, rows: np.ndarray | None) -> Numbered:
        return Numbered(self.seed, batch_size, np.arange(batch_size) if rows is None else rows)

    def held_out(self, *, batch_size: int, rows: np.ndarray | None, max_batches: int) -> list[HeldOut]:
        share = np.arange(batch_size) if rows is None else rows

        def batches():
            for batch in range(max_batches):
                yield rows_of(1000 + batch * batch_size + share, self.seed)

        return [HeldOut("", True, batches)]


def teacher(batch: Any) -> dict[str, np.ndarray]:
    """Numbers that are a function of the row."""
    tokens = batch["tokens"]
    ids = np.stack([(tokens + k) % 50 for k in range(K)], axis=-1).astype(np.int32)
    return {"ids": ids, "logps": -ids.astype(np.float32), "rest": tokens.astype(np.float32)}


@pytest.fixture
def taught(tmp_path):
    def make(steps: int = 5, seed: int = 0, batch_size: int = BATCH, **about: Any) -> TaughtRows:
        return TaughtRows(Numbers(seed), TeacherCache(tmp_path / "cache", {**ABOUT, **about}), steps, 2, batch_size)

    return make


def assert_taught(batch: Any) -> None:
    for name, wanted in teacher(batch).items():
        found = batch[f"teacher_{name}"]
        assert found.dtype == wanted.dtype and np.array_equal(found, wanted), name


def test_each_row_has_its_own_in_any_process_and_after_a_stop(taught, monkeypatch):
    monkeypatch.setattr(teacher_cache, "SHARD_BYTES", 700)  # several shards, so that a batch may need two of them
    assert taught().teach(teacher) == {"train": 20, "held_out-0": 8}
    assert len(list(taught().cache.folder.glob("train-*.safetensors"))) > 2
    whole = taught().batches(batch_size=BATCH, rows=None)
    for _ in range(5):
        assert_taught(next(whole))
    with pytest.raises(UserError, match="has 20 rows of the set 'train', the run needs 24"):
        next(whole)
    share = taught(steps=2).batches(batch_size=10, rows=np.array([1, 7]))
    share.set_state({"next_index": 1})
    batch = next(share)
    assert_taught(batch)
    assert (
        np.array_equal(batch["tokens"], rows_of(np.array([11, 17]), 0)["tokens"])
        and share.get_state()["next_index"] == 2
    )
    source = taught()
    assert source.identity() == {"corpus": "0", "teacher": f"ab12 {K}"} and source.side_files == {}
    (held_out,) = source.held_out(batch_size=2, rows=None, max_batches=4)
    batches = list(held_out.batches())
    assert len(batches) == 4
    for batch in batches:
        assert_taught(batch)


def test_making_goes_on(taught, monkeypatch):
    def stops(batch: Any) -> dict[str, np.ndarray]:
        if np.array_equal(batch["tokens"], rows_of(12 + np.arange(BATCH), 0)["tokens"]):
            raise KeyboardInterrupt
        return teacher(batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(teacher_cache, "SHARD_BYTES", 1)
        taught().teach(stops)
    folder = taught().cache.folder
    first = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert len(first) == 3
    asked: list[np.ndarray] = []
    assert taught(steps=7).teach(lambda batch: asked.append(batch["tokens"]) or teacher(batch))["train"] == 28
    assert len(asked) == 4 + 2 and np.array_equal(asked[0], rows_of(12 + np.arange(BATCH), 0)["tokens"])
    assert all((folder / name).read_bytes() == content for name, content in first.items())
    batches = taught(steps=7).batches(batch_size=BATCH, rows=None)
    for _ in range(7):
        assert_taught(next(batches))
    with pytest.raises(UserError, match="no whole number of batches of 3"):
        taught(batch_size=3).teach(teacher)


def test_what_is_of_something_else_is_refused(taught):
    def refused(message: str, **options: Any) -> None:
        source = taught(**options)
        with pytest.raises(UserError, match=message):
            source.identity()
            next(source.batches(batch_size=BATCH, rows=None))

    refused(r"has 0 rows of the set 'train', the run needs 20")
    taught().teach(teacher)
    refused("has 20 rows of the set 'train', the run needs 24", steps=6)
    refused("another teacher, by the sha256 of its parameters: ab12 there, cd34 here", teacher="cd34")
    refused(r"another distill\.temperature: 1\.5 there, 2\.0 here", temperature=2.0)
    refused(r"another distill\.cache_size", size=4)
    refused(r"another numerics\.params", dtype="float64")
    refused("made of other rows", seed=1)
    folder = taught().cache.folder
    shard = folder / "train-0.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    refused("train-0.safetensors: .* it was cut short")
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused("train-0.safetensors: .* it was changed")
    shard.unlink()
    refused("train-0.safetensors: missing")
    (folder / "manifest.json").write_text(json.dumps({"about": 3}))
    refused("is no manifest of a cache")


def test_rows_of_other_data_are_never_added(taught):
    """Neither a cache that would be whole, nor one that would be made longer, nor where it is shorter than before."""
    taught(steps=3).teach(teacher)
    manifest = taught().cache.folder / "manifest.json"
    before = manifest.read_bytes()
    for steps in (2, 3, 7):
        with pytest.raises(UserError, match="made of other rows"):
            taught(steps=steps, seed=1).teach(teacher)
    assert manifest.read_bytes() == before
    assert taught(steps=2).teach(teacher)["train"] == 12


def test_two_teachers_write_one_after_the_other(taught):
    """The second begins, has the rows as they were then, and waits; so it adds nothing."""
    late = taught()
    late.cache.open()
    asked: list[np.ndarray] = []

    def counted(batch: Any) -> dict[str, np.ndarray]:
        asked.append(batch["tokens"])
        return teacher(batch)

    def while_another_begins(batch: Any) -> dict[str, np.ndarray]:
        if not asked:
            thread.start()
            thread.join(0.1)
        return counted(batch)

    thread = threading.Thread(target=late.teach, args=(counted,))
    taught().teach(while_another_begins)
    thread.join(30)
    assert len(asked) == 5 + 2 and not thread.is_alive()
    assert len(json.loads((late.cache.folder / "manifest.json").read_text())["shards"]["train"]) == 1
