"""Print what a verb returns, and read what it is given."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Any

from jaxlm.errors import UserError


def show(renderable: Any) -> None:
    from rich.console import Console

    Console().print(renderable)


def write(text: str) -> None:
    with contextlib.suppress(ValueError):
        sys.stdout.write(text)
        sys.stdout.flush()


def open_model(path: Path, mesh: str | None = None) -> Any:
    """`jaxlm.load`; compiled programs are kept on disk, for the process is the command line's own."""
    import jaxlm
    from jaxlm.processes.compile_cache import enable_compilation_cache

    model = jaxlm.load(path, mesh=mesh)
    enable_compilation_cache(model.config.data.cache_dir)
    return model


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}", "--text names a file of text in UTF-8") from None


def sized(cfg: Any) -> Any:
    """The config with the vocabulary that its tokenizer will have, without reading the corpus."""
    from jaxlm.data.pipeline import train_tokenizer

    if cfg.model.vocab_size:
        return cfg
    size = cfg.tokenizer.vocab_size if cfg.tokenizer.kind == "bpe" else train_tokenizer(cfg).vocab_size
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=size))
