"""`jaxlm convert` and `jaxlm parity`: weights in other layouts, and the proof that they are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from jaxlm.cli.arguments import Backend
from jaxlm.cli.show import read_text
from jaxlm.convert import FAMILY_NAMES, LLAMA2C
from jaxlm.errors import UserError

commands = typer.Typer()


_LAYOUTS = (
    "`jaxlm` (a run), `torch` (torch_ref), `hf` (the first public layout that can hold the model), "
    f"`peft` (the adapters of a run alone), or one by its name: {', '.join((*FAMILY_NAMES, LLAMA2C))}."
)


@commands.command()
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
        from jaxlm.convert.training_state import convert_state
        from jaxlm.recipes import make_recipe

        if to != "jaxlm":
            raise UserError(f"--backend with --to {to}: only a run has an optimiser", "--to jaxlm")
        models_of = lambda cfg: make_recipe(cfg).models  # noqa: E731
        print(convert_state(src, dst, backend.value, models_of, step=step, overwrite=overwrite))
        return
    import jaxlm

    print(jaxlm.convert(src, dst, to, step=step, overwrite=overwrite, tokenizer=tokenizer))


@commands.command()
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
    import jaxlm

    options: dict[str, Any] = {"levels": levels.split(",")} if levels else {}
    options |= {"dtypes": dtypes.split(",")} if dtypes else {}
    options |= {"text": read_text(text)} if text else {}
    if not jaxlm.check_parity(run, other, out=out, show=True, computed_by=computed_by, prompt=prompt, **options).same:
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
