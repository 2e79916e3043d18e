"""`jaxlm tokenizer` and `jaxlm data`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from jaxlm.cli.arguments import ConfigPath, JsonFlag, ModelPath, Overrides
from jaxlm.cli.show import show

commands = typer.Typer()
tokenizer_app = typer.Typer(help="Train a tokenizer, or look at one.", no_args_is_help=True)
data_app = typer.Typer(help="Tokenise a corpus ahead of a run, or look at its rows.", no_args_is_help=True)
commands.add_typer(tokenizer_app, name="tokenizer")
commands.add_typer(data_app, name="data")


@tokenizer_app.command("train")
def tokenizer_train(path: ConfigPath, out: Path, overrides: Overrides = None) -> None:
    """Train the tokenizer that CONFIG describes and write it to OUT."""
    from jaxlm.config import toml
    from jaxlm.data.pipeline import train_tokenizer

    tokenizer = train_tokenizer(toml.load(path, overrides or ()))
    tokenizer.save(out)
    print(f"{out}: {tokenizer.vocab_size:,} tokens")


@tokenizer_app.command("inspect")
def tokenizer_inspect(
    path: Annotated[Path, typer.Argument(help="A tokenizer.json, or a run.")], text: str = ""
) -> None:
    """Show a tokenizer's size and special tokens, and how it cuts TEXT."""
    from jaxlm.text.inspection import inspect

    show(inspect(path / "tokenizer.json" if path.is_dir() else path, text))


@data_app.command("prepare")
def data_prepare(path: ConfigPath, overrides: Overrides = None) -> None:
    """Tokenise the corpus of CONFIG into shards that runs share."""
    from jaxlm.config import toml
    from jaxlm.data.pipeline import prepare

    show(prepare(toml.load(path, overrides or ())))


@data_app.command("inspect")
def data_inspect(
    path: ConfigPath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=0, help="How many rows to show.")] = 1,
    step: Annotated[int, typer.Option(min=1, help="Of which step of the run.")] = 1,
    as_json: JsonFlag = False,
) -> None:
    """Show the corpus of CONFIG, the shares of its mixture, and the rows of any step of the run.

    Of a stage of conversations or pairs: how many there are, what of them is trained, token by token, and the padding.
    Of reinforcement learning: the prompts of the step with their ids and answers, and the sizes of both parts.
    """
    from jaxlm.config import toml
    from jaxlm.recipes.start import inspect_data

    report = inspect_data(toml.load(path, overrides or ()), step=step, rows=rows)
    if as_json:
        for row in report.rows:
            print(json.dumps(row.as_dict()))
    else:
        show(report)


@data_app.command("score")
def data_score(
    path: ConfigPath,
    run: ModelPath,
    out: Annotated[Path, typer.Argument(metavar="OUT.npy", help="The file to write.")],
    overrides: Overrides = None,
) -> None:
    """Write the loss of each training document of CONFIG under the model RUN, for `data.curriculum.scores`."""
    from jaxlm.config import toml
    from jaxlm.eval.difficulty import score

    scores = score(toml.load(path, overrides or ()), run, out)
    print(f"{out}: {len(scores):,} documents, mean loss {scores.mean():.4f} nats/token")


@data_app.command("teach")
def data_teach(path: ConfigPath, overrides: Overrides = None) -> None:
    """Write what the teacher of CONFIG thinks of each token of the run into `distill.cache`, or go on with it."""
    from jaxlm.config import toml
    from jaxlm.recipes.teach import teach

    cfg = toml.load(path, overrides or ())
    rows = teach(cfg)
    print(f"{cfg.distill.cache}: {', '.join(f'{count:,} rows of {name}' for name, count in rows.items())}")
