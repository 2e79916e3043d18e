"""Files beside the weights that a conversion takes along, byte for byte: what `transformers` knows of the tokenizer."""

from __future__ import annotations

from pathlib import Path

from jaxlm.convert.llama2c import ROPE_TABLES
from jaxlm.errors import UserError

PUBLIC = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
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
    return {name: content(folder / name) for name in names if (folder / name).is_file()}


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
    return path.read_bytes()
