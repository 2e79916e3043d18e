"""`jaxlm eval` and `jaxlm compare`: measured models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from jaxlm.cli.arguments import JsonFlag, SandboxName
from jaxlm.cli.show import show
from jaxlm.errors import UserError

commands = typer.Typer()


CODE_TASKS = (
    "humaneval", "mbpp", "humaneval-infilling", "humaneval-sh", "humaneval-fix", "humaneval-explain", "bug-detection",
    "next-line",
)  # fmt: skip
Words = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN TASK...",
        help="A model and tasks: `position` (perplexity against position), or of code: " + ", ".join(CODE_TASKS) + ". "
        "With --from the task alone.",
        show_default=False,
    ),
]


@commands.command("eval")
def evaluate(
    words: Words,
    length: Annotated[int, typer.Option(help="position: tokens of a text; 0: 8 times data.seq_len.")] = 0,
    window: Annotated[int, typer.Option(min=0, help="position: also with this attention window.")] = 0,
    keep_first: Annotated[int, typer.Option(min=0, help="position: and with so many retained first tokens.")] = 4,
    texts: Annotated[int, typer.Option(help="position: texts side by side.")] = 16,
    buckets: Annotated[int, typer.Option(help="position: rows of the table.")] = 16,
    samples_file: Annotated[Path | None, typer.Option("--from", help="code: judge these samples, no model.")] = None,
    samples: Annotated[int, typer.Option(help="code: completions of a problem.")] = 1,
    temperature: Annotated[float, typer.Option(min=0, help="code: 0 is greedy.")] = 0.0,
    k: Annotated[str, typer.Option("--k", help="code: the k of pass@k, such as 1,10.")] = "1",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="code: longest completion, in tokens.")] = 512,
    seed: Annotated[int, typer.Option(help="code: seeds the sampling.")] = 0,
    data: Annotated[Path | None, typer.Option(help="code: file of the set; else under JAXLM_DATA.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="code: only the first so many problems; next-line: lines.")] = 0,
    sandbox: SandboxName = "auto",
    python: Annotated[str, typer.Option(help="code: Python for the boxes.")] = "",
    every: Annotated[bool, typer.Option("--all", help="mbpp: all 974, not only ids 11 to 510.")] = False,
    shots: Annotated[int, typer.Option(min=0, max=3, help="mbpp: solved examples in the prompt.")] = 3,
    part: Annotated[
        str, typer.Option(help="infilling: single-line, multi-line, random-span, random-span-light.")
    ] = "single-line",
    fim: Annotated[str, typer.Option(help="infilling: psm, spm, or prompt (the suffix as a comment).")] = "psm",
    chat: Annotated[bool, typer.Option("--chat", help="code: ask by the chat template; code is in fences.")] = False,
    out: Annotated[Path | None, typer.Option(help="code: where records go; else RUN/eval.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure a trained model; results are kept in RUN/eval. Or judge samples of code by --from."""
    from jaxlm.errors import did_you_mean

    tasks = words if samples_file else words[1:]
    for task in tasks:
        if task not in ("position", *CODE_TASKS):
            raise UserError(f"unknown task {task!r}", did_you_mean(task, ("position", *CODE_TASKS)))
    if not tasks:
        raise UserError("no task is named", f"position, {', '.join(CODE_TASKS)}")
    if code := [task for task in tasks if task != "position"]:
        from jaxlm.cli import code_tasks
        from jaxlm.eval.code.evaluate import CodeOptions
        from jaxlm.eval.code.generation import Generation

        made = {"samples": samples, "temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed}
        chosen = {"data": data, "sandbox": sandbox, "python": python, "every": every, "shots": shots, "part": part}
        options = CodeOptions(ks=code_tasks.numbers(k), chat=chat, out=out, limit=limit, **chosen)
        how = Generation(**made, fim=fim, chat=chat)
        code_tasks.run([*([] if samples_file else words[:1]), *code], samples_file, options, how, as_json)
    if "position" in tasks:
        _position(words[0], as_json, length=length, window=window, keep_first=keep_first, texts=texts, buckets=buckets)


def _position(run: str, as_json: bool, **options: int) -> None:
    from jaxlm.eval.perplexity import position

    report = position(run, **options)
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        show(report)


@commands.command()
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
    show(compare([one for one in given if "=" not in one], overrides, out=out, steps=steps))
    print(f"{out / 'report.html'}")
