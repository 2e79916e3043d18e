# %% [markdown]
# # My own PyTorch model against jaxlm
#
# You have a Llama written in PyTorch, with names of your own. Is it the same model as jaxlm's? Save its weights under
# the public names, open them with jaxlm, and compare in float64: different mathematics shows there, rounding does not.
# This file is a notebook as text: open it with Jupytext or an editor that knows `# %%`, or run it with Python.

# %%
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

import jaxlm

VOCAB, WIDTH, INNER, LAYERS, HEADS, EPS, THETA = 97, 32, 96, 2, 4, 1e-5, 1e4

# %% [markdown]
# ## My model
#
# RMSNorm, rotary attention, SwiGLU, a head that is the embedding. Nothing of jaxlm is in it.


# %%
def rotate(x: torch.Tensor) -> torch.Tensor:
    """Turn the two halves of each head [B, T, N, H] by the position (Su et al. 2021)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] * THETA ** (-torch.arange(half, dtype=x.dtype) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class MyNorm(nn.Module):
    def __init__(self, eps: float = EPS) -> None:
        super().__init__()
        self.gain, self.eps = nn.Parameter(torch.ones(WIDTH)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.gain


class MyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = MyNorm(), MyNorm()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        h = self.norm_1(x)
        q, k, v = (one(h).view(b, t, HEADS, -1) for one in (self.q, self.k, self.v))
        q, k, v = (one.transpose(1, 2) for one in (rotate(q), rotate(k), v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(b, t, d))
        h = self.norm_2(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class MyLlama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(MyBlock() for _ in range(LAYERS))
        self.norm = MyNorm()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.words.weight.T


torch.manual_seed(0)
mine = MyLlama()

# %% [markdown]
# ## The same weights under public names

# %%
NAMES = {
    "words": "embed_tokens",
    "blocks": "layers",
    "norm_1": "input_layernorm",
    "norm_2": "post_attention_layernorm",
    **{name: f"self_attn.{name}_proj" for name in "qkvo"},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    "gain": "weight",
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": 128,
    "rms_norm_eps": EPS,
    "rope_theta": THETA,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def public(name: str) -> str:
    return "model." + ".".join(NAMES.get(part, part) for part in name.split("."))


folder = Path("runs/my_llama")
folder.mkdir(parents=True, exist_ok=True)
save_file({public(name): x.detach() for name, x in mine.named_parameters()}, folder / "model.safetensors")
(folder / "config.json").write_text(json.dumps(CONFIG))

# %% [markdown]
# ## Compare
#
# Both in float64, on the same ids. Two correct programs differ by rounding alone, 1e-15 or so.

# %%
model = jaxlm.load(folder, dtype="float64")
mine = mine.double()
ids = np.random.default_rng(0).integers(0, VOCAB, (2, 20))


def difference(one: MyLlama) -> float:
    with torch.no_grad():
        theirs = one(torch.tensor(ids)).numpy()
    ours = np.asarray(model(ids))
    return float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours))


print(f"relative difference of the logits: {difference(mine):.1e}")
assert difference(mine) < 1e-12

# %% [markdown]
# ## A difference, and where it begins
#
# Plant a fault: one norm with another epsilon. The logits differ by little, as such faults do. `to_torch` gives jaxlm's
# mirror as a PyTorch module, so the outputs of any two modules can be laid side by side.

# %%
mine.blocks[1].norm_2.eps = 1e-3
print(f"with the fault: {difference(mine):.1e}")
assert difference(mine) > 1e-6


def outputs(root: nn.Module, names: dict[str, str], *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the modules of `names` returned, by their common names."""
    found: dict[str, torch.Tensor] = {}
    hooks = [
        root.get_submodule(name).register_forward_hook(lambda _, __, y, as_=common: found.__setitem__(as_, y))
        for common, name in names.items()
    ]
    with torch.no_grad():
        root(*inputs)
    for hook in hooks:
        hook.remove()
    return found


blocks = range(LAYERS)
MINE = {f"norm {2 * i + j}": f"blocks.{i}.norm_{j + 1}" for i in blocks for j in (0, 1)}
THEIRS = {f"norm {2 * i + j}": f"layers.{i}.{('mixer', 'ffn')[j]}_norm" for i in blocks for j in (0, 1)}
tokens = torch.tensor(ids)
positions = torch.arange(tokens.shape[1]).expand_as(tokens)
a = outputs(mine, MINE, tokens)
b = outputs(model.to_torch(), THEIRS, tokens, positions, torch.ones_like(tokens))
first = next(name for name in MINE if not torch.allclose(a[name], b[name], rtol=1e-10))
print("the first norm that differs:", first)
assert first == "norm 3"

# %% [markdown]
# ## The proof that stays
#
# `jaxlm parity runs/my_llama` compares jaxlm with transformers on these weights: outputs of all modules, loss,
# gradients, optimiser steps, greedy tokens, in three dtypes. From Python it is one call; here, the outputs in float64.

# %%
report = jaxlm.check_parity(folder, levels=("weights", "forward"), dtypes=("float64",))
print(report.verdict)
assert report.same
