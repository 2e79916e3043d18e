"""What is read, in which order, on which side; and one clear line for everything that cannot be read."""

import gzip
import json
import os
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import Data
from jaxlm.data import readers, sources
from jaxlm.data.sources import Documents, describe_skipped, open_source, pieces, separable
from jaxlm.errors import UserError
from jaxlm.text.tokenizer import Tokenizer


def read(source: Path | str, **options) -> list[tuple[str, str, str]]:
    return [(side, d.name, d.text) for side, d in Documents(Data(source=str(source), **options))]


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    (root / "sub").mkdir(parents=True)
    for i in range(40):
        (root / "sub" / f"{i:02}.py").write_text(f"x = {i}\n")
    (root / "b.md").write_text("# b\r\n")
    return root


def test_folder_is_read_in_order_and_split_by_name(folder):
    documents = read(folder, validation_fraction=0.2)
    assert [name for _, name, _ in documents] == ["b.md", *(f"sub/{i:02}.py" for i in range(40))]
    assert documents[0][2] == "# b\r\n", "line ends are kept"
    assert 2 <= Counter(side for side, _, _ in documents)["validation"] <= 16
    assert documents == read(folder, validation_fraction=0.2)
    (folder / "a_new_file.py").write_text("y\n")
    sides = {name: side for side, name, _ in read(folder, validation_fraction=0.2)}
    assert all(sides[name] == side for side, name, _ in documents), "a new file moves no other"


def test_extensions_choose(folder):
    assert {name for _, name, _ in read(folder, extensions=(".md",))} == {"b.md"}
    with pytest.raises(UserError, match=r"no file that ends in \.rs"):
        read(folder, extensions=(".rs",))


def test_small_corpora_have_both_sides(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    for fraction in (0.001, 0.999):
        assert Counter(side for side, _, _ in read(tmp_path, validation_fraction=fraction)) == {
            "train": 1,
            "validation": 1,
        }
    assert {side for side, _, _ in read(tmp_path, validation_fraction=0.0)} == {"train"}


def test_one_document_is_cut_at_a_line_end(tmp_path):
    text = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "input.txt").write_text(text)
    for source in (tmp_path, tmp_path / "input.txt"):
        (_, _, train), (_, _, validation) = read(source, validation_fraction=0.1)
        assert train + validation == text and validation.startswith("line ") and 79 <= len(validation) < 90
    assert read(tmp_path / "input.txt", validation_fraction=0.0) == [("train", "input.txt", text)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_rows_are_documents_and_copies_stay_together(tmp_path, name):
    texts = [f"text {i % 50} é" for i in range(100)]
    path = tmp_path / name
    if name.endswith(".parquet"):
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
        parquet.write_table(sys.modules["pyarrow"].table({"body": texts, "n": list(range(100))}), path)
    else:
        lines = "".join(json.dumps({"body": text}) + "\n" for text in texts).encode()
        path.write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    documents = read(path, text_key="body", validation_fraction=0.2)
    assert [text for _, _, text in documents] == texts
    assert len({(side, text) for side, _, text in documents}) == 50
    assert {side for side, _, _ in documents} == {"train", "validation"}
    with pytest.raises(UserError, match=r"'boddy'.*did you mean 'body'"):
        read(path, text_key="boddy")


def test_validation_source_takes_the_whole_other_corpus(folder, tmp_path):
    held_out = jsonl(tmp_path / "v.jsonl", [{"text": "a"}, {"text": "b"}])
    sides = Counter(side for side, _, _ in read(folder, validation_source=str(held_out)))
    assert sides == {"train": 41, "validation": 2}


def test_max_bytes_stops_within_a_character_boundary(folder, tmp_path):
    assert sum(len(text.encode()) for _, _, text in read(folder, max_bytes=50)) == 50
    (tmp_path / "é.txt").write_text("é" * 100)
    assert sum(len(text) for _, _, text in read(tmp_path / "é.txt", max_bytes=51)) == 25


def test_bad_files_of_a_folder_are_skipped_and_named(folder):
    (folder / "image.png").write_bytes(b"\x89PNG\0\0")
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (folder / "late.txt").write_bytes(b"a" * 10000 + b"\0")
    (folder / "empty.txt").write_text("")
    documents = Documents(Data(source=str(folder)))
    assert len(list(documents)) == 41
    assert set(documents.skipped) == {"image.png", "latin.txt", "late.txt"}
    assert describe_skipped(documents.skipped).startswith("3 skipped, e.g. image.png is binary")


def test_nothing_outside_the_folder_and_nothing_hidden_is_read(folder, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "up").symlink_to(tmp_path)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("secret")
    os.mkfifo(folder / "pipe")
    assert len(read(folder)) == 41


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\0b", "is binary"),
        (b"caf\xe9", r"is not UTF-8 \(byte 3\)"),
        (b"", "the corpus is empty"),
    ],
)
def test_a_named_file_must_be_text(tmp_path, content, message):
    path = tmp_path / "input.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert "input.txt" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": ', "row 2: not JSON"),
        (b'["a"]\n', "row 1: not a JSON object"),
        (b'{"txt": "a"}\n', "row 1: no field 'text'.*did you mean 'txt'"),
        (b'{"text": 3}\n', "row 1: 'text' is not text"),
        (b'{"text": "\xff"}\n', "row 1 is not UTF-8"),
        (b'{"text": "\\ud800"}\n', "row 1 has half a surrogate pair"),
        (b"\n\n", "the corpus is empty"),
    ],
)
def test_rows_must_be_good(tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / "rows.jsonl", max_bad_rows=0)
    assert "\n" not in str(caught.value)


def test_damaged_and_exploding_archives(tmp_path, monkeypatch):
    whole = gzip.compress(b'{"text": "abc"}\n' * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz: cannot be read"):
        read(tmp_path / "cut.jsonl.gz")
    (tmp_path / "not.jsonl.gz").write_bytes(b"plain")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "not.jsonl.gz")
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1000)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 100_000))
    with pytest.raises(UserError, match="expands to more than"):
        read(tmp_path / "bomb.jsonl.gz")
    (tmp_path / "line.jsonl.gz").write_bytes(gzip.compress(b'{"text": "' + b"a" * 5000))
    with pytest.raises(UserError, match="row 1: longer than"):
        read(tmp_path / "line.jsonl.gz")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    with pytest.raises(UserError, match=r"bad\.parquet: cannot be read"):
        read(tmp_path / "bad.parquet")


@pytest.mark.parametrize("source", ["no/such/folder", "./here", "gone.txt", "/gone", "owner/gone.jsonl"])
def test_missing_path(source):
    with pytest.raises(UserError, match="no such file or folder"):
        read(source)


def test_empty_folder(tmp_path):
    with pytest.raises(UserError, match="has no file"):
        read(tmp_path)


def test_hugging_face_dataset(monkeypatch):
    class Table(dict):
        _fingerprint = "f1"
        column_names = ("text",)

        def __len__(self):
            return 3

    def load_dataset(name, subset, split):
        if name != "owner/set":
            raise ConnectionError("no network\nat all")
        assert (subset, split) == ("small", "train")
        return Table(text=["a", "b", "c"])

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    module.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert [text for _, _, text in read("owner/set:small")] == ["a", "b", "c"]
    with pytest.raises(UserError, match=r"nor a Hugging Face dataset: no network$"):
        read("owner/other")
    with pytest.raises(UserError, match="no column 'body'"):
        read("owner/set:small", text_key="body")


def test_hugging_face_dataset_without_the_package(monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"jaxlm\[datasets\]"):
        read("owner/set")


def test_identity_notices_every_change(folder):
    def identity(**options):
        return Documents(Data(source=str(folder), **options)).identity()

    before = identity()
    assert identity() == before
    path = folder / "b.md"
    info = path.stat()
    path.write_text("# c\r\n")  # the same size ...
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))  # ... and time of change
    changed = identity()
    assert changed != before
    path.rename(folder / "c.md")
    assert identity() not in (before, changed)
    assert len({identity(max_bytes=9), identity(validation_fraction=0.3), identity(text_key="t"), identity()}) == 4


def test_stdlib_is_python_without_its_tests_and_tables():
    names = [file.name for file in open_source("stdlib", Data()).files]
    assert {"argparse.py", "json/decoder.py"} <= set(names) and all(name.endswith(".py") for name in names)
    assert not {"site-packages", "test", "encodings"} & {part for name in names for part in name.split("/")}


def test_pieces_join_to_the_text_and_end_at_lines():
    text = "ab\ncdefghij\n\nk" * 5
    for size in range(1, 20):
        assert "".join(pieces(text, size)) == text
        assert all(0 < len(piece) <= size for piece in pieces(text, size))
    assert list(pieces("ab\ncd\nef", 4)) == ["ab\n", "cd\n", "ef"]


def test_parts_are_cut_where_no_blank_touches_the_line_end():
    assert list(separable("ab\ncd\n\nef \ngh\n ij\nkl\n", 1)) == ["ab\n", "cd\n\nef \ngh\n ij\n", "kl\n"]
    assert list(separable("ab\ncd\nef", 4)) == ["ab\ncd\n", "ef"]
    assert list(separable("ab\r\ncd\r\nef", 1)) == ["ab\r\ncd\r\nef"], "GPT-2 puts the two blanks apart"
    assert list(separable("", 1)) == []


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Our own tokenizer, and where the shared data are, GPT-2's and DeepSeek's."""
    found = {"ours": Tokenizer.train(["def f(x):\n    return x\n\n\n  a b 12 é\n"] * 9, 300)}
    data = Path(os.environ.get("JAXLM_DATA") or Path(__file__).parents[3] / "shared" / "data") / "tokenizers"
    if data.is_dir():
        unpacked = tmp_path_factory.mktemp("deepseek") / "tokenizer.json"
        unpacked.write_bytes(gzip.decompress((data / "deepseek_r1" / "tokenizer.json.gz").read_bytes()))
        found["gpt2"] = Tokenizer.from_file(data / "gpt2" / "tokenizer.json")
        found["deepseek_r1"] = Tokenizer.from_file(unpacked)
    return found


BITS = ["\n", "\n\n", " ", "    ", "\t", "\r\n", "a", "def", "x1", "12", "é", "中", ".", ");", "'s"]
BITS += ["\u0301", "\u00a0", "\u2028", "<|endoftext|>"]
TEXTS = st.lists(st.sampled_from(BITS), max_size=60).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS, size=st.integers(1, 30))
def test_ids_of_parts_are_those_of_the_text(public: dict[str, Tokenizer], text: str, size: int):
    """GPT-2's, DeepSeek's and our own pattern; any cut at a line end would not do."""
    for name, tokenizer in public.items():
        parts = [i for part in separable(text, size) for i in tokenizer.encode(part)]
        assert parts == tokenizer.encode(text), name


def test_other_cuts_change_ids(public: dict[str, Tokenizer]):
    text, gpt2 = "a\n\nb", public.get("gpt2") or pytest.skip("no tokenizers of others")
    assert list(pieces(text, 3)) == ["a\n\n", "b"]
    assert [*gpt2.encode("a\n\n"), *gpt2.encode("b")] != gpt2.encode(text)
