"""Plans of engines: bytes against an engine that is there, traffic against a count by hand, what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

import jax
import pytest

from jaxlm import cli, config
from jaxlm.errors import UserError
from jaxlm.infer.engine.on_jax.runner import JaxRunner
from jaxlm.mesh import Layout
from jaxlm.models.decoder import Decoder, init_params
from jaxlm.numerics import Policy
from jaxlm.plan.decoding import Decoding, Load, parse, plan_decoding
from jaxlm.plan.topology import parse as topology

eight = pytest.mark.skipif(jax.device_count() != 8, reason="needs the 8 virtual devices of conftest.py")
ROWS, CONTEXT = 3, 512


def settings(pattern: tuple[str, ...], **mesh: int) -> config.Config:
    sizes: Any = {"vocab_size": 256, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "d_ff": 128, "max_seq_len": CONTEXT}
    parts: Any = {"mamba": config.Mamba(head_dim=16, d_state=8), "moe": config.MoE(n_experts=4, d_ff=32)}
    model = config.Model(pattern=pattern, n_layers=len(pattern), **sizes, **parts)
    split: Any = {"data": 1, **mesh}
    return config.Config(model=model, mesh=config.Mesh(**split))


def planned(cfg: config.Config, devices: int, rows: int = ROWS) -> Decoding:
    return plan_decoding(cfg, topology(f"cpu:{devices}"), Load(rows, 0), "tiny")


@eight
@pytest.mark.parametrize("mesh", [{"fsdp": 2, "tensor": 2}, pytest.param({}, marks=pytest.mark.soak)], ids=str)
def test_bytes_are_those_of_the_engine(mesh: dict[str, int]) -> None:
    cfg = settings(("attention+mlp", "attention(window=32)+moe", "mamba", "mamba2"), **mesh)
    count = 1
    for size in mesh.values():
        count *= size
    decoder = Decoder(cfg.model, Policy.from_config(cfg.numerics))
    layout = Layout.from_config(cfg.mesh, jax.devices()[:count])
    runner = JaxRunner(decoder, init_params(decoder, jax.random.key(0)), rows=ROWS, slots=CONTEXT, layout=layout)

    def held(tree: Any) -> int:
        first = jax.devices()[0]
        shards = (shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)
        return sum(shard.data.nbytes for shard in shards if shard.device == first)

    plan = planned(cfg, count)
    assert plan.weights == held(runner.params)
    assert plan.cache == held(runner.state.cache)
    assert plan.bytes - plan.copied == held(runner.params) + held(runner.state)
    assert (plan.copied > 0) == (count == 1), "maps of a mesh stay apart"


def test_what_a_step_reads() -> None:
    """All matrices once, the embedding never; keys and values of every token; of experts those that are needed."""
    cfg, d = settings(("attention+mlp",)), 64
    tied = planned(cfg, 1)
    plan = planned(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, tie_embeddings=False)), 1)
    kernels = 2 * d * 64 + 2 * d * 32 + 3 * d * 128 + 256 * d
    assert plan.copied == 4 * (d * 64 + 2 * d * 32 + 2 * d * 128), "queries, keys and values; gate and up"
    norms = 3 * d
    assert plan.weights_read == 4 * (kernels + norms) and plan.weights == 4 * (kernels + norms + 256 * d)
    assert plan.cache_read == pytest.approx(4 * ROWS * CONTEXT * 2 * 2 * 16, rel=1e-4)
    assert plan.tokens_per_second == pytest.approx(ROWS * 10e9 / (plan.weights_read + plan.cache_read))
    assert tied.weights_read == tied.weights == plan.weights_read

    moe = settings(("attention+moe",))
    experts = 4 * 4 * 3 * d * 32
    few, many = planned(moe, 1, 1).weights_read, planned(moe, 1, 64).weights_read
    assert many - few == pytest.approx(experts / 2, rel=1e-3)  # 2 of 4 for one row, all for 64


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    args = ["plan", "dense-113m", "--topology", "h100:1", "--decode", "rows=64,context=2048"]
    monkeypatch.setattr("sys.argv", ["jaxlm", *args, "--json"])
    before = dict(os.environ)
    assert cli.main() == 0
    assert dict(os.environ) == before, "what the compiler needs is there while it is asked"
    assert json.loads(capsys.readouterr().out)["rows"] == 64
    monkeypatch.setattr("sys.argv", ["jaxlm", *args])
    assert cli.main() == 0
    assert "tokens a second, bound by" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "more",
    [("--search",), ("--show-sharding",), ("--no-compile",), ("--tokens", "5"), ("--price", "0"), ("--page", "x.html")],
    ids=" ".join,
)
def test_options_that_are_not_of_an_engine(
    more: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["plan", "dense-113m", "--topology", "h100:1", "--decode", "rows=64,context=2048", *more]
    monkeypatch.setattr("sys.argv", ["jaxlm", *args])
    assert cli.main() == 2
    assert "takes none of the options of training, nor --page" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["rows", "rows=0", "rows=x", "context=5", "rows=2,length=5"])
def test_mistakes(text: str) -> None:
    with pytest.raises(UserError, match="rows"):
        parse(text)


def test_a_mesh_that_does_not_divide() -> None:
    with pytest.raises(UserError, match="kv_heads of 2 does not divide over tensor = 4"):
        planned(settings(("attention+mlp",), tensor=4), 4)
