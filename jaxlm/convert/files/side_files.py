"""Files beside the weights that a conversion takes along, byte for byte: what `transformers` knows of the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from jaxlm.convert.files.storage import read_json
from jaxlm.convert.llama2c.model_bin import MODEL, ROPE_TABLES
from jaxlm.errors import UserError
from jaxlm.text.beside import end_ids

SENTENCEPIECE = "tokenizer.model"
PUBLIC = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    SENTENCEPIECE,
    "vocab.json",
    "merges.txt",
)
"""Beside a tokenizer.json, in every layout."""

LARGEST = 2**26
"""Bytes of the largest file that is taken along."""


def carried(folder: Path) -> dict[str, bytes]:
    """Those of the files that a folder has.

    Raises:
        UserError: a file is too large to be what its name says, or a link that leads out of the model.
    """
    names = (*PUBLIC, ROPE_TABLES)
    kept = {name: content(folder / name) for name in names if (folder / name).is_file()}
    if "generation_config.json" not in kept and (folder / "config.json").is_file():
        settings = read_json(folder / "config.json")
        if len(end_ids(settings)) > 1:  # which a tokenizer alone cannot say
            ids = {key: settings.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
            kept["generation_config.json"] = json.dumps(ids, indent=2).encode() + b"\n"
    return kept


def no_tokenizer(path: Path) -> UserError:
    """What to do about a model, a folder or a `model.bin`, that has no tokenizer that jaxlm reads."""
    if path.is_file() or (path / MODEL).is_file():
        return UserError(
            f"{path}: no tokenizer.bin with as many pieces beside it", "put the one it was trained with there"
        )
    if (path / SENTENCEPIECE).is_file():
        saved = f"transformers.AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r})"
        return UserError(f"{path}: there is a {SENTENCEPIECE} but no tokenizer.json", f"{saved} writes one")
    return UserError(f"{path}: there is no tokenizer.json", "copy the one the model was trained with into it")


def content(path: Path) -> bytes:
    """A small file of a model's folder.

    Raises:
        UserError: see `carried`.
    """
    # The folder may come from anywhere and its copy be published: no link may fetch other files of this machine. The
    # cache of huggingface_hub links snapshots/REVISION/NAME to blobs/HASH.
    home, real = path.parent.resolve(), path.resolve()
    if path.is_symlink() and home not in real.parents and real.parent != home.parent.parent / "blobs":
        raise UserError(f"{path}: a link to {real}, outside of the model", "put a copy in its place")
    if (size := path.stat().st_size) > LARGEST:
        raise UserError(f"{path}: {size:,} bytes are no file of a tokenizer")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
