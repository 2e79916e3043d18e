"""Text in, text out: open a model, complete prompts, on either backend.

for completion in generate_text("runs/quickstart", ["def add(a, b):"], GREEDY, max_new_tokens=64):
    print(completion.text)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jaxlm import config
from jaxlm.infer import generate
from jaxlm.models.decoder import Decoder, Params
from jaxlm.numerics import Policy
from jaxlm.processes.compile_cache import enable_compilation_cache
from jaxlm.text.completion import STREAM_BLOCK, Completion, complete, encode_prompts
from jaxlm.text.sampling import Sampling
from jaxlm.text.tokenizer import Tokenizer, check_fits

if TYPE_CHECKING:
    from jaxlm.convert.open_model import Model


class Generator:
    """A decoder with its tokenizer, ready to complete many prompts."""

    def __init__(self, decoder: Decoder, params: Params, tokenizer: Tokenizer) -> None:
        check_fits(tokenizer, decoder.config.vocab_size)
        self.tokenizer = tokenizer
        self.decoder, self.params = generate.unrolled_for_decoding(decoder, params)

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
        blocks = generate.blocks(
            self.decoder,
            self.params,
            encode_prompts(self.tokenizer, prompts),
            sampling,
            max_new_tokens=max_new_tokens,
            eos_id=self.tokenizer.eot,
            pad_id=self.tokenizer.pad,
            seed=seed,
            size=STREAM_BLOCK if stop or stream else 0,
        )
        return complete(blocks, self.tokenizer, prompts, stop=stop, stream=stream)


def generate_text(
    path: str | Path,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    seed: int = 0,
    num_samples: int = 1,
    backend: config.Backend = "jax",
    stream: Callable[[int, str], None] | None = None,
) -> list[Completion]:
    """Open the model at `path` (a run, a torch_ref or Hugging Face folder, a `model.bin`) and complete prompts.

    Args:
        num_samples: completions of each prompt, side by side in the result.
        stream: called with the index in the result and each piece of its text, as soon as it is final.

    Raises:
        UserError: `path` holds no model or no tokenizer, or see `Generator.complete`.
    """
    from jaxlm.convert.files.side_files import no_tokenizer
    from jaxlm.convert.open_model import load

    model = load(path)
    if model.tokenizer_path is None:
        raise no_tokenizer(Path(path))
    tokenizer = Tokenizer.from_file(model.tokenizer_path)
    repeated = [prompt for prompt in prompts for _ in range(num_samples)]
    numerics = model.config.numerics
    with jax.enable_x64("float64" in (numerics.params, numerics.compute) or jax.config.read("jax_enable_x64")):
        generator = (_torch_generator if backend == "torch" else _generator)(model, tokenizer)
        return generator.complete(
            repeated, sampling, max_new_tokens=max_new_tokens, stop=stop, seed=seed, stream=stream
        )


def _generator(model: Model, tokenizer: Tokenizer) -> Generator:
    enable_compilation_cache(model.config.data.cache_dir)
    decoder = Decoder(model.config.model, Policy.from_config(model.config.numerics))
    return Generator(decoder, jax.device_put(model.params), tokenizer)


def _torch_generator(model: Model, tokenizer: Tokenizer) -> Any:
    from jaxlm.convert.native import to_torch
    from torch_ref.infer import generate as torch_generate

    tensors = dict(to_torch(model.params, model.config.model))
    return torch_generate.Generator(torch_generate.decoder_of(model.config, tensors), tokenizer)
