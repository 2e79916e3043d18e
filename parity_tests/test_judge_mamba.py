"""An independent judge: transformers' Mamba, Mamba-2 and Jamba with our weights give our logits and gradients.

Their code casts to float32 in places; `Lifted` makes that float64, so that only different mathematics is left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import JambaConfig, JambaForCausalLM, Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from jaxlm import config
from jaxlm.convert.families import FAMILIES
from jaxlm.convert.rows import to_layout
from jaxlm.parity.sides.float64_mode import Lifted
from parity_tests import pairs
from parity_tests.tolerances import FLOAT64

D, V, T, LAYERS = 32, 97, 70, 2


def mamba() -> tuple[config.Model, Any]:
    """Odd sizes, biases in the projections."""
    options = config.Mamba(d_state=5, expand=3, d_conv=3, dt_rank=7, proj_bias=True)
    hf = MambaConfig(
        vocab_size=V,
        hidden_size=D,
        state_size=5,
        expand=3,
        conv_kernel=3,
        time_step_rank=7,
        use_bias=True,
        num_hidden_layers=LAYERS,
        use_mambapy=False,
    )
    return pairs.model(pattern=("mamba",), n_layers=LAYERS, mamba=options), MambaForCausalLM(hf)


def mamba2() -> tuple[config.Model, Any]:
    """Two groups of heads, chunks that do not divide the length."""
    options = config.Mamba(d_state=5, head_dim=8, n_groups=2)
    hf = Mamba2Config(
        vocab_size=V,
        hidden_size=D,
        state_size=5,
        expand=2,
        num_heads=8,
        head_dim=8,
        n_groups=2,
        num_hidden_layers=LAYERS,
        chunk_size=16,
        tie_word_embeddings=True,
    )
    return pairs.model(pattern=("mamba2",), n_layers=LAYERS, mamba=options), Mamba2ForCausalLM(hf)


def jamba() -> tuple[config.Model, Any]:
    """A Mamba block with its inner norms, then an attention block without positions."""
    options = config.Mamba(d_state=5, inner_norms=True)
    hf = JambaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=40,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        num_experts=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=5,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    ours = pairs.model(
        pattern=("mamba+mlp", "attention+mlp"),
        n_layers=LAYERS,
        mamba=options,
        positions="none",
        norm_eps=1e-6,
        tie_embeddings=False,
    )
    return ours, JambaForCausalLM(hf)


@pytest.mark.parametrize("make", [mamba, mamba2, jamba])
def test_transformers_agrees(make: Callable[[], tuple[config.Model, Any]], rng: np.random.Generator) -> None:
    """Logits of both our frameworks, and the gradient of every parameter, against theirs."""
    cfg, hf = make()
    values = pairs.random_params(cfg, rng)
    pair = pairs.pair(cfg, values)
    hf = hf.double().train()
    rows = FAMILIES[make.__name__].rows(cfg)
    found = {name: torch.tensor(array) for name, array in to_layout(pair.params, cfg, rows)}
    missing, unexpected = hf.load_state_dict(found, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    hf.tie_weights()

    tokens = rng.integers(3, V, (2, T))
    positions, ones = np.tile(np.arange(T, dtype=np.int32), (2, 1)), np.ones((2, T), np.int32)
    with Lifted():
        logits = hf(torch.tensor(tokens), use_cache=False).logits
    assert logits.dtype == torch.float64
    places = tokens.astype(np.int32), positions, ones
    mirror, _ = pair.torch(*map(torch.tensor, places))
    FLOAT64.check(pairs.error(mirror.detach().numpy(), logits.detach().numpy()), "torch_ref")

    dy = rng.standard_normal(logits.shape)
    with Lifted():
        logits.backward(torch.tensor(dy))

    @jax.jit
    def run(params: Any) -> Any:
        out, pull = jax.vjp(lambda p: pair.jax.apply({"params": p}, *map(jnp.asarray, places))[0], params)
        return out, pull(jnp.asarray(dy))[0]

    ours, gradients = run(pair.params)
    FLOAT64.check(pairs.error(np.asarray(ours), logits.detach().numpy()), "jaxlm")
    expected = dict(hf.named_parameters())
    for name, gradient in to_layout(gradients, cfg, rows):
        other = expected[name].grad
        assert other is not None, name
        FLOAT64.check(pairs.error(gradient, other.numpy()), f"gradient of {name}")
