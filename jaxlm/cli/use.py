"""`jaxlm generate`: a trained model in use."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from jaxlm.cli.arguments import Backend, BackendOption, JsonFlag, ModelPath
from jaxlm.cli.show import write

commands = typer.Typer()


@commands.command()
def generate(
    run: ModelPath,
    prompt: Annotated[str, typer.Argument(help="Text to continue.", show_default=False)],
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the likeliest token.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest completion, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Keep the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the smallest set with this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Keep tokens with this share of the likeliest one's probability.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: discourage tokens already there.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Seeds the sampling.")] = 0,
    num_samples: Annotated[int, typer.Option(min=1, help="Completions of the prompt.")] = 1,
    as_json: JsonFlag = False,
    backend: BackendOption = Backend.jax,
) -> None:
    """Continue PROMPT with a trained model; the text appears as it is made."""
    from jaxlm.infer.text import generate_text
    from jaxlm.text.sampling import Sampling

    sampling = Sampling(
        temperature=0.0 if greedy else temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    streaming = not as_json and num_samples == 1
    if streaming:
        write(prompt)
    completions = generate_text(
        run,
        [prompt],
        sampling,
        max_new_tokens=max_new_tokens,
        stop=stop or (),
        seed=seed,
        num_samples=num_samples,
        backend=backend.value,
        stream=(lambda _, text: write(text)) if streaming else None,
    )
    if streaming:
        write("\n")
    for completion in completions if not streaming else ():
        print(json.dumps(dataclasses.asdict(completion)) if as_json else completion.prompt + completion.text + "\n")
