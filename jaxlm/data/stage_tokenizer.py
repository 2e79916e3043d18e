"""The tokenizer of a stage that goes on from a model, and the folder of its template: the model's own."""

from __future__ import annotations

from pathlib import Path

from jaxlm import config
from jaxlm.errors import UserError
from jaxlm.text.tokenizer import Tokenizer


def stage_tokenizer(cfg: config.Config, own: Tokenizer | None = None) -> Tokenizer:
    """That of the run that resumes (`own`), of `[tokenizer]` if it names one, else the one beside `train.init_from`.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if own is not None:
        return own
    if cfg.tokenizer.kind == "bytes":
        return Tokenizer.bytes_level(specials=cfg.tokenizer.specials)
    path = cfg.tokenizer.path or (str(Path(cfg.train.init_from) / "tokenizer.json") if cfg.train.init_from else "")
    if not path:
        raise UserError(
            "the stage has no tokenizer", "train.init_from=RUN takes the run's own, tokenizer.path names one"
        )
    return Tokenizer.from_file(path)


def template_folder(cfg: config.Config) -> Path | None:
    """The folder with the template and the ends of the model that a stage begins with: that of its tokenizer."""
    if cfg.tokenizer.path:
        return Path(cfg.tokenizer.path).parent
    return Path(cfg.train.init_from) if cfg.train.init_from else None
