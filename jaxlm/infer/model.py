"""A model in use is a value: `jaxlm.load` opens anything that holds one, and a `Model` computes, writes and converts.

    model = load("runs/quickstart")
    model.generate("def add(a, b):", max_new_tokens=32).text
    model([5, 8, 2])                       # logits [T, V]
    model.log_probs("def add(a, b):")      # of each token after the first

Nothing here prints, and nothing changes JAX's settings.

Shapes: B batch, T length, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm import config
from jaxlm.convert import native, open_model
from jaxlm.convert.canonical import canonical
from jaxlm.convert.files.side_files import carried, no_tokenizer
from jaxlm.errors import UserError
from jaxlm.infer import tree
from jaxlm.infer.batch import answer_file
from jaxlm.infer.engine import Engine, Request
from jaxlm.infer.engine.on_jax.joined import tell_second_copy
from jaxlm.infer.forwards import compiled_forwards
from jaxlm.infer.generate import bucket
from jaxlm.infer.text import Generator, end_ids, slots_for
from jaxlm.mesh import Layout
from jaxlm.models.decoder import Decoder, Params
from jaxlm.numerics import Policy, precision
from jaxlm.text.completion import Completion, check_prompts, encode_prompts, right_padded
from jaxlm.text.sampling import GREEDY, Sampling
from jaxlm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jaxlm.convert.write_model import Summary

Tokens = str | Sequence[int] | Sequence[Sequence[int]] | np.ndarray | Int[Array, "..."]
"""A text, ids [T], or rows of ids [B, T]."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A decoder with its parameters and tokenizer. A value: `dataclasses.replace(model, params=...)` is another one."""

    config: config.Config
    params: Params
    """The live tree, as `decoder` takes it."""
    tokenizer: Tokenizer | None = None
    path: Path | None = None
    """Where it came from."""
    kind: str = "run"
    """`run`, `torch`, or the name of a family."""
    tokenizer_path: Path | None = None
    layout: Layout | None = None
    """The devices over which it is split, if it is."""

    @functools.cached_property
    def decoder(self) -> Decoder:
        """The architecture, without parameters: `decoder.apply({"params": params}, tokens, positions, segments)`."""
        return Decoder(self.config.model.portable, Policy.from_config(self.config.numerics))

    def encode(self, text: str) -> list[int]:
        """Ids of a text as a document begins in training; special tokens may be spelled out.

        Raises:
            UserError: the model has no tokenizer.
        """
        return encode_prompts(self._tokenizer, [text])[0]

    def __call__(self, tokens: Tokens) -> Float[Array, "*b t v"]:
        """Logits of the next token at each place, in float32 or wider; of another head its numbers for each token.

        Args:
            tokens: a text, ids [T], or rows of ids [B, T].

        Raises:
            UserError: ids outside the vocabulary or none, or more than the model has positions for.
        """
        return self._forward(tokens, "logits")

    def hidden(self, tokens: Tokens) -> Float[Array, "*b t d"]:
        """As a call, but what the output matrix is applied to: the last hidden state after the final norm."""
        return self._forward(tokens, "hidden")

    @overload
    def log_probs(self, texts: str | Sequence[int]) -> np.ndarray: ...
    @overload
    def log_probs(self, texts: Sequence[str] | Sequence[Sequence[int]]) -> list[np.ndarray]: ...
    def log_probs(self, texts: Any) -> Any:
        """The log-probability, nats, of each token after the first, given those before it.

        Args:
            texts: a text or its ids [T], or several of them, which may differ in length.

        Returns:
            [T - 1] in float32 or wider; a list of them for several.

        Raises:
            UserError: as a call.
        """
        self.config.model.require_language_model("log_probs")
        alone = isinstance(texts, str) or (len(texts) > 0 and np.ndim(texts[0]) == 0 and not isinstance(texts[0], str))
        rows = [self._ids(text) for text in ([texts] if alone else texts)]
        self._check(rows)
        inputs = [row[:-1] or row for row in rows]  # a row of one token has nothing to predict, but is computed
        tokens_BT, positions_BT, segments_BT, _ = right_padded(inputs, bucket(max(map(len, inputs))), 0)
        targets_BT = np.zeros_like(tokens_BT)
        for row, target_T in zip(rows, targets_BT, strict=True):
            target_T[: len(row) - 1] = row[1:]
        with precision(self.config.numerics):
            logps_BT = self._compiled["log_probs"](self.params, tokens_BT, positions_BT, segments_BT, targets_BT)
            logps_BT = np.asarray(logps_BT)
        found = [logps_T[: len(row) - 1] for row, logps_T in zip(rows, logps_BT, strict=True)]
        return found[0] if alone else found

    @overload
    def generate(
        self,
        prompts: str,
        *,
        sampling: Sampling = ...,
        max_new_tokens: int = ...,
        stop: Sequence[str] = ...,
        seed: int = ...,
        stream: Callable[[int, str], None] | None = ...,
        backend: config.Backend = ...,
        speculate: int = ...,
        draft: Model | None = ...,
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        sampling: Sampling = ...,
        max_new_tokens: int = ...,
        stop: Sequence[str] = ...,
        seed: int = ...,
        num_samples: int = ...,
        stream: Callable[[int, str], None] | None = ...,
        backend: config.Backend = ...,
        speculate: int = ...,
        draft: Model | None = ...,
    ) -> list[Completion]: ...
    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        sampling: Sampling = GREEDY,
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
        seed: int = 0,
        num_samples: int = 1,
        stream: Callable[[int, str], None] | None = None,
        backend: config.Backend = "jax",
        speculate: int = 0,
        draft: Model | None = None,
    ) -> Completion | list[Completion]:
        """Continue prompts.

        Args:
            prompts: one, whose completion is returned, or several, whose completions are a list.
            sampling: how the next token is chosen; default: the likeliest.
            stop: a text ends before the first of these strings.
            num_samples: completions of each prompt, side by side in the list, also for one prompt if above 1.
            stream: called with the index in the list and each piece of text as soon as it is final.
            backend: `torch` computes by torch_ref.
            speculate: tokens guessed and checked in one call, up to 7, by what the text repeats or by a `draft`, a
                smaller model. The text is the same.

        Raises:
            UserError: the model has no tokenizer, a prompt does not fit (see `check_prompts`), a draft has nothing to
                guess (`speculate` is 0), or torch is to speculate.
        """
        several = [prompts] if isinstance(prompts, str) else list(prompts)
        with precision(self.config.numerics):
            if backend == "torch":
                if speculate or draft is not None:
                    raise UserError("one prompt is completed by torch without speculation", "use --prompts, or JAX")
                several = [prompt for prompt in several for _ in range(num_samples)]
                complete = self._torch_generator.complete
            else:
                guesser = None if draft is None else draft.generator
                complete = functools.partial(
                    self.generator.complete, num_samples=num_samples, speculate=speculate, draft=guesser
                )
            found = complete(several, sampling, max_new_tokens=max_new_tokens, stop=stop, seed=seed, stream=stream)
        return found[0] if isinstance(prompts, str) and num_samples == 1 else found

    def stream(
        self,
        prompt: str,
        *,
        sampling: Sampling = GREEDY,
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> Iterator[str]:
        """Continue one prompt piece by piece; see `generate`. Nothing is computed ahead of what is asked for."""
        ids = self.encode(prompt)
        check_prompts(self.config.model, [ids], max_new_tokens)
        slots = slots_for(self.config.model, len(ids) + max_new_tokens)
        request = Request(ids, sampling=sampling, max_new_tokens=max_new_tokens, stop=tuple(stop), seed=seed)
        with self.engine(rows=1, context=slots, threaded=False, warm_up=False) as engine:
            parts = iter(engine.submit(request))
            while True:
                with precision(self.config.numerics):  # not while the caller has its turn
                    part = next(parts, None)
                if part is None:
                    return
                if part.text:
                    yield part.text

    def engine(self, *, backend: config.Backend = "jax", draft: Model | None = None, **options: Any) -> Engine:
        """An engine that answers many requests at once, from any thread.

        Args:
            backend: `torch` computes by torch_ref.
            draft: a smaller model with the same tokenizer that guesses tokens.
            options: `rows`, `cache_memory`, `prefix_memory` and the others of `infer.text.Generator.engine`.

        Raises:
            UserError: as `Generator.engine`; or the model has no tokenizer.
        """
        with precision(self.config.numerics):
            guesser = None if draft is None else draft._generator_of(backend)
            return self._generator_of(backend).engine(draft=guesser, **options)

    def answer_file(
        self,
        prompts: str | Path,
        out: str | Path,
        defaults: Request,
        *,
        rows: int = 16,
        context: int = 0,
        backend: config.Backend = "jax",
        speculate: int = 0,
        draft: Model | None = None,
    ) -> Iterator[int]:
        """Answer a file of prompts; see `batch.answer_file`, also for errors. Yields the lines done."""
        sizes: dict[str, Any] = {"rows": rows, "context": context, "prefix_memory": "256M", "speculate": speculate}
        with self.engine(backend=backend, draft=draft, threaded=False, warm_up=False, **sizes) as engine:
            name = f"{(self.path or Path()).resolve()}\0{engine.prefixes.fingerprint}"
            yield from answer_file(engine, Path(prompts), Path(out), defaults, name)

    @functools.cached_property
    def generator(self) -> Generator:
        """What completes many prompts at once, and makes engines; built when it is first needed.

        Raises:
            UserError: the model has no tokenizer.
        """
        with precision(self.config.numerics):
            ends = end_ids(self.path) if self.path else ()
            tell_second_copy(self.decoder, self.layout)
            return Generator(self.decoder, self.params, self._tokenizer, ends, self.layout)

    def to_torch(self) -> Any:
        """The same model as a `torch_ref.models.decoder.Decoder`, a `torch.nn.Module`, bit for bit.

        Raises:
            UserError: PyTorch is not installed.
        """
        try:
            from torch_ref.infer.generate import decoder_of
        except ModuleNotFoundError as error:
            raise UserError(f"to_torch needs {error.name}", "pip install 'jaxlm[torch]'") from None
        host = jax.tree.map(np.asarray, self.params)
        return decoder_of(self.config, dict(native.to_torch(host, self.config.model)))

    def save(self, path: str | Path, layout: str = "jaxlm", *, overwrite: bool = False) -> Summary:
        """Write it as a run (`jaxlm`), a torch_ref folder (`torch`), or a public layout (`llama`, `hf`, ...).

        Raises:
            UserError: there is something already, the layout is unknown or cannot hold this model.
        """
        from jaxlm.convert.write_model import require_apart, write_model

        folder = self.path if self.path is not None and self.path.is_dir() else None
        if folder is not None:
            require_apart(folder, Path(path))
        with tempfile.TemporaryDirectory() as scratch:
            own = self.tokenizer_path
            if own is None and self.tokenizer is not None:
                own = Path(scratch) / open_model.TOKENIZER
                self.tokenizer.save(own)
            parameters = canonical(self.params, self.config.model)
            kept = carried(folder) if folder is not None else {}
            opened = open_model.Opened(self.path or Path(scratch), self.config, parameters, self.kind, own, kept)
            return write_model(opened, Path(path), layout, overwrite=overwrite)

    def __repr__(self) -> str:
        return f"{self._headline()}\n{tree.as_text(tree.branches(self.params))}"

    def _repr_html_(self) -> str:
        shown = tree.Branch(self._headline(), self._count(), branches=tree.branches(self.params))
        return tree.as_html((shown,)).replace("<details", "<details open", 1)

    def _headline(self) -> str:
        model, numerics = self.config.model, self.config.numerics
        return (
            f"Model {self.path or ''}: {self._count():,} parameters in {numerics.params}, computes in "
            f"{numerics.compute}; {model.n_layers} layers of {', '.join(model.pattern)}; width {model.d_model}, "
            f"vocabulary {model.vocab_size:,}{'' if model.head == 'lm' else f', {model.head} head'}"
        )

    def _count(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    @property
    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise no_tokenizer(self.path or Path("this model"))
        return self.tokenizer

    def _generator_of(self, backend: config.Backend) -> Any:
        return self._torch_generator if backend == "torch" else self.generator

    @functools.cached_property
    def _torch_generator(self) -> Any:
        module = self.to_torch()
        from torch_ref.infer.generate import Generator as TorchGenerator

        return TorchGenerator(module, self._tokenizer, end_ids(self.path) if self.path else ())

    def _ids(self, text: Any) -> list[int]:
        return self.encode(text) if isinstance(text, str) else np.asarray(text).tolist()

    def _check(self, rows: Sequence[Sequence[int]]) -> None:
        """Refuse ids that the model has no embedding for, and places that it has no position for."""
        check_prompts(self.config.model, rows, 1)

    def _forward(self, tokens: Any, part: str) -> Any:
        ids = np.asarray(self.encode(tokens) if isinstance(tokens, str) else tokens)
        if ids.ndim not in (1, 2) or ids.dtype.kind not in "iu":
            raise UserError(f"tokens are {ids.dtype.name} of shape {list(ids.shape)}", "give ids [T] or [B, T]")
        rows = np.atleast_2d(ids).tolist()
        self._check(rows)
        tokens_BT, positions_BT, segments_BT, _ = right_padded(rows, bucket(ids.shape[-1]), 0)
        with precision(self.config.numerics):
            found = self._compiled[part](self.params, tokens_BT, positions_BT, segments_BT)[:, : ids.shape[-1]]
            return found if ids.ndim == 2 else found[0]

    @functools.cached_property
    def _compiled(self) -> dict[str, Any]:
        return compiled_forwards(self.decoder, self.layout)
