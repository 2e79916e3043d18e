"""Small models trained side by side, judged on the same held-out tokens: for benchmarks of ways to make rows.

Everything lies in a folder. A run that was stopped goes on, and scores that are there are not made again; both only
with the options that stand in `options.json` beside the runs.

Shapes: S seeds, N sequences or tokens, B sequences at a time, T tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxlm
from benchmarks import peers
from benchmarks.asked import positive
from benchmarks.kept import Kept
from jaxlm.config import toml
from jaxlm.text.tokenizer import Tokenizer

BATCH = 16
RESAMPLES = 4000


class Scores(NamedTuple):
    """Scores of sequences, of the targets that count.

    Attributes:
        nll: negative log-likelihood of each target, sequence after sequence, nats.
        likeliest: whether the target was the likeliest token.
    """

    nll: np.ndarray
    likeliest: np.ndarray


class Sequences(NamedTuple):
    """Ids of sequences, and of each id whether it counts as a target; a first id never does."""

    ids: list[list[int]]
    counts: list[np.ndarray]


def parser(name: str, text: str | None, **defaults: int) -> argparse.ArgumentParser:
    """The options of a benchmark with this text: steps, batch, seq_len, width, layers, and seeds."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=(text or "").partition("\n")[0])
    made.add_argument("--folder", type=Path, default=Path("runs") / name)
    for option, value in {**defaults, "seeds": 3}.items():
        made.add_argument(f"--{option.replace('_', '-')}", type=positive, default=value)
    made.add_argument("--out", type=Path, help=f"default: benchmarks/results/{name}.json")
    return made


def shape_of_runs(options: argparse.Namespace) -> dict[str, Any]:
    """The options that a run keeps: all but the folder, the seeds, and where the result goes."""
    return {key: value for key, value in vars(options).items() if key not in ("folder", "seeds", "out")}


def config_of(options: argparse.Namespace, seed: int, tokenizer: Mapping[str, Any], data: Mapping[str, Any]) -> Any:
    """The config of one model, as a tree."""
    model = {"d_model": options.width, "n_layers": options.layers, "n_heads": 4, "n_kv_heads": 2, "init_std": 0.05}
    train = {"steps": options.steps, "batch_size": options.batch, "learning_rate": 4e-3, "warmup_steps": 30}
    return {
        "seed": seed,
        "model": model,
        "tokenizer": dict(tokenizer),
        "data": {"seq_len": options.seq_len, "cache_dir": str(options.folder / "cache"), **data},
        "train": train,
        "eval": {"every": options.steps, "batches": 8},
        "checkpoint": {"every": max(1, options.steps // 3)},
    }


def saved(name: str, options: argparse.Namespace, **figures: Any) -> None:
    """Write the result, with its options and the tokens that each model has seen."""
    tokens = options.steps * options.batch * options.seq_len
    kept_options = shape_of_runs(options) | {"seeds": options.seeds}
    peers.save(name, {"options": kept_options, "tokens of each model": tokens, **figures}, options.out)


def trained(tree: Mapping[str, Any], folder: Path) -> jaxlm.Model:
    """The model of a run, which begins or goes on where it stopped."""
    config = toml.from_dict({**tree, "sample": {"prompts": ()}, "out_dir": str(folder)})
    newest = max((int(path.name) for path in folder.glob("checkpoints/[0-9]*") if path.name.isdigit()), default=0)
    if newest < config.train.steps:
        logging.getLogger("jaxlm").setLevel(logging.WARNING)
        jaxlm.train(config, resume=True)
    return jaxlm.load(folder)


def own_words(texts: Iterable[str], size: int, folder: Path) -> tuple[str, str]:
    """Options of a run of conversations, which trains no tokenizer, for one that is trained here, on these texts."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        Tokenizer.train(texts, size).save(path)
    return 'tokenizer.kind="file"', f'tokenizer.path="{path}"'


def scored(model: jaxlm.Model, sequences: Sequences) -> Scores:
    """Score sequences, those of like length together."""

    @jax.jit
    def judge(params: Any, tokens_BT: Any, targets_BT: Any) -> tuple[Any, Any]:
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        places = tokens_BT, positions_BT, jnp.ones_like(tokens_BT)
        logits_BTV = model.decoder.apply({"params": params}, *places)[0].astype(jnp.float32)
        picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT, logits_BTV.argmax(axis=-1) == targets_BT

    order = np.argsort([len(ids) for ids in sequences.ids], kind="stable")
    nll: list[np.ndarray] = [np.zeros(0)] * len(order)
    likeliest: list[np.ndarray] = [np.zeros(0, bool)] * len(order)
    for first in range(0, len(order), BATCH):
        numbers = order[first : first + BATCH].tolist()
        # The last batch is filled up, and its width rounded: a program for each shape would be compiled. What stands
        # behind a sequence is not seen by it.
        width = -(-max(len(sequences.ids[number]) for number in numbers) // 128) * 128
        ids_BT = np.zeros((BATCH, width + 1), np.int32)
        for row, number in enumerate(numbers):
            ids_BT[row, : len(sequences.ids[number])] = sequences.ids[number]
        nll_BT, likeliest_BT = map(np.asarray, judge(model.params, ids_BT[:, :-1], ids_BT[:, 1:]))
        for row, number in enumerate(numbers):
            places = np.flatnonzero(sequences.counts[number]) - 1
            nll[number], likeliest[number] = nll_BT[row, places].astype(np.float64), likeliest_BT[row, places]
    return Scores(np.concatenate(nll), np.concatenate(likeliest))


def kept(run: Path, options: Mapping[str, Any], make: Any) -> dict[str, np.ndarray]:
    """Scores of a run by name: from its folder, or made now.

    Raises:
        SystemExit: the run was begun with other options.
    """
    path, record = run / "nll.npz", Kept(run.parent / "options.json")
    if record.get(run.name, options) is None:
        if run.exists():
            raise SystemExit(f"{run}: {record.file} has no options of it; take another --folder, or remove it")
        record.put(run.name, options, {})
    if path.is_file():
        with np.load(path) as file:
            return dict(file)
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, **made)
    temporary.replace(path)
    return made


def by_arm(
    options: argparse.Namespace,
    arms: Iterable[str],
    make: Callable[[str, int, Path], dict[str, np.ndarray]],
    headline: str,
) -> dict[str, list[dict[str, np.ndarray]]]:
    """The scores of every arm, a seed after the other; a line for each run has the mean of those named `headline`.

    Args:
        make: `(arm, seed, run) -> scores by name`, for runs that are not there yet.
    """
    found: dict[str, list[dict[str, np.ndarray]]] = {arm: [] for arm in arms}
    for seed in range(options.seeds):
        for arm in found:
            run = options.folder / f"{arm}-{seed}"
            found[arm].append(kept(run, shape_of_runs(options), functools.partial(make, arm, seed, run)))
            print(f"{run}: {np.nanmean(found[arm][-1][headline]):.4f} nats a token, {headline}", flush=True)
    return found


def compared(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], documents: np.ndarray) -> dict[str, Any]:
    """The difference of two arms in nats a token, with a 95 % interval over documents and seeds.

    Both are drawn with replacement: tokens of a document are no independent cases, and neither are those of a seed.

    Args:
        ours: negative log-likelihood of each token [N], of each seed [S]; `theirs` of the same tokens and seeds.
        documents: which document each token is of [N].
    """
    ours_SN, theirs_SN = np.stack(list(ours)), np.stack(list(theirs))
    _, document_N = np.unique(documents, return_inverse=True)
    count = int(document_N.max()) + 1
    tokens_M = np.bincount(document_N, minlength=count)
    apart_SM = np.stack([np.bincount(document_N, row, minlength=count) for row in ours_SN - theirs_SN])
    random = np.random.default_rng(0)
    resampled = []
    for _ in range(RESAMPLES):
        seeds, chosen = random.integers(len(apart_SM), size=len(apart_SM)), random.integers(count, size=count)
        resampled.append(apart_SM[seeds].mean(axis=0)[chosen].sum() / tokens_M[chosen].sum())
    return {
        "ours": float(ours_SN.mean()),
        "theirs": float(theirs_SN.mean()),
        "difference": float((ours_SN - theirs_SN).mean()),
        "interval": np.quantile(resampled, (0.025, 0.975)).tolist(),
        "by seed": (ours_SN - theirs_SN).mean(axis=1).tolist(),
        "tokens": ours_SN.shape[1],
        "documents": count,
    }


def printed(name: str, found: Mapping[str, Any]) -> None:
    """A line of a comparison."""
    low, high = found["interval"]
    print(
        f"{name:44} {found['ours']:7.4f} {found['theirs']:7.4f} {found['difference']:+8.4f} [{low:+.4f}, {high:+.4f}]"
        f"  {found['tokens']:,} tokens, {found['documents']} documents",
        flush=True,
    )
