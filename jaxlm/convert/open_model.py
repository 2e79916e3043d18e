"""Open anything that holds a model: a run, a torch_ref or Hugging Face folder, llama2.c's `model.bin`, a GGUF file."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxlm import config
from jaxlm.config import toml
from jaxlm.convert import adapters, base, gguf, native
from jaxlm.convert.canonical import canonical, fill
from jaxlm.convert.families import FAMILIES, REFUSED
from jaxlm.convert.files import hub, storage
from jaxlm.convert.files.side_files import carried
from jaxlm.convert.llama2c import model_bin
from jaxlm.convert.rows import Parameters
from jaxlm.convert.tensors import tensors_of
from jaxlm.errors import UserError
from jaxlm.models.decoder import Decoder, Params, abstract_params
from jaxlm.numerics import Policy
from jaxlm.run.checkpoints import checkpoint_folder, checkpoint_steps
from jaxlm.run.directory import FROZEN

TOKENIZER = "tokenizer.json"

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model in memory: its config, its live tree as numpy arrays, and where it came from."""

    config: config.Config
    params: Params
    tokenizer_path: Path | None
    kind: str
    """`run`, `torch`, or the name of a family."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model on disk: its config, and its parameters by canonical names, each read when it is asked for."""

    path: Path
    config: config.Config
    parameters: Mapping[str, Any]  # arrays; a check of types would read one
    kind: str
    """`run`, `torch`, or the name of a family."""
    tokenizer: Path | None = None
    """Of a tokenizer.json, tokenizer.bin or GGUF file that does not lie in `path`."""
    kept: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    """Files to write beside the weights, by name."""

    @property
    def dtype(self) -> str:
        """Of the stored embedding, by numpy's name."""
        return tensors_of(self.parameters).dtype("embed.embedding")

    @property
    def tokenizer_path(self) -> Path | None:
        """Of its tokenizer, if it has one."""
        return self.tokenizer or (self.path / TOKENIZER if (self.path / TOKENIZER).is_file() else None)

    def read(self) -> Model:
        """The whole model in memory."""
        params = fill(self.parameters, self.config.model)
        return Model(self.config, params, self.tokenizer_path, self.kind)


def load(path: str | Path, *, step: int | None = None) -> Model:
    """Open a run, a torch_ref or Hugging Face folder, a `model.bin` or what the hub has as `org/name`, and read it.

    Args:
        step: which checkpoint of a run; None: the newest.

    Raises:
        UserError: `path` is none of these, or what it holds is damaged or does not fit its config.
    """
    return _open(Path(path), step, _restored).read()


def open_model(path: str | Path, *, step: int | None = None, tokenizer: str | Path | None = None) -> Opened:
    """As `load`, but nothing is read yet. No damaged checkpoint is passed over: see `load` and `steps_to_try`.

    Args:
        tokenizer: a tokenizer.json or tokenizer.bin to use instead of its own.
    """
    path = Path(path)
    opened = _open(path, step, _stored)
    if tokenizer is None:
        return opened if opened.kept else dataclasses.replace(opened, kept=carried(opened.path))
    own = config.Tokenizer(kind="file", path=str(tokenizer))
    return dataclasses.replace(
        opened, tokenizer=Path(tokenizer), config=dataclasses.replace(opened.config, tokenizer=own)
    )


def steps_to_try(path: str | Path, step: int | None = None) -> list[int | None]:
    """The steps at which `open_model` may find `path` intact, newest first; only `step` where it is given or no run.

    Raises:
        UserError: the folder of the checkpoints cannot be read.
    """
    if step is None and (Path(path) / "config.toml").is_file():
        return [*reversed(checkpoint_steps(path))] or [None]
    return [step]


def open_nearest(path: str | Path) -> tuple[Opened, dict[str, Any]]:
    """A Hugging Face folder as `open_model` opens it, with what `Family.nearest` leaves out of its config.json.

    Raises:
        UserError: as `open_model`.
    """
    path = hub.local(Path(path))
    hf = storage.read_json(path / "config.json")
    family = FAMILIES.get(str(hf.get("model_type")))
    kept, refused = family.nearest(hf) if family else (hf, {})
    return _open_family(path, kept), refused


def _open(path: Path, step: int | None, orbax: _Reader) -> Opened:
    if path.suffix == ".bin" and path.is_file():
        return _open_llama2c(path)
    if path.suffix == gguf.SUFFIX and path.is_file():
        return _open_gguf(path)
    path = hub.local(path)
    if not path.is_dir():
        raise UserError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}", _WANTED)
    if (path / "config.toml").is_file() and (path / "checkpoints").is_dir():
        return _open_run(path, step, orbax)
    if step is not None:
        raise UserError(f"{path} is not a run, it has no step {step}")
    if (path / "config.toml").is_file():
        settings = _settings(path, "")
        return Opened(path, settings, _torch_parameters(path, settings), "torch")
    if (path / "config.json").is_file():
        return _open_family(path, storage.read_json(path / "config.json"))
    if (path / model_bin.MODEL).is_file():
        return _open_llama2c(path / model_bin.MODEL)
    if (path / adapters.CONFIG).is_file():
        return _open_peft(path)
    raise UserError(f"{path}: not a model", _WANTED)


def _open_llama2c(path: Path) -> Opened:
    found = model_bin.read(path)
    tokenizer = model_bin.find_tokenizer(path, found.model.vocab_size)
    settings = model_bin.settings(found.model, tokenizer)
    return Opened(path, settings, found.parameters, model_bin.NAME, tokenizer, found.kept)


def _open_gguf(path: Path) -> Opened:
    found = gguf.read(path)
    tokenizer = config.Tokenizer(kind="file", path=str(path))
    data = config.Data(seq_len=min(config.Data().seq_len, found.model.max_seq_len))
    settings = dataclasses.replace(config.Config(), model=found.model, tokenizer=tokenizer, data=data)
    return Opened(path, settings, found.parameters, gguf.NAME, path, found.kept)


def _open_run(path: Path, step: int | None, orbax: _Reader) -> Opened:
    settings = _settings(path, str(path))
    newest = checkpoint_folder(path, step)
    if settings.lora.rank:
        return _open_with_adapters(path, settings, step)
    if any(newest.glob("model.safetensors*")):  # of `--backend torch`, or of a conversion
        parameters = _torch_parameters(newest, settings, several=True)
    else:
        parameters = canonical(_orbax_params(path, settings, step, orbax), settings.model)
    return Opened(path, settings, parameters, "run")


def _open_with_adapters(path: Path, settings: config.Config, step: int | None) -> Opened:
    """A run with adapters as a whole model: its base, with the adapters added."""
    with jax.enable_x64(True):  # float64 parameters stay so; the others have their own dtype
        params = base.whole_model(path, settings, _base_params(path, settings), _trained(path, settings, step))
    train = dataclasses.replace(settings.train, init_from="")
    merged = dataclasses.replace(settings, lora=config.LoRA(), train=train)
    return Opened(path, merged, canonical(params, settings.model), "run")


def _base_params(path: Path, settings: config.Config) -> Params:
    """The live tree of the base of a run with adapters, in numpy arrays."""
    try:
        below = open_model(base.base_path(path, settings))
    except UserError as error:
        hint = f"put it back, or name its place in {path / FROZEN}"
        raise UserError(f"{path}: its base cannot be opened: {error.message}", hint) from None
    parameters = base.with_head(below.parameters, settings.model, below.config.model, settings.seed)
    return base.cast(fill(parameters, settings.model), np.dtype(settings.numerics.params))


def _trained(path: Path, settings: config.Config, step: int | None) -> Params:
    """The live tree of the adapters of a run."""
    newest = checkpoint_folder(path, step)
    if any(newest.glob("model.safetensors*")):
        return base.from_torch(_of_model(storage.read_folder(newest)), settings)
    return _orbax_params(path, settings, step, _restored, base.adapter_shapes(settings))


def open_adapters(path: str | Path, step: int | None = None) -> tuple[config.Config, Params]:
    """The config of a run with adapters, and their live tree.

    Raises:
        UserError: it is no run, or has none; or its base is not there, or another than they were trained on.
    """
    path = Path(path)
    if not (path / "config.toml").is_file() or not (settings := _settings(path, str(path))).lora.rank:
        raise UserError(f"{path}: not a run with adapters", "a run has some when lora.rank is above 0")
    with jax.enable_x64(True):
        base.check_base(path, settings, _base_params(path, settings))
        return settings, _trained(path, settings, step)


def _open_peft(path: Path) -> Opened:
    """A folder of PEFT: its base, with the adapters merged."""
    where = storage.read_json(path / adapters.CONFIG).get("base_model_name_or_path")
    if not where:
        raise UserError(f"{path / adapters.CONFIG} names no base", "base_model_name_or_path = the folder of the base")
    try:
        below = open_model(where) if Path(where).resolve() != path.resolve() else None
    except UserError as error:
        hint = "name the folder of the base there, or merge it: merge_and_unload().save_pretrained(DIR)"
        raise UserError(f"{path}: an adapter of {where}, which cannot be opened: {error.message}", hint) from None
    if below is None:
        raise UserError(f"{path / adapters.CONFIG} names itself as the base", "name the folder of the base")
    params = fill(below.parameters, below.config.model)
    merged = base.merged_peft(path, params, below.config)
    own = {"tokenizer": below.tokenizer_path}
    return dataclasses.replace(below, parameters=canonical(merged, below.config.model), **own)


_Reader = Callable[[Any, Any, int | None], Params]
"""Of a `Checkpointer` the parameters like these at a step."""


def _restored(checkpoints: Any, like: Params, step: int | None) -> Params:
    """All at once, which is quicker than one by one."""
    return jax.tree.map(np.asarray, checkpoints.restore_params(like, _log.warning, step))


def _stored(checkpoints: Any, like: Params, step: int | None) -> Params:
    """Leaves that are read when they are asked for."""
    return checkpoints.stored_params(like, step)


def _orbax_params(
    path: Path, settings: config.Config, step: int | None, reader: _Reader, shapes: Params | None = None
) -> Params:
    from jaxlm.train.checkpoint import Checkpointer  # Orbax takes a second to import

    # On the host: the mesh that trained the model need not exist here.
    host = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    with jax.enable_x64(True):  # float64 parameters stay so; the others have their own dtype
        shapes = shapes or abstract_params(Decoder(settings.model, Policy.from_config(settings.numerics)))[0]
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host), shapes)
        checkpoints = Checkpointer(path, read_only=True)
        params = reader(checkpoints, like, step)
        checkpoints.close()
        return params


def _torch_parameters(path: Path, settings: config.Config, several: bool = False) -> Parameters:
    """`several`: other trained trees of the stage may lie there too, as `value/NAME`."""
    tensors = storage.read_folder(path)
    rows = native.rows(settings.model)
    return Parameters(_of_model(tensors) if several else tensors, settings.model, rows, str(path))


def _of_model(tensors: Any) -> Any:
    """The tensors of a checkpoint of torch_ref without those of other trained trees."""
    others = {name for name in tensors if "/" in name}
    return tensors.without(others) if others else tensors


def _open_family(path: Path, hf: Mapping[str, Any]) -> Opened:
    where = path / "config.json"
    family = FAMILIES.get(str(hf.get("model_type")))
    if reason := REFUSED.get(str(hf.get("model_type"))):
        raise UserError(f"{where}: model_type {hf['model_type']!r}: {reason}")
    if family is None:
        raise UserError(f"{where}: model_type {hf.get('model_type')!r} is not known", f"known: {', '.join(FAMILIES)}")
    model = family.config_from_hf(hf, str(where))
    tensors = family.tensors(storage.read_folder(path), model)
    parameters = Parameters(tensors, model, family.rows(model), str(path))
    dtype = parameters.dtype("embed.embedding")
    tree: dict[str, Any] = {
        "data": {"seq_len": min(config.Data().seq_len, model.max_seq_len)},
        "numerics": {
            "params": "float64" if dtype == "float64" else "float32",
            "compute": dtype if dtype in ("bfloat16", "float64") else "float32",
        },
        "tokenizer": {"kind": "file", "path": str(path / TOKENIZER)} if (path / TOKENIZER).is_file() else {},
    }
    settings = dataclasses.replace(toml.from_dict(tree, str(where)), model=model)
    return Opened(path, settings, parameters, family.name)


def _settings(path: Path, out_dir: str) -> config.Config:
    settings = dataclasses.replace(toml.load(path / "config.toml"), out_dir=out_dir)
    if not settings.model.vocab_size:
        raise UserError(
            f"{path / 'config.toml'}: model.vocab_size is 0", "the config of a finished run has it resolved"
        )
    return settings


_WANTED = (
    "looked for config.toml and checkpoints/ (a run), config.toml and model.safetensors (torch_ref), "
    "config.json and model.safetensors (Hugging Face), model.bin (llama2.c), a file that ends in .gguf"
)
