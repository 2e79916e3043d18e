"""Adapters and four-bit kernels: outputs and gradients in both frameworks, bits of bitsandbytes, files of PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from jaxlm import config
from jaxlm.convert import adapters as files
from jaxlm.convert.families import FAMILIES
from jaxlm.convert.files.storage import planned, write_folder
from jaxlm.convert.native import to_torch
from jaxlm.convert.rows import to_layout
from jaxlm.errors import UserError
from jaxlm.models import adapted, four_bits, lora
from jaxlm.models.decoder import Decoder, init_params
from jaxlm.numerics import Policy as JaxPolicy
from jaxlm.ops import quantized as jax_quantized
from jaxlm.parity.sides.float64_mode import Lifted
from parity_tests import pairs
from parity_tests.tolerances import FLOAT64
from torch_ref.models import attach_lora as torch_lora
from torch_ref.models import decoder as torch_decoder
from torch_ref.numerics import Policy as TorchPolicy
from torch_ref.ops import quantized as torch_quantized

MODELS: dict[str, dict[str, Any]] = {
    "dense": {"d_model": 64, "d_ff": 64},
    "unrolled": {"layer_loop": "unroll", "biases": ("qkv", "attention_out", "mlp")},
    "experts": {"pattern": ("attention+moe",), "moe": {"n_experts": 4, "n_shared": 1}},
    "hybrid": {"pattern": ("mamba+mlp", "attention+mlp"), "n_layers": 4},
}
KINDS = {
    "lora": config.LoRA(rank=3, alpha=5.0),
    "rslora": config.LoRA(rank=4, alpha=5.0, rslora=True),
    "dora": config.LoRA(rank=2, alpha=5.0, dora=True),
    "patterns": config.LoRA(rank=2, rank_pattern={"o_proj": 5}, alpha_pattern={"*": 3.0}, targets=("mixer.*",)),
}


@pytest.fixture(autouse=True)
def wide() -> Any:
    with jax.enable_x64(True):
        yield


class Adapted:
    """A decoder with adapters that are not zero, in both frameworks."""

    def __init__(self, options: dict[str, Any], kind: config.LoRA, four: str = "") -> None:
        self.config = pairs.model(**options)
        self.decoder = Decoder(self.config, JaxPolicy(jnp.dtype("float64"), jnp.dtype("float64")))
        self.params = init_params(self.decoder, jax.random.key(0))
        self.sites = lora.sites(self.decoder)
        self.targets = lora.chosen(self.sites, kind)
        tree = lora.init(self.targets, kind, 0, np.float64, self.params)
        random = np.random.default_rng(1)
        self.adapters = jax.tree.map(lambda leaf: leaf + 0.1 * random.standard_normal(leaf.shape), tree)
        self.scales = lora.scales(self.targets, kind, np.float64)
        self.frozen: Any = {"params": self.params, "adapter_scale": self.scales}
        self.torch = torch_decoder.Decoder(self.config, TorchPolicy(torch.float64, torch.float64))
        self.torch.load_state_dict({n: torch.tensor(x) for n, x in to_torch(self.params, self.config)}, strict=True)
        self.trained = torch_lora.attach(self.torch, kind)
        tensors = dict(files.to_torch(self.adapters, self.targets, self.config))
        torch_lora.load(self.torch, {name: torch.tensor(np.array(x)) for name, x in tensors.items()})
        if four:
            rest, packs = four_bits.split(self.params, self.sites, double=four == "double")
            self.frozen |= {"params": rest, "nf4": packs}
            torch_lora.quantize(self.torch, double=four == "double")
        ids = random.integers(0, self.config.vocab_size, (2, 24)).astype(np.int32)
        segments = np.array([[1] * 10 + [2] * 14, [1] * 20 + [0] * 4], np.int32)
        positions = np.array([[*range(10), *range(14)], [*range(20), *([0] * 4)]], np.int32)
        self.rows = ids, positions, segments
        self.mix = random.standard_normal((2, 24, self.config.vocab_size))

    def ours(self, adapters: Any = None) -> Any:
        variables = {**self.frozen, "adapters": self.adapters if adapters is None else adapters}
        logits: Any = self.decoder.apply(variables, *map(jnp.asarray, self.rows))
        return logits[0]

    def theirs(self) -> torch.Tensor:
        return self.torch(*(torch.tensor(x) for x in self.rows))[0]


QUICK = {("dense", kind) for kind in KINDS} | {("unrolled", "dora"), ("experts", "dora"), ("hybrid", "rslora")}
CASES = [
    pytest.param(m, k, "", marks=() if (m, k) in QUICK else pytest.mark.soak, id=f"{m}-{k}")
    for m in MODELS
    for k in KINDS
    if (m, k) != ("hybrid", "patterns")  # a Mamba has no o_proj
]
CASES += [("dense", "lora", "nf4"), ("dense", "dora", "double")]


@pytest.mark.parametrize(("model", "kind", "four"), CASES)
def test_outputs_and_gradients(model: str, kind: str, four: str) -> None:
    """Of every adapter, on packed rows with padding."""
    pair = Adapted(MODELS[model], KINDS[kind], four)

    def loss(adapters: Any) -> tuple[Any, Any]:
        logits = pair.ours(adapters)
        return jnp.sum(logits * pair.mix), logits

    (_, ours), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(pair.adapters)
    theirs = pair.theirs()
    FLOAT64.check(pairs.error(theirs.detach().numpy(), np.asarray(ours)), "logits")
    (theirs * torch.tensor(pair.mix)).sum().backward()
    wanted = dict(files.to_torch(grads, pair.targets, pair.config))
    assert wanted.keys() == pair.trained.keys()
    for name, parameter in pair.trained.items():
        FLOAT64.check(pairs.error(parameter.grad.numpy(), wanted[name]), name)
    assert all(p.grad is None for n, p in pair.torch.named_parameters() if n not in pair.trained)
    back = files.from_torch(wanted, pair.targets, pair.config)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), back, jax.tree.map(np.asarray, grads)))


@pytest.mark.parametrize("fault", ["scale r for sqrt r", "a and b swapped", "alpha of another adapter"])
def test_a_planted_fault_is_seen(fault: str) -> None:
    pair = Adapted({"d_model": 32, "d_ff": 32, "n_heads": 4, "n_kv_heads": 4}, KINDS["rslora"])
    for part in torch_lora.sites(pair.torch).values():
        adapter: Any = part.adapter
        if fault == "scale r for sqrt r":
            adapter.scale = 5.0 / 4
        elif fault == "a and b swapped":
            adapter.a, adapter.b = (torch.nn.Parameter(x.T.contiguous()) for x in (adapter.b, adapter.a))
        else:
            adapter.scale *= 1 + 1e-6
    with pytest.raises(AssertionError, match="exceeds"):
        FLOAT64.check(pairs.error(pair.theirs().detach().numpy(), np.asarray(pair.ours())), "logits")


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_merged_is_unmerged(kind: str) -> None:
    pair = Adapted(MODELS["experts"], KINDS[kind])
    merged = lora.merged(pair.params, pair.adapters, pair.scales, pair.targets)
    whole: Any = pair.decoder.apply({"params": merged}, *map(jnp.asarray, pair.rows))
    assert pairs.error(np.asarray(whole[0]), np.asarray(pair.ours())) < 1e-12
    before = pair.theirs().detach().numpy()
    torch_lora.merge(pair.torch)
    assert pairs.error(pair.theirs().detach().numpy(), before) < 1e-12


def test_the_first_forward_pass_is_the_base_bit_for_bit() -> None:
    pair = Adapted(MODELS["dense"], KINDS["lora"])
    fresh = lora.init(pair.targets, KINDS["lora"], 0, np.float64)
    base: Any = pair.decoder.apply({"params": pair.params}, *map(jnp.asarray, pair.rows))
    assert np.array_equal(np.asarray(base[0]), np.asarray(pair.ours(fresh)))


def test_first_values_do_not_depend_on_the_layer_loop() -> None:
    kind = KINDS["lora"]
    made = []
    for loop in ("scan", "unroll"):
        targets = lora.chosen(lora.sites(Decoder(pairs.model(layer_loop=loop))), kind)
        made.append(dict(files.to_torch(lora.init(targets, kind, 3, np.float64), targets, pairs.model())))
    assert made[0].keys() == made[1].keys() and all(np.array_equal(made[0][n], made[1][n]) for n in made[0])


def weights() -> np.ndarray:
    """Rows of different scale, one with a block of zeros, one of the levels and their midpoints."""
    random = np.random.default_rng(0)
    weight = (random.standard_normal((96, 320)) * random.uniform(0.01, 1, (96, 1))).astype(np.float32)
    levels = jax_quantized.LEVELS
    weight[0, :64] = 0
    weight[1, :64] = np.tile(levels, 4)
    weight[2, :64] = np.resize([1, *(levels[:-1] + levels[1:]) / 2], 64)
    return weight


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_four_bits_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = weights()
    stored = jax_quantized.quantize(jnp.asarray(weight))
    codes, state = functional.quantize_4bit(torch.tensor(weight), quant_type="nf4", blocksize=64)
    assert np.array_equal(np.asarray(stored.codes).reshape(-1), codes.numpy().reshape(-1))
    assert np.array_equal(np.asarray(stored.scales).reshape(-1), state.absmax.numpy())
    assert np.array_equal(
        np.asarray(jax.jit(jax_quantized.dequantize)(stored)), functional.dequantize_4bit(codes, state)
    )
    codes, state = functional.quantize_4bit(
        torch.tensor(weight), quant_type="nf4", blocksize=64, compress_statistics=True
    )
    # torch's float32 mean depends on the width of the machine's vectors; ours may differ by its last bit.
    mean = jax_quantized.quantize_scales(stored.scales).offset
    assert abs(float(mean) - float(state.offset)) <= np.spacing(np.float32(mean))
    eight = jax_quantized.quantize_scales(stored.scales, float(state.offset))
    assert np.array_equal(np.asarray(eight.codes).reshape(-1), state.absmax.numpy())
    assert np.array_equal(np.asarray(eight.scales), state.state2.absmax.numpy())

    def from_eight(eight: Any) -> Any:
        return jax_quantized.dequantize(jax_quantized.NF4(stored.codes, jax_quantized.dequantize_scales(eight)))

    assert np.array_equal(np.asarray(jax.jit(from_eight)(eight)), functional.dequantize_4bit(codes, state).numpy())


def test_four_bits_are_the_same_in_both_frameworks() -> None:
    weight = weights()
    ours, theirs = jax_quantized.quantize(jnp.asarray(weight)), torch_quantized.quantize(torch.tensor(weight))
    eight, torch_eight = (q.quantize_scales(s.scales) for q, s in ((jax_quantized, ours), (torch_quantized, theirs)))
    made = (*ours, *eight, jax_quantized.dequantize(ours), jax.jit(jax_quantized.dequantize_scales)(eight))
    wanted = (*theirs, *torch_eight, torch_quantized.dequantize(theirs), torch_quantized.dequantize_scales(torch_eight))
    for a, b in zip(made, wanted, strict=True):
        assert np.array_equal(np.asarray(a), b.numpy())


PEFT_MODELS: dict[str, dict[str, Any]] = {
    "llama": {"rope_layout": "interleaved"},
    "qwen2": {"biases": ("qkv",)},
    "gpt2": {
        "positions": "learned",
        "norm": "layernorm",
        "activation": "gelu_tanh",
        "n_kv_heads": 4,
        "norm_eps": 1e-5,
        "biases": ("qkv", "attention_out", "mlp"),
        "tie_embeddings": True,
        "d_ff": 128,
        "max_seq_len": 64,
    },
    "mixtral": {"pattern": ("attention+moe",), "moe": {"n_experts": 4}},
}


PEFT_QUICK = {("llama", "dora"), ("llama", "patterns"), ("qwen2", "rslora"), ("gpt2", "dora"), ("mixtral", "lora")}


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        pytest.param(family, kind, marks=() if (family, kind) in PEFT_QUICK else pytest.mark.soak)
        for family in PEFT_MODELS
        for kind in KINDS
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_peft_computes_the_same(family: str, kind: str, tmp_path: Path) -> None:
    """Our files in PEFT over transformers, logits in float64; and back."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    options = KINDS[kind]
    if family == "mixtral":
        options = config.LoRA(rank=3, rslora=kind == "rslora", dora=kind == "dora", targets=("mixer.*",))
    if family == "gpt2" and kind == "patterns":  # queries, keys and values are one matrix there, with one scale
        ranks, alphas = {"k_proj": 3}, {"k_proj": 24.0}
        options = config.LoRA(rank=2, alpha=16.0, rank_pattern=ranks, alpha_pattern=alphas, targets=("mixer.*",))
    pair = Adapted(PEFT_MODELS[family], options)
    made = FAMILIES[family]
    base = tmp_path / "base"
    hf = made.config_to_hf(pair.config, dtype="float64")
    tensors = planned(
        (name, np.ascontiguousarray(x)) for name, x in to_layout(pair.params, pair.config, made.rows(pair.config))
    )
    write_folder(base, tensors, {"config.json": json.dumps(hf)}, layout=family)
    stored, stated = files.to_peft(pair.adapters, pair.targets, options, pair.config, made)
    folder = tmp_path / "peft"
    folder.mkdir()
    save_file(
        {n: np.ascontiguousarray(x) for n, x in stored.items()}, folder / files.WEIGHTS, metadata={"format": "pt"}
    )
    (folder / files.CONFIG).write_text(json.dumps(stated))
    pair.rows = pair.rows[0][:, :20], np.tile(np.arange(20, dtype=np.int32), (2, 1)), np.ones((2, 20), np.int32)
    with Lifted(), torch.no_grad():
        eager: Any = {"attn_implementation": "eager", "experts_implementation": "eager"}
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64, **eager)
        model = peft.PeftModel.from_pretrained(model, folder).eval()
        theirs = model(torch.tensor(pair.rows[0], dtype=torch.long)).logits.numpy()
    FLOAT64.check(pairs.error(theirs, np.asarray(pair.ours())), f"{family} {kind}")
    if family == "gpt2":
        with pytest.raises(UserError, match="one adapter of several linear maps"):
            files.read_peft(folder, pair.config, pair.sites)
        return
    tree, again = files.read_peft(folder, pair.config, pair.sites)
    assert jax.tree.all(jax.tree.map(np.array_equal, tree, pair.adapters))
    targets = lora.chosen(pair.sites, again)
    assert jax.tree.all(jax.tree.map(np.allclose, lora.scales(targets, again, np.float64), pair.scales))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_peft_trains_whole_modules_too(tied: bool, tmp_path: Path) -> None:
    """`modules_to_save`: embedding, norm and head of our files in PEFT over transformers, and back; a fault is seen."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    pair = Adapted({"rope_layout": "interleaved", "tie_embeddings": tied}, config.LoRA(rank=3))
    options = config.LoRA(rank=3, modules_to_save=("embed", "final_norm") if tied else ("embed", "final_norm", "head"))
    random = np.random.default_rng(2)
    move = lambda leaf: np.asarray(leaf) + 0.1 * random.standard_normal(leaf.shape)  # noqa: E731
    saved = {name: jax.tree.map(move, pair.params[name]) for name in options.modules_to_save}
    base = tmp_path / "base"
    made, tree = FAMILIES["llama"], pair.adapters | saved
    hf = made.config_to_hf(pair.config, dtype="float64")
    tensors = planned(
        (name, np.ascontiguousarray(x)) for name, x in to_layout(pair.params, pair.config, made.rows(pair.config))
    )
    write_folder(base, tensors, {"config.json": json.dumps(hf)}, layout="llama")
    stored, stated = files.to_peft(tree, pair.targets, options, pair.config, made)
    folder = tmp_path / "peft"
    folder.mkdir()
    save_file(
        {n: np.ascontiguousarray(x) for n, x in stored.items()}, folder / files.WEIGHTS, metadata={"format": "pt"}
    )
    (folder / files.CONFIG).write_text(json.dumps(stated))
    pair.rows = pair.rows[0][:, :20], np.tile(np.arange(20, dtype=np.int32), (2, 1)), np.ones((2, 20), np.int32)
    with Lifted(), torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float64, attn_implementation="eager"
        )
        model = peft.PeftModel.from_pretrained(model, folder).eval()
        theirs = model(torch.tensor(pair.rows[0], dtype=torch.long)).logits.numpy()
    variables = adapted.variables(adapted.Adapted(jax.tree.map(jnp.asarray, tree), pair.frozen))
    ours: Any = pair.decoder.apply(variables, *map(jnp.asarray, pair.rows))
    FLOAT64.check(pairs.error(theirs, np.asarray(ours[0])), "logits")
    assert pairs.error(theirs, np.asarray(pair.ours())) > 1e-3, "without the whole modules it is another model"
    again, read = files.read_peft(folder, pair.config, pair.sites)
    assert set(read.modules_to_save) == set(options.modules_to_save)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, jax.tree.map(np.asarray, tree)))
    if tied:
        (folder / files.CONFIG).write_text(json.dumps(stated | {"ensure_weight_tying": False}))
        with pytest.raises(UserError, match="embedding and head are one in the base and not in modules_to_save"):
            files.read_peft(folder, pair.config, pair.sites)
