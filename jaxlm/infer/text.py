"""Text in, text out: a decoder with its tokenizer completes prompts. `jaxlm.load` opens one: see `infer.model`.

for completion in Generator(decoder, params, tokenizer).complete(["def add(a, b):"], GREEDY, max_new_tokens=64):
    print(completion.text)
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxlm import config
from jaxlm.errors import UserError
from jaxlm.infer.engine import Engine, Reply, Request
from jaxlm.infer.engine.draft import DRAFT_WIDTHS, check_draft
from jaxlm.infer.engine.on_jax.joined import joined_for_decoding
from jaxlm.infer.engine.on_jax.runner import JaxRunner, row_bytes
from jaxlm.infer.generate import unrolled_for_decoding
from jaxlm.infer.memory import bytes_of, context_of, rows_within
from jaxlm.mesh import Layout
from jaxlm.models.decoder import Decoder, Params
from jaxlm.text.completion import Completion, check_prompts, encode_prompts
from jaxlm.text.sampling import Sampling
from jaxlm.text.tokenizer import Tokenizer, check_usable

ROWS = 8
"""Texts that are decoded side by side, when there are so many."""
LEAST_SLOTS = 256


class Generator:
    """A decoder with its tokenizer, ready to complete many prompts.

    Args:
        ends: ids that end a text besides the tokenizer's end and begin of text.
        layout: devices over which the model is split.

    Raises:
        UserError: the model has another head than that of a language model.
    """

    def __init__(
        self,
        decoder: Decoder,
        params: Params,
        tokenizer: Tokenizer,
        ends: Sequence[int] = (),
        layout: Layout | None = None,
    ) -> None:
        decoder.config.require_language_model("generation")
        check_usable(tokenizer, decoder.config.vocab_size)
        self.tokenizer, self.layout = tokenizer, layout
        laid = joined_for_decoding if layout is None else unrolled_for_decoding
        self.decoder, self.params = laid(decoder, params)  # one copy for all engines
        self.ends = tuple(dict.fromkeys([*sorted(tokenizer.ends), *ends]))

    def engine(
        self,
        *,
        rows: int = ROWS,
        context: int = 0,
        cache_memory: str | int | None = None,
        prefix_memory: str | int = 0,
        speculate: int = 0,
        draft: Generator | None = None,
        threaded: bool = True,
        warm_up: bool = True,
        **options: int,
    ) -> Engine:
        """An engine on this model.

        Args:
            rows: texts side by side, at most; fewer where `cache_memory` is too small for so many.
            context: tokens of the longest prompt with its text; 0: model.max_seq_len.
            cache_memory: bytes, or such as "512M", for the rows of the draft too; None: whatever the rows take.
            prefix_memory: the same for the known beginnings of prompts; 0 keeps none.
            speculate: tokens guessed and checked in one call, up to 7; 0: none.
            draft: a smaller model that guesses them; None: they are guessed where a text repeats itself.
            threaded: in a thread of its own; otherwise whoever awaits a reply makes the steps.
            warm_up: compile all programs now; otherwise each when it is first needed.
            options: `budget` and `most_waiting` of `Engine`.

        Raises:
            UserError: not one row fits, the model has fewer positions, or the draft has another tokenizer.
        """
        cfg = self.decoder.config
        context = context_of(cfg, context)
        memory = None if cache_memory is None else bytes_of(cache_memory, "cache_memory")
        size, guesser = row_bytes(self.decoder, context), None
        if draft is not None:
            check_draft(self.tokenizer, draft.tokenizer)
            size += row_bytes(draft.decoder, context_of(draft.decoder.config, context))
        rows = rows_within(rows, memory, size, context)
        make = functools.partial(JaxRunner, rows=rows, slots=context)
        runner = make(self.decoder, self.params, speculates=speculate > 0, layout=self.layout)
        if draft is not None:
            guesser = make(draft.decoder, draft.params, widths=DRAFT_WIDTHS, speculates=True, layout=draft.layout)
        print_of = f"{cfg}{self.decoder.policy}{self.tokenizer.fingerprint()}"
        return Engine(
            runner,
            self.tokenizer,
            ends=self.ends,
            prefix_memory=bytes_of(prefix_memory, "prefix_memory"),
            fingerprint=f"{print_of}{speculate > 0}",
            speculate=speculate,
            draft=guesser,
            threaded=threaded,
            warm_up=warm_up,
            **options,
        )

    def complete(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        seed: int = 0,
        num_samples: int = 1,
        stream: Callable[[int, str], None] | None = None,
        speculate: int = 0,
        draft: Generator | None = None,
    ) -> list[Completion]:
        """Complete all prompts, on rows side by side.

        Args:
            stop: a text ends before the first of these strings.
            num_samples: completions of each prompt, side by side in the result; number i of the result is choice i of
                the seed.
            stream: called with the index in the result and each piece of its text, as soon as it is final.
            speculate: see `engine`, also for `draft`.

        Raises:
            UserError: see `encode_prompts` and `check_prompts`; or the logits are not finite.
        """
        ids = encode_prompts(self.tokenizer, prompts)
        check_prompts(self.decoder.config, ids, max_new_tokens)
        slots = slots_for(self.decoder.config, max(map(len, ids)) + max_new_tokens)
        request = functools.partial(
            Request, sampling=sampling, max_new_tokens=max_new_tokens, stop=tuple(stop), seed=seed, n=num_samples
        )
        rows = min(ROWS, len(ids) * num_samples)
        with self.engine(
            rows=rows, context=slots, speculate=speculate, draft=draft, threaded=False, warm_up=False
        ) as engine:
            requests = [request(prompt, sample=i * num_samples) for i, prompt in enumerate(ids)]
            replies = [engine.submit(request) for request in requests]
            return [
                completion
                for i, (prompt, reply) in enumerate(zip(prompts, replies, strict=True))
                for completion in _completions(prompt, reply, i * num_samples, stream)
            ]


def _completions(prompt: str, reply: Reply, first: int, stream: Callable[[int, str], None] | None) -> list[Completion]:
    for part in reply:
        if stream is not None and part.text:
            stream(first + part.index, part.text)
    result = reply.result()
    for choice in result.choices:
        if choice.finish == "error":
            raise UserError(str(choice.ended_by))
    return [Completion(prompt, one.text, list(one.ids), one.finish, one.guessed) for one in result.choices]


def slots_for(cfg: config.Model, tokens: int) -> int:
    """The room of a row for texts of so many tokens: few sizes, so that few programs are compiled."""
    room = max(LEAST_SLOTS, 1 << (tokens - 1).bit_length())
    fits = 0 < tokens <= cfg.max_seq_len
    return min(room, cfg.max_seq_len) if fits and cfg.positions in ("learned", "sinusoidal") else room


def end_ids(path: str | Path) -> tuple[int, ...]:
    """Ids that end a text by `generation_config.json`, where the folder has one."""
    file = Path(path) / "generation_config.json"
    if not file.is_file():
        return ()
    try:
        ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file}: {error}", "it must be a JSON object") from None
    listed = ids if isinstance(ids, list) else [ids]
    return tuple(token for token in listed if isinstance(token, int))
