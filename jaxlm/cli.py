"""The command line: verbs of a few lines that call the library. A user's mistake is one line and exit code 2.

jaxlm train configs/quickstart.toml train.steps=100
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxlm import __version__
from jaxlm.errors import UserError
from jaxlm.launch.commands import app as launch_app

app = typer.Typer(
    name="jaxlm",
    help="Train language models in JAX, run them in PyTorch, and prove that both are the same model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
tokenizer_app = typer.Typer(help="Train a tokenizer, or look at one.", no_args_is_help=True)
data_app = typer.Typer(help="Tokenise a corpus ahead of a run, or look at its rows.", no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")
app.add_typer(launch_app, name="launch")


class Backend(StrEnum):
    """The framework that computes."""

    jax = "jax"
    torch = "torch"


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file or a name.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Options that differ from the file.")
]
ModelPath = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="A run, a torch_ref or Hugging Face folder, a model.bin, or a name on the hub.",
        show_default=False,
    ),
]
BackendOption = Annotated[Backend, typer.Option(help="Framework that computes.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def train(
    path: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run, or begin it if there is none.")] = False,
    backend: BackendOption = Backend.jax,
) -> None:
    """Train the model of CONFIG. The run directory is `out_dir`."""
    from jaxlm import config_file
    from jaxlm.recipes import pretrain

    pretrain.run(config_file.load(path, overrides or ()), resume=resume, backend=backend.value)


@app.command()
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
    from jaxlm.data.completion import Sampling
    from jaxlm.infer.text import generate_text

    sampling = Sampling(
        temperature=0.0 if greedy else temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    streaming = not as_json and num_samples == 1
    if streaming:
        _write(prompt)
    completions = generate_text(
        run,
        [prompt],
        sampling,
        max_new_tokens=max_new_tokens,
        stop=stop or (),
        seed=seed,
        num_samples=num_samples,
        backend=backend.value,
        stream=(lambda _, text: _write(text)) if streaming else None,
    )
    if streaming:
        _write("\n")
    for completion in completions if not streaming else ():
        print(json.dumps(dataclasses.asdict(completion)) if as_json else completion.prompt + completion.text + "\n")


_LAYOUTS = (
    "`jaxlm` (a run), `torch` (torch_ref), `hf` (the first public layout that can hold the model), or one by its name: "
    "llama, mistral, qwen2, qwen3, gpt2, mixtral, qwen3_moe, gpt_oss, dots1, mamba, mamba2, jamba, llama2c."
)


@app.command()
def convert(
    src: Annotated[
        Path, typer.Argument(help="A run, a torch_ref or Hugging Face folder, llama2.c's model.bin, a name on the hub.")
    ],
    dst: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[str, typer.Option(help=_LAYOUTS)],
    step: Annotated[int | None, typer.Option(help="Checkpoint of a run; default: the newest.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST.")] = False,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json or tokenizer.bin, instead of SRC's.")] = None,
    backend: Annotated[
        Backend | None,
        typer.Option(help="With `--to jaxlm`: a run, optimiser and all, for this one to resume."),
    ] = None,
) -> None:
    """Write a model in another layout, bit for bit."""
    if backend is not None:
        from jaxlm.convert.state import convert_state

        if to != "jaxlm":
            raise UserError(f"--backend with --to {to}: only a run has an optimiser", "--to jaxlm")
        print(convert_state(src, dst, backend.value, step=step, overwrite=overwrite))
        return
    from jaxlm.convert.convert import convert

    print(convert(src, dst, to, step=step, overwrite=overwrite, tokenizer=tokenizer))


@app.command()
def parity(
    run: Annotated[Path, typer.Argument(metavar="A", help="A run, config, torch_ref or Hugging Face folder.")],
    other: Annotated[Path | None, typer.Argument(metavar="B", help="The model to compare; default: A.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of parity.json and parity.html; default: a run A.")] = None,
    computed_by: Annotated[
        str | None,
        typer.Option("--with", help="What computes B: `jaxlm`, `torch`, `hf`; default: `hf` for its own folders."),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A file of text to show them; default: a built-in one.")] = None,
    prompt: Annotated[str, typer.Option(help="Text to show them and to continue.")] = "",
    levels: Annotated[str, typer.Option(help="Only these of config,weights,forward,loss,gradients,...")] = "",
    dtypes: Annotated[str, typer.Option(help="Only these of float64,float32,bfloat16; float64 always.")] = "",
    golden: Annotated[
        tuple[str, Path] | None,
        typer.Option(metavar="write|check FILE", help="Freeze A in a golden file, or compare it with one."),
    ] = None,
) -> None:
    """Tell whether two models are the same and where they part: A by jaxlm, B by PyTorch or transformers.

    Exit code 0: the same, 1: they differ, 2: a mistake.
    """
    if golden is not None:
        _golden(run, *golden, other=other, out=out, computed_by=computed_by or "jaxlm")
        return
    from jaxlm.parity import check

    options: dict[str, Any] = {"levels": levels.split(",")} if levels else {}
    options |= {"dtypes": dtypes.split(",")} if dtypes else {}
    options |= {"text": _read_text(text)} if text else {}
    if not check(run, other, out=out, show=True, computed_by=computed_by, prompt=prompt, **options).same:
        raise typer.Exit(1)


def _golden(run: Path, action: str, file: Path, *, other: Path | None, out: Path | None, computed_by: str) -> None:
    from jaxlm.parity import check_golden, write_golden

    if action not in ("write", "check"):
        raise UserError(f"--golden {action}: unknown", "--golden write FILE or --golden check FILE")
    if other is not None:
        raise UserError(f"--golden takes one model, {other} is a second")
    if action == "write":
        write_golden(run, file, computed_by=computed_by, show=True)
    elif not check_golden(run, file, computed_by=computed_by, out=out, show=True).same:
        raise typer.Exit(1)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}", "--text names a file of text in UTF-8") from None


@app.command("eval")
def evaluate(
    run: ModelPath,
    tasks: Annotated[list[str], typer.Argument(metavar="TASK...", help="`position`: perplexity against position.")],
    length: Annotated[int, typer.Option(help="position: tokens of a text; 0: 8 times data.seq_len.")] = 0,
    window: Annotated[int, typer.Option(min=0, help="position: also with this attention window.")] = 0,
    keep_first: Annotated[int, typer.Option(min=0, help="position: and with so many retained first tokens.")] = 4,
    texts: Annotated[int, typer.Option(help="position: texts side by side.")] = 16,
    buckets: Annotated[int, typer.Option(help="position: rows of the table.")] = 16,
    as_json: JsonFlag = False,
) -> None:
    """Measure a trained model; results are kept in RUN/eval."""
    from jaxlm.errors import did_you_mean
    from jaxlm.eval.perplexity import position

    for task in tasks:
        if task != "position":
            raise UserError(f"unknown task {task!r}", did_you_mean(task, ("position",)))
    options = {"window": window, "keep_first": keep_first, "texts": texts, "buckets": buckets}
    report = position(run, length=length, **options)
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        _show(report)


@app.command()
def compare(
    configs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG | SECTION.KEY=VALUE]...", help="Default: the four of configs/compare."),
    ] = None,
    steps: Annotated[int, typer.Option(min=0, help="Steps of each; 0: as the configs say.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the runs and of report.html.")] = Path("runs/compare"),
) -> None:
    """Train architectures on the same text and budget, and show loss, speed and memory side by side."""
    from jaxlm.eval.compare import compare

    given = configs or []
    overrides = [one for one in given if "=" in one]
    _show(compare([one for one in given if "=" not in one], overrides, out=out, steps=steps))
    print(f"{out / 'report.html'}")


@app.command()
def info(
    path: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="A TOML file, a name or a run; none: list the names.")
    ] = None,
    overrides: Overrides = None,
    as_json: JsonFlag = False,
    show_list: Annotated[bool, typer.Option("--list", help="List the named configurations.")] = False,
) -> None:
    """Count the parameters, FLOPs and memory of CONFIG (or of a run) without allocating anything."""
    from jaxlm import config_file
    from jaxlm.models.accounting import account
    from jaxlm.models.catalogue import catalogue

    if path is None or show_list:
        named = catalogue()
        print(json.dumps(dataclasses.asdict(named)["rows"])) if as_json else _show(named)
        return
    cfg = config_file.load(path / "config.toml" if path.is_dir() else path, overrides or ())
    counted = account(_sized(cfg))
    if as_json:
        print(json.dumps({**dataclasses.asdict(counted), "bytes": counted.bytes}))
    else:
        _show(counted)


@app.command()
def plan(
    path: ConfigPath,
    overrides: Overrides = None,
    topology: Annotated[str, typer.Option(help="CHIP:SHAPE, such as v5p:8x8x8, 2*v6e:16x16, h100:512, cpu:8.")] = "",
    slices: Annotated[int, typer.Option(min=1, help="Slices of that shape, joined by the network.")] = 1,
    search: Annotated[bool, typer.Option("--search", help="Try meshes, remat and microbatches; rank them.")] = False,
    show_sharding: Annotated[bool, typer.Option("--show-sharding", help="Show who owns what.")] = False,
    tokens: Annotated[float, typer.Option(min=0, help="Tokens of the run; 0: what train.steps make.")] = 0.0,
    price: Annotated[
        float | None, typer.Option(min=0, help="USD for an hour of one chip; else the list price.")
    ] = None,
    compiling: Annotated[bool, typer.Option("--compile/--no-compile", help="Ask the compiler of the chip.")] = True,
    as_json: JsonFlag = False,
) -> None:
    """Say whether CONFIG fits a machine that is not here, what limits it, what it takes and costs."""
    from jaxlm import config_file
    from jaxlm.plan import topology as topologies

    goal, cfg = topologies.parse(topology, slices), config_file.load(path, overrides or ())
    topologies.prepare_environment(goal)
    from jaxlm.plan.make import plan_all

    options = {"tokens": tokens, "price": price, "compiling": compiling, "name": Path(path).stem}
    for part in plan_all(_sized(cfg), goal, search=search, show_sharding=show_sharding, **options):
        if isinstance(part, str):
            print(end="" if as_json else f"{part}\n")
        else:
            print(json.dumps(part.as_dict())) if as_json else _show(part)


@tokenizer_app.command("train")
def tokenizer_train(path: ConfigPath, out: Path, overrides: Overrides = None) -> None:
    """Train the tokenizer that CONFIG describes and write it to OUT."""
    from jaxlm import config_file
    from jaxlm.data.pipeline import train_tokenizer

    tokenizer = train_tokenizer(config_file.load(path, overrides or ()))
    tokenizer.save(out)
    print(f"{out}: {tokenizer.vocab_size:,} tokens")


@tokenizer_app.command("inspect")
def tokenizer_inspect(
    path: Annotated[Path, typer.Argument(help="A tokenizer.json, or a run.")], text: str = ""
) -> None:
    """Show a tokenizer's size and special tokens, and how it cuts TEXT."""
    from jaxlm.data.tokenizer import inspect

    _show(inspect(path / "tokenizer.json" if path.is_dir() else path, text))


@data_app.command("prepare")
def data_prepare(path: ConfigPath, overrides: Overrides = None) -> None:
    """Tokenise the corpus of CONFIG into shards that runs share."""
    from jaxlm import config_file
    from jaxlm.data.pipeline import prepare

    _show(prepare(config_file.load(path, overrides or ())))


@data_app.command("inspect")
def data_inspect(path: ConfigPath, overrides: Overrides = None) -> None:
    """Show the corpus of CONFIG and the first packed row of it."""
    from jaxlm import config_file
    from jaxlm.data.pipeline import inspect_corpus

    _show(inspect_corpus(config_file.load(path, overrides or ())))


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show:
        print(f"jaxlm {__version__}")
        raise typer.Exit


def main() -> int:
    """Run the command line; returns the exit code."""
    code = _guarded(lambda: app(standalone_mode=True))
    if code and "jaxlm.distributed" in sys.modules:
        sys.modules["jaxlm.distributed"].leave(code)
    return code


def _guarded(command: Callable[[], Any]) -> int:
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        return 141
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 0
    return 0


def _sized(cfg: Any) -> Any:
    """The config with the vocabulary that its tokenizer will have, without reading the corpus."""
    from jaxlm.data.pipeline import train_tokenizer

    if cfg.model.vocab_size:
        return cfg
    size = cfg.tokenizer.vocab_size if cfg.tokenizer.kind == "bpe" else train_tokenizer(cfg).vocab_size
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=size))


def _show(renderable: Any) -> None:
    from rich.console import Console

    Console().print(renderable)


def _write(text: str) -> None:
    with contextlib.suppress(ValueError):
        sys.stdout.write(text)
        sys.stdout.flush()
