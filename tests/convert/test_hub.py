"""Models by their name on the hub, with a hub that is made up."""

from __future__ import annotations

import fnmatch
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from jaxlm.convert.files.hub import local
from jaxlm.convert.open_model import load
from jaxlm.convert.write_model import convert
from jaxlm.errors import UserError


@pytest.fixture
def cached(tmp_path: Path, torch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama that the hub has as `org/tiny`; its place in the cache, which is made of links as the client makes it."""
    remote, cache = tmp_path / "remote", tmp_path / "hub" / "models--org--tiny"
    convert(torch_folder, remote, "llama")
    for name in ("pytorch_model.bin", "modeling_tiny.py", "consolidated.safetensors"):
        (remote / name).write_bytes(b"not to be fetched")
    snapshot = cache / "snapshots" / "c0ffee"

    def download(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert name == "org/tiny"
        (cache / "blobs").mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for path in remote.iterdir():
            asked = any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns)
            if asked and not any(fnmatch.fnmatch(path.name, pattern) for pattern in ignore_patterns):
                shutil.copy(path, cache / "blobs" / f"hash of {path.name}")
                (snapshot / path.name).symlink_to(Path("../../blobs") / f"hash of {path.name}")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    return snapshot


def test_a_name_of_the_hub_is_a_model(cached: Path, torch_folder: Path, tmp_path: Path) -> None:
    convert("org/tiny", tmp_path / "out", "torch")
    found, wanted = tmp_path / "out" / "model.safetensors", torch_folder / "model.safetensors"
    assert found.read_bytes() == wanted.read_bytes()
    assert load(cached).kind == "llama"
    fetched = {path.name for path in cached.iterdir()}
    assert fetched > {"model.safetensors", "config.json", "tokenizer.json"}
    assert not fetched & {"pytorch_model.bin", "modeling_tiny.py", "consolidated.safetensors"}


@pytest.mark.parametrize("name", ["gone", "/org/tiny", "org/tiny/more", "../org/tiny", "org/..", "here/x"])
def test_only_names_are_asked_for(cached: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "here").mkdir()
    with pytest.raises(UserError, match="no such folder"):
        load(name)
    assert not cached.exists()


def test_a_local_folder_comes_first(cached: Path, torch_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(torch_folder, tmp_path / "org" / "tiny")
    assert local(Path("org/tiny")) == Path("org/tiny") and not cached.exists()


def test_a_link_out_of_the_cache_is_refused(cached: Path, tmp_path: Path) -> None:
    local(Path("org/tiny"))
    (tmp_path / "secret").write_text("{}")
    (cached / "tokenizer.json").unlink()
    (cached / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(cached))
        load("org/tiny")
    assert caught.value.message == f"{cached / 'tokenizer.json'}: links to {tmp_path / 'secret'}, outside the model"


def _said(kind: Any, status: int) -> Exception:
    response: Any = types.SimpleNamespace(headers={}, request=None, status_code=status)
    return kind("several\nlines", response=response)


NO_FOLDER = "no such folder, and "


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: _said(errors.RepositoryNotFoundError, 404), f"{NO_FOLDER}no such model on the Hugging Face hub"),
        (lambda: _said(errors.GatedRepoError, 403), "the hub gives it to those who accept its conditions"),
        (lambda: _said(errors.HfHubHTTPError, 500), f"{NO_FOLDER}the Hugging Face hub does not send it"),
        (lambda: errors.LocalEntryNotFoundError("a\nb"), f"{NO_FOLDER}the Hugging Face hub cannot be reached"),
        (lambda: errors.OfflineModeIsEnabled("off"), f"{NO_FOLDER}the Hugging Face hub cannot be reached"),
        (lambda: errors.HFValidationError("no name"), f"{NO_FOLDER}the Hugging Face hub does not send it"),
    ],
)
def test_what_the_hub_refuses(monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception], message: str) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError) as caught:
        load("org/tiny")
    assert caught.value.message == f"org/tiny: {message}" and "\n" not in str(caught.value)


def test_a_model_without_safetensors(cached: Path, tmp_path: Path) -> None:
    (tmp_path / "remote" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="org/tiny: the hub has no safetensors of it"):
        load("org/tiny")
