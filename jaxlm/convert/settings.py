"""config.json <-> `[model]`: a family lists its settings, each of which maps both ways.

What a layout cannot express is not listed anywhere: a model goes out if its config.json comes back as the same model.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxlm import config
from jaxlm.config.pattern import MIXERS
from jaxlm.errors import UserError

REQUIRED: Any = object()
"""The default of a key that config.json must have."""
Hf = Mapping[str, Any]
"""A config.json."""


class Setting(NamedTuple):
    """Some keys of config.json and the options of `[model]` that they stand for, by dotted names: `moe.top_k`."""

    out: Callable[[config.Model], dict[str, Any]]
    """Keys of config.json. What cannot be expressed may be left out: the way back finds it."""
    back: Callable[[Hf], dict[str, Any]]
    """Options of `[model]`; a key that is absent has the default of transformers.

    Raises ValueError where a key says what jaxlm cannot express; the message names key and value, a second argument is
    a hint.
    """
    name: str = ""
    """The key, or the first of several."""
    few: bool = False
    """Whether the key has one of a few values, and changes no tensor."""


def key(
    theirs: str, ours: str, default: Any = REQUIRED, of: Callable[[config.Model], config.Model] = lambda model: model
) -> Setting:
    """One key with the same value as one option.

    Args:
        default: of transformers; a value, or a function of config.json.
        of: `[model]` as the block sees it that has the option.
    """
    option = operator.attrgetter(ours)

    def back(hf: Hf) -> dict[str, Any]:
        value = hf.get(theirs)
        if value is None:
            if default is REQUIRED:
                raise ValueError(f"{theirs} is missing")
            value = default(hf) if callable(default) else default
        return {ours: value}

    return Setting(lambda model: {theirs: option(of(model))}, back, theirs)


def choice(theirs: str, ours: str, values: Mapping[Any, Sequence[Any]], default: Any) -> Setting:
    """One key whose values have other names: `values` maps ours to their spellings, of which the first goes out."""
    option = operator.attrgetter(ours)

    def out(model: config.Model) -> dict[str, Any]:
        value = option(model)
        return {theirs: values[value][0]} if value in values else {}

    def back(hf: Hf) -> dict[str, Any]:
        found = hf.get(theirs, default)
        for value, spellings in values.items():
            if found in spellings:
                return {ours: value}
        raise refusal(theirs, found)

    return Setting(out, back, theirs, few=True)


def always(ours: str, value: Any) -> Setting:
    """An option that every model of the layout has."""
    return Setting(nothing, lambda hf: {ours: value})


def says(theirs: str, value: Any) -> Setting:
    """A key that only goes out: it plays no role in what the weights compute."""
    return Setting(lambda model: {theirs: value}, inert(theirs).back, theirs)


def inert(*theirs: str) -> Setting:
    """Keys that are known and say nothing here: of another version or program, or of training."""

    def back(hf: Hf) -> dict[str, Any]:
        for name in theirs:
            hf.get(name)  # a key that is asked for is known
        return {}

    return Setting(nothing, back, theirs[0])


def fixed(theirs: str, value: Any, also: Sequence[Any] = ()) -> Setting:
    """A key that jaxlm knows with one value only.

    Args:
        also: other spellings of it; None: the key may be absent or null.
    """

    def back(hf: Hf) -> dict[str, Any]:
        if hf.get(theirs, value) not in (value, *also):
            raise refusal(theirs, hf[theirs])
        return {}

    return Setting(lambda model: {} if value is None else {theirs: value}, back, theirs, few=True)


def biases(theirs: str, ours: Sequence[str], default: bool = False) -> Setting:
    """One key for the biases of some maps. They come together or not at all."""

    def back(hf: Hf) -> dict[str, Any]:
        value = hf.get(theirs)
        return {"biases": list(ours) if (default if value is None else value) else []}

    return Setting(lambda model: {theirs: ours[0] in model.biases}, back, theirs)


def nothing(model: config.Model) -> dict[str, Any]:
    """The way out of a setting that config.json has no key for, or that another writes."""
    return {}


def refusal(key: str, value: Any) -> ValueError:
    """The fault of a key that says what jaxlm cannot express."""
    return ValueError(f"{key} = {value!r} is something that jaxlm cannot express yet")


def tree(options: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Options by dotted names, those of all settings, as the nested section `[model]`; lists of biases add up."""
    nested: dict[str, Any] = {}
    for name, value in (pair for one in options for pair in one.items()):
        *sections, last = name.split(".")
        inside = nested
        for section in sections:
            inside = inside.setdefault(section, {})
        inside[last] = [*inside.get(last, []), *value] if last == "biases" else value
    return nested


def shortest_pattern(blocks: Sequence[str]) -> list[str]:
    """The least pattern whose repeats are these blocks."""
    for length in range(1, len(blocks) + 1):
        if len(blocks) % length == 0 and list(blocks[:length]) * (len(blocks) // length) == list(blocks):
            return list(blocks[:length])
    return list(blocks)


_ATTENTION = MIXERS["attention"]
_SCALING = {
    "none": (),
    "linear": ("factor",),
    "ntk": ("factor",),
    "llama3": ("factor", "original_max_seq_len", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_seq_len", "beta_slow", "beta_fast", "truncate", "attention_factor"),
}
_MOE_TRAINING = ("noisy", "balance_loss", "importance_loss", "z_loss", "bias_update_rate", "impl", "exchange")
_MAMBA_TRAINING = ("dt_min", "dt_max", "dt_floor", "chunk", "impl")
_MAMBA_UNUSED = {
    "mamba": (*_MAMBA_TRAINING, "head_dim", "n_groups"),
    "mamba2": (*_MAMBA_TRAINING, "dt_rank", "inner_norms"),
}
_HALF_BIASES = {
    "attention": ("qkv", "attention_out"),
    "mlp": ("mlp",),
    "moe": ("router", "experts", "mlp"),
}
_WHOLE = ("head", "vocab_size", "d_model", "n_layers", "norm", "norm_eps", "norm_position", "final_norm")


def function_of(model: config.Model) -> dict[str, Any]:
    """What decides the function that a model computes, by the names of `[model]`, each layer by itself.

    Initialisation, dropout, balancing losses and the choice of kernels do not; nor does the rotary layout, which the
    rows take care of.
    """
    options: dict[str, Any] = {name: getattr(model, name) for name in _WHOLE}
    if model.head == "lm":
        options |= {"tie_embeddings": model.tie_embeddings, "biases.head": "head" in model.biases}
    elif model.head == "classes":
        options |= {"classes": model.classes, "pooling": model.pooling}
    if model.positions in ("learned", "sinusoidal"):
        options |= {"positions": model.positions, "max_seq_len": model.max_seq_len}
    for i in range(model.n_layers):
        halves = model.halves(model.pattern[i % len(model.pattern)])
        mixer, ffn = halves.mixer, halves.ffn
        layer = {"mixer": halves.mixer_name, "ffn": halves.ffn_name}
        if halves.mixer_name == "attention":
            names = [n for n in _ATTENTION if mixer.positions == "rope" or not n.startswith(("rope", "rotary"))]
            layer |= {name: getattr(mixer, name) for name in names}
            if mixer.rope:
                scaling = mixer.rope.scaling
                layer |= {f"rope_scaling.{name}": getattr(scaling, name) for name in ("kind", *_SCALING[scaling.kind])}
        elif halves.mixer_name:
            layer |= _section("mamba", mixer.mamba, _MAMBA_UNUSED[halves.mixer_name])
        if halves.ffn_name:
            layer |= {"activation": ffn.activation}
            layer |= {"d_ff": ffn.d_ff} if halves.ffn_name == "mlp" else {}
        if halves.ffn_name == "moe":
            layer |= _section("moe", dataclasses.replace(ffn.moe, d_ff=ffn.moe.d_ff or ffn.d_ff), _MOE_TRAINING)
        for half in (halves.mixer_name, halves.ffn_name):
            layer |= {f"biases.{name}": name in model.biases for name in _HALF_BIASES.get(half, ())}
        options |= {f"layers.{i}.{name}": value for name, value in layer.items()}
    return options


def _section(name: str, section: Any, without: Sequence[str]) -> dict[str, Any]:
    return {f"{name}.{key}": value for key, value in dataclasses.asdict(section).items() if key not in without}


def require_same(model: config.Model, back: config.Model, family: str) -> None:
    """Refuse to write a model that would come back as another one.

    Raises:
        UserError: by the name of the first option that the layout cannot express.
    """
    mine, other = function_of(model), function_of(back)
    for name, value in mine.items():
        if other.get(name) != value:
            _, biases, bias = name.partition("biases.")
            back_as = f"with{'out' * bool(value)} {bias!r}" if biases else f"as {other.get(name)!r}"
            hint = f"it would come back {back_as}; --to torch takes every model"
            raise UserError(f"the {family} layout has no place for {_shown(name, model, mine)}", hint)


def _shown(name: str, model: config.Model, options: Mapping[str, Any]) -> str:
    """An option as the user wrote it, and in which layer if the others differ."""
    value, (option, layer) = options[name], (name, "")
    if name.startswith("layers."):
        _, number, option = name.split(".", 2)
        values = [options.get(f"layers.{i}.{option}") for i in range(model.n_layers)]
        layer = "" if values.count(value) == len(values) else f" of layer {number}"
    if option in ("mixer", "ffn"):
        return f"model.pattern = {list(model.pattern)}"
    if option.startswith("biases."):
        return f"model.biases = {list(model.biases)}"
    return f"model.{option} = {value!r}{layer}"
