"""Folders of PEFT that jaxlm cannot read: each is refused in one line that names the file or the tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxlm import config
from jaxlm.convert import saved_modules
from jaxlm.convert.adapters import CONFIG, WEIGHTS
from jaxlm.convert.families import FAMILIES
from jaxlm.convert.files.storage import planned, write_folder
from jaxlm.convert.open_model import load
from jaxlm.convert.rows import to_layout
from jaxlm.errors import UserError
from jaxlm.models.decoder import Decoder, init_params

Q = "base_model.model.model.layers.0.self_attn.q_proj"
HEAD = "base_model.model.lm_head"


def base(folder: Path, **options: Any) -> Path:
    model = config.Model(vocab_size=40, d_model=16, n_layers=1, n_heads=2, d_ff=24, max_seq_len=32, **options)
    family, path = FAMILIES["llama"], folder / "base"
    tensors = to_layout(init_params(Decoder(model), jax.random.key(0)), model, family.rows(model))
    files = {"config.json": json.dumps(family.config_to_hf(model, dtype="float32"))}
    write_folder(path, planned([(name, np.ascontiguousarray(x)) for name, x in tensors]), files, layout="llama")
    return path


def peft(folder: Path, tensors: dict[str, np.ndarray], where: Path | None, **stated: Any) -> Path:
    path = folder / "peft"
    path.mkdir()
    save_file(tensors, path / WEIGHTS)
    named = {"base_model_name_or_path": str(where)} if where else {}
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **named, **stated}
    (path / CONFIG).write_text(json.dumps(told))
    return path


def pair(name: str, outs: int = 16, ins: int = 16) -> dict[str, np.ndarray]:
    ones = {"lora_A": np.ones((2, ins), np.float32), "lora_B": np.ones((outs, 2), np.float32)}
    return {f"{name}.{kind}.weight": array for kind, array in ones.items()}


def test_a_folder_is_its_base_with_the_adapters_merged(tmp_path: Path) -> None:
    where = base(tmp_path)
    name = "layers_0" if "layers_0" in load(where).params else "layers"
    before, after = (jax.tree.leaves(load(x).params[name]) for x in (where, peft(tmp_path, pair(Q), where)))
    moved = [np.abs(a - b).max() for a, b in zip(before, after, strict=True) if not np.array_equal(a, b)]
    assert moved == pytest.approx([4.0])  # alpha / r = 2, times two ranks of ones


@pytest.mark.parametrize(
    ("tensors", "stated", "tied", "message"),
    [
        (pair(Q), {"peft_type": "IA3"}, False, "peft_type 'IA3': jaxlm reads LORA"),
        (pair(Q), {"use_qalora": True}, False, "use_qalora = True: jaxlm has no such adapters"),
        (pair(Q, ins=24), {}, False, "q_proj: an adapter of 16 x 24, the base has 16 x 16"),
        (pair(HEAD, 40) | pair(Q), {}, True, "an adapter of lm_head, which is the embedding of this base"),
        (pair(HEAD, 40) | pair(Q), {}, False, "lm_head.lora_A.weight fits nowhere"),
        (pair(Q.replace("self_attn", "attn")), {}, False, "its modules are in no layout of this base"),
        (pair(Q), {"base_model_name_or_path": None}, False, "names no base"),
        (pair(Q), {"init_lora_weights": "pissa_niter_4"}, False, "'pissa_niter_4' moves the base too"),
        (pair(Q), {"init_lora_weights": "lora_ga"}, False, "'lora_ga' moves the base too"),
        (pair(Q), {"r": 8}, False, "r = 8, and there is an adapter of rank 2"),
        (pair(Q), {"lora_alpha": "4"}, False, "lora_alpha = '4' is no number above 0"),
        ({f"{Q}.lora_A.weight": np.ones((2, 16), np.float32)}, {}, False, "q_proj.lora_B.weight: missing"),
    ],
)
def test_what_cannot_be_read_is_named(
    tensors: dict[str, np.ndarray], stated: dict[str, Any], tied: bool, message: str, tmp_path: Path
) -> None:
    where = base(tmp_path, tie_embeddings=tied)
    with pytest.raises(UserError, match=message):
        load(peft(tmp_path, tensors, where, **stated))


def test_half_of_a_module_that_was_trained_whole_is_refused() -> None:
    """A layer norm has a scale and a bias; a file with one of them is of another model."""
    model = config.Model(vocab_size=40, d_model=16, n_layers=1, n_heads=2, d_ff=24, max_seq_len=32, norm="layernorm")
    rows = [row for row in FAMILIES["gpt2"].rows(model) if row.ours[0].startswith("final_norm")]
    tensors = {name: np.ones(16, np.float32) for row in rows for name in row.theirs}
    assert saved_modules.from_layout(tensors, rows, model)["final_norm"].keys() == {"scale", "bias"}
    bias = next(name for name in tensors if "bias" in name)
    with pytest.raises(UserError, match=r"final_norm\.bias: missing; a module of modules_to_save is stored whole"):
        saved_modules.from_layout({name: x for name, x in tensors.items() if name != bias}, rows, model)
