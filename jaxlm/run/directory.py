"""The run directory: where a run begins, and what makes it self-contained.

runs/NAME/  config.toml (resolved)  tokenizer.json  metrics.jsonl  checkpoints/STEP/  samples/  plots/loss.png
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxlm import __version__, config
from jaxlm.config import toml
from jaxlm.errors import UserError
from jaxlm.run.checkpoints import checkpoint_steps
from jaxlm.text.tokenizer import Tokenizer, check_fits

_SAME_ON_RESUME = (
    *("recipe", "model", "lora", "tokenizer", "numerics.params"),
    # The rows and their order.
    *("seed", "data.seq_len", "data.packing", "data.min_tokens", "data.fim", "data.curriculum", "data.unit"),
)
_FREE = (  # change neither parameters nor what they mean
    "model.dropout",
    "lora.dropout",
    "model.remat",
    "model.attention_impl",
    "model.moe.exchange",
    *(f"model.moe.{name}" for name in ("impl", "balance_loss", "importance_loss", "z_loss", "bias_update_rate")),
)
_OWN = ("data.source", "data.validation_source", "data.cache_dir", "data.workers", "tokenizer.path")
"""What each host may have for itself, as long as the tokens are the same."""


FROZEN = "frozen.json"
"""Where the parameters of the frozen trees come from, and their sha256, by name."""


def tokenizer_of_run(cfg: config.Config, *, resume: bool) -> Tokenizer | None:
    """The tokenizer of the run that lies in `out_dir`; None: there is no run yet.

    Raises:
        UserError: a run is already there and `resume` is not asked for.
    """
    run_dir = Path(cfg.out_dir)
    if not (run_dir / "config.toml").is_file():
        return None
    if not resume:
        metrics = run_dir / "metrics.jsonl"
        if not checkpoint_steps(run_dir) and not (metrics.is_file() and metrics.stat().st_size):
            return None  # a start that ended by a mistake: nothing is lost
        raise UserError(f"{run_dir}: a run is already there", "continue it with --resume, or set another out_dir=")
    return Tokenizer.from_file(run_dir / "tokenizer.json")


def with_vocabulary(cfg: config.Config, tokenizer: Tokenizer) -> config.Config:
    """The config with the vocabulary of its tokenizer, unless it names another size.

    Raises:
        UserError: the tokenizer does not fit `model.vocab_size`.
    """
    vocab_size = cfg.model.vocab_size or tokenizer.vocab_size
    check_fits(tokenizer, vocab_size)
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=vocab_size))


def compare_with_run(cfg: config.Config, tell: Callable[[str], None]) -> None:
    """Compare the config with the one of the run that lies in `out_dir`, and speak of what changed.

    Raises:
        UserError: the run has another architecture.
    """
    run_dir = Path(cfg.out_dir)
    _compare(run_dir, toml.load(run_dir / "config.toml"), cfg, tell)


def shared_facts(cfg: config.Config, identity: Mapping[str, str], resume: bool) -> dict[str, Any]:
    """What must be the same on every process of a run: versions, data, config, and the checkpoints that it sees."""
    steps = sorted(int(path.name) for path in (Path(cfg.out_dir) / "checkpoints").glob("[0-9]*") if path.name.isdigit())
    libraries = {name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "grain")}
    options = {name: value for name, value in _flat(toml.to_dict(cfg)).items() if name not in _OWN}
    checkpoints = {"the checkpoints in out_dir": ", ".join(map(str, steps)) or "none"}
    return {"jaxlm": __version__, **libraries, **identity, "--resume": resume, **options, **checkpoints}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, by dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def write_run(cfg: config.Config, tokenizer: Tokenizer, files: Mapping[str, bytes] | None = None) -> None:
    """Make the run directory, once nothing speaks against the run.

    Files appear whole, and the config, which marks a run, comes last.

    Args:
        files: what else lies in it, by name.

    Raises:
        UserError: the directory cannot be written.
    """
    run_dir = Path(cfg.out_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        tokenizer.save(run_dir / "tokenizer.json")
        for name, content in (files or {}).items():
            (run_dir / name).write_bytes(content)
        temporary = run_dir / ".config.toml"
        temporary.write_text(toml.to_toml(cfg), encoding="utf-8")
        temporary.replace(run_dir / "config.toml")
    except OSError as error:
        raise UserError(f"{run_dir}: cannot be written: {error.strerror}") from None


def _compare(run_dir: Path, before: config.Config, now: config.Config, tell: Callable[[str], None]) -> None:
    """Refuse another model and other rows (`_SAME_ON_RESUME`); name any other option that changed, and use it."""
    old, new = _explicit(before), _explicit(now)
    for name, was, value in _differences(old, new):
        fixed = any(f"{name}.".startswith(f"{key}.") for key in _SAME_ON_RESUME)
        if name not in _FREE and fixed:
            hint = "resume with the run's own config.toml, or choose another out_dir"
            if name.startswith("data."):
                hint = f"text would be left out or read twice; of a mixture, weights and caps may change. {hint}"
            raise UserError(f"{run_dir}: {name} is {value!r}, the run was made with {was!r}", hint)
        if name != "out_dir":
            tell(f"warning: resuming with {name} = {value!r}, was {was!r}")


def _explicit(cfg: config.Config) -> dict[str, Any]:
    """The config as dicts. `layer_loop = "auto"` is replaced by what it means, for it shapes a checkpoint's tree."""
    loop = "scan" if cfg.model.scanned else "unroll"
    return toml.to_dict(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, layer_loop=loop)))


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    found = []
    for key in old | new:  # tables of rules have keys of their own
        was, value = old.get(key), new.get(key)
        if isinstance(was, dict) and isinstance(value, dict):
            found += _differences(was, value, f"{prefix}{key}.")
        elif value != was:
            found.append((prefix + key, was, value))
    return found
