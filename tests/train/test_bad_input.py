"""A user's mistake at the command line: exit code 2, one line that says what to do, and nothing lost."""

import shutil
import threading

import pytest

from jaxlm.config import Config, Data
from jaxlm.errors import UserError
from jaxlm.recipes import start

TINY = ("train.steps=1", "checkpoint.every=0")


@pytest.fixture(scope="module")
def trained(runs, tmp_path_factory):
    """A finished run, and all its files."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert runs.start(out, *TINY, stdout=None, stderr=None).wait() == 0
    return out


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.stepz=1", "unknown key 'train.stepz' (did you mean 'steps'?)"),
        ("train.steps=many", "train.steps = 'many': input should be a valid integer"),
        ("data.source=/no/such/place", "'/no/such/place'"),
        ("mesh.tensor=3", "[mesh] data -1 x fsdp 1 x expert 1 x context 1 x tensor 3 does not fit 1 devices"),
    ],
)
def test_a_bad_option(runs, tmp_path, override, says):
    assert says in runs.refused(tmp_path / "run", override)
    assert not (tmp_path / "run").exists(), "the mended command starts without --resume"


def test_a_missing_config(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "toml", runs.toml.with_name("tinny.toml"))
    assert "no such config file (did you mean 'tiny.toml'?)" in runs.refused(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", b"", "the corpus is empty"),
        ("binary.txt", b"text\0\1\2", "is binary, not text"),
        ("latin.txt", "déjà vu".encode("latin-1"), "is not UTF-8 (byte 1)"),
    ],
)
def test_a_corpus_that_is_no_text(runs, tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    line = runs.refused(tmp_path / "run", f'data.source="{tmp_path / name}"')
    assert name in line and says in line


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.d_ff=48", "model.d_ff is 48, the run was made with 32"),
        ("model.remat=full", "model.layer_loop is 'scan', the run was made with 'unroll'"),
        ("tokenizer.specials=false", "tokenizer.specials is False, the run was made with True"),
        ("numerics.params=float64", "numerics.params is 'float64', the run was made with 'float32'"),
    ],
)
def test_another_model_on_resume(runs, trained, override, says):
    before = contents(trained)
    assert says in runs.refused(trained, *TINY, override, resume=True)
    assert contents(trained) == before


def test_a_run_that_is_already_there(runs, trained):
    before = contents(trained)
    assert "a run is already there (continue it with --resume" in runs.refused(trained, *TINY)
    assert contents(trained) == before


def test_another_corpus_on_resume(runs, trained, tmp_path):
    (tmp_path / "other.txt").write_text("other words\n" * 99)
    before = contents(trained)
    line = runs.refused(trained, *TINY, f'data.source="{tmp_path / "other.txt"}"', resume=True)
    assert "the corpus is not the one of the checkpoint" in line
    assert contents(trained) == before


def test_a_tokenizer_that_does_not_fit_the_checkpoint(runs, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    tokenizer = (run / "tokenizer.json").read_text()
    (run / "tokenizer.json").write_text(tokenizer.replace("<|pad|>", "<|dap|>"))
    assert "the tokenizer is not the one of the checkpoint" in runs.refused(run, *TINY, resume=True)


def test_a_mistake_waits_for_the_import(monkeypatch, tmp_path):
    """A daemon thread that Python ends within an import of C++ code aborts the process: exit code 134 instead of 2."""
    ended = threading.Event()
    monkeypatch.setattr(start, "_import_ahead", lambda backend: ended.wait(60))
    before = set(threading.enumerate())
    with pytest.raises(UserError):
        start.run(Config(out_dir=str(tmp_path / "run"), data=Data(source=str(tmp_path / "missing"))))
    ahead = set(threading.enumerate()) - before
    ended.set()
    assert ahead and not any(thread.daemon for thread in ahead)
