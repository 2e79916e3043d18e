"""Two sets of weights by the names of torch_ref: how those that differ are related, in words.

A finding holds the tensors that share one explanation; `known` tells whether there is one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from jaxlm import config
from jaxlm.parity.diagnose.tensor_relation import Axis, relation, source

Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Recognised:
    """What is different about some tensors."""

    what: str
    names: tuple[str, ...]
    known: bool = True


def recognise(ours: Tensors, theirs: Tensors, model: config.Model) -> list[Recognised]:
    """Every difference, those with an explanation first, then those of most tensors.

    Args:
        model: the config of `ours`.
    """
    shared = [name for name in ours if name in theirs]
    unlike = [name for name in shared if not _equal(ours[name], theirs[name])]
    found = [*_absent(ours, theirs)]
    # Values that stand under another name are exchanged tensors. They are taken out first, for as a relation of one
    # tensor to itself they would look like noise.
    elsewhere = _elsewhere(ours, theirs, unlike)
    found += _exchanged(elsewhere)
    rest = [name for name in unlike if name not in elsewhere]
    # Tensors with the same explanation are one finding: 28 layers of transposed kernels are one fault.
    groups: dict[tuple[str, bool], list[str]] = defaultdict(list)
    for name in rest:
        mine, other = _wide(ours[name]), _wide(theirs[name])
        what = relation(mine, other, axes(name, mine.shape, model)) or _mixed(name, ours, other)
        groups[what or "", what is not None].append(name)
    for (what, known), names in groups.items():
        words = f"{where(names)}: {what}" if known else _unknown(names, ours, theirs)
        found.append(Recognised(words, tuple(names), known))
    return sorted(found, key=lambda one: (not one.known, -len(one.names)))


def axes(name: str, shape: tuple[int, ...], model: config.Model) -> list[Axis]:
    """What the axes of a tensor are made of."""
    layer = re.match(r"layers\.(\d+)\.mixer\.", name)
    module = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    plain = [Axis("row"), Axis("column"), Axis("column")][: len(shape)]
    if ".experts." in name:
        return [Axis("expert"), *plain[:-1]]
    if module == "router" or ".router." in name:
        return [Axis("expert"), *plain[1:]]
    if module in ("conv", "bc_conv"):
        return [Axis("channel"), Axis("tap")][: len(shape)]
    # Heads and rotary pairs are those of the block that the layer belongs to: blocks of a pattern may differ.
    block = model.halves(model.pattern[int(layer[1]) % len(model.pattern)]).mixer if layer else model
    size, rotated = block.head_dim, block.rotary_dim if block.positions == "rope" else 0
    if module in ("q_proj", "k_proj", "q_norm", "k_norm"):
        return [Axis("row", size, rotated), *plain[1:]]
    if module == "v_proj":
        return [Axis("row", size), *plain[1:]]
    if module == "o_proj" and len(shape) == 2:
        return [Axis("row"), Axis("column", size)]
    return plain


def where(names: Iterable[str]) -> str:
    """Tensors in few words: `q_proj.weight and k_proj.weight of layers 0 to 3`."""
    layers: dict[str, list[int]] = defaultdict(list)
    for name in names:
        match = re.match(r"layers\.(\d+)\.(.+)", name)
        layers[match[2] if match else name].extend([int(match[1])] if match else [])
    grouped: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, numbers in layers.items():
        grouped[tuple(sorted(numbers))].append(name)
    return "; ".join(f"{_and(parts)}{_of_layers(numbers)}" for numbers, parts in grouped.items())


def _of_layers(numbers: tuple[int, ...]) -> str:
    if not numbers:
        return ""
    if len(numbers) > 2 and numbers == tuple(range(numbers[0], numbers[-1] + 1)):
        return f" of layers {numbers[0]} to {numbers[-1]}"
    return f" of layer{'s' if len(numbers) > 1 else ''} {_and([str(number) for number in numbers])}"


def _and(parts: list[str]) -> str:
    if len(parts) > 6:
        parts = [*parts[:5], f"{len(parts) - 5} more"]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _absent(ours: Tensors, theirs: Tensors) -> Iterator[Recognised]:
    """Tensors of one side only; a head of its own and a tied one."""
    missing = [name for name in ours if name not in theirs]
    extra = [name for name in theirs if name not in ours]
    if "head.weight" in extra:
        extra.remove("head.weight")
        copy = _equal(theirs["head.weight"], theirs["embed.weight"])
        what = "a copy of the embedding, not tied to it" if copy else "a tensor of its own, and not the embedding"
        yield Recognised(f"the tie is missing: head.weight is {what}, where ours is tied", ("head.weight",))
    if "head.weight" in missing:
        missing.remove("head.weight")
        yield Recognised("the head is tied to the embedding, where ours has its own head.weight", ("head.weight",))
    for names, side in ((missing, "ours"), (extra, "the other side")):
        if names:
            yield Recognised(f"only {side} has {where(names)}", tuple(names))


def _elsewhere(ours: Tensors, theirs: Tensors, unlike: list[str]) -> dict[str, str]:
    """Of tensors that differ: the name under which we have the very same values."""
    if not unlike:
        return {}
    # By digest of the values. Constant tensors (zeros, ones) are left out: they are everywhere and tell nothing. In
    # reverse, so that the first of equal tensors wins.
    names = {_key(ours[name]): name for name in reversed(list(ours)) if np.ptp(_wide(ours[name])) > 0}
    return {name: names[key] for name in unlike if (key := _key(theirs[name])) in names}


def _key(x: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    return x.shape, hashlib.sha256(np.ascontiguousarray(_wide(x)).data).digest()


def _exchanged(sources: Mapping[str, str]) -> Iterator[Recognised]:
    """Tensors that hold the values of another one: exchanged within a layer, or from another layer."""
    parts: dict[tuple[str, str], list[str]] = defaultdict(list)
    layers: dict[tuple[tuple[int, int], ...], list[str]] = defaultdict(list)
    by_module: dict[str, dict[int, int]] = defaultdict(dict)
    for name, origin in sources.items():
        (layer, module), (other, old) = _split(name), _split(origin)
        # Moved within the same module name: layers are exchanged or shifted. Else two modules of a layer are exchanged.
        if module == old:
            by_module[module][layer] = other
        else:
            parts[module, old].append(name)
    for module, moves in by_module.items():
        layers[tuple(sorted(moves.items()))] += [f"layers.{layer}.{module}" for layer in moves]
    yield from (_shifted(dict(moves), names) for moves, names in layers.items())
    while parts:
        (module, old), names = next(iter(parts.items()))
        # If A holds B and B holds A in the same layers, that is one swap, whatever the kind: weights and biases are
        # reported together.
        pair = {_last(module), _last(old)}
        same = [key for key in parts if {_last(key[0]), _last(key[1])} == pair and _returned(parts, key)]
        if (module, old) in same:
            both = tuple(name for key in same for name in parts.pop(key))
            yield Recognised(f"{where(both)}: {' and '.join(sorted(pair))} are swapped", both)
        else:
            del parts[module, old]
            yield Recognised(f"{where(names)}: holds what is {old} in ours", tuple(names))


def _returned(parts: Mapping[tuple[str, str], list[str]], key: tuple[str, str]) -> bool:
    """Whether the other tensor holds this one, in the same layers."""
    layers = [{_split(name)[0] for name in parts.get(one, [])} for one in (key, (key[1], key[0]))]
    return layers[0] == layers[1]


def _shifted(moves: dict[int, int], names: list[str]) -> Recognised:
    steps = {other - layer for layer, other in moves.items()}
    if len(moves) == 2 and all(moves.get(other) == layer for layer, other in moves.items()):
        what = f"layers {_and([str(layer) for layer in sorted(moves)])} are swapped"
    elif len(steps) == 1:
        step = steps.pop()
        what = f"layers are shifted: layer i holds what is layer i {'+' if step > 0 else '-'} {abs(step)} in ours"
    else:
        what = "layers are in another order: " + ", ".join(f"{layer} holds {other}" for layer, other in moves.items())
    return Recognised(f"{what} ({where(names)})", tuple(names))


def _split(name: str) -> tuple[int, str]:
    match = re.match(r"layers\.(\d+)\.(.+)", name)
    return (int(match[1]), match[2]) if match else (-1, name)


def _without_kind(module: str) -> str:
    return module.removesuffix(".weight").removesuffix(".bias")


def _last(module: str) -> str:
    return _without_kind(module).rpartition(".")[2].removesuffix("_proj")


def _mixed(name: str, ours: Tensors, other: np.ndarray) -> str | None:
    """Whether the rows are those of several of our tensors of the same module."""
    module, kind = name.rpartition(".")[0].rpartition(".")[0], name.rpartition(".")[2]
    peers = [
        n for n in ours if n.startswith(f"{module}.") and n.endswith(f".{kind}") and n.count(".") == name.count(".")
    ]
    # Only tensors whose rows have the same length can have been joined and split again.
    peers = [n for n in peers if ours[n].ndim == other.ndim and ours[n].shape[1:] == other.shape[1:]]
    if len(peers) < 2 or other.ndim < 2:
        return None
    take = source(np.concatenate([_wide(ours[n]) for n in peers]), other)
    if take is None:
        return None
    # Rows are numbered over the joined tensors; the ends say which tensor a row comes from.
    ends = np.cumsum([len(ours[n]) for n in peers])
    used = sorted({int(number) for number in np.searchsorted(ends, take, side="right")})
    return f"rows of {_and([_last(peers[i]) for i in used])}: a joined projection is split in another order"


def _unknown(names: list[str], ours: Tensors, theirs: Tensors) -> str:
    """Tensors that are not related in any known way, and how far they are apart."""
    apart = {name: _apart(_wide(ours[name]), _wide(theirs[name])) for name in names}
    worst = max(apart, key=lambda name: apart[name])
    if apart[worst] == np.inf:
        shape = f"{list(theirs[worst].shape)} instead of {list(ours[worst].shape)}"
        return f"{where(names)}: not related in any known way; {worst} is {shape}"
    differ = int(np.sum(_wide(ours[worst]) != _wide(theirs[worst])))
    distance = (
        f"{differ} of {ours[worst].size} elements of {worst} differ, the relative difference is {apart[worst]:.1e}"
    )
    return f"{where(names)}: not related in any known way; {distance}"


def _apart(mine: np.ndarray, other: np.ndarray) -> float:
    if mine.shape != other.shape:
        return float("inf")
    size = float(np.linalg.norm(mine.ravel()))
    return float(np.linalg.norm((mine - other).ravel())) / (size or 1.0)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.array_equal(_wide(a), _wide(b))


def _wide(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float64)
