"""The layout of Hugging Face's GptOssForCausalLM (gpt-oss 20b and 120b), dequantised: its rows, and its config.json."""

from __future__ import annotations

from jaxlm import config
from jaxlm.convert.families.experts import ALL_EXPERTS, decoder_settings, layer_types, pattern, routed, width
from jaxlm.convert.families.llama import attention_rows, outer_rows, rope
from jaxlm.convert.family import Family
from jaxlm.convert.rows import Row, flat, interleave, matrix, plain
from jaxlm.convert.settings import Hf, always, biases, fixed, inert, key


def rows(cfg: config.Model) -> list[Row]:
    """All experts of a layer are one tensor [E, in, out]; the columns of gate and up take turns."""
    ours, theirs = "layers.{i}.ffn", "model.layers.{i}.mlp"
    gate, up = f"{ours}.experts.gate_proj", f"{ours}.experts.up_proj"
    return [
        *outer_rows(),
        *attention_rows(cfg),
        Row("layers.{i}.mixer.sink_logits", "model.layers.{i}.self_attn.sinks"),
        Row(f"{ours}.router.kernel", f"{theirs}.router.weight", matrix),
        Row(f"{ours}.router.bias", f"{theirs}.router.bias"),
        Row((f"{gate}.kernel", f"{up}.kernel"), f"{theirs}.experts.gate_up_proj", plain, interleave),
        Row((f"{gate}.bias", f"{up}.bias"), f"{theirs}.experts.gate_up_proj_bias", flat, interleave),
        Row(f"{ours}.experts.down_proj.kernel", f"{theirs}.experts.down_proj", plain),
        Row(f"{ours}.experts.down_proj.bias", f"{theirs}.experts.down_proj_bias", flat),
    ]


PUBLISHED = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""The YaRN of the published models, which a config.json without rotary keys means."""


def _every_other(hf: Hf) -> list[str]:
    return ["full_attention" if i % 2 else "sliding_attention" for i in range(hf["num_hidden_layers"])]


def _head_dim(hf: Hf) -> int:
    return hf["hidden_size"] // hf["num_attention_heads"] if "head_dim" in hf else 64


FAMILY = Family(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    rows=rows,
    settings=(
        *decoder_settings(kv_heads=8, max_seq_len=131072, norm_eps=1e-5),
        key("head_dim", "head_dim", _head_dim),
        rope(150000.0, absent=PUBLISHED),
        biases("attention_bias", ("qkv", "attention_out"), default=True),
        always("biases", ["router", "experts"]),
        always("sink_logits", True),
        pattern(layer_types(_every_other, 128), ALL_EXPERTS),
        always("activation", "swiglu_clamped"),
        fixed("hidden_act", "silu", (None,)),
        fixed("swiglu_alpha", 1.702),
        fixed("swiglu_limit", 7.0),
        inert("experts_per_token", "initial_context_length"),  # of OpenAI's own program
        width("intermediate_size", "d_ff"),
        routed("num_local_experts", "moe.n_experts", 128),
        routed("num_experts_per_tok", "moe.top_k", 4),
    ),
)
