"""`jaxlm convert SRC DST --to jaxlm|torch|llama`: open anything, write it as something else."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm import config, config_file
from jaxlm.convert import native, storage
from jaxlm.convert.families import FAMILIES
from jaxlm.convert.family import Family
from jaxlm.convert.load import TOKENIZER, Opened, open_model
from jaxlm.convert.rows import plan
from jaxlm.data.tokenizer import Tokenizer, check_fits
from jaxlm.errors import UserError, did_you_mean

SHARD_BYTES = 5_000_000_000
"""Largest weight file of a run and of a public layout, as `save_pretrained` has it."""

_LONG = 2**28
"""Bytes that take more than a moment to write: from here on there is a progress bar."""


class Summary(NamedTuple):
    """What a conversion wrote."""

    destination: Path
    to: str
    tensors: int
    bytes: int
    seconds: float

    def __str__(self) -> str:
        rate = self.bytes / 1e9 / self.seconds
        return (
            f"{self.destination}: {self.to}, {self.tensors} tensors, {self.bytes / 1e6:,.1f} MB "
            f"in {self.seconds:.1f} s, {rate:.2g} GB/s"
        )


def convert(
    src: str | Path,
    dst: str | Path,
    to: str,
    *,
    overwrite: bool = False,
    step: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Summary:
    """Write the model at `src` as a run (`jaxlm`), a torch_ref folder (`torch`) or a public layout (`llama`).

    Values and their types never change, and the model is never in memory as a whole.

    Args:
        overwrite: replace whatever lies at `dst`.
        step: which checkpoint of a run; None: the newest.
        shard_bytes: above this size a run and a public layout have several weight files and an index.

    Raises:
        UserError: what `load` and `storage.write_folder` refuse, an unknown `to`, a model that the layout cannot hold.
    """
    began = time.perf_counter()
    src, dst = Path(src), Path(dst)
    targets = ("jaxlm", "torch", *FAMILIES)
    if to not in targets:
        raise UserError(f"--to {to}: no such layout", did_you_mean(to, targets))
    if src.resolve() == dst.resolve() or dst.resolve() in src.resolve().parents:
        raise UserError(f"{dst} is or holds the source {src}", "name another destination")
    model = open_model(src, step=step)
    cfg = model.config.model
    if model.tokenizer_path:
        check_fits(Tokenizer.from_file(model.tokenizer_path), cfg.vocab_size)
    files = _public_files(model, FAMILIES[to]) if to in FAMILIES else _own_files(model, dst if to == "jaxlm" else "")
    tensors = list(plan(model.parameters, cfg, FAMILIES[to].rows(cfg) if to in FAMILIES else native.rows(cfg)))
    limit = None if to == "torch" else shard_bytes
    with _progress(tensors, dst) as told:
        if to == "jaxlm":
            written = _write_run(dst, tensors, files, shard_bytes=limit, overwrite=overwrite, told=told)
        else:
            written = storage.write_folder(
                dst, tensors, files, layout=to, shard_bytes=limit, overwrite=overwrite, told=told
            )
    return Summary(dst, to, *written, time.perf_counter() - began)


def _write_run(
    dst: Path, tensors: Sequence[storage.Planned], files: Mapping[str, str | bytes], *, overwrite: bool, **how: Any
) -> storage.Written:
    """A run directory with parameters at step 0, for generation, evaluation and parity."""
    with storage.staged(dst, overwrite) as stage:
        for name, content in files.items():
            (stage / name).write_bytes(content.encode() if isinstance(content, str) else content)
        checkpoint = stage / "checkpoints" / "0"
        checkpoint.mkdir(parents=True)
        return storage.write_weights(checkpoint, tensors, {}, layout="torch", **how)


def _own_files(model: Opened, out_dir: str | Path) -> dict[str, str | bytes]:
    """What lies beside the weights of a run or a torch_ref folder."""
    settings = dataclasses.replace(_portable(model.config), out_dir=str(out_dir))
    return {"config.toml": config_file.to_toml(settings), **_tokenizer_file(model)}


def _portable(settings: config.Config) -> config.Config:
    """The config without paths of this machine: the tokenizer lies beside it."""
    tokenizer = settings.tokenizer
    if tokenizer.kind == "file":
        tokenizer = dataclasses.replace(tokenizer, path=TOKENIZER)
    return dataclasses.replace(settings, out_dir="", tokenizer=tokenizer)


def _tokenizer_file(model: Opened) -> dict[str, bytes]:
    return {TOKENIZER: model.tokenizer_path.read_bytes()} if model.tokenizer_path else {}


def _public_files(model: Opened, family: Family) -> dict[str, str | bytes]:
    """Everything that `from_pretrained` reads besides the weights."""
    tokenizer = Tokenizer.from_file(model.tokenizer_path) if model.tokenizer_path else None
    ids = {"eos": tokenizer.eot, "pad": tokenizer.specials.get("pad")} if tokenizer else {}
    hf = family.config_to_hf(model.config.model, dtype=model.dtype, **ids)
    special_ids = {key: hf[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files: dict[str, str | bytes] = {"config.json": _json(hf), "generation_config.json": _json(special_ids)}
    if tokenizer:
        spellings = {
            f"{name}_token": tokenizer.token_bytes(token).decode() for name, token in ids.items() if token is not None
        }
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.config.model.max_seq_len,
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
            **spellings,
        }
        files |= {"tokenizer_config.json": _json(settings), **_tokenizer_file(model)}
    return files


@contextlib.contextmanager
def _progress(tensors: Sequence[storage.Planned], dst: Path) -> Iterator[Callable[[int], object]]:
    """A function that is told of written bytes; there is a bar on stderr when they are many."""
    from rich.console import Console
    from rich.progress import Progress

    size = sum(one.nbytes for one in tensors)
    with Progress(console=Console(stderr=True), transient=True, disable=size < _LONG) as progress:
        task = progress.add_task(f"writing {dst.name}", total=size)
        yield lambda size: progress.advance(task, size)


def _json(content: Any) -> str:
    return json.dumps(content, indent=2) + "\n"
