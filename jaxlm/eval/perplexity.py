"""Perplexity against position: what a model makes of the n-th token of a long text, far beyond its training length.

    jaxlm eval runs/quickstart position --window 64 --keep-first 4

The held-out documents are joined to long texts, each without a break, and go through the cache chunk by chunk, so that
a model with a window needs the memory of its window. An attention window, with and without retained first tokens, can
be put on any model for the occasion: this is the experiment of StreamingLLM (Xiao et al. 2023, section 3.1).

Shapes: B texts, T tokens of a text, C tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm import config
from jaxlm.convert.files.side_files import no_tokenizer
from jaxlm.data.pipeline import prepare
from jaxlm.errors import UserError
from jaxlm.infer.generate import unrolled_for_decoding
from jaxlm.infer.load import load
from jaxlm.models.decoder import Decoder, Params, init_cache
from jaxlm.numerics import Policy, precision
from jaxlm.processes.compile_cache import enable_compilation_cache
from jaxlm.processes.settings import settings_restored
from jaxlm.run.progress import shown

CHUNK = 128
"""Tokens that go through the model at once."""


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Targets number `begin` to `end - 1` of each text, counted from 1: how many tokens stand before them."""

    begin: int
    end: int
    nll: float
    """Mean negative log-likelihood, nats a token."""

    @property
    def perplexity(self) -> float:
        """The exponential of `nll`."""
        return math.exp(self.nll)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to attend, and what came of it."""

    name: str
    window: int
    keep_first: int
    cache_bytes: int
    """Memory of the cache of all texts."""
    buckets: tuple[Bucket, ...]


@dataclasses.dataclass(frozen=True)
class PositionReport:
    """Perplexity against position of one model."""

    trained_length: int
    length: int
    texts: int
    variants: tuple[Variant, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything, with perplexities beside the likelihoods."""
        tree = dataclasses.asdict(self)
        for variant in tree["variants"]:
            for bucket in variant["buckets"]:
                bucket["perplexity"] = math.exp(bucket["nll"])
        return tree

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(
            title=f"perplexity against position: {self.texts} texts of {self.length:,} tokens, "
            f"{self.length / self.trained_length:.3g} times the training length",
            title_justify="left",
        )
        table.add_column("tokens before", justify="right")
        for variant in self.variants:
            table.add_column(variant.name, justify="right")
        for row in zip(*(variant.buckets for variant in self.variants), strict=True):
            place = f"{row[0].begin:,} - {row[0].end - 1:,}"
            beyond = row[0].begin > self.trained_length
            table.add_row(place, *(f"{bucket.perplexity:,.2f}" for bucket in row), style="" if beyond else "dim")
        sizes = (f"{variant.cache_bytes / 2**20:,.2f} MiB" for variant in self.variants)
        table.add_section()
        table.add_row("cache", *sizes)
        return table


def position(
    path: str | Path,
    *,
    length: int = 0,
    window: int = 0,
    keep_first: int = 4,
    texts: int = 16,
    buckets: int = 16,
) -> PositionReport:
    """Measure the model at `path` on its own held-out documents; write `eval/position.json` and `.png` beside it.

    Args:
        length: tokens of a text; 0 takes eight times `data.seq_len`.
        window: also with this attention window (0: only as trained), without and with retained first tokens.
        keep_first: how many are retained.
        texts: of the corpus, side by side; fewer where it is too short.
        buckets: of equal width, over which losses are averaged.

    Raises:
        UserError: there is no model or no tokenizer, the held-out text is shorter than one text, the model's positions
            end before it, or the window cannot be put on the model.
    """
    model = load(path)
    if model.tokenizer is None:
        raise no_tokenizer(Path(path))
    model.config.model.require_language_model("perplexity")
    settings, trained = model.config, model.config.data.seq_len
    length = length or 8 * trained
    for name, value in (("length", length), ("texts", texts), ("buckets", buckets)):
        if value < 1:
            raise UserError(f"{name} = {value} must be positive")
    _check(settings.model, length, window)
    corpus = prepare(settings, model.tokenizer)
    rows_BT = _texts(corpus.validation.tokens, length, texts, str(corpus.source))
    numerics = settings.numerics
    with precision(numerics), settings_restored():
        enable_compilation_cache(settings.data.cache_dir)
        measured = []
        for name, cfg in _variants(settings.model.portable, window, keep_first):
            decoder = Decoder(cfg, Policy.from_config(numerics))
            nll_T, cache_bytes = losses(decoder, model.params, rows_BT, f"perplexity, {name}")
            measured.append(Variant(name, cfg.window, cfg.keep_first, cache_bytes, _buckets(nll_T, buckets)))
    report = PositionReport(trained, length, len(rows_BT), tuple(measured))
    _write(report, Path(path) / "eval")
    return report


def losses(
    decoder: Decoder, params: Params, rows_BT: Int[np.ndarray, "b t"], label: str = ""
) -> tuple[Float[np.ndarray, " n"], int]:
    """Mean loss, nats, of targets 1 to T - 1 over the texts, and the bytes of the cache through which they went."""
    from rich.console import Console
    from rich.progress import track

    decoder, params = unrolled_for_decoding(decoder, params)
    b, n = rows_BT.shape[0], rows_BT.shape[1] - 1
    cache: Any = init_cache(decoder, b, -(-n // CHUNK) * CHUNK)
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    found = []
    console = Console(stderr=True)
    for start in track(
        range(0, n, CHUNK), label, console=console, transient=True, disable=not (console.is_terminal and shown())
    ):
        width = min(CHUNK, n - start)
        padded = np.zeros((b, CHUNK + 1), np.int32)
        padded[:, : width + 1] = rows_BT[:, start : start + width + 1]
        nll_BC, cache = _chunk(decoder, params, cache, padded, np.int32(start), np.int32(width))
        found.append(np.asarray(nll_BC, np.float64).mean(axis=0)[:width])
    return np.concatenate(found), cache_bytes


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _chunk(
    decoder: Decoder,
    params: Params,
    cache: Any,
    tokens_BC1: Int[Array, "b c1"],
    start: Int[Array, ""],
    width: Int[Array, ""],
) -> tuple[Float[Array, "b c"], Any]:
    """Losses of the targets of one chunk, and the cache after it; what lies beyond `width` is padding."""
    tokens_BC, targets_BC = tokens_BC1[:, :-1], tokens_BC1[:, 1:]
    index_BC = jnp.broadcast_to(jnp.arange(tokens_BC.shape[1], dtype=jnp.int32), tokens_BC.shape)
    places = start + index_BC, (index_BC < width).astype(jnp.int32)
    applied: Any = decoder.apply({"params": params}, tokens_BC, *places, cache)
    logits_BCV, cache = applied
    picked_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BCV, axis=-1) - picked_BC, cache


def _check(cfg: config.Model, length: int, window: int) -> None:
    if cfg.positions in ("learned", "sinusoidal") and length > cfg.max_seq_len:
        raise UserError(
            f"length = {length}, model.positions = {cfg.positions!r} end at model.max_seq_len = {cfg.max_seq_len}",
            f"at most --length {cfg.max_seq_len}",
        )
    if window and not any(cfg.halves(kind).mixer_name == "attention" for kind in cfg.pattern):
        raise UserError(f"window = {window}: no block of model.pattern is attention", "leave --window out")


def _variants(cfg: config.Model, window: int, keep_first: int) -> list[tuple[str, config.Model]]:
    """The model as it was trained, and under a window that every attention block without one of its own follows."""
    found = [("as trained", cfg)]
    if window:
        found.append((f"window {window}", dataclasses.replace(cfg, window=window, keep_first=0)))
    if window and keep_first:
        name = f"window {window}, first {keep_first}"
        found.append((name, dataclasses.replace(cfg, window=window, keep_first=keep_first)))
    return found


def _texts(tokens_N: np.ndarray, length: int, texts: int, source: str) -> Int[np.ndarray, "b t"]:
    """As many texts as there are, evenly spaced; one token more than there are targets."""
    count = min(texts, (len(tokens_N) - 1) // length)
    if count < 1:
        raise UserError(
            f"{source}: {len(tokens_N):,} held-out tokens are fewer than one text of {length:,}",
            f"at most --length {max(0, len(tokens_N) - 1)}; data.validation_fraction decides how many are held out",
        )
    starts = np.linspace(0, len(tokens_N) - length - 1, count).astype(int)
    return np.stack([tokens_N[start : start + length + 1] for start in starts]).astype(np.int32)


def _buckets(nll_T: Float[np.ndarray, " t"], count: int) -> tuple[Bucket, ...]:
    """Means over buckets of equal width; target i has i tokens before it."""
    edges = np.unique(np.linspace(0, len(nll_T), min(count, len(nll_T)) + 1).astype(int))
    pairs = zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    return tuple(Bucket(begin + 1, end + 1, float(nll_T[begin:end].mean())) for begin, end in pairs)


def _write(report: PositionReport, folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
        (folder / "position.json").write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
        _plot(report.variants, report.trained_length, folder / "position.png")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None


def _plot(variants: Sequence[Variant], trained_length: int, path: Path) -> None:
    """Perplexity, on a logarithmic axis, against the tokens before it."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(7, 4), dpi=144)
    axes = figure.subplots()
    for variant in variants:
        middles = [(bucket.begin + bucket.end - 1) / 2 for bucket in variant.buckets]
        axes.plot(middles, [bucket.perplexity for bucket in variant.buckets], marker="o", ms=3, label=variant.name)
    axes.axvline(trained_length, color="grey", ls="--", lw=1, label="training length")
    axes.set(xlabel="tokens before", ylabel="perplexity", yscale="log")
    for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatted(ScalarFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
