"""A run with adapters from its files: its base, which must be the one that it was trained on, and the whole model.

runs/NAME/frozen.json   {"base": {"path": "runs/smollm2", "sha256": "..."}}
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxlm import config
from jaxlm.convert import adapters as layouts
from jaxlm.convert.canonical import canonical
from jaxlm.convert.families import FAMILIES
from jaxlm.convert.family import Family
from jaxlm.convert.files import storage
from jaxlm.errors import UserError
from jaxlm.models import lora
from jaxlm.models.adapted import split
from jaxlm.models.decoder import Decoder, Params
from jaxlm.numerics import Policy
from jaxlm.run.directory import FROZEN
from jaxlm.train import adapters
from jaxlm.train.recipe import BASE, digest_of


def base_digest(params: Params, model: config.Model) -> str:
    """sha256 (hex) of all parameters by canonical name, so it is the same for scanned and unrolled layers."""
    return digest_of(canonical(params, model))


def cast(tree: Params, dtype: np.dtype) -> Params:
    """The live tree in a dtype, as numpy arrays."""
    return {
        name: cast(leaf, dtype) if isinstance(leaf, dict) else np.asarray(leaf, dtype) for name, leaf in tree.items()
    }


def takes_the_trunk(model: config.Model, before: config.Model) -> bool:
    """Whether a model that begins with another has a head of its own, that scores."""
    return model.head not in ("lm", before.head)


def with_head(parameters: Mapping[str, Any], model: config.Model, before: config.Model, seed: int) -> Mapping[str, Any]:
    """The parameters with which `model` begins, by canonical names: those of `before`, with a new head where it scores.

    The head depends on the seed alone: it is the same in both frameworks, and when a run with adapters is opened again.
    """
    return _Beside(draw_head(model, seed), parameters) if takes_the_trunk(model, before) else parameters


def draw_head(model: config.Model, seed: int) -> dict[str, np.ndarray]:
    """A new head of a model that scores, by canonical names: a normal kernel [D, C] and a bias of zero."""
    normal_DC = np.random.default_rng(seed).standard_normal((model.d_model, model.outputs))
    return {"score.kernel": normal_DC * model.init_std, "score.bias": np.zeros(model.outputs)}


class _Beside(Mapping[str, Any]):
    """Parameters with some of others in their place; each is read when it is asked for."""

    def __init__(self, first: Mapping[str, Any], rest: Mapping[str, Any]) -> None:
        self._first, self._rest = first, rest

    def __getitem__(self, name: str) -> Any:
        return self._first[name] if name in self._first else self._rest[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._first, *self._rest]))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def base_path(run_dir: Path, settings: config.Config) -> str:
    """The path at which the run found its base; if nothing is there, that of its config."""
    stored = _recorded(run_dir).get("path", "")
    return stored if stored and Path(stored).exists() else settings.train.init_from


def whole_model(run_dir: Path, settings: config.Config, base: Params, trained: Params) -> Params:
    """All parameters of a run with adapters, in numpy arrays.

    Args:
        base: the live tree of the base.
        trained: the live tree of the adapters.

    Raises:
        UserError: the base is another one than the adapters were trained on.
    """
    check_base(run_dir, settings, base)
    decoder = _decoder(settings)
    frozen = adapters.base_collections(decoder, settings.lora, base)
    return adapters.whole(decoder, settings.lora, trained, frozen)


def check_base(run_dir: Path, settings: config.Config, base: Params) -> None:
    """Refuse another base than the adapters of a run were trained on.

    Raises:
        UserError: it is another one.
    """
    before, now = _recorded(run_dir).get("sha256", ""), base_digest(base, settings.model)
    if before != now:
        raise UserError(
            f"{run_dir}: its base is another model than the adapters were trained on",
            f"they were trained on sha256 {before[:12]}..., {base_path(run_dir, settings)} has {now[:12]}...",
        )


def adapter_shapes(settings: config.Config) -> Params:
    """Shapes and dtypes of what a run with adapters trains."""
    return adapters.abstract_trained(_decoder(settings), settings.lora)[0]


def from_torch(tensors: Mapping[str, Any], settings: config.Config) -> Params:
    """The live tree of adapters that the torch engine saved."""
    return layouts.from_torch(tensors, adapters.targets(_decoder(settings), settings.lora), settings.model)


def merged_peft(folder: Path, base: Params, settings: config.Config) -> Params:
    """A base with the adapters of a folder of PEFT added.

    Raises:
        UserError: see `adapters.read_peft`.
    """
    every = lora.sites(_decoder(settings))
    tree, options = layouts.read_peft(folder, settings.model, every)
    chosen = lora.chosen(every, options)
    low_rank, saved = split(tree)
    return lora.merged(base, low_rank, lora.scales(chosen, options, np.float64), chosen) | saved


def write_peft(
    settings: config.Config, tree: Params, dst: Path, base: str, *, overwrite: bool = False
) -> storage.Written:
    """Write the adapters of a run as PEFT reads them; `base` is the folder or hub name of the base for transformers.

    Raises:
        UserError: no public layout holds the base, or PEFT has no place for an adapter.
    """
    family = next((one for one in FAMILIES.values() if _holds(one, settings.model)), None)
    if family is None:
        raise UserError("--to peft: no public layout can hold the base", "--to torch takes every model, merged")
    sites = adapters.targets(_decoder(settings), settings.lora)
    tensors, stated = layouts.to_peft(tree, sites, settings.lora, settings.model, family)
    stated["base_model_name_or_path"] = base
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with storage.staged(dst, overwrite) as stage:
        save_file(contiguous, stage / layouts.WEIGHTS, {"format": "pt"})
        (stage / layouts.CONFIG).write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")
        shutil.copymode(stage / layouts.CONFIG, stage / layouts.WEIGHTS)  # the library's files are private to the user
    return storage.Written(len(contiguous), sum(array.nbytes for array in contiguous.values()))


def _recorded(run_dir: Path) -> Mapping[str, str]:
    file = run_dir / FROZEN
    if not file.is_file():
        raise UserError(f"{file}: missing: it says which base the adapters were trained on", "copy the whole run")
    return storage.read_json(file).get(BASE, {})


def _decoder(settings: config.Config) -> Decoder:
    return Decoder(settings.model, Policy.from_config(settings.numerics))


def _holds(family: Family, model: config.Model) -> bool:
    try:
        family.config_to_hf(model, dtype="float32")
    except UserError:
        return False
    return True
