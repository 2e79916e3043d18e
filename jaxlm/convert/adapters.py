"""Adapters between layouts: the live tree, torch_ref's names, and PEFT's files.

torch_ref and PEFT have one adapter a layer, `a` [r, in] and `b` [out, r]; the live tree has `a` [in..., r] and
`b` [r, out...], stacked where the layers are scanned. A public layout permutes or joins outputs as it does those of the
kernel itself, so its own rows say how `b` goes there: a `b` is a kernel whose inputs are the ranks.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm import config
from jaxlm.convert import native, saved_modules
from jaxlm.convert.canonical import Leaf, leaves
from jaxlm.convert.families import FAMILIES
from jaxlm.convert.family import Family
from jaxlm.convert.files.safetensors_file import MappedFile
from jaxlm.convert.rows import Row, expand, inputs, matrix
from jaxlm.errors import UserError
from jaxlm.models.adapted import split
from jaxlm.models.lora import Site, Tree

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
HEAD = f"{PREFIX}lm_head.weight"
_NAMES = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The adapter of one linear map of one layer, in float arrays."""

    a: np.ndarray
    """[in..., r]; of experts [E, in..., r]."""
    b: np.ndarray
    """[r, out...]."""
    magnitude: np.ndarray | None
    """[out...]."""
    site: Site

    @property
    def rank(self) -> int:
        """Of the update."""
        return self.a.shape[-1]


def by_layer(tree: Tree, targets: Sequence[Site]) -> dict[str, Adapter]:
    """The adapters of a live tree by canonical name."""
    found = {}
    for site in targets:
        leaves: Any = tree
        for key in site.path:
            leaves = leaves[key]
        for layer, name in enumerate(site.names):
            pick = (lambda leaf, i=layer: np.asarray(leaf)[i]) if site.axes[0] == "layers" else np.asarray
            parts = {key: pick(leaf) for key, leaf in leaves.items()}
            found[name] = Adapter(parts["a"], parts["b"], parts.get("magnitude"), site)
    return found


def to_torch(tree: Tree, targets: Sequence[Site], cfg: config.Model) -> Iterator[tuple[str, np.ndarray]]:
    """Adapters under torch_ref's names, `layers.0.mixer.q_proj.adapter.a`, and whole modules as `embed.weight`."""
    yield from saved_modules.to_layout(split(tree)[1], native.rows(cfg), cfg).items()
    for name, one in by_layer(tree, targets).items():
        lead = one.site.lead[1:] if one.site.axes[0] == "layers" else one.site.lead
        size = math.prod(one.site.ins)
        yield f"{name}.adapter.a", one.a.reshape(*lead, size, one.rank).swapaxes(-1, -2)
        yield f"{name}.adapter.b", one.b.reshape(*lead, one.rank, -1).swapaxes(-1, -2)
        if one.magnitude is not None:
            yield f"{name}.adapter.magnitude", one.magnitude.reshape(*lead, -1)


def from_torch(tensors: Mapping[str, np.ndarray], targets: Sequence[Site], cfg: config.Model) -> Tree:
    """The live tree of adapters, and of whole modules, under torch_ref's names.

    Raises:
        UserError: an adapter is missing.
    """
    tree = saved_modules.from_layout(tensors, native.rows(cfg), cfg)
    for site in targets:
        stacked = site.axes[0] == "layers"
        lead = site.lead[1:] if stacked else site.lead
        layers = [_from_torch(tensors, name, lead, site) for name in site.names]
        leaves = {key: np.stack([one[key] for one in layers]) if stacked else layers[0][key] for key in layers[0]}
        holder = tree
        for key in site.path:
            holder = holder.setdefault(key, {})
        holder.update(leaves)
    return tree


def _from_torch(tensors: Mapping[str, np.ndarray], name: str, lead: tuple[int, ...], site: Site) -> Tree:
    if f"{name}.adapter.a" not in tensors:
        raise UserError(f"there is no adapter of {name}", "were they made with other lora.targets?")
    a, b = (np.asarray(tensors[f"{name}.adapter.{key}"]) for key in ("a", "b"))
    leaves = {
        "a": a.swapaxes(-1, -2).reshape(*lead, *site.ins, -1),
        "b": b.swapaxes(-1, -2).reshape(*lead, b.shape[-1], *site.outs),
    }
    if f"{name}.adapter.magnitude" in tensors:
        leaves["magnitude"] = np.asarray(tensors[f"{name}.adapter.magnitude"]).reshape(*lead, *site.outs)
    return leaves


def to_peft(
    tree: Tree, targets: Sequence[Site], lora: config.LoRA, cfg: config.Model, family: Family
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and `adapter_config.json` of PEFT for the public layout of a family.

    Raises:
        UserError: the layout or PEFT has no place for an adapter, by name.
    """
    adapters, tensors = by_layer(tree, targets), {}
    ranks: dict[str, tuple[int, float]] = {}
    for row in expand(family.rows(cfg), cfg):
        names = [name.removesuffix(".kernel") for name in row.ours]
        if not any(name in adapters for name in names):
            continue
        stored, *others = row.theirs
        if others or any("experts" in adapters[n].site.axes for n in names if n in adapters):
            raise UserError(
                f"PEFT has no adapter of stacked experts: {names[0]}", 'lora.targets = ["mixer.*"] or merge'
            )
        module = stored.removesuffix(".weight")
        parts = _joined(row, names, adapters, leaves(cfg), lora)
        tensors |= {f"{PREFIX}{module}.{_NAMES[key]}": value for key, value in parts.items()}
        scale = lora.scale_of(next(name for name in names if name in adapters))
        rank = parts["a"].shape[0]
        ranks[module] = (rank, scale * (math.sqrt(rank) if lora.rslora else rank))
    saved = saved_modules.to_layout(split(tree)[1], expand(family.rows(cfg), cfg), cfg)
    tensors |= {PREFIX + name: value for name, value in saved.items()}
    stated = _config(ranks, lora, family)
    if saved:
        # By their whole path: PEFT takes every module whose name ends so, and `norm` would be each of a block too.
        stated["modules_to_save"] = sorted({name.rpartition(".")[0] for name in saved})
        if cfg.tie_embeddings and "embed" in split(tree)[1]:  # PEFT stores the head too, and keeps both tied
            stated["ensure_weight_tying"] = True
            tensors[HEAD] = saved[next(row.theirs[0] for row in family.rows(cfg) if row.ours == ("embed.embedding",))]
    return tensors, stated


def _joined(
    row: Row, names: Sequence[str], adapters: Mapping[str, Adapter], known: Mapping[str, Leaf], lora: config.LoRA
) -> dict[str, np.ndarray]:
    """One adapter of PEFT from those of the linear maps that a tensor of the layout joins: their ranks in a row."""
    present = [name for name in names if name in adapters]
    if len({lora.scale_of(name) for name in present}) > 1:
        raise UserError(f"{row.theirs[0]} joins {', '.join(present)}, which have different scales", "one lora.alpha")
    total, at = sum(adapters[name].rank for name in present), 0
    kernels, shapes = [], []
    for name in names:
        kernel = known[f"{name}.kernel"]
        outs = slice(inputs(kernel), None)
        shapes.append(Leaf((total, *kernel.shape[outs]), (None, *kernel.axes[outs])))
        wide = np.zeros(shapes[-1].shape, adapters[present[0]].b.dtype)
        if name in adapters:
            wide[at : at + adapters[name].rank] = adapters[name].b
            at += adapters[name].rank
        kernels.append(wide)
    stored = row.out(kernels, shapes)[0]
    downs = [adapters[name].a.reshape(-1, adapters[name].rank).T for name in present]
    parts = {"a": np.concatenate(downs), "b": np.ascontiguousarray(stored if _turned(row) else stored.T)}
    if lora.dora:
        if len(present) < len(names):
            raise UserError(f"{row.theirs[0]} joins {', '.join(names)}, DoRA has a magnitude for only some")
        lifted = [np.asarray(adapters[name].magnitude)[None] for name in names]
        single = [Leaf(one.shape, leaf.axes) for one, leaf in zip(lifted, shapes, strict=True)]
        parts["magnitude"] = np.ascontiguousarray(row.out(lifted, single)[0].reshape(-1))
    return parts


def _turned(row: Row) -> bool:
    """Whether the layout stores [out, in]; GPT-2's does not."""
    return matrix in row.transforms


def _config(ranks: Mapping[str, tuple[int, float]], lora: config.LoRA, family: Family) -> dict[str, Any]:
    usual_rank, usual_alpha = max(ranks.values(), key=list(ranks.values()).count)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": usual_rank,
        "lora_alpha": usual_alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(ranks),
        "rank_pattern": {name: rank for name, (rank, _) in ranks.items() if rank != usual_rank},
        "alpha_pattern": {name: alpha for name, (_, alpha) in ranks.items() if alpha != usual_alpha},
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "fan_in_fan_out": family.name == "gpt2",
        "bias": "none",
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


_MOVED = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways in which PEFT begins adapters that take what they hold out of the base."""
_REFUSED = ("use_qalora", "use_bdlora", "lora_bias", "megatron_config", "layer_replication", "target_parameters")


def read_peft(folder: Path, cfg: config.Model, all_sites: Sequence[Site]) -> tuple[Tree, config.LoRA]:
    """The live tree of PEFT's files, and the options that make the same adapters.

    Raises:
        UserError: another kind of PEFT, an option that jaxlm does not have, a tensor that fits nowhere.
    """
    stated = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if stated.get("peft_type") != "LORA":
        raise UserError(f"{folder / CONFIG}: peft_type {stated.get('peft_type')!r}: jaxlm reads LORA")
    if used := next((name for name in _REFUSED if stated.get(name)), None):
        raise UserError(f"{folder / CONFIG}: {used} = {stated[used]!r}: jaxlm has no such adapters")
    began = stated.get("init_lora_weights")
    if isinstance(began, str) and began.lower().startswith(_MOVED):
        hint = "convert it in PEFT: save_pretrained(DIR, path_initial_model_for_weight_conversion=...)"
        raise UserError(f"{folder / CONFIG}: init_lora_weights = {began!r} moves the base too", hint)
    file = MappedFile(folder / WEIGHTS)
    stored = {name: file.read(name) for name in file.entries}
    if cfg.tie_embeddings:
        _check_tied(folder, stated, stored)
    family = next((one for one in FAMILIES.values() if _holds(one, cfg, stored)), None)
    if family is None:
        raise UserError(f"{folder}: its modules are in no layout of this base", "is it an adapter of another model?")
    adapters: dict[str, dict[str, np.ndarray]] = {}
    used = set[str]()
    sites = {name: site for site in all_sites for name in site.names}
    for row in expand(family.rows(cfg), cfg):
        key = PREFIX + row.theirs[0].removesuffix(".weight")
        if f"{key}.lora_A.weight" not in stored:
            continue
        mine, *others = row.ours
        if others:
            raise UserError(f"{key}: one adapter of several linear maps", "jaxlm trains one for each; merge it in PEFT")
        name = mine.removesuffix(".kernel")
        if name not in sites:  # an embedding or a head: refused below
            continue
        adapters[name] = _from_row(row, key, stored, sites[name])
        used |= {f"{key}.{suffix}" for suffix in _NAMES.values()}
    whole = {name.removeprefix(PREFIX): value for name, value in stored.items() if name not in used}
    saved = saved_modules.from_layout(whole, expand(family.rows(cfg), cfg), cfg)
    used |= {PREFIX + name for name in saved_modules.to_layout(saved, expand(family.rows(cfg), cfg), cfg)}
    if unused := sorted(stored.keys() - used):
        raise UserError(
            f"{folder}: {unused[0]} fits nowhere",
            "jaxlm reads adapters of linear maps, and modules_to_save outside the layers",
        )
    lora = dataclasses.replace(_options(folder / CONFIG, stated, adapters), modules_to_save=tuple(saved))
    targets = [site for site in all_sites if any(name in adapters for name in site.names)]
    flat = {f"{name}.adapter.{key}": value for name, parts in adapters.items() for key, value in parts.items()}
    return from_torch(flat, targets, cfg) | saved, lora


def _check_tied(folder: Path, stated: Mapping[str, Any], stored: dict[str, np.ndarray]) -> None:
    """Drop the head from the tensors, where the base ties it to the embedding. Raises: UserError if they differ."""
    head = stored.pop(HEAD, None)
    if any(name.startswith(f"{PREFIX}lm_head.") for name in stored):
        hint = "merging would change the embedding too: train without lm_head, or give the base a head of its own"
        raise UserError(f"{folder}: an adapter of lm_head, which is the embedding of this base", hint)
    known = {"embed_tokens.weight", "wte.weight", "embeddings.weight"}
    tables = [value for name, value in stored.items() if ".".join(name.rsplit(".", 2)[-2:]) in known]
    same = head is not None and len(tables) == 1 and np.array_equal(head, tables[0])
    tied = same and bool(stated.get("ensure_weight_tying"))
    if (tables or head is not None) and not tied:
        hint = "train it with ensure_weight_tying = true, or give the base a head of its own"
        raise UserError(f"{folder}: embedding and head are one in the base and not in modules_to_save", hint)


def _holds(family: Family, cfg: config.Model, stored: Mapping[str, np.ndarray]) -> bool:
    try:
        rows = expand(family.rows(cfg), cfg)
        family.config_to_hf(cfg, dtype="float32")
    except UserError:
        return False
    names = {PREFIX + name.removesuffix(".weight") for row in rows for name in row.theirs}
    return all(any(key.startswith(name + ".") for name in names) for key in stored)


def _from_row(row: Row, key: str, stored: Mapping[str, np.ndarray], site: Site) -> dict[str, np.ndarray]:
    """An adapter in torch_ref's layout: the row read backwards gives its outputs our order."""
    if f"{key}.lora_B.weight" not in stored:
        raise UserError(f"{key}.lora_B.weight: missing beside lora_A", "is the file whole?")
    a, b = stored[f"{key}.lora_A.weight"], stored[f"{key}.lora_B.weight"]
    rank, (ins, outs) = b.shape[1], (math.prod(site.ins), math.prod(site.outs))
    if a.shape != (rank, ins) or b.shape[0] != outs:
        raise UserError(
            f"{key}: an adapter of {b.shape[0]} x {a.shape[1]}, the base has {outs} x {ins}",
            "it is an adapter of another model",
        )
    leaf = Leaf((rank, *site.outs), (None, *site.axes[site.stacked + site.inputs :]))
    ours = row.back([b if _turned(row) else b.T], [leaf])[0]
    parts = {"a": a, "b": ours.reshape(rank, -1).T}
    if f"{key}.lora_magnitude_vector" in stored:
        vector = stored[f"{key}.lora_magnitude_vector"]
        single = Leaf((1, *site.outs), leaf.axes)
        parts["magnitude"] = row.back([vector.reshape(row.shapes([single])[0])], [single])[0].reshape(-1)
    return parts


def _options(file: Path, stated: Mapping[str, Any], adapters: Mapping[str, Mapping[str, np.ndarray]]) -> config.LoRA:
    """`[lora]` with a rank and an alpha for each adapter that has its own."""
    for key in ("r", "lora_alpha"):
        if isinstance(stated.get(key), bool) or not isinstance(stated.get(key), int | float) or stated[key] <= 0:
            raise UserError(f"{file}: {key} = {stated.get(key)!r} is no number above 0")
    rslora = bool(stated.get("use_rslora"))
    usual = int(stated["r"])
    ranks = {name: int(parts["b"].shape[1]) for name, parts in adapters.items()}
    if (other := next((r for r in ranks.values() if r != usual), None)) and not stated.get("rank_pattern"):
        raise UserError(f"{file}: r = {usual}, and there is an adapter of rank {other}", "are both of one folder?")
    alphas = {name: float(stated["lora_alpha"]) for name in adapters}
    for pattern, alpha in (stated.get("alpha_pattern") or {}).items():
        last = pattern.rsplit(".", 1)[-1]
        alphas |= {name: float(alpha) for name in adapters if name.endswith(last) and _same_layer(pattern, name)}
    return config.LoRA(
        rank=usual,
        alpha=float(stated["lora_alpha"]),
        rslora=rslora,
        dora=bool(stated.get("use_dora")),
        dropout=float(stated.get("lora_dropout") or 0),
        targets=tuple(sorted(adapters)),
        rank_pattern={name: rank for name, rank in ranks.items() if rank != usual},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != float(stated["lora_alpha"])},
    )


def _same_layer(pattern: str, name: str) -> bool:
    numbers = [part for part in pattern.split(".") if part.isdecimal()]
    return not numbers or numbers[0] == name.split(".")[1]
