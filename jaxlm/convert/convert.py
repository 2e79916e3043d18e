"""`jaxlm convert SRC DST --to jaxlm|torch|llama`: open anything, write it as something else."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxlm import config, config_file
from jaxlm.convert import native, storage
from jaxlm.convert.families import FAMILIES
from jaxlm.convert.family import Family
from jaxlm.convert.load import TOKENIZER, Model, Opened, open_model
from jaxlm.convert.rows import plan
from jaxlm.data.tokenizer import Tokenizer, check_fits
from jaxlm.errors import UserError, did_you_mean

SHARD_BYTES = 5_000_000_000
"""Largest file of a public layout, as `save_pretrained` has it."""

_LONG = 2**28
"""Bytes that take more than a moment to write: from here on there is a progress bar."""


class Summary(NamedTuple):
    """What a conversion wrote."""

    destination: Path
    to: str
    tensors: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.destination}: {self.to}, {self.tensors} tensors, {self.bytes / 1e6:,.1f} MB"


def convert(
    src: str | Path,
    dst: str | Path,
    to: str,
    *,
    overwrite: bool = False,
    step: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Summary:
    """Write the model at `src` as a run (`jaxlm`), a torch_ref folder (`torch`) or a public layout (`llama`, ...).

    Values never change. Only a run stores float32 or float64, so 16-bit weights are widened there, which is exact.

    Args:
        to: `hf` is the first public layout that can hold the model.
        overwrite: replace whatever lies at `dst`.
        step: which checkpoint of a run; None: the newest.
        shard_bytes: above this size a public layout has several weight files and an index.

    Raises:
        UserError: what `load` and `storage.write_folder` refuse, an unknown `to`, a model that the layout cannot hold.
    """
    src, dst = Path(src), Path(dst)
    targets = ("jaxlm", "torch", "hf", *FAMILIES)
    if to not in targets:
        raise UserError(f"--to {to}: no such layout", did_you_mean(to, targets))
    if src.resolve() == dst.resolve() or dst.resolve() in src.resolve().parents:
        raise UserError(f"{dst} is or holds the source {src}", "name another destination")
    model = open_model(src, step=step)
    cfg = model.config.model
    to = resolve(to, cfg)
    if model.tokenizer_path:
        check_fits(Tokenizer.from_file(model.tokenizer_path), cfg.vocab_size)
    if to == "jaxlm":
        return _write_run(model.read(), dst, overwrite)
    if to == "torch":
        files: dict[str, str | bytes] = {"config.toml": config_file.to_toml(_portable(model.config))}
        files |= _tokenizer_file(model)
        rows, limit = native.rows(cfg), None
    else:
        files = _public_files(model, FAMILIES[to])
        rows, limit = FAMILIES[to].rows(cfg), shard_bytes
    tensors = list(plan(model.parameters, cfg, rows))
    with _progress(tensors, dst) as told:
        written = storage.write_folder(
            dst, tensors, files, layout=to, shard_bytes=limit, overwrite=overwrite, told=told
        )
    return Summary(dst, to, *written)


def resolve(to: str, cfg: config.Model) -> str:
    """The layout that `to` names: for `hf` the first family that can hold the model, which a line on stderr says.

    Raises:
        UserError: no family can; with what each of them has no place for.
    """
    if to != "hf":
        return to
    refusals = []
    for name, family in FAMILIES.items():
        try:
            family.config_to_hf(cfg, dtype="float32")
        except UserError as error:
            refusals.append(f"{name}: {error.message.partition('has no place for ')[2]}")
        else:
            print(f"--to hf: {name} can hold this model", file=sys.stderr)
            return name
    hint = f"--to torch takes every model; there is no place for: {'; '.join(refusals)}"
    raise UserError("--to hf: no public layout can hold this model", hint)


def _write_run(model: Model, dst: Path, overwrite: bool) -> Summary:
    """A run directory with one checkpoint at step 0, ready for generation and fine-tuning."""
    from jaxlm.train.checkpoint import Checkpointer  # Orbax takes a second to import

    dtype = model.config.numerics.params
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), model.params)
    settings = dataclasses.replace(_portable(model.config), out_dir=str(dst))
    with storage.staged(dst, overwrite) as stage:
        (stage / "config.toml").write_text(config_file.to_toml(settings), encoding="utf-8")
        for name, content in _tokenizer_file(model).items():
            (stage / name).write_bytes(content)
        with jax.enable_x64(True):  # float64 parameters stay so
            checkpoints = Checkpointer(stage)
            checkpoints.save_params(0, params)
            checkpoints.close()
    return Summary(dst, "jaxlm", len(jax.tree.leaves(params)), sum(leaf.nbytes for leaf in jax.tree.leaves(params)))


def _portable(settings: config.Config) -> config.Config:
    """The config without paths of this machine: the tokenizer lies beside it."""
    tokenizer = settings.tokenizer
    if tokenizer.kind == "file":
        tokenizer = dataclasses.replace(tokenizer, path=TOKENIZER)
    return dataclasses.replace(settings, out_dir="", tokenizer=tokenizer)


def _tokenizer_file(model: Model | Opened) -> dict[str, bytes]:
    return {TOKENIZER: model.tokenizer_path.read_bytes()} if model.tokenizer_path else {}


def _public_files(model: Opened, family: Family) -> dict[str, str | bytes]:
    """Everything that `from_pretrained` reads besides the weights."""
    tokenizer = Tokenizer.from_file(model.tokenizer_path) if model.tokenizer_path else None
    ids = {"eos": tokenizer.eot, "pad": tokenizer.specials.get("pad")} if tokenizer else {}
    dtype = model.parameters["embed.embedding"].dtype.name
    hf = family.config_to_hf(model.config.model, dtype=dtype, **ids)
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
