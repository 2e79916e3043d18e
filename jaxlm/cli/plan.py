"""`jaxlm info` and `jaxlm plan`: the cost of a model, and of its training on other machines."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

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
    topologies.prepare_environment(goal)
    if decode:
        from jaxlm.plan.decoding import parse, plan_decoding

        decoding = plan_decoding(sized(cfg), goal, parse(decode), Path(path).stem)
        print(json.dumps(decoding.as_dict())) if as_json else show(decoding)
        return
    from jaxlm.plan.overview import plan_all

    parts = []
    for part in plan_all(
        sized(cfg),
        goal,
        search=search,
        show_sharding=show_sharding,
        name=Path(path).stem,
        tokens=tokens,
        price=price,
        compiling=compiling,
    ):
        parts.append(part)
        if isinstance(part, str):
            print(end="" if as_json else f"{part}\n")
        else:
            print(json.dumps(part.as_dict())) if as_json else show(part)
    if page is not None:
        from jaxlm.report.printed_page import write_printed

        write_printed(f"Plan of {Path(path).stem}", parts, page)
