"""A model in a GGUF file, as llama.cpp writes those of the Llama family, as a public layout that jaxlm opens.

The tensors appear under the names of `LlamaForCausalLM`, in float32 whatever the file stores, each read when it is
asked for. llama.cpp turns the rows of q and k so that rotary pairs are neighbours; that is undone here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm import config
from jaxlm.convert.families import llama
from jaxlm.convert.rows import Parameters
from jaxlm.convert.tensors import Tensors
from jaxlm.errors import UserError
from jaxlm.text.gguf_file import Head, Stored, read_head
from jaxlm.text.gguf_tokenizer import side_files

NAME, SUFFIX = "gguf", ".gguf"


class Block(NamedTuple):
    """How ggml stores values of one type: `count` of them in so many `bytes`."""

    name: str
    count: int
    bytes: int


KINDS: Mapping[int, Block] = {
    0: Block("F32", 1, 4),
    1: Block("F16", 1, 2),
    2: Block("Q4_0", 32, 18),
    3: Block("Q4_1", 32, 20),
    8: Block("Q8_0", 32, 34),
    12: Block("Q4_K", 256, 144),
    14: Block("Q6_K", 256, 210),
    30: Block("BF16", 1, 2),
}
"""The types that jaxlm reads, by their number in ggml."""

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class File(NamedTuple):
    """What a GGUF file holds."""

    model: config.Model
    parameters: Parameters
    """By canonical names, each read when it is asked for."""
    kept: dict[str, bytes]
    """Files to write beside the weights."""


def read(path: Path) -> File:
    """Open a GGUF file.

    Raises:
        UserError: see `read_head`; another architecture than Llama's, a type that jaxlm does not read, sizes that
            contradict each other or the file.
    """
    head = read_head(path)
    _check_table(head)
    model = settings(head)
    tensors = GGUFTensors(head, model.n_heads, model.n_kv_heads)
    rows = llama.FAMILY.rows(model)
    return File(model, Parameters(tensors, model, rows, str(path)), side_files(head))


def settings(head: Head) -> config.Model:
    """`[model]` of the metadata.

    Raises:
        UserError: a key is missing, or says what jaxlm cannot express.
    """
    kind = head.get("general.architecture", str)
    if kind != "llama":
        raise UserError(f"{head.path}: general.architecture {kind!r}: jaxlm reads llama", "convert its safetensors")
    if "token_embd.weight" not in head.tensors:
        raise UserError(f"{head.path}: there is no tensor token_embd.weight")
    width, heads = head.get("llama.embedding_length", int), head.get("llama.attention.head_count", int)
    if heads < 1:
        raise UserError(f"{head.path}: llama.attention.head_count = {heads} must be positive")
    head_dim = head.get("llama.attention.key_length", int, width // heads)
    _refuse(head, "llama.rope.dimension_count", int, head_dim)
    _refuse(head, "llama.attention.value_length", int, head_dim)
    _refuse(head, "llama.expert_count", int, 0)
    _refuse(head, "llama.rope.scaling.type", str, "none")
    hf = {
        "hidden_size": width,
        "num_hidden_layers": head.get("llama.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": head.get("llama.attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "intermediate_size": head.get("llama.feed_forward_length", int),
        "max_position_embeddings": head.get("llama.context_length", int),
        "rms_norm_eps": _meant(head.get("llama.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _meant(head.get("llama.rope.freq_base", float, 10000.0)),
        "vocab_size": head.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in head.tensors,
    }
    return llama.FAMILY.config_from_hf(hf, str(head.path))


def _meant(value: float) -> float:
    """The shortest decimal of a number that was written as float32: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def _refuse(head: Head, key: str, kind: type, wanted: Any) -> None:
    if (found := head.get(key, kind, wanted)) != wanted:
        raise UserError(f"{head.path}: {key} = {found!r}, jaxlm reads llama models with {wanted!r}")


def _check_table(head: Head) -> None:
    """Compare every type, size and place with the file before any tensor is read."""
    size = head.path.stat().st_size
    for name, one in head.tensors.items():
        if one.kind not in KINDS:
            known = ", ".join(block.name for block in KINDS.values())
            raise UserError(f"{head.path}: tensor {name} is of ggml type {_type_name(one.kind)}", f"read are: {known}")
        if one.shape[-1] % KINDS[one.kind].count:
            block = KINDS[one.kind]
            raise UserError(f"{head.path}: tensor {name} has rows of {one.shape[-1]}, {block.name} needs {block.count}")
        if one.offset + _bytes(one) > size:
            end = f"{one.offset + _bytes(one):,}"
            raise UserError(
                f"{head.path}: tensor {name} ends at {end}, the file at {size:,}", "truncated: copy it again"
            )
    ordered = sorted(head.tensors.items(), key=lambda item: item[1].offset)
    for (name, one), (other, next_one) in pairwise(ordered):
        if one.offset + _bytes(one) > next_one.offset:
            raise UserError(f"{head.path}: the tensors {name} and {other} overlap", "damaged: copy it again")


def _bytes(one: Stored) -> int:
    block = KINDS[one.kind]
    return math.prod(one.shape) // block.count * block.bytes


def _type_name(kind: int) -> str:
    import gguf

    known = {one.value: one.name for one in gguf.GGMLQuantizationType}
    return known.get(kind, str(kind))


class GGUFTensors(Tensors):
    """The tensors of a GGUF file under the names of `LlamaForCausalLM`; each access makes a float32 array."""

    def __init__(self, head: Head, n_heads: int, n_kv_heads: int) -> None:
        self._stored = {_public_name(name): one for name, one in head.tensors.items()}
        self._turned = {"q_proj": n_heads, "k_proj": n_kv_heads}
        self._file = np.memmap(head.path, np.uint8, "r")

    def __getitem__(self, name: str) -> np.ndarray:
        import gguf

        one = self._stored[name]
        stored = self._file[one.offset : one.offset + _bytes(one)].reshape(*one.shape[:-1], -1)
        values = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType(one.kind))
        heads = self._turned.get(name.split(".")[-2])
        return neighbours_to_halves(values, heads) if heads else np.asarray(values)

    def shape(self, name: str) -> tuple[int, ...]:
        """From the table."""
        return self._stored[name].shape

    def dtype(self, name: str) -> str:
        """Always the same."""
        return "float32"

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def neighbours_to_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * head_dim, in] from rotary pairs (2i, 2i + 1) of each head to (i, i + head_dim / 2)."""
    out, inner = weight.shape
    return weight.reshape(heads, out // heads // 2, 2, inner).swapaxes(1, 2).reshape(out, inner)


def _public_name(name: str) -> str:
    """The name in `LlamaForCausalLM`, or the name itself, which `Parameters` then refuses."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if layer and layer[2] in _LAYER_NAMES:
        return f"model.layers.{int(layer[1])}.{_LAYER_NAMES[layer[2]]}.{layer[3]}"
    return _NAMES.get(name, name)
