"""How a model is asked: prompts as ids, plain or by a chat template, and the ids that end an answer.

asking = Asking.of(cfg, tokenizer)
asking.encode(["37+5="])        # a list of ids for each prompt
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxlm import config
from jaxlm.data.stage_tokenizer import template_folder
from jaxlm.errors import UserError
from jaxlm.text.chat import Chat, encode
from jaxlm.text.completion import encode_prompts
from jaxlm.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Asking:
    """A tokenizer, and the template of a chat if prompts are messages of one."""

    tokenizer: Tokenizer
    chat: Chat | None
    end: int
    """The id that ends an answer in training."""
    ends: frozenset[int]
    """All ids that end one."""

    @classmethod
    def of(cls, cfg: config.Config, tokenizer: Tokenizer) -> Asking:
        """By `rl.template`.

        Raises:
            UserError: no id could end an answer, or there is no such template.
        """
        if not cfg.rl.template:
            if tokenizer.eot is None:
                raise UserError("the tokenizer has no end of text: no sample could end", "tokenizer.specials=true")
            return cls(tokenizer, None, tokenizer.eot, frozenset({tokenizer.eot}))
        chat = Chat.of(tokenizer, cfg.rl.template, template_folder(cfg), key="rl.template")
        turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "1"}]
        example = encode(chat, turns)
        end = int(example.ids[example.weights > 0][-1])
        if end not in chat.ends:
            hint = "a template that ends an assistant's turn, such as jaxlm or chatml"
            raise UserError(f"rl.template = {cfg.rl.template!r}: no token ends an answer", hint)
        return cls(tokenizer, chat, end, chat.ends)

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """The ids after which the model answers."""
        if self.chat is None:
            return encode_prompts(self.tokenizer, prompts)
        return [self.chat.prompt([{"role": "user", "content": prompt}]) for prompt in prompts]

    def answer(self, text: str) -> list[int]:
        """The ids of an answer, with its end."""
        return [*self.tokenizer.encode(text), self.end]
