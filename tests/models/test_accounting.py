"""Counts of parameters, FLOP and bytes: against the program that runs, and against paper."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxlm import config
from jaxlm.config import toml
from jaxlm.counts import flops
from jaxlm.counts.parameters import account, matmul_params
from jaxlm.models.decoder import Decoder, abstract_params

TINY = config.Model(vocab_size=40, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24, max_seq_len=64)


def run(model: config.Model, **data: int) -> config.Config:
    return config.Config(model=model, data=config.Data(**{"seq_len": 64, **data}))


def dot_flops(jaxpr) -> int:
    """FLOP of the matrix products of a program, inner programs and every turn of a scan included."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = 1
            for axis in contracted:
                inner *= equation.invars[0].aval.shape[axis]
            total += 2 * inner * equation.outvars[0].aval.size
        turns = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            if isinstance(value, jax.extend.core.ClosedJaxpr):
                total += turns * dot_flops(value.jaxpr)
            elif isinstance(value, jax.extend.core.Jaxpr):
                total += turns * dot_flops(value)
    return total


def traced(model: config.Model, tokens: int) -> tuple:
    """The decoder's forward pass over one row, traced."""
    decoder = Decoder(dataclasses.replace(model, attention_impl="xla"))
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    forward = jax.jit(lambda params, *inputs: decoder.apply({"params": params}, *inputs)[0])
    return forward, (abstract_params(decoder)[0], ids, ids, ids)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "gelu", "tie_embeddings": False, "biases": ("qkv", "mlp", "head")},
        {"positions": "learned", "norm": "layernorm", "norm_position": "post", "n_kv_heads": 1, "head_dim": 6},
        {"n_layers": 12, "pattern": ("attention+mlp", "attention(n_heads=2, head_dim=8)+mlp(d_ff=48)")},
    ],
)
def test_products_are_those_of_the_program(options):
    """Every matrix product of the forward pass, exactly; the program multiplies masked scores too, so twice as many."""
    model = dataclasses.replace(TINY, **options)
    forward, arguments = traced(model, 64)
    counted = 2 * matmul_params(Decoder(model)) + 2 * flops.mixing_flops(model, 64)
    assert dot_flops(jax.make_jaxpr(forward)(*arguments).jaxpr) == 64 * counted


def test_flops_are_those_of_xla():
    """XLA's own analysis of the compiled program counts the norms, activations and softmax besides: 1 % here."""
    model = dataclasses.replace(TINY, vocab_size=2048, d_model=256, head_dim=64, d_ff=1024, layer_loop="unroll")
    forward, arguments = traced(model, 64)
    counted = 2 * matmul_params(Decoder(model)) + 2 * flops.mixing_flops(model, 64)
    measured = forward.lower(*arguments).compile().cost_analysis()["flops"]
    assert 1 <= measured / (64 * counted) < 1.02


def test_flops_of_attention():
    """4 N H for each key seen: half the text, or the window and the first tokens, and the sink tokens."""
    model = dataclasses.replace(TINY, n_layers=1)
    for options, keys in [
        ({}, 32),
        ({"window": 16}, 16 * (1 - 16 / 128)),
        ({"window": 99}, 32),
        ({"window": 16, "keep_first": 4}, 20 * (1 - 20 / 128)),
        ({"sink_tokens": 3}, 35),
    ]:
        assert flops.mixing_flops(dataclasses.replace(model, **options), 64) == 4 * 4 * 4 * keys
    assert flops.flops_per_token(model, 1000, 64) == 6 * 1000 + 3 * 4 * 16 * 32


def test_flops_of_state_space_mixers():
    """Mamba's do not depend on the length; Mamba-2's only below one chunk. Worked out on paper for 32 channels."""
    mamba = config.Model(pattern=("mamba",), d_model=16, n_layers=1)
    assert flops.mixing_flops(mamba, 64) == flops.mixing_flops(mamba, 10**6) == 32 * (2 * 4 + 7 * 16 + 4)
    options = config.Mamba(d_state=8, head_dim=16, n_groups=2, chunk=16)
    mamba2 = dataclasses.replace(mamba, pattern=("mamba2",), mamba=options)
    conv, scores, values, states = 2 * 4 * (32 + 2 * 2 * 8), 2 * 16 * 8 * 2, 32 * 2 * 16, 32 * (4 * 8 + 2 * 8 // 16 + 4)
    assert flops.mixing_flops(mamba2, 64) == flops.mixing_flops(mamba2, 10**6) == conv + scores + values + states


def test_products_of_experts_are_those_of_the_program():
    """With all experts chosen, those of the naive dispatch, which computes every expert, and its weighted sum."""
    moe = config.MoE(n_experts=4, top_k=4, d_ff=20, n_shared=1, impl="naive")
    model = dataclasses.replace(TINY, pattern=("attention+moe",), moe=moe)
    forward, arguments = traced(model, 64)
    counted = 2 * matmul_params(Decoder(model)) + 2 * flops.mixing_flops(model, 64)
    measured = dot_flops(jax.make_jaxpr(forward)(*arguments).jaxpr) / 64
    assert counted <= measured <= counted + 2 * 2 * 4 * 16  # the sum may be a product of its own


def test_a_token_meets_the_experts_that_it_passes():
    def counts(top_k: int) -> tuple[int, int, int]:
        moe = config.MoE(n_experts=4, top_k=top_k, d_ff=20, n_shared=1)
        counted = account(run(dataclasses.replace(TINY, pattern=("attention+moe", "attention+mlp"), moe=moe)))
        return counted.total, counted.active, counted.matmul

    expert = 3 * 16 * 20
    dense = account(run(TINY)).total - 3 * 16 * 24
    for top_k in (1, 3):
        assert counts(top_k)[:2] == (dense + 5 * expert + 4 * 16, dense + (1 + top_k) * expert + 4 * 16)
    assert counts(3)[2] - counts(1)[2] == 2 * expert


def test_caches_that_do_not_grow():
    """A window of 16 has 16 slots of keys, values and positions; Mamba its convolution and state."""
    a_token = account(run(TINY)).cache_bytes_per_token
    window = account(run(dataclasses.replace(TINY, window=16)))
    assert (window.cache_bytes_per_token, window.cache_bytes_fixed) == (0, 16 * a_token)
    mamba = account(run(dataclasses.replace(TINY, pattern=("mamba", "attention+mlp"))))
    assert mamba.cache_bytes_per_token == a_token / 2
    assert mamba.cache_bytes_fixed == 32 * (3 + 16) * 4


def test_parameters():
    untied = dataclasses.replace(TINY, tie_embeddings=False, positions="learned")
    counted = account(run(untied))
    tables = 40 * 16 + 64 * 16
    blocks = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24)
    assert (counted.embedding, counted.matmul) == (tables, blocks + 40 * 16)
    assert counted.total == counted.active == tables + blocks + 40 * 16 + 5 * 16
    assert account(run(TINY)).total == counted.total - 64 * 16 - 40 * 16


def test_bytes():
    """Keys, values and positions of a cached token; optimiser state is two moments; a mesh of four takes a quarter."""
    one = account(run(TINY))
    assert one.cache_bytes_per_token == 2 * (2 * 2 * 4 * 4 + 4) and one.cache_bytes_fixed == 0
    assert one.parameter_bytes == one.gradient_bytes == one.optimizer_bytes / 2 == 4 * one.total
    assert one.bytes == 4 * one.parameter_bytes + one.activation_bytes
    four = account(dataclasses.replace(run(TINY), mesh=config.Mesh(fsdp=4)))
    assert four.devices == 4 and four.parameter_bytes == one.parameter_bytes / 4
    whole, remat = (account(run(dataclasses.replace(TINY, n_layers=12, remat=name))) for name in ("none", "full"))
    assert remat.activation_bytes < whole.activation_bytes / 3


@pytest.mark.parametrize("pattern", [("attention+mlp",), ("attention+moe",), ("mamba",), ("mamba2", "attention+mlp")])
def test_an_estimate_of_activations_is_near_xlas(pattern):
    """What XLA allots to a training step besides its arguments lies within a factor of two of the estimate."""
    options = {"vocab_size": 256, "d_model": 64, "head_dim": 16, "d_ff": 192, "layer_loop": "unroll"}
    model = dataclasses.replace(TINY, **options, pattern=pattern, mamba=config.Mamba(head_dim=32))
    cfg = dataclasses.replace(run(model), train=config.Train(batch_size=16))
    decoder = Decoder(model)
    ids = jax.ShapeDtypeStruct((16, 64), jnp.int32)

    def loss(params, *inputs):
        return jnp.square(decoder.apply({"params": params}, *inputs, method="hidden")[0]).sum()

    step = jax.jit(jax.grad(loss)).lower(abstract_params(decoder)[0], ids, ids, ids).compile()
    estimate = account(cfg).activation_bytes - 2 * 4 * 1024 * 256
    assert 0.5 < step.memory_analysis().temp_size_in_bytes / estimate < 2


def test_info_prints_json(tmp_path, capsys):
    from jaxlm.cli import plan

    path = Path(tmp_path / "tiny.toml")
    path.write_text(toml.to_toml(run(TINY)))
    plan.info(path, as_json=True)
    assert json.loads(capsys.readouterr().out)["total"] == account(run(TINY)).total
