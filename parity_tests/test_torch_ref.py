"""torch_ref on its own: an independent judge, and the ways in which PyTorch users run a model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from parity_tests import pairs
from parity_tests.tolerances import AUTOCAST, LLAMA
from torch_ref.models.decoder import Decoder, init_params
from torch_ref.numerics import Policy

ROOT = Path(__file__).parents[1]
FLOAT64_POLICY = Policy(torch.float64, torch.float64)
LLAMA_NAMES = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "mixer_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "mixer": "self_attn",
    "ffn": "mlp",
    "layers": "model.layers",
}


def random_decoder(rng: np.random.Generator, policy: Policy = FLOAT64_POLICY, **options: object) -> Decoder:
    """A decoder of the base model with these options and values of their own everywhere."""
    cfg = pairs.model(**options)
    decoder = Decoder(cfg, policy)
    decoder.load_state_dict(pairs.state_dict(pairs.random_params(cfg, rng), cfg))
    return decoder


def inputs(decoder: Decoder, rng: np.random.Generator, t: int = 100) -> tuple[torch.Tensor, ...]:
    """Tokens, positions and segments of packed rows."""
    arrays = pairs.tensors(pairs.packed_batch(decoder.config, rng, t))
    return arrays["tokens"], arrays["positions"], arrays["segments"]


@pytest.mark.parametrize("tied", [True, False])
def test_llama_of_transformers(tied: bool, rng: np.random.Generator) -> None:
    """Weights under Llama's names give Llama's logits, prompts padded on the left.

    In float32, which transformers keeps inside norms, rotation and softmax even of a float64 model.
    """
    decoder = random_decoder(rng, Policy(), tie_embeddings=tied, norm_eps=1e-6, rope_theta=5e5)
    cfg = decoder.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=cfg.vocab_size,
            hidden_size=cfg.d_model,
            intermediate_size=cfg.d_ff,
            num_hidden_layers=cfg.n_layers,
            num_attention_heads=cfg.n_heads,
            num_key_value_heads=cfg.n_kv_heads,
            head_dim=cfg.head_dim,
            max_position_embeddings=cfg.max_seq_len,
            rms_norm_eps=cfg.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
    )
    renamed = {
        ".".join(LLAMA_NAMES.get(part, part) for part in name.split(".")): value
        for name, value in decoder.state_dict().items()
    }
    if tied:
        renamed["lm_head.weight"] = renamed["model.embed_tokens.weight"]
    llama.load_state_dict(renamed, strict=True)

    t, lengths = 300, torch.tensor([[300], [171]])
    tokens = torch.tensor(rng.integers(0, cfg.vocab_size, (2, t)))
    positions = (torch.arange(t) - (t - lengths)).clamp(min=0)
    mask = (torch.arange(t) >= t - lengths).long()
    with torch.no_grad():
        theirs = llama(tokens, attention_mask=mask, position_ids=positions).logits[mask == 1]
        ours = decoder(tokens, positions, mask)[0][mask == 1]
    LLAMA.check(pairs.error(ours.double().numpy(), theirs.double().numpy()), "logits")


COMPILED = """
import torch
from jaxlm.config import Model
from torch_ref.models.decoder import Decoder, init_cache, init_params
from torch_ref.numerics import Policy
from torch_ref.objectives.lm import lm_loss

cfg = Model(vocab_size=97, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=100)
decoder = init_params(Decoder(cfg, Policy()), seed=0)
segments = 1 + (torch.arange(100) > 40).int().expand(2, 100)
inputs = torch.randint(0, 97, (2, 100)), torch.arange(100).expand(2, 100), segments

def loss(tokens, positions, segments):
    hidden, _ = decoder.hidden(tokens, positions, segments)
    return lm_loss(hidden, *decoder.unembedding(), tokens, (segments > 0).float(), block=64).loss

def gradient(loss):
    decoder.zero_grad()
    loss(*inputs).backward()
    return decoder.embed.weight.grad.clone()

def step(tokens, positions, segments, cache):
    return decoder(tokens, positions, segments, cache)[0]

compiled = [torch.compile(f, fullgraph=True, backend="aot_eager") for f in (loss, step)]
torch.testing.assert_close(gradient(compiled[0]), gradient(loss))
with torch.no_grad():
    a, b = (f(*inputs, init_cache(decoder, 2, 100)) for f in (compiled[1], step))
torch.testing.assert_close(a, b)
"""


def test_the_graph_does_not_break() -> None:
    """`torch.compile` takes the loss with its backward pass, and a step with a cache, as one graph each.

    In a process of its own: the run-time type checks of this suite do not compile.
    """
    done = subprocess.run([sys.executable, "-c", COMPILED], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_recomputation_changes_nothing(remat: str, rng: np.random.Generator) -> None:
    plain = random_decoder(rng, n_layers=2)
    again = Decoder(pairs.model(n_layers=2, remat=remat), FLOAT64_POLICY)
    again.load_state_dict(plain.state_dict())
    arrays = inputs(plain, rng)
    for decoder in (plain, again):
        decoder(*arrays)[0].square().sum().backward()
    for a, b in zip(again.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_autocast(rng: np.random.Generator) -> None:
    """bfloat16 products by autocast: close to bfloat16 where jaxlm casts, with wide logits and gradients."""
    decoder = random_decoder(rng, Policy(), n_layers=2)
    arrays = inputs(decoder, rng)
    expected = decoder(*arrays)[0]
    with torch.autocast("cpu", torch.bfloat16):
        logits = decoder(*arrays)[0]
    assert logits.dtype == torch.float32
    AUTOCAST.check(pairs.error(logits.detach().numpy(), expected.detach().numpy()), "logits")
    logits.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in decoder.parameters())


def test_dropout_acts_in_training_only(rng: np.random.Generator) -> None:
    decoder = random_decoder(rng, dropout=0.5, n_layers=1)
    plain = random_decoder(rng, n_layers=1)
    plain.load_state_dict(decoder.state_dict())
    arrays = inputs(decoder, rng)
    with torch.no_grad():
        torch.manual_seed(0)
        a, b = decoder(*arrays)[0], decoder(*arrays)[0]
        assert not torch.equal(a, b)
        assert torch.equal(decoder.eval()(*arrays)[0], plain(*arrays)[0])


def test_dropout_stands_where_jaxlm_has_it() -> None:
    """After the embedding, after each mixer and after each feed-forward: counted as they are called."""
    decoder = init_params(Decoder(pairs.model(dropout=0.25, n_layers=3), Policy()), seed=0)
    calls: list[torch.nn.Module] = []
    for module in decoder.modules():
        if isinstance(module, torch.nn.Dropout):
            assert module.p == 0.25
            module.register_forward_hook(lambda module, *_: calls.append(module))
    decoder(*(torch.ones(1, 4, dtype=torch.long),) * 3)
    assert len(calls) == 1 + 2 * 3


def test_initial_values() -> None:
    """The distributions of jaxlm: norms one, biases zero, normal weights, output projections smaller by sqrt(2 L)."""
    options = {"d_model": 128, "d_ff": 128, "head_dim": 32, "n_layers": 2, "init_std": 0.05}
    cfg = pairs.model(**options, norm="layernorm", biases=("qkv", "mlp", "head"), tie_embeddings=False)
    decoder = init_params(Decoder(cfg, Policy()), seed=3)
    for name, parameter in decoder.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.05 / 2 if "o_proj" in name or "down_proj" in name else 0.05
            assert abs(parameter.std().item() / std - 1) < 0.05, name
            assert abs(parameter.mean().item()) < 0.05 * std, name
    again = init_params(Decoder(cfg, Policy()), seed=3)
    assert all(torch.equal(a, b) for a, b in zip(decoder.parameters(), again.parameters(), strict=True))
    other = init_params(Decoder(cfg, Policy()), seed=4)
    assert not torch.equal(decoder.embed.weight, other.embed.weight)
