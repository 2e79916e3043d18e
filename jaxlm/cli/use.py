"""`jaxlm generate`: a trained model in use."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from jaxlm.cli.arguments import Backend, BackendOption, JsonFlag, ModelPath
from jaxlm.cli.show import open_model, write
from jaxlm.errors import UserError

if TYPE_CHECKING:
    from jaxlm import config
    from jaxlm.text.sampling import Sampling

commands = typer.Typer()


@commands.command()
def generate(
    run: ModelPath,
    prompt: Annotated[str | None, typer.Argument(help="Text to continue.", show_default=False)] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the likeliest token.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest completion, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Keep the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the smallest set with this probability.")] = 1.0,
    typical_p: Annotated[float, typer.Option(help="Keep the most typical tokens with this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Keep tokens with this share of the likeliest one's probability.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: discourage tokens already there.")] = 1.0,
    frequency_penalty: Annotated[float, typer.Option(help="Taken from a token's logit for each time it came.")] = 0.0,
    presence_penalty: Annotated[float, typer.Option(help="Taken from the logits of tokens that came.")] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seeds the sampling.")] = 0,
    num_samples: Annotated[int, typer.Option(min=1, help="Completions of the prompt.")] = 1,
    as_json: JsonFlag = False,
    chat: Annotated[bool, typer.Option("--chat", help="PROMPT is a user's message, in the model's template.")] = False,
    backend: BackendOption = Backend.jax,
    mesh: Annotated[str | None, typer.Option(help="Split the model: a preset of configs/mesh, such as fsdp.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of many prompts, one JSON object a line.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the texts of --prompts go.")] = None,
    rows: Annotated[int, typer.Option(help="With --prompts: texts side by side.")] = 16,
    speculate: Annotated[int, typer.Option(help="Guess so many tokens, up to 7, and check them in one call.")] = 0,
    draft: Annotated[Path | None, typer.Option(help="A smaller model that guesses; else what repeats itself.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Say on stderr how many guesses were right.")] = False,
) -> None:
    """Continue PROMPT with a trained model; the text appears as it is made.

    With --prompts, continue every line of a file: {"prompt": "...", "max_new_tokens": 64, "sampling": {"top_p": 0.9}}.
    A command that was killed goes on where it stopped. Under `jaxlm launch local --processes 2 -- generate RUN ...` the
    processes hold the model together, and the first one speaks.
    """
    from jaxlm.text.sampling import Sampling

    sampling = Sampling(
        temperature=0.0 if greedy else temperature,
        top_k=top_k,
        top_p=top_p,
        typical_p=typical_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
    )
    stops = tuple(stop or ())
    mesh = _join(backend, mesh)
    wanted = _Wanted(sampling, max_new_tokens, stops, seed, num_samples, backend.value, mesh, speculate, draft)
    if prompts is not None:
        _refuse_options_of_one_prompt(verbose, as_json, chat)
    if prompts is not None or out is not None or prompt is None:
        _answer_file(run, prompt, prompts, out, rows, wanted)
    else:
        _answer_prompt(run, prompt, as_json, chat, verbose, wanted)


def _refuse_options_of_one_prompt(verbose: bool, as_json: bool, chat: bool) -> None:
    if verbose:
        raise UserError("--verbose is of one prompt", "with --prompts, usage of each line has the guesses")
    if as_json:
        raise UserError("--json is of one prompt", "with --prompts, --out has a JSON object a line")
    if chat:
        raise UserError("--chat is of one prompt", "with --prompts, a line has the whole text, template and all")


class _Wanted(NamedTuple):
    """How every prompt is to be continued, by which framework, and with which guesses."""

    sampling: Sampling
    max_new_tokens: int
    stop: tuple[str, ...]
    seed: int
    num_samples: int
    backend: config.Backend
    mesh: str | None
    speculate: int
    draft: Path | None


def _join(backend: Backend, mesh: str | None) -> str | None:
    """Meet the other processes, if there are any; returns the preset of the mesh, which several processes need."""
    from jaxlm import config
    from jaxlm.processes import meet

    place = meet.find_place(config.Distributed(), os.environ)
    several = place is not None and place.processes > 1
    if backend is Backend.torch and (several or mesh):
        raise UserError("--backend torch computes in one process on one device", "use --backend jax")
    meet.initialize(config.Distributed())
    return mesh or ("fsdp" if several else None)


def _as_chat(model: Any, message: str) -> str:
    """The text up to where the assistant answers a message, by the template that lies beside the tokenizer."""
    from jaxlm.text.chat import Chat

    model.encode(message)  # which needs a tokenizer
    chat = Chat.of(model.tokenizer, beside=model.tokenizer_path.parent if model.tokenizer_path else None)
    return chat.render([{"role": "user", "content": message}], generation_prompt=True).text


def _answer_file(
    run: Path, prompt: str | None, prompts: Path | None, out: Path | None, rows: int, wanted: _Wanted
) -> None:
    from jaxlm.infer.engine import Request

    if prompt is not None or prompts is None or out is None:
        raise UserError("give a PROMPT, or --prompts IN.jsonl and --out OUT.jsonl")
    sampling, length, stop, seed, choices, backend, mesh, speculate, draft = wanted
    usual = Request((), sampling=sampling, max_new_tokens=length, stop=stop, seed=seed, n=choices)
    done, guesser = 0, _draft(draft, mesh)
    for done in open_model(run, mesh).answer_file(
        prompts, out, usual, rows=rows, backend=backend, speculate=speculate, draft=guesser
    ):
        _speak(f"\r{done} texts")
    _speak(f"\r{out}: {done} texts\n" if done else f"{out}: nothing left to do\n")


def _answer_prompt(run: Path, prompt: str, as_json: bool, chat: bool, verbose: bool, wanted: _Wanted) -> None:
    """Print the completions of one prompt; a single one appears as it is made."""
    streaming = not as_json and wanted.num_samples == 1
    shown: list[str] = []
    model = open_model(run, wanted.mesh)
    echo, prompt = ("", _as_chat(model, prompt)) if chat else (prompt, prompt)

    def stream(_: int, text: str) -> None:
        _speak(text if shown else echo + text)
        shown.append(text)

    completions = model.generate(
        [prompt],
        sampling=wanted.sampling,
        max_new_tokens=wanted.max_new_tokens,
        stop=wanted.stop,
        seed=wanted.seed,
        num_samples=wanted.num_samples,
        stream=stream if streaming else None,
        backend=wanted.backend,
        speculate=wanted.speculate,
        draft=_draft(wanted.draft, wanted.mesh),
    )
    if streaming:
        _speak("\n" if shown else echo + "\n")
    for completion in completions if not streaming else ():
        text = json.dumps(_fields(completion)) if as_json else f"{echo}{completion.text}\n"
        _speak(f"{text}\n")
    if verbose:
        _tell_guesses(completions)


def _speak(text: str) -> None:
    """Print as `write` does; of several processes the first one speaks."""
    from jaxlm.processes import meet

    if meet.is_first():
        write(text)


def _draft(path: Path | None, mesh: str | None) -> Any:
    return None if path is None else open_model(path, mesh)


def _fields(completion: Any) -> dict[str, Any]:
    """The fields of a completion to print; guesses where there were any."""
    fields = dataclasses.asdict(completion)
    fields["guessed"] = completion.guessed._asdict()
    if not completion.guessed.calls:
        del fields["guessed"]
    return fields


def _tell_guesses(completions: list[Any]) -> None:
    """How many tokens of all texts were guessed, on stderr."""
    tokens = sum(len(one.tokens) for one in completions)
    calls, guessed, accepted = (sum(one.guessed[i] for one in completions) for i in range(3))
    each = f", {accepted / calls:.2f} a call" if calls else ""
    print(f"{tokens} tokens; {guessed} guessed in {calls} calls, {accepted} of them right{each}", file=sys.stderr)
