"""What happens to a request before it waits: it is looked at, and each of its choices begins.

    Intake(runner, tokenizer, ends=(0,)).choices(Request("def add(a, b):", n=2))      # two `Growing`

A fault of a request is found here, in the thread of whoever asks, and never in a step that other texts share.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxlm.errors import UserError
from jaxlm.infer.engine.growing import Growing
from jaxlm.infer.engine.request import ENDS, Finish, Request
from jaxlm.infer.engine.runner import Runner
from jaxlm.infer.engine.structured import Grammars
from jaxlm.text.completion import encode_prompts
from jaxlm.text.tokenizer import Tokenizer


class Intake:
    """Turns requests into choices that can grow on the rows of a runner.

    Args:
        ends: ids that end a text.
    """

    def __init__(self, runner: Runner, tokenizer: Tokenizer | None, ends: Sequence[int]) -> None:
        self._runner, self._tokenizer = runner, tokenizer
        self.ends = tuple(dict.fromkeys(ends))[: ENDS // 2]
        self._grammars: Grammars | None = None

    def choices(self, request: Request) -> list[Growing]:
        """The choices of a request, of which no token is drawn yet.

        Raises:
            UserError: the prompt is empty, too long or has ids that the model does not know; nothing ends the text; or
                it or a grammar needs a tokenizer, and there is none.
        """
        ids = self._prompt_ids(request)
        return [self._growing(request, index, ids) for index in range(request.choices)]

    def _prompt_ids(self, request: Request) -> list[int]:
        if isinstance(request.prompt, str):
            if self._tokenizer is None:
                raise UserError("the engine has no tokenizer", "give the prompt as ids")
            (ids,) = encode_prompts(self._tokenizer, [request.prompt])
        else:
            ids = list(request.prompt)
        vocab, room = self._runner.vocab, self._runner.length
        if not ids:
            raise UserError("the prompt has no token", "begin with the end-of-text token")
        for what, some in (("the prompt", ids), ("forced", request.forced), ("forbidden", request.forbidden)):
            if some and not 0 <= min(some) <= max(some) < vocab:
                raise UserError(f"{what} has ids from {min(some)} to {max(some)}, the model knows 0 to {vocab - 1}")
        if any(not 0 <= token < vocab for token in (*request.logit_bias, *request.stop_ids)):
            raise UserError(f"logit_bias or stop_ids has an id that is not between 0 and {vocab - 1}")
        if request.deadline is not None and self._runner.shared:
            raise UserError("a deadline is of one process: the clocks of several differ", "leave it out")
        if len(ids) >= room:
            raise UserError(f"the prompt has {len(ids)} tokens, a row has room for {room} with the text")
        return ids

    def _growing(self, request: Request, index: int, ids: list[int]) -> Growing:
        ends = (*(() if request.ignore_eos else self.ends), *request.stop_ids)
        endless = not (ends or request.ignore_eos or request.stop or request.grammar)
        if endless and request.max_new_tokens is None:
            raise UserError("nothing ends the text: no id does, and max_new_tokens is none", "max_new_tokens=256")
        guide = None if request.grammar is None else self._grammar_rules().follow(request.grammar)
        room, wanted = self._runner.length - len(ids), request.max_new_tokens
        full: Finish = "context" if wanted is None or wanted > room else "length"
        limit = room if wanted is None else min(wanted, room)
        tokenizer = self._tokenizer
        return Growing(request, index, ids, limit=limit, full=full, ends=ends, tokenizer=tokenizer, guide=guide)

    def _grammar_rules(self) -> Grammars:
        if self._grammars is None:
            if self._tokenizer is None:
                raise UserError("a grammar needs a tokenizer", "the engine has none")
            self._grammars = Grammars(self._tokenizer, self._runner.vocab, self.ends)
        return self._grammars
