"""What lies beside the weights goes along, byte for byte, and nothing else does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from jaxlm.convert.files import side_files
from jaxlm.convert.write_model import convert
from jaxlm.errors import UserError
from jaxlm.infer.load import load

FILES = {
    "tokenizer_config.json": b'{"tokenizer_class":  "LlamaTokenizerFast", "chat_template": "{{ messages }}"}',
    "special_tokens_map.json": b'{"eos_token": "<|endoftext|>"}\n\n',
    "added_tokens.json": b"{ }",
    "generation_config.json": b'{"eos_token_id": [256, 261], "temperature": 0.6}',
    "chat_template.jinja": "{{ bos_token }}\r\n{# gr\u00fc\u00dfe #}".encode(),
    "tokenizer.model": b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02",
    "vocab.json": b'{"a":0}',
    "merges.txt": b"#version: 0.2\n",
}
OTHERS = {"README.md": b"# Model", "evil.py": b"1/0", "training_args.bin": b"\x80\x02", "notes.json": b"{}"}


@pytest.fixture
def hf(torch_folder: Path, tmp_path: Path) -> Path:
    """A Hugging Face folder with all that belongs to it, and some that does not."""
    convert(torch_folder, tmp_path / "hf", "llama")
    for name, content in {**FILES, **OTHERS}.items():
        (tmp_path / "hf" / name).write_bytes(content)
    tokenizer = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(tokenizer, indent=3))  # as no library would write it
    (tmp_path / "hf" / "manifest.json").unlink()
    return tmp_path / "hf"


@pytest.mark.parametrize("through", ["jaxlm", "torch"])
def test_there_and_back(hf: Path, tmp_path: Path, through: str) -> None:
    convert(hf, tmp_path / "ours", through)
    convert(tmp_path / "ours", tmp_path / "back", "llama")
    for folder in (tmp_path / "ours", tmp_path / "back"):
        for name in (*FILES, "tokenizer.json"):
            assert (folder / name).read_bytes() == (hf / name).read_bytes(), name
        assert not {path.name for path in folder.iterdir()} & OTHERS.keys()
    manifest = json.loads((tmp_path / "back" / "manifest.json").read_text())
    assert manifest["files"].keys() >= FILES.keys()
    assert (tmp_path / "back" / "config.json").read_bytes() == (hf / "config.json").read_bytes()
    convert(hf, tmp_path / "back", "llama")  # an earlier result in the same layout is replaced


def test_what_is_missing_is_made(hf: Path, tmp_path: Path) -> None:
    for name in FILES:
        (hf / name).unlink()
    convert(hf, tmp_path / "ours", "torch")
    assert not FILES.keys() & {path.name for path in (tmp_path / "ours").iterdir()}
    convert(tmp_path / "ours", tmp_path / "back", "llama")
    assert json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["eos_token_id"] == 256


def test_the_cache_of_the_hub(hf: Path, tmp_path: Path) -> None:
    """snapshots/REVISION/NAME is a link to blobs/HASH there."""
    snapshot = tmp_path / "hub" / "snapshots" / "abc"
    (tmp_path / "hub" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(hf.iterdir())):
        path.rename(tmp_path / "hub" / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert side_files.carried(snapshot) == FILES


def test_links_out_of_the_model_are_refused(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "id_rsa").write_text("secret")
    for target in (tmp_path / "id_rsa", Path("..", "id_rsa")):
        (hf / "chat_template.jinja").unlink()
        (hf / "chat_template.jinja").symlink_to(target)
        with pytest.raises(UserError, match=r"chat_template.jinja: a link to .*id_rsa, outside"):
            convert(hf, tmp_path / "out", "torch")
    assert not (tmp_path / "out").exists()
    (hf / "chat_template.jinja").unlink()
    (hf / "chat_template.jinja").symlink_to("vocab.json")
    assert side_files.carried(hf)["chat_template.jinja"] == FILES["vocab.json"]


def test_large_files_and_what_is_no_file(hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vocab.json", "merges.txt"):
        (hf / name).unlink()
    (hf / "vocab.json").mkdir()
    os.mkfifo(hf / "merges.txt")
    assert side_files.carried(hf).keys() == FILES.keys() - {"vocab.json", "merges.txt"}
    monkeypatch.setattr(side_files, "LARGEST", 40)
    with pytest.raises(UserError, match=r"tokenizer_config.json: 77 bytes are no file of a tokenizer"):
        side_files.carried(hf)


def test_a_sentencepiece_model_alone(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (hf / "tokenizer.json").unlink()
    convert(hf, tmp_path / "out", "torch")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == FILES["tokenizer.model"]
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(
        f"the weights go alone: {hf}: there is a tokenizer.model but no tokenizer.json (transformers."
    )
    with pytest.raises(UserError, match=r"tokenizer.model but no tokenizer.json .*save_pretrained"):
        load(hf).generate("a", max_new_tokens=1)
    (hf / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"there is no tokenizer.json"):
        load(hf).generate("a", max_new_tokens=1)


def test_another_tokenizer_has_no_companions(hf: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_bytes((hf / "tokenizer.json").read_bytes())
    convert(hf, tmp_path / "out", "torch", tokenizer=other)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.toml", "model.safetensors", "manifest.json", "tokenizer.json"}
