"""The rows of a run with all parts on: the same for any number of processes, before and after a stop."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jaxlm import config
from jaxlm.config import toml
from jaxlm.data.packing.stream import PackedRows
from jaxlm.data.pipeline import TrainBatches, make_train_iterator, make_validation_batches, prepare
from jaxlm.data.rows.difficulty import shard_digest
from jaxlm.data.rows.inspect import inspect_corpus
from jaxlm.data.rows.validation import check_watch, held_out_sets, measure
from jaxlm.errors import UserError
from jaxlm.run.directory import compare_with_run, write_run
from jaxlm.text.tokenizer import Tokenizer

WORDS = ("def", "return", "class", "import", "for", "while", "if", "else", "print", "value", "name")


def write_corpus(root: Path, files: int, seed: int, ending: str = ".py") -> Path:
    """Text that looks a little like code, of very different lengths."""
    random = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        lines = [" ".join(random.choice(WORDS, 5)) for _ in range(int(random.integers(1, 60)))]
        (root / f"{i:03}{ending}").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> dict:
    """All parts on: a mixture with a change of weights, middles, best fit, a curriculum."""
    root = tmp_path_factory.mktemp("rows")
    write_corpus(root / "a", 60, 1)
    write_corpus(root / "b", 30, 2, ".sh")
    write_corpus(root / "c", 20, 3, ".txt")
    sources = [
        {"name": "a", "source": str(root / "a"), "weight": [[0, 0.7], [30, 0.2]]},
        {"name": "b", "source": str(root / "b"), "weight": 0.2},
        {"name": "c", "source": str(root / "c"), "weight": 0.1},
    ]
    data = {"cache_dir": str(root / "cache"), "seq_len": 96, "packing": "best_fit", "mixture": sources}
    data |= {
        "fim": {"rate": 0.5},
        "curriculum": {"by": "length", "steps": 40, "start": 0.2},
        "validation_fraction": 0.2,
    }
    return {"data": data, "tokenizer": {"kind": "bytes"}, "train": {"batch_size": 8, "steps": 400}}


@pytest.fixture(scope="module")
def settings(tree) -> config.Config:
    return toml.from_dict(tree)


def changed(tree: dict, **data) -> config.Config:
    return toml.from_dict({**tree, "data": {**tree["data"], **data}})


def batches(cfg: config.Config, rows: np.ndarray | None = None) -> TrainBatches:
    options = {"batch_size": cfg.train.batch_size, "seed": cfg.seed}
    return make_train_iterator(cfg.data, prepare(cfg), rows=rows, **options)


def take(iterator, count: int) -> list[dict[str, np.ndarray]]:
    return [next(iterator) for _ in range(count)]


def assert_equal(left, right) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys() == {"tokens", "targets", "positions", "segments", "weights"}
        for name in a:
            assert a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name]), name


def test_without_new_options_rows_are_those_of_packed_rows(tmp_path):
    write_corpus(tmp_path / "a", 30, 1)
    data = {"source": str(tmp_path / "a"), "cache_dir": str(tmp_path / "cache"), "seq_len": 64}
    cfg = toml.from_dict({"data": data, "tokenizer": {"kind": "bytes"}, "train": {"batch_size": 8}})
    corpus = prepare(cfg)
    packed = PackedRows(corpus.train, 64, seed=cfg.seed, pad=corpus.tokenizer.pad)
    iterator = batches(cfg)
    for number in range(30):
        expected = packed[np.arange(8) + 8 * number]._asdict()
        assert_equal([next(iterator)], [expected])
    assert iterator.get_state() == {"next_index": 30}
    [only] = held_out_sets(cfg.data, corpus, batch_size=8)
    assert (only.name, only.in_total) == ("", True)
    assert_equal(list(only.batches()), list(make_validation_batches(cfg.data, corpus, batch_size=8)))


@pytest.mark.parametrize("processes", [2, 4])
def test_the_global_batch_is_the_same_for_any_number_of_processes(settings, processes):
    whole = take(batches(settings), 40)
    shares = np.split(np.arange(8), processes)
    each = [take(batches(settings, share), 40) for share in shares]
    joined = [
        {name: np.concatenate([parts[i][name] for parts in each]) for name in whole[0]} for i in range(len(whole))
    ]
    assert_equal(joined, whole)


@pytest.mark.parametrize("stopped", [0, 1, 29, 30, 55])
def test_stopped_in_one_process_and_resumed_in_two(settings, stopped):
    first = batches(settings)
    take(first, stopped)
    state = json.loads(json.dumps(first.get_state()))
    expected = take(first, 10)
    halves = []
    for share in (np.arange(4), np.arange(4, 8)):
        fresh = batches(settings, share)
        take(fresh, 2)  # what was read ahead must not appear
        fresh.set_state(state)
        halves.append(take(fresh, 10))
    joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*halves, strict=True)]
    assert_equal(joined, expected)


def test_weights_may_change_on_resume_from_the_next_step_on(tree, settings):
    first = batches(settings)
    seen = take(first, 20)
    state = json.loads(json.dumps(first.get_state()))
    mixture = [dict(one) for one in tree["data"]["mixture"]]
    mixture[0]["weight"] = 0.05
    other = changed(tree, mixture=mixture)
    resumed = batches(other)
    resumed.set_state(state)
    rows = resumed.rows
    source, number = rows.mixture[np.arange(20 * 8 + 800)]
    old = first.rows.mixture[np.arange(20 * 8)]
    assert np.array_equal(source[:160], old[0]) and np.array_equal(number[:160], old[1])
    for i in range(3):
        assert np.array_equal(number[source == i], np.arange((source == i).sum())), "nothing lost, nothing repeated"
    assert (source[160:] == 0).mean() < 0.3 < (source[:160] == 0).mean()
    take(resumed, 5)
    again = batches(other)
    again.set_state(json.loads(json.dumps(resumed.get_state())))
    assert_equal(take(again, 3), take(resumed, 3))
    back = batches(settings)
    back.set_state(state)
    assert len(back.get_state()["mixture"]) == 1, "unchanged shares are no change"
    assert len(seen) == 20


@pytest.mark.parametrize(
    "change", [{"fim": {"rate": 0.4}}, {"packing": "stream"}, {"curriculum": {}}, {"min_tokens": 9}]
)
def test_what_would_make_other_rows_may_not_change(tree, tmp_path, change):
    """Weights may: the corpora go on where they stand."""
    settings = toml.from_dict({**tree, "out_dir": str(tmp_path / "run")})
    write_run(settings, Tokenizer.bytes_level())
    mixture = [{**one, "weight": 0.5} for one in tree["data"]["mixture"]]
    told: list[str] = []
    compare_with_run(dataclasses.replace(changed(tree, mixture=mixture), out_dir=settings.out_dir), told.append)
    assert len(told) == 1 and "data.mixture" in told[0]
    other = dataclasses.replace(changed(tree, **change), out_dir=settings.out_dir)
    with pytest.raises(
        UserError, match=rf"data\.{next(iter(change))}.*the run was made with.*weights and caps may change"
    ):
        compare_with_run(other, told.append)


def test_shares_are_delivered_as_planned(settings):
    iterator = batches(settings)
    take(iterator, 30)
    tokens = iterator.delivered()
    shares = np.array(list(tokens.values())) / sum(tokens.values())
    assert list(tokens) == ["a", "b", "c"]
    assert shares == pytest.approx([0.7, 0.2, 0.1], abs=0.04)
    take(iterator, 90)
    shares = np.array(list(iterator.delivered().values()))
    assert shares / shares.sum() == pytest.approx([0.4, 0.4, 0.2], abs=0.03)


def test_each_source_is_shuffled_anew_in_every_epoch(settings):
    rows = batches(settings).rows
    a = rows.sources[0].rows
    first = [tuple(a.pieces(i).begins.tolist()) for i in range(a.rows_per_epoch)]
    second = [tuple(a.pieces(i + a.rows_per_epoch).begins.tolist()) for i in range(a.rows_per_epoch)]
    assert first != second and sorted(sum(map(len, first)) for _ in "a") == sorted(sum(map(len, second)) for _ in "a")


def test_a_far_step_costs_what_the_first_costs(settings):
    """O(1): the plan of one epoch, whatever came before."""
    rows = batches(settings).rows
    far = rows[np.arange(8) + 8 * 10**6]
    alone = batches(settings).rows[np.arange(8) + 8 * 10**6]
    assert all(np.array_equal(x, y) for x, y in zip(far, alone, strict=True))
    assert len(rows.sources[0].rows._rows._plans) <= 2


def test_the_mixture_ends_when_all_are_through(tree):
    mixture = [{**one, "max_epochs": 2, "weight": 1.0} for one in tree["data"]["mixture"]]
    cfg = changed(tree, mixture=mixture, curriculum={})
    iterator = batches(cfg)
    rows = iterator.rows
    assert iterator.count == sum(2 * source.rows.rows_per_epoch for source in rows.sources) // 8
    take(iterator, iterator.count)
    one = changed(
        tree, mixture=[{**part, "weight": 1.0} for part in tree["data"]["mixture"]], stop_with="c", curriculum={}
    )
    stopped = batches(one)
    counts = stopped.rows.mixture.counts(int(stopped.rows.mixture.end))
    assert counts[2] == stopped.rows.sources[2].rows.rows_per_epoch


def test_held_out_sets_by_corpus_language_and_middle(settings):
    corpus = prepare(settings)
    sets = held_out_sets(settings.data, corpus, batch_size=8, by_language=True)
    assert [(one.name, one.in_total) for one in sets] == [
        *(("a", True), ("b", True), ("c", True)),
        *(("python", False), ("shell", False), ("text", False)),
        ("fim", False),
    ]
    tokens = {one.name: sum(batch["weights"].sum() for batch in one.batches()) for one in sets}
    assert tokens["a"] == tokens["python"] == corpus.parts[0].shards.validation.trained_tokens
    assert 0 < tokens["fim"] < tokens["a"], "middles alone"

    def evaluate(held_out) -> dict[str, float]:
        weight = float(sum(batch["weights"].sum() for batch in held_out))
        return {"nll": 2 * weight, "weight": weight}

    total, losses = measure(sets, evaluate)
    assert total["weight"] == tokens["a"] + tokens["b"] + tokens["c"]
    assert set(losses) == set(tokens) and set(losses.values()) == {2.0}
    check_watch("fim", sets)
    with pytest.raises(UserError, match=r"eval\.watch = 'shel' is not measured \(did you mean 'shell'\?\)"):
        check_watch("shel", sets)


def test_inspection_shows_any_step(settings):
    report = inspect_corpus(settings, step=200, rows=3)
    console = Console(record=True, width=140)
    console.print(report)
    text = console.export_text()
    assert "share planned" in text and "share delivered" in text and "of padding" in text
    assert re.search(r"\[segment 1: \d+ tokens, \d{3}\.(py|sh|txt), tokens", text)
    numbers = np.arange(3) + 199 * 8
    arrays = batches(settings).rows[numbers]
    for i, row in enumerate(report.rows):
        shown = row.as_dict()
        assert {"tokens", "segments", "positions", "weights", "source"} <= shown.keys()
        assert shown["tokens"] == arrays.tokens[i].tolist()
        assert len(shown["pieces"]) == max(shown["segments"])
        assert row.padding == int((arrays.segments[i] == 0).sum())
    for one in report.sources:
        assert one.planned == pytest.approx(one.delivered, abs=0.01)
    with pytest.raises(UserError, match="--step 401: the run has the steps 1 to 400"):
        inspect_corpus(settings, step=401)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": {"kind": "bytes", "specials": False}}, r"data\.fim: the tokenizer has no fim_prefix.*fim_marks"),
        ({"data": {"seq_len": 8}}, r"data\.seq_len = 8 leaves no room for fill-in-the-middle"),
        ({"data": {"curriculum": {"by": "level", "steps": 5}}}, r"no number 'level' \(data\.curriculum\.by\)"),
        ({"data": {"curriculum": {"by": "loss", "steps": 5, "scores": "x.npy"}}}, "x.npy: not a file of scores"),
        (
            {"data": {"curriculum": {"by": "length", "steps": 999}}},
            r"curriculum\.steps = 999 is more than train\.steps",
        ),
        ({"data": {"languages": ["pyton"]}}, r"data\.languages: 'pyton' is unknown \(did you mean 'python'\?\)"),
        ({"data": {"source": "/nowhere/*.jsonl"}}, "no file matches"),
        ({"data": {"row_files": [".xml"]}}, r"'\.xml' is not \.csv, \.tsv or \.json"),
    ],
)
def test_bad_input_is_one_line(tmp_path, change, message):
    write_corpus(tmp_path / "a", 6, 1)
    data = {"source": str(tmp_path / "a"), "cache_dir": str(tmp_path / "cache"), "seq_len": 64, "fim": {"rate": 0.5}}
    tree = {"data": data | change.get("data", {}), "tokenizer": change.get("tokenizer", {"kind": "bytes"})}
    tree["train"] = {"steps": 100, "batch_size": 4}
    with pytest.raises(UserError, match=message) as caught:
        batches(toml.from_dict(tree))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (0, "is 0 throughout: remove the corpus"),
        (-1, r"weight = -1\.0 must be 0 or more"),
        (float("nan"), r"data\.mixture\.a\.weight = nan: input should be a finite number"),
        ([[0, 1], [10, 0]], "all weights are 0 at step 10"),
        ([[5, 1]], "the first step of a list must be 0"),
        ([[0, 1], [0, 2]], "the steps must rise"),
        ([[0, 1], [400, 2]], r"a weight from step 400 on, train\.steps = 400"),
    ],
)
def test_bad_weights_are_one_line(tree, weight, message):
    with pytest.raises(UserError, match=message):
        changed(tree, mixture=[{**tree["data"]["mixture"][0], "weight": weight}])


def test_two_corpora_of_one_name_and_a_corpus_smaller_than_a_row(tree, tmp_path):
    one = tree["data"]["mixture"][0]
    with pytest.raises(UserError, match="two corpora have the name 'a'"):
        changed(tree, mixture=[one, one])
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "x.txt").write_text("few words\n")
    with pytest.raises(UserError, match=r"data\.mixture\.tiny: its \d+ training tokens do not fill one row of 96"):
        batches(changed(tree, mixture=[one, {"name": "tiny", "source": str(tmp_path / "tiny")}]))


def test_a_weight_is_an_override(tree, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(toml.to_toml(toml.from_dict(tree)))
    cfg = toml.load(path, ["data.mixture.b.weight=0.5"])
    assert [one.weight for one in cfg.data.mixture][1] == 0.5
    with pytest.raises(UserError, match=r"there is no 'd'"):
        toml.load(path, ["data.mixture.d.weight=0.5"])
    with pytest.raises(UserError, match=r"unknown key 'data\.mixture\.wait' \(did you mean 'weight'\?\)"):
        toml.load(path, ["data.mixture.b.wait=0.5"])


def test_scores_of_another_tokenizer_or_corpus_are_refused(tree, tmp_path):
    cfg = changed(tree, mixture=[], source=tree["data"]["mixture"][0]["source"], curriculum={})
    corpus = prepare(cfg)
    shard, path = corpus.train, tmp_path / "scores.npy"
    wanted = np.random.default_rng(0).random(shard.documents)
    np.save(path, wanted)
    kept = {
        "tokenizer": corpus.tokenizer.fingerprint(),
        "corpora": [shard_digest(shard)],
        "documents": [shard.documents],
    }

    def ordered(kept: dict) -> TrainBatches:
        path.with_suffix(".json").write_text(json.dumps(kept))
        curriculum = {"by": "loss", "steps": 40, "scores": str(path), "start": 0.05}
        return batches(changed(tree, mixture=[], source=tree["data"]["mixture"][0]["source"], curriculum=curriculum))

    rows = ordered(kept).rows
    pieces = rows.sources[0].rows.pieces(int(rows.place(np.array([0]))[1][0]))
    assert wanted[[shard.document_at(int(b)) for b in pieces.begins]].mean() < 0.5, "an easy row comes first"
    with pytest.raises(UserError, match="the scores are of another tokenizer"):
        ordered({**kept, "tokenizer": "0" * 64})
    with pytest.raises(UserError, match="the scores are of another corpus"):
        ordered({**kept, "corpora": ["0" * 64]})


def test_a_curriculum_by_a_field_and_rows_of_csv_and_json(tmp_path):
    rows = [{"question": f"what is {i}", "answer": f"it is {i}, of course " * 4, "level": i} for i in range(40)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    lines = ["question,answer,level", *(f'"what, {i}","a ""quoted""\nline",{i}' for i in range(40))]
    (tmp_path / "b.csv").write_text("\n".join(lines) + "\n")
    data = {
        "source": [str(tmp_path / "a.json"), str(tmp_path / "*.csv")],
        "template": "{question}\n{answer}",
        "row_files": [".csv", ".json"],
        "cache_dir": str(tmp_path / "cache"),
        "seq_len": 64,
        "packing": "best_fit",
        "curriculum": {"by": "level", "steps": 10, "start": 0.1},
    }
    cfg = toml.from_dict({"data": data, "tokenizer": {"kind": "bytes"}, "train": {"batch_size": 4, "steps": 20}})
    corpus = prepare(cfg)
    text = corpus.tokenizer.decode(corpus.train.tokens.tolist())
    assert 'a "quoted"\nline' in text and "what, 3\n" in text and "what is 7\nit is 7" in text
    rows_of_run = batches(cfg).rows
    values = corpus.train.values
    assert values is not None
    first = rows_of_run.sources[0].rows.pieces(int(rows_of_run.place(np.array([0]))[1][0]))
    levels = values[[corpus.train.document_at(int(b)) for b in first.begins]]
    assert levels.mean() < 20


@pytest.mark.soak
def test_twenty_kills(settings):
    expected = take(batches(settings), 300)
    random = np.random.default_rng(0)
    seen, state = [], None
    for stop in [*np.sort(random.integers(1, 300, 20)).tolist(), 300]:
        share = np.split(np.arange(8), int(random.choice([1, 2, 4])))
        parts = []
        for rows in share:
            fresh = batches(settings, rows)
            if state:
                fresh.set_state(json.loads(json.dumps(state)))
            parts.append(take(fresh, stop - len(seen)))
            following = fresh.get_state()
        seen += [{n: np.concatenate([p[i][n] for p in parts]) for n in expected[0]} for i in range(stop - len(seen))]
        state = following
    assert_equal(seen, expected)
