"""`jaxlm info` and `jaxlm plan`: the cost of a model, and of its training on other machines."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxlm.cli.arguments import ConfigPath, JsonFlag, Overrides
from jaxlm.cli.show import show, sized
from jaxlm.errors import UserError

commands = typer.Typer()


@commands.command()
def info(
    path: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="A TOML file, a name or a run; none: list the names.")
    ] = None,
    overrides: Overrides = None,
    as_json: JsonFlag = False,
    show_list: Annotated[bool, typer.Option("--list", help="List the named configurations.")] = False,
) -> None:
    """Count the parameters, FLOPs and memory of CONFIG (or of a run) without allocating anything."""
    from jaxlm.config import toml
    from jaxlm.counts.catalogue import catalogue
    from jaxlm.counts.parameters import account

    if path is None or show_list:
        named = catalogue()
        print(json.dumps(dataclasses.asdict(named)["rows"])) if as_json else show(named)
        return
    cfg = toml.load(path / "config.toml" if path.is_dir() else path, overrides or ())
    counted = account(sized(cfg))
    if as_json:
        print(json.dumps({**dataclasses.asdict(counted), "bytes": counted.bytes}))
    else:
        show(counted)


@commands.command()
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
    page: Annotated[Path | None, typer.Option(help="Write what is printed to this HTML file too.")] = None,
    decode: Annotated[str, typer.Option(help="Plan an engine in place of training: rows=64,context=8192.")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Say whether CONFIG fits a machine that is not here, what limits it, what it takes and costs."""
    from jaxlm.config import toml
    from jaxlm.plan import topology as topologies

    of_training = search, show_sharding, tokens, price is not None, not compiling, page is not None
    if decode and any(of_training):
        raise UserError("--decode plans an engine and takes none of the options of training, nor --page")

    goal, cfg = topologies.parse(topology, slices), toml.load(path, overrides or ())
    name, parts = Path(path).stem, []
    with topologies.environment(goal):
        if decode:
            from jaxlm.plan.decoding import parse, plan_decoding

            _print(plan_decoding(sized(cfg), goal, parse(decode), name), as_json)
            return
        from jaxlm.plan.overview import plan_all
        from jaxlm.plan.plan_one import make

        make_plan = functools.partial(make, name=name, tokens=tokens, price=price, compiling=compiling)
        for part in plan_all(sized(cfg), goal, make_plan, search=search, show_sharding=show_sharding):
            parts.append(part)
            _print(part, as_json)
    if page is not None:
        from jaxlm.report.printed_page import write_printed

        write_printed(f"Plan of {name}", parts, page)


def _print(part: Any, as_json: bool) -> None:
    """A table, or a line of text, which JSON leaves out."""
    if isinstance(part, str):
        print(end="" if as_json else f"{part}\n")
    else:
        print(json.dumps(part.as_dict())) if as_json else show(part)
