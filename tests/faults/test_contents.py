"""Each file is read as what it is, or refused by what it is; one bad item is skipped and named, and never hides."""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import Data
from jaxlm.data.sources import Documents
from jaxlm.errors import UserError

TEXTS = [f"row {i}: the quick brown fox" for i in range(60)]
ROWS = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def read(source: Path, **options) -> tuple[list[str], dict[str, str]]:
    documents = Documents(Data(source=str(source), **options))
    return [document.text for _, document in documents], documents.skipped


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def zstd(content: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    return pyarrow.compress(content, codec="zstd", asbytes=True)


@pytest.mark.parametrize("name", ["a.json", "A.JSONL", "a.ndjson", "a.Json", "a.jsonl", "a.NDJSON"])
@pytest.mark.parametrize("alone", [True, False])
def test_rows_are_rows_whatever_the_ending(tmp_path, name, alone):
    put(tmp_path / name, LINES)
    texts, _ = read(tmp_path / name if alone else tmp_path)
    assert texts == TEXTS


@pytest.mark.parametrize("content", [json.dumps(ROWS), json.dumps(ROWS, indent=2), "\ufeff " + json.dumps(ROWS)])
def test_an_array_of_rows(tmp_path, content):
    put(tmp_path / "train.json", content.encode())
    assert read(tmp_path / "train.json")[0] == read(tmp_path)[0] == TEXTS


def test_other_json_is_text_in_a_folder_and_refused_alone(tmp_path):
    settings = put(tmp_path / "package.json", b'{\n "name": "x"\n}\n')
    put(tmp_path / "keys.json", json.dumps([{"body": "x"}, {"body": "y"}]).encode())
    put(tmp_path / "keys2.json", b'{"body": "x"}\n{"body": "y"}\n')
    put(tmp_path / "a.txt", b"text")
    texts, skipped = read(tmp_path)
    assert sorted(texts) == ["text", '{\n "name": "x"\n}\n']
    assert set(skipped) == {"keys.json", "keys2.json"} and "'text'" in skipped["keys.json"]
    with pytest.raises(UserError, match=r"package\.json: neither"):
        read(settings)
    with pytest.raises(UserError, match=r"did you mean|valid"):
        read(tmp_path / "keys.json")


@pytest.mark.parametrize(
    "ending, pack", [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)]
)
def test_compressed_files(tmp_path, ending, pack):
    for name, content in (
        ("c.json", LINES),
        ("c.jsonl", LINES),
        ("C.JSONL", LINES),
        ("d.json", json.dumps(ROWS).encode()),
    ):
        assert read(put(tmp_path / (name + ending), pack(content)))[0] == TEXTS
    folder = put(tmp_path / "t" / f"part.txt{ending.upper()}", pack(b"\xef\xbb\xbfplain text\n" * 2)).parent
    assert "".join(read(folder)[0]) == "plain text\n\ufeffplain text\n"
    disguised = put(tmp_path / "x.txt", pack(b"plain text\n" * 50))
    with pytest.raises(UserError, match=r"compressed|binary|UTF-8"):
        read(disguised)
    cut = put(tmp_path / f"cut.txt{ending}", pack(os.urandom(999).hex().encode())[:200])
    with pytest.raises(UserError, match="cannot be read"):
        read(cut)
    with pytest.raises(UserError, match="its content does not"):
        read(put(tmp_path / f"no.txt{ending}", b"plain"))


def test_marks_of_byte_order_are_no_text(tmp_path):
    put(tmp_path / "a.txt", b"\xef\xbb\xbfFirst\nsecond\n")
    put(tmp_path / "b.txt", b"\xef\xbb\xbfAnother\n")
    put(tmp_path / "c.txt", "wide".encode("utf-16"))
    texts, skipped = read(tmp_path)
    assert sorted(texts) == ["Another\n", "First\nsecond\n"]
    assert "UTF-16" in skipped["c.txt"]


def test_a_few_bad_rows_are_skipped_and_named(tmp_path):
    bad = [
        b'{"text": null}',
        b"{broken",
        b'{"body": "x"}',
        b"[1]",
        b'{"text": 7}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
    ]
    path = put(tmp_path / "rows.jsonl", LINES + b"\n".join(bad) + b"\n" + LINES.replace(b"row", b"new"))
    texts, skipped = read(path)
    assert len(texts) == 120
    assert list(skipped) == [f"rows.jsonl, row {n}" for n in range(61, 68)], skipped
    assert "not text" in skipped["rows.jsonl, row 61"] and "UTF-8" in skipped["rows.jsonl, row 67"]
    with pytest.raises(UserError, match="max_bad_rows = 3"):
        read(path, max_bad_rows=3)
    with pytest.raises(UserError, match="row 61: 'text' is not text"):
        read(path, max_bad_rows=0)
    with pytest.raises(UserError, match="not text"):
        read(put(tmp_path / "all.jsonl", b'{"text": null}\n' * 5))


def test_a_number_of_thousands_of_digits(tmp_path):
    row = b'{"text": "an exercise", "answer": ' + b"7" * 5000 + b"}\n"
    assert read(put(tmp_path / "d.jsonl", LINES + row))[0][-1] == "an exercise"
    assert len(read(put(tmp_path / "d.json", b"[" + row + b"]"), validation_fraction=0.0)[0]) == 1


def test_a_closed_folder_is_skipped_and_named(tmp_path, monkeypatch):
    put(tmp_path / "a.txt", b"text")
    put(tmp_path / "lost+found" / "b.txt", b"hidden")
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    texts, skipped = read(tmp_path)
    assert texts == ["text"] and "Permission denied" in skipped["lost+found/"]


def test_an_empty_source_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "secret.txt", b"TOKEN")
    with pytest.raises(UserError, match=r"data.source is empty"):
        read("")  # type: ignore[arg-type]


NAMES = st.builds(
    "".join,
    st.tuples(
        st.sampled_from(["a", "B c", "-x", "é[1]"]),
        st.sampled_from(["", ".txt", ".json", ".JSONL", ".ndjson", ".csv", ".parquet", ".py"]),
        st.sampled_from(["", ".gz", ".bz2", ".xz", ".zst", ".GZ"]),
    ),
)
CONTENTS = st.binary(max_size=60) | st.sampled_from(
    [
        LINES,
        json.dumps(ROWS).encode(),
        b"\xef\xbb\xbftext",
        b"[]",
        b"{}",
        b"null",
        b"[" * 5000,
        b'{"text": 1}',
        b"\xff\xfea\0",
    ]
)


@settings(max_examples=300, deadline=None)
@given(
    name=NAMES,
    content=CONTENTS,
    pack=st.sampled_from([bytes, gzip.compress, bz2.compress, lzma.compress]),
    alone=st.booleans(),
)
def test_any_file_is_read_or_refused_in_a_line(tmp_path_factory, name, content, pack, alone):
    folder = tmp_path_factory.mktemp("drawn")
    put(folder / name, pack(content))
    try:
        texts, _ = read(folder / name if alone else folder)
    except UserError as error:
        assert "\n" not in str(error)
        return
    for text in texts:
        assert not text.startswith("\ufeff") and text.encode()
        assert not (
            content in (LINES, json.dumps(ROWS).encode()) and name[-1] in "nL" and text.startswith(("{", "["))
        ), text
