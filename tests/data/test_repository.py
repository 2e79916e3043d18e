"""Repositories: what is imported comes first, circles end, names and paths stand in every row."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm import config
from jaxlm.config import toml
from jaxlm.data import contents
from jaxlm.data.pipeline import make_train_iterator, prepare
from jaxlm.data.repository import dependencies, joined, marks_of, reading_order, rows_of_files, taken_apart
from jaxlm.data.sources import open_source
from jaxlm.errors import UserError
from jaxlm.text.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"app.py": "import util\n", "util.py": ""}, {"app.py": {"util.py"}}),
        (
            {"p/a.py": "from . import b\nfrom .c import d\n", "p/b.py": "", "p/c.py": ""},
            {"p/a.py": {"p/b.py", "p/c.py"}},
        ),
        ({"p/q/a.py": "from ..c import d\n", "p/c.py": ""}, {"p/q/a.py": {"p/c.py"}}),
        ({"src/p/a.py": "import p.b as x\n", "src/p/b.py": ""}, {"src/p/a.py": {"src/p/b.py"}}),
        ({"a.py": "from p import b\n", "p/__init__.py": "", "p/b.py": ""}, {"a.py": {"p/b.py"}}),
        ({"a.py": "import (\n", "b.py": ""}, {}),
        ({"a.c": '#include "in/b.h"\n# include <c.h>\n', "in/b.h": "", "lib/c.h": ""}, {"a.c": {"in/b.h", "lib/c.h"}}),
        (
            {"a.ts": "import {x} from './b.js'\nexport * from \"./d\"\n", "b.ts": "", "d/index.ts": ""},
            {"a.ts": {"b.ts", "d/index.ts"}},
        ),
        ({"a.js": "const x = require('./b')\n", "b.js": ""}, {"a.js": {"b.js"}}),
        (
            {"s/x/A.java": "import x.y.B;\nimport x.z.*;\n", "s/x/y/B.java": "", "s/x/z/C.java": ""},
            {"s/x/A.java": {"s/x/y/B.java", "s/x/z/C.java"}},
        ),
        ({"main.go": 'import (\n\t"example.org/m/sub"\n)\n', "sub/a.go": ""}, {"main.go": {"sub/a.go"}}),
        (
            {"src/main.rs": "mod b;\nuse crate::c::d;\n", "src/b.rs": "", "src/c/mod.rs": ""},
            {"src/main.rs": {"src/b.rs", "src/c/mod.rs"}},
        ),
        (
            {"run.sh": '. "$DIR/lib.sh"\nsource other.sh\n', "lib.sh": "", "other.sh": ""},
            {"run.sh": {"lib.sh", "other.sh"}},
        ),
    ],
)
def test_imports_are_found(files, expected):
    assert {path: found for path, found in dependencies(files).items() if found} == expected


def test_order_by_hand():
    files = {
        "README.md": "",
        "tests/test_a.py": "import a\n",
        "a.py": "import b\nimport c\n",
        "b.py": "import c\n",
        "c.py": "",
        "alone.py": "",
    }
    assert reading_order(dependencies(files)) == ["README.md", "c.py", "b.py", "a.py", "alone.py", "tests/test_a.py"]


def test_circles_end_and_ties_go_by_name():
    circle = {"a.py": {"b.py"}, "b.py": {"c.py"}, "c.py": {"a.py"}, "A.py": set()}
    assert reading_order(circle) == ["A.py", "a.py", "c.py", "b.py"]
    assert reading_order({"x.py": set()}) == ["x.py"]


@settings(max_examples=60)
@given(st.integers(1, 12), st.sets(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=30))
def test_what_is_imported_comes_first_where_there_is_no_circle(count, pairs):
    needs = {f"f{i}.py": {f"f{j}.py" for a, j in pairs if a == i and j < i} for i in range(count)}
    order = reading_order(needs)
    assert sorted(order) == sorted(needs)
    place = {path: i for i, path in enumerate(order)}
    assert all(place[other] < place[path] for path, imported in needs.items() for other in imported)
    assert order == reading_order(dict(reversed(needs.items()))), "whatever the order of the files"


def test_ten_thousand_files():
    needs = {f"f{i:05}.py": {f"f{i - 1:05}.py"} if i else set() for i in range(10_000)}
    assert reading_order(needs) == sorted(needs)


def test_joined_and_taken_apart():
    files = [("a.py", "x = 1\n"), ("b/c.py", ""), ("d", "no line end")]
    for name in ("owner/name", ""):
        text, marks = joined(name, files)
        assert taken_apart(text, marks) == (name, [(f"{path}\n", content) for path, content in files])


@settings(max_examples=50)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.integers(20, 50))
def test_rows_begin_with_name_and_path_and_lose_nothing(sizes, limit):
    head, end, token = [1, 2], [9], iter(range(1000, 9999))
    files = [([5, 100 + i], [next(token) for _ in range(size)]) for i, size in enumerate(sizes)]
    rows = rows_of_files(head, files, end, limit)
    seen = []
    for row in rows:
        assert len(row) <= limit and row[:2].tolist() == head and row[-1] == 9 and row[2] == 5
        seen += [int(token) for token in row if token >= 1000]
    assert seen == [token for _, text in files for token in text], "no token lost, none twice"
    for _, text in files:
        if len(text) <= limit - 5:
            holding = [row for row in rows if set(text) & set(row.tolist())]
            assert len(holding) <= 1, "a file that fits is not cut"


def make(tmp_path, **data):
    root = tmp_path / "repositories"
    for name in ("first", "second"):
        (root / name / "pkg").mkdir(parents=True, exist_ok=True)
        (root / name / "README.md").write_text(f"about {name}\n")
        (root / name / "pkg" / "a.py").write_text(
            "from . import b\n\n\ndef run(value):\n    return b.twice(value)\n" * 2
        )
        (root / name / "pkg" / "b.py").write_text(
            "def twice(value):\n    return 2 * value  # <|file_sep|> is text\n" * 3
        )
    tree = {
        "data": {
            "source": str(root),
            "cache_dir": str(tmp_path / "cache"),
            "seq_len": 512,
            "unit": "repository",
            **data,
        },
        "tokenizer": {"kind": "bytes"},
        "train": {"batch_size": 2},
    }
    return toml.from_dict({**tree, "data": {**tree["data"], "validation_fraction": 0.0, "packing": "best_fit"}})


def test_rows_are_no_repository(tmp_path):
    """A file of rows, or a folder of such files alone; rows beside the files of a repository are left to it."""
    cfg = make(tmp_path)
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "a.jsonl").write_text('{"text": "one"}\n')
    for source in (rows / "a.jsonl", rows):
        data = dataclasses.replace(cfg.data, source=str(source))
        with pytest.raises(UserError, match=r'data\.unit = "repository": .* holds rows, .*data\.unit = "document"'):
            prepare(dataclasses.replace(cfg, data=data))
    (rows / "b.py").write_text("import a\n")
    prepare(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, source=str(rows))))


def test_files_that_a_name_tells_apart_are_not_opened_to_know_a_repository(tmp_path, monkeypatch):
    for name in ("a.json", "b.json", "c.py"):
        (tmp_path / name).write_text("[]")
    monkeypatch.setattr(contents, "unpacked", lambda path: pytest.fail(f"{path} is opened"))
    assert not open_source(str(tmp_path), config.Data(unit="repository")).rows_only


def test_a_repository_is_a_document(tmp_path):
    cfg = make(tmp_path, repository={"without_name": 0.0})
    corpus = prepare(cfg)
    marks = marks_of(corpus.tokenizer)
    document = corpus.train.tokens[: corpus.train.offsets[1]].tolist()
    assert document[0] == marks.name and document.count(marks.file) == 3 and document[-1] == corpus.tokenizer.eot
    cut = [i for i, token in enumerate(document) if token == marks.file]
    texts = [corpus.tokenizer.decode(document[a + 1 : b]) for a, b in zip([0, *cut], [*cut, -1], strict=True)]
    assert [text.split("\n")[0] for text in texts] == ["first", "README.md", "pkg/b.py", "pkg/a.py"]
    assert "<|file_sep|> is text" in texts[2], "no text becomes a mark"
    assert prepare(make(tmp_path, repository={"without_name": 1.0})).train.tokens[0] == marks.file


def test_middles_lie_within_files(tmp_path):
    cfg = make(tmp_path, fim={"rate": 1.0, "file_rate": 1.0}, repository={"without_name": 0.0})
    corpus = prepare(cfg)
    special, marks = corpus.tokenizer.special, marks_of(corpus.tokenizer)
    filled = 0
    batch = next(make_train_iterator(cfg.data, corpus, batch_size=2, seed=0))
    for row in batch["tokens"]:
        ids = row.tolist()
        cuts = [*(i for i, token in enumerate(ids) if token == marks.file), len(ids)]
        for first, last in itertools.pairwise(cuts):
            file = ids[first:last]
            places = [
                file.index(special(name))
                for name in ("fim_prefix", "fim_suffix", "fim_middle")
                if special(name) in file
            ]
            assert len(places) in (0, 3) and places == sorted(places), "all marks of a file, in order"
            filled += len(places) == 3
            if places:
                assert "\n" in corpus.tokenizer.decode(file[: places[0]]), "behind the path"
                assert special("eot") in file[places[-1] :]
    assert filled >= 2


def test_a_tokenizer_without_marks_is_refused():
    with pytest.raises(UserError, match="the tokenizer has no marks for names and files"):
        marks_of(Tokenizer.bytes_level(specials=False))
    assert np.all(np.array(marks_of(Tokenizer.bytes_level())) >= 256)
