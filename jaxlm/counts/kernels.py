"""Which kernels a training step of a model uses: of attention, of experts, of scans."""

from __future__ import annotations

from collections.abc import Iterator

from jaxlm import config
from jaxlm.numerics import Policy
from jaxlm.ops.attention import kernels
from jaxlm.ops.moe import experts


def kernels_of(cfg: config.Config, platform: str) -> str:
    """The kernels of each kind of block, for rows of `data.seq_len` tokens on `cpu`, `gpu` or `tpu`.

    Returns:
        `attention blockwise, experts blocks`; where blocks of one kind differ, all of theirs in the order of the
        pattern: `attention blockwise and xla`.

    Raises:
        UserError: the config names a kernel that does not apply.
    """
    chosen: dict[str, dict[str, None]] = {}
    for kind in cfg.model.pattern:
        for what, name in _block(cfg, kind, platform):
            chosen.setdefault(what, {})[name] = None
    return ", ".join(f"{what} {' and '.join(names)}" for what, names in chosen.items())


def _block(cfg: config.Config, kind: str, platform: str) -> Iterator[tuple[str, str]]:
    dtype, halves = Policy.from_config(cfg.numerics).compute, cfg.model.halves(kind)
    mixer, length = halves.mixer, cfg.data.seq_len
    if halves.mixer_name == "attention":
        merged = bool(mixer.keep_first or mixer.sink_tokens)
        needs = {"softcap": bool(mixer.softcap), "sinks": mixer.sink_logits, "merged": merged}
        call = kernels.Call(platform, dtype, length, mixer.head_dim, aligned=True, **needs)
        yield "attention", kernels.choose(mixer.attention_impl, call)
    else:
        yield "scan", "chunked" if mixer.mamba.impl == "auto" else mixer.mamba.impl
    if halves.ffn_name == "moe":
        yield "experts", experts.choose(halves.ffn.moe.impl, platform, dtype)
