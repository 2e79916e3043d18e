"""`jaxlm convert SRC DST --to jaxlm|torch|llama`: open anything, write it as something else."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm import config
from jaxlm.config import toml
from jaxlm.convert import base, native
from jaxlm.convert.families import FAMILIES
from jaxlm.convert.family import Family
from jaxlm.convert.files import storage
from jaxlm.convert.files.side_files import PUBLIC, SENTENCEPIECE, content, no_tokenizer
from jaxlm.convert.llama2c import model_bin
from jaxlm.convert.open_model import TOKENIZER, Opened, open_adapters, open_model
from jaxlm.convert.rows import plan
from jaxlm.errors import UserError, did_you_mean
from jaxlm.text.beside import end_ids
from jaxlm.text.tokenizer import Tokenizer, check_usable

_log = logging.getLogger(__name__)

SHARD_BYTES = 5_000_000_000
"""Largest weight file of a run and of a public layout, as `save_pretrained` has it."""

_LONG = 2**28
"""Bytes that take more than a moment to write: from here on there is a progress bar."""


MEASURABLE = 100_000_000
"""Bytes of a conversion whose rate is worth telling."""
PEFT = "peft"


class Summary(NamedTuple):
    """What a conversion wrote."""

    destination: Path
    to: str
    tensors: int
    bytes: int
    seconds: float

    def __str__(self) -> str:
        size = f"{self.tensors} tensors, {self.bytes / 1e6:,.1f} MB in {self.seconds:.1f} s"
        # The rate of a small model says how long opening files takes.
        rate = f", {self.bytes / 1e9 / self.seconds:.2f} GB/s" if self.bytes > MEASURABLE else ""
        return f"{self.destination}: {self.to}, {size}{rate}"


def convert(
    src: str | Path,
    dst: str | Path,
    to: str,
    *,
    overwrite: bool = False,
    step: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    tokenizer: str | Path | None = None,
) -> Summary:
    """Write the model at `src` as a run (`jaxlm`), a torch_ref folder (`torch`) or a public layout (`llama`, ...).

    Values and their types never change (llama2.c stores float32 alone, so 16-bit weights are widened there; adapters
    are merged first, in float64), and the model is never in memory as a whole. The files of the tokenizer go along as
    they are.

    Args:
        to: `hf` is the first public layout that can hold the model; `peft`: the adapters of a run alone.
        overwrite: replace whatever lies at `dst`.
        step: which checkpoint of a run; None: the newest.
        shard_bytes: above this size a run and a public layout have several weight files and an index.
        tokenizer: a tokenizer.json, or a tokenizer.bin of llama2.c, to use instead of that of `src`.

    Raises:
        UserError: what `load` and `storage.write_folder` refuse, an unknown `to`, a model that the layout cannot hold.
    """
    src, dst = Path(src), Path(dst)
    _require_layout(to)
    require_apart(src, dst)
    if to == PEFT:
        return _write_peft(src, dst, step, overwrite)
    model = open_model(src, step=step, tokenizer=tokenizer)
    return write_model(model, dst, to, overwrite=overwrite, shard_bytes=shard_bytes)


def write_model(
    model: Opened, dst: Path, to: str, *, overwrite: bool = False, shard_bytes: int = SHARD_BYTES
) -> Summary:
    """Write an open model; see `convert`.

    Raises:
        UserError: what `storage.write_folder` refuses, an unknown `to`, a model that the layout cannot hold.
    """
    began = time.perf_counter()
    _require_layout(to)
    cfg = model.config.model
    to = resolve(to, cfg)
    if model.tokenizer_path:
        check_usable(Tokenizer.from_file(model.tokenizer_path), cfg.vocab_size)
    elif model.kind == model_bin.NAME or SENTENCEPIECE in model.kept:
        _log.warning("the weights go alone: %s", no_tokenizer(model.path))
    if to == model_bin.NAME:
        return Summary(dst, to, *_write_llama2c(model, dst, overwrite), time.perf_counter() - began)
    files = _public_files(model, FAMILIES[to]) if to in FAMILIES else _own_files(model, dst if to == "jaxlm" else "")
    tensors = list(plan(model.parameters, cfg, FAMILIES[to].rows(cfg) if to in FAMILIES else native.rows(cfg)))
    limit = None if to == "torch" else shard_bytes
    with _progress(tensors, dst) as report:
        if to == "jaxlm":
            written = _write_run(dst, tensors, files, shard_bytes=limit, overwrite=overwrite, report=report)
        else:
            written = storage.write_folder(
                dst, tensors, files, layout=to, shard_bytes=limit, overwrite=overwrite, report=report
            )
    return Summary(dst, to, *written, time.perf_counter() - began)


def _write_peft(src: Path, dst: Path, step: int | None, overwrite: bool) -> Summary:
    began = time.perf_counter()
    settings, tree = open_adapters(src, step)
    where = base.base_path(src, settings)
    if (Path(where) / "config.toml").is_file():
        _log.warning("PEFT reads the base from config.json: `jaxlm convert %s DIR --to hf` makes such a folder", where)
    written = base.write_peft(settings, tree, dst, where, overwrite=overwrite)
    return Summary(dst, PEFT, *written, time.perf_counter() - began)


def _require_layout(to: str) -> None:
    targets = ("jaxlm", "torch", "hf", PEFT, model_bin.NAME, *FAMILIES)
    if to not in targets:
        raise UserError(f"--to {to}: no such layout", did_you_mean(to, targets))


def require_apart(src: Path, dst: Path) -> None:
    """Raise a `UserError` when replacing `dst` would remove `src`."""
    if src.resolve() == dst.resolve() or dst.resolve() in src.resolve().parents:
        raise UserError(f"{dst} is or holds the source {src}", "name another destination")


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
            _log.info("--to hf: %s can hold this model", name)
            return name
    hint = f"--to torch takes every model; there is no place for: {'; '.join(refusals)}"
    raise UserError("--to hf: no public layout can hold this model", hint)


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
    return {"config.toml": toml.to_toml(settings), **_tokenizer_files(model)}


def _portable(settings: config.Config) -> config.Config:
    """The config without paths of this machine: the tokenizer lies beside it."""
    tokenizer = settings.tokenizer
    if tokenizer.kind == "file":
        tokenizer = dataclasses.replace(tokenizer, path=TOKENIZER)
    return dataclasses.replace(settings, out_dir="", tokenizer=tokenizer)


def _write_llama2c(model: Opened, dst: Path, overwrite: bool) -> storage.Written:
    """A folder with what llama2.c's run.c reads: `model.bin` and `tokenizer.bin`."""
    cfg, path = model.config.model, model.tokenizer_path
    with storage.staged(dst, overwrite) as stage:
        if path:
            (stage / model_bin.TOKENIZER).write_bytes(model_bin.tokenizer_bin(path, cfg.vocab_size))
        cfg_and_tables = (cfg, model.kept.get(model_bin.ROPE_TABLES))
        return storage.Written(*model_bin.write(stage, model.parameters, *cfg_and_tables))


def _tokenizer_files(model: Opened) -> dict[str, bytes]:
    """The tokenizer.json and the files beside it."""
    path, own = model.tokenizer_path, dict(model.kept)
    if path is None:
        return own
    if path.suffix in (".bin", ".gguf"):
        return {TOKENIZER: Tokenizer.from_file(path).to_json().encode(), **own}
    return {TOKENIZER: content(path), **own}


def _public_files(model: Opened, family: Family) -> dict[str, str | bytes]:
    """Everything that `from_pretrained` reads besides the weights."""
    tokenizer = Tokenizer.from_file(model.tokenizer_path) if model.tokenizer_path else None
    ids = {"bos": tokenizer.bos, "eos": tokenizer.eot, "pad": tokenizer.specials.get("pad")} if tokenizer else {}
    hf = family.config_to_hf(model.config.model, dtype=model.dtype, **ids)
    special_ids = {key: hf[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if special_ids["bos_token_id"] not in (None, special_ids["eos_token_id"]):  # which ends a text as well
        special_ids["eos_token_id"] = [hf[key] for key in ("eos_token_id", "bos_token_id") if hf[key] is not None]
    generation = _settings(model.kept.get("generation_config.json", b"{}"))
    if kept := end_ids(generation):
        special_ids["eos_token_id"] = kept[0] if len(kept) == 1 else list(kept)
        if generation.keys() == special_ids.keys():  # it was made of a config.json whose ids these were
            hf["eos_token_id"] = special_ids["eos_token_id"]
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
        files |= {"tokenizer_config.json": _json(settings)}
    return files | {name: stored for name, stored in _tokenizer_files(model).items() if name in (TOKENIZER, *PUBLIC)}


@contextlib.contextmanager
def _progress(tensors: Sequence[storage.Planned], dst: Path) -> Iterator[Callable[[int], object]]:
    """Yield a function to call with the bytes just written; it draws a bar on stderr when they are many."""
    from rich.console import Console
    from rich.progress import Progress

    size = sum(one.nbytes for one in tensors)
    with Progress(
        console=Console(stderr=True), transient=True, disable=size < _LONG or not _log.isEnabledFor(logging.INFO)
    ) as progress:
        task = progress.add_task(f"writing {dst.name}", total=size)
        yield lambda size: progress.advance(task, size)


def _settings(content: bytes) -> dict[str, Any]:
    try:
        settings = json.loads(content)
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}


def _json(content: Any) -> str:
    return json.dumps(content, indent=2) + "\n"
