"""Decoding in PyTorch: the algorithm of `jaxlm.infer.generate`, step by step, and text on top of it.

    python -m torch_ref.infer.generate FOLDER "def add(a, b):"

FOLDER is written by `jaxlm convert RUN FOLDER --to torch`; JAX is not needed.

Shapes: P prompts, B rows (samples of the prompts), T prompt length, N new tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jaxlm import config
from jaxlm.config import toml
from jaxlm.errors import UserError
from jaxlm.infer.engine.draft import DRAFT_WIDTHS, check_draft
from jaxlm.infer.engine.engine import Engine
from jaxlm.infer.memory import bytes_of, context_of, rows_within
from jaxlm.text.completion import STREAM_BLOCK, Completion, check_prompts, complete, encode_prompts, right_padded
from jaxlm.text.sampling import Sampling, uniforms
from jaxlm.text.tokenizer import Tokenizer, check_usable
from torch_ref.infer.runner import TorchRunner
from torch_ref.models.decoder import Decoder, init_cache
from torch_ref.numerics import Policy
from torch_ref.ops.sampling import over_temperature, sample


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    eos_id: int | None = None,
    pad_id: int = 0,
    seed: int = 0,
) -> list[list[int]]:
    """Complete prompts of ids; returns the new ids of each row, up to `eos_id` (included) or `max_new_tokens`.

    Raises:
        UserError: see `check_prompts`.
    """
    options = {"max_new_tokens": max_new_tokens, "eos_id": eos_id, "pad_id": pad_id, "seed": seed}
    new_BN = np.concatenate([*blocks(decoder, prompts, sampling, **options)], axis=1)
    return _up_to_end(new_BN, eos_id)


def _up_to_end(new_BN: np.ndarray, eos_id: int | None) -> list[list[int]]:
    """The new ids of each row, its end id included."""
    return [row[: row.index(eos_id) + 1] if eos_id in row else row for row in new_BN.tolist()]


class Draws(NamedTuple):
    """Samples of prompts."""

    ids: list[list[int]]
    """New ids of each row, up to the end id (included) or the length asked for."""
    logps: list[np.ndarray]
    """Of each row the log-probability of its ids under the distribution that they were drawn from, float32 or wider."""


def draws(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    temperature: float,
    *,
    max_new_tokens: int,
    samples: int = 1,
    eos_id: int | None = None,
    pad_id: int = 0,
    seed: int = 0,
) -> Draws:
    """Sample from the whole distribution at a temperature above 0, with log-probabilities: the ids of `generate`.

    Args:
        samples: of each prompt, side by side: rows as if each prompt stood there so many times, but the model reads it
            once.

    Raises:
        UserError: see `check_prompts`.
    """
    options = {"max_new_tokens": max_new_tokens, "eos_id": eos_id, "pad_id": pad_id, "seed": seed, "samples": samples}
    steps = list(_steps(decoder, prompts, Sampling(temperature=temperature), **options, scored=True))
    ids = _up_to_end(_stacked([token_B for token_B, _ in steps]), eos_id)
    logps_BN = torch.stack([logp_B for _, logp_B in steps if logp_B is not None], dim=1).detach().cpu().numpy()
    return Draws(ids, [logps[: len(row)] for row, logps in zip(ids, logps_BN, strict=True)])


def blocks(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    eos_id: int | None = None,
    pad_id: int = 0,
    seed: int = 0,
    size: int = 0,
) -> Iterator[np.ndarray]:
    """As `generate`, in blocks [B, size] as they are drawn (0: one block); after the end of a row comes `pad_id`."""
    options = {"max_new_tokens": max_new_tokens, "eos_id": eos_id, "pad_id": pad_id, "seed": seed}
    block = list[Tensor]()
    for token_B, _ in _steps(decoder, prompts, sampling, **options):
        block.append(token_B)
        if len(block) == (size or max_new_tokens):
            yield _stacked(block)
            block = []
    if block:
        yield _stacked(block)


@torch.inference_mode()
def _steps(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    eos_id: int | None,
    pad_id: int,
    seed: int,
    samples: int = 1,
    scored: bool = False,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The token of each row, step after step, and its log-probability where that is asked for."""
    decoder.config.require_language_model("generation")
    check_prompts(decoder.config, prompts, max_new_tokens)
    decoder.eval()
    device = decoder.embed.weight.device
    padded = right_padded(prompts, max(map(len, prompts)), pad_id)
    tokens_PT, positions_PT, segments_PT, lengths_P = (torch.as_tensor(array, device=device) for array in padded)
    rows = samples * len(prompts)
    uniforms_BN = torch.as_tensor(uniforms(seed, rows, max_new_tokens), device=device)
    seen_BV = None
    if sampling.repetition_penalty != 1:
        seen_BV = torch.zeros(rows, decoder.config.vocab_size, dtype=torch.bool, device=device)
        for row in range(rows):
            seen_BV[row, prompts[row // samples]] = True

    counts_BV = None
    if sampling.counts:
        counts_BV = torch.zeros(rows, decoder.config.vocab_size, dtype=torch.int32, device=device)
    cache = init_cache(decoder, len(prompts), tokens_PT.shape[1] + max_new_tokens)
    hidden_PTD, cache = decoder.hidden(tokens_PT, positions_PT, segments_PT, cache)
    last_P1D = hidden_PTD.take_along_dim(lengths_P[:, None, None].long() - 1, dim=1)

    # Each prompt was read once; from here on every sample of it is a row with a cache of its own.
    lengths_B, last_B1D = (x.repeat_interleave(samples, dim=0) for x in (lengths_P, last_P1D))
    cache = _spread_cache(cache, samples)
    token_B, logp_B = _draw(decoder, sampling, last_B1D, uniforms_BN[:, 0], seen_BV, counts_BV, scored)
    ended_B = token_B == eos_id if eos_id is not None else torch.zeros_like(token_B, dtype=torch.bool)
    yield token_B, logp_B
    for step in range(1, max_new_tokens):
        if ended_B.all():
            break
        if seen_BV is not None:
            seen_BV[torch.arange(rows, device=device), token_B] = True
        if counts_BV is not None:
            counts_BV[torch.arange(rows, device=device), token_B] += 1
        position_B1 = (lengths_B + (step - 1))[:, None]
        hidden_B1D, cache = decoder.hidden(token_B[:, None], position_B1, torch.ones_like(position_B1), cache)
        token_B, logp_B = _draw(decoder, sampling, hidden_B1D, uniforms_BN[:, step], seen_BV, counts_BV, scored)
        token_B = torch.where(ended_B, pad_id, token_B)
        if eos_id is not None:
            ended_B = ended_B | (token_B == eos_id)
        yield token_B, logp_B


def _spread_cache(cache: Any, samples: int) -> Any:
    """A cache with each row so many times; a count has no rows."""
    if samples == 1:  # no copy
        return cache
    if isinstance(cache, Tensor):
        return cache.repeat_interleave(samples, dim=0) if cache.ndim else cache
    parts = [_spread_cache(part, samples) for part in cache]
    return type(cache)(*parts) if hasattr(cache, "_fields") else tuple(parts)


class Generator:
    """A decoder with its tokenizer, ready to complete many prompts at once, and to make engines.

    Args:
        ends: ids that end a text of an engine besides the tokenizer's end and begin of text.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, ends: Sequence[int] = ()) -> None:
        decoder.config.require_language_model("generation")
        check_usable(tokenizer, decoder.config.vocab_size)
        self.decoder, self.tokenizer = decoder, tokenizer
        self.ends = tuple(dict.fromkeys([*sorted(tokenizer.ends), *ends]))

    def complete(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        seed: int = 0,
        stream: Callable[[int, str], None] | None = None,
    ) -> list[Completion]:
        """Complete all prompts in one batch; see `jaxlm.text.completion.complete` for `stop` and `stream`.

        Raises:
            UserError: see `encode_prompts` and `check_prompts`.
        """
        drawn = blocks(
            self.decoder,
            encode_prompts(self.tokenizer, prompts),
            sampling,
            max_new_tokens=max_new_tokens,
            eos_id=self.tokenizer.eot,
            pad_id=self.tokenizer.pad,
            seed=seed,
            size=STREAM_BLOCK if stop or stream else 0,
        )
        return complete(drawn, self.tokenizer, prompts, stop=stop, stream=stream)

    def engine(
        self,
        *,
        rows: int = 8,
        context: int = 0,
        prefix_memory: str | int = 0,
        speculate: int = 0,
        draft: Generator | None = None,
        threaded: bool = True,
        warm_up: bool = True,
    ) -> Engine:
        """An engine on this decoder's device; see `jaxlm.infer.text.Generator.engine` for the arguments.

        Raises:
            UserError: a size is none, the model has fewer positions, or the draft has another tokenizer.
        """
        cfg, guesser = self.decoder.config, None
        rows, context = rows_within(rows, None, 0, context), context_of(cfg, context)
        runner = TorchRunner(self.decoder, rows=rows, slots=context, speculates=speculate > 0)
        if draft is not None:
            check_draft(self.tokenizer, draft.tokenizer)
            context = context_of(draft.decoder.config, context)
            guesser = TorchRunner(draft.decoder, rows=rows, slots=context, widths=DRAFT_WIDTHS, speculates=True)
        return Engine(
            runner,
            self.tokenizer,
            ends=self.ends,
            prefix_memory=bytes_of(prefix_memory, "prefix_memory"),
            fingerprint=f"{cfg}{self.decoder.policy}{self.tokenizer.fingerprint()}{speculate > 0}",
            speculate=speculate,
            draft=guesser,
            threaded=threaded,
            warm_up=warm_up,
        )


def decoder_of(settings: config.Config, tensors: Mapping[str, np.ndarray]) -> Decoder:
    """The decoder of a config with these weights, for inference."""
    decoder = Decoder(settings.model, Policy.from_config(settings.numerics))
    decoder.load_state_dict({name: torch.tensor(array) for name, array in tensors.items()}, strict=True)
    return decoder.requires_grad_(False).eval()


def open_folder(folder: str | Path) -> Generator:
    """The model of a folder that `jaxlm convert --to torch` wrote.

    Raises:
        UserError: a file is missing or is none of its kind.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = Path(folder)
    for name in ("config.toml", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name}: no such file", "write the folder with: jaxlm convert RUN FOLDER --to torch"
            )
    settings = toml.load(folder / "config.toml")
    try:
        decoder = decoder_of(settings, load_file(folder / "model.safetensors"))
    except (SafetensorError, RuntimeError) as error:  # RuntimeError: names or shapes that are not those of the config
        raise UserError(f"{folder / 'model.safetensors'}: {' '.join(str(error).split())}") from None
    return Generator(decoder, Tokenizer.from_file(folder / "tokenizer.json"))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m torch_ref.infer.generate", description="Complete a prompt with PyTorch."
    )
    parser.add_argument("folder", help="config.toml, model.safetensors and tokenizer.json")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--stop", action="append", default=[], help="end before this string; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    for field in dataclasses.fields(Sampling):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=field.default, help=f"default {field.default}")
    args = parser.parse_args(arguments)
    try:
        sampling = Sampling(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Sampling)})
        generator = open_folder(args.folder)
        sys.stdout.write(args.prompt)
        generator.complete(
            [args.prompt],
            sampling,
            max_new_tokens=args.max_new_tokens,
            stop=args.stop,
            seed=args.seed,
            stream=lambda _, piece: print(piece, end="", flush=True),
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print()
    return 0


def _draw(
    decoder: Decoder,
    sampling: Sampling,
    hidden_B1D: Float[Tensor, "b 1 d"],
    uniform_B: Float[Tensor, " b"],
    seen_BV: Tensor | None,
    counts_BV: Tensor | None,
    scored: bool,
) -> tuple[Tensor, Tensor | None]:
    """One token of each row, and its log-probability at the temperature where it is asked for."""
    logits_BV = decoder.unembed(hidden_B1D)[:, 0]
    token_B = sample(logits_BV, uniform_B, seen_BV, counts_BV, **dataclasses.asdict(sampling))
    if not scored:
        return token_B, None
    cold_BV = over_temperature(logits_BV, sampling.temperature)
    return token_B, torch.log_softmax(cold_BV, dim=-1).gather(1, token_B[:, None].long())[:, 0]


def _stacked(block: Sequence[Tensor]) -> np.ndarray:
    return torch.stack(list(block), dim=1).int().cpu().numpy()


if __name__ == "__main__":
    sys.exit(main())
