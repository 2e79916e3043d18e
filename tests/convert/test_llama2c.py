"""llama2.c's model.bin: where each number lies, there and back, and what is refused."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from jaxlm import config
from jaxlm.convert import canonical, native
from jaxlm.convert.files import storage
from jaxlm.convert.llama2c import model_bin
from jaxlm.convert.open_model import load, open_model
from jaxlm.convert.write_model import convert
from jaxlm.errors import UserError
from jaxlm.text.tokenizer import Tokenizer


class Bin(NamedTuple):
    """A file, and the arrays that were written into it, in their order and with their layers."""

    content: bytes
    arrays: dict[str, np.ndarray]


def make_bin(
    rng: np.random.Generator, sizes: tuple[int, ...], *, separate: bool = False, tables: np.ndarray | None = None
) -> Bin:
    """A model.bin of random numbers, as export.py of llama2.c writes it. `sizes` as in the header."""
    d, f, layers, n, k, v, t = sizes
    shapes = {
        "token_embedding": (v, d),
        "rms_att": (layers, d),
        "wq": (layers, d, d),
        "wk": (layers, d // n * k, d),
        "wv": (layers, d // n * k, d),
        "wo": (layers, d, d),
        "rms_ffn": (layers, d),
        "w1": (layers, f, d),
        "w2": (layers, d, f),
        "w3": (layers, f, d),
        "rms_final": (d,),
        "freqs": (2, t, d // n // 2),
        "wcls": (v, d),
    }
    arrays = {name: rng.standard_normal(shape).astype("<f4") for name, shape in shapes.items()}
    angles = np.outer(np.arange(t), (10000.0 ** -(np.arange(0, d // n, 2) * n / d)).astype(np.float32)).astype(
        np.float32
    )
    arrays["freqs"] = np.stack([np.cos(angles.astype(float)), np.sin(angles.astype(float))]).astype("<f4")
    if tables is not None:
        arrays["freqs"] = tables.astype("<f4")
    if not separate:
        del arrays["wcls"]
    header = struct.pack("<7i", d, f, layers, n, k, -v if separate else v, t)
    return Bin(header + b"".join(array.tobytes() for array in arrays.values()), arrays)


SMALL = (16, 24, 3, 4, 2, 40, 12)
SIZES = [(SMALL, False), (SMALL, True), ((24, 20, 2, 3, 3, 33, 7), True), ((24, 28, 4, 6, 1, 21, 1), False)]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        (tmp_path / "model.bin").write_bytes(content)
        return tmp_path / "model.bin"

    return write


@pytest.mark.parametrize(("sizes", "separate"), SIZES)
def test_each_number_has_its_place(write: Callable, rng: np.random.Generator, sizes: tuple, separate: bool) -> None:
    made = make_bin(rng, sizes, separate=separate)
    opened = open_model(write(made.content))
    cfg, found = opened.config.model, opened.parameters
    assert (cfg.d_model, cfg.d_ff, cfg.n_layers, cfg.n_heads, cfg.n_kv_heads, cfg.vocab_size, cfg.max_seq_len) == sizes
    assert (cfg.rope_layout, cfg.rope_theta, cfg.norm_eps, cfg.tie_embeddings) == (
        "interleaved",
        1e4,
        1e-5,
        not separate,
    )
    theirs = {
        "mixer_norm.scale": "rms_att",
        "mixer.q_proj.kernel": "wq",
        "mixer.k_proj.kernel": "wk",
        "mixer.v_proj.kernel": "wv",
        "mixer.o_proj.kernel": "wo",
        "ffn_norm.scale": "rms_ffn",
        "ffn.gate_proj.kernel": "w1",
        "ffn.down_proj.kernel": "w2",
        "ffn.up_proj.kernel": "w3",
    }
    outer = {"embed.embedding": made.arrays["token_embedding"], "final_norm.scale": made.arrays["rms_final"]}
    expected = outer | {
        f"layers.{i}.{mine}": made.arrays[name][i] for i in range(cfg.n_layers) for mine, name in theirs.items()
    }
    expected |= {"head.kernel": made.arrays["wcls"]} if separate else {}
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        mine = found[name]
        stored = array.T if name.endswith("kernel") else array
        np.testing.assert_array_equal(mine.reshape(stored.shape), stored, err_msg=name)
        assert mine.dtype == np.float32


@pytest.mark.parametrize(("sizes", "separate", "through"), [(*SIZES[1], "jaxlm"), *((*one, "torch") for one in SIZES)])
def test_there_and_back(
    write: Callable, rng: np.random.Generator, tmp_path: Path, sizes: tuple, separate: bool, through: str
) -> None:
    path = write(make_bin(rng, sizes, separate=separate).content)
    convert(path, tmp_path / "ours", through)
    assert not (tmp_path / "ours" / model_bin.ROPE_TABLES).exists()
    tensors = 2 + 9 * sizes[2] + separate
    assert convert(tmp_path / "ours", tmp_path / "back", "llama2c")[1:4] == ("llama2c", tensors, path.stat().st_size)
    assert [file.name for file in (tmp_path / "back").iterdir()] == ["model.bin"]
    assert (tmp_path / "back" / "model.bin").read_bytes() == path.read_bytes()
    convert(tmp_path / "back", tmp_path / "again", "llama2c")  # a folder with a model.bin is a model too
    assert (tmp_path / "again" / "model.bin").read_bytes() == path.read_bytes()


def test_tables_of_another_machine_are_kept(write: Callable, rng: np.random.Generator, tmp_path: Path) -> None:
    tables = make_bin(rng, SMALL).arrays["freqs"]
    for number, other in enumerate([np.nextafter(tables, np.float32(2)), np.zeros_like(tables)]):
        path = write(make_bin(rng, SMALL, tables=other).content)
        ours, back, llama = (tmp_path / f"{name}{number}" for name in ("ours", "back", "llama"))
        convert(path, ours, "torch" if number else "jaxlm")
        convert(ours, back, "llama2c")
        assert (back / "model.bin").read_bytes() == path.read_bytes()
        convert(ours, llama, "llama")
        assert not (llama / model_bin.ROPE_TABLES).exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("options", [{}, {"tie_embeddings": False}, {"pattern": ("attention+mlp",) * 2}])
def test_our_models_as_llama2c(
    make_model: Callable, make_params: Callable, tmp_path: Path, dtype: str, options: dict
) -> None:
    """Pairs (i, i + H/2) become (2i, 2i + 1), so that a second way there changes nothing more."""
    cfg = make_model(d_model=24, **options)  # of heads of 4, the turn is its own inverse
    params = make_params(cfg, dtype)
    _torch_folder(tmp_path / "torch", cfg, params)
    convert(tmp_path / "torch", tmp_path / "bin", "llama2c")
    back = load(tmp_path / "bin" / "model.bin")
    ours, theirs = canonical.canonical(params, cfg), canonical.canonical(back.params, back.config.model)
    for name in ours:
        mine = ours[name].astype(np.float32)
        if name.endswith(("q_proj.kernel", "k_proj.kernel")):
            half = mine.shape[-1] // 2
            mine = np.stack([mine[..., :half], mine[..., half:]], -1).reshape(mine.shape)
        np.testing.assert_array_equal(theirs[name], mine, err_msg=name)
    convert(tmp_path / "bin", tmp_path / "again", "llama2c")
    assert (tmp_path / "again" / "model.bin").read_bytes() == (tmp_path / "bin" / "model.bin").read_bytes()


def _torch_folder(path: Path, cfg: config.Model, params: Any, **files: str) -> None:
    from jaxlm.config import toml

    settings = config.Config(model=cfg)
    files = {"config.toml": toml.to_toml(settings), **files}
    storage.write_folder(path, storage.planned(native.to_torch(params, cfg)), files, layout="torch")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"biases": ("mlp",)}, "model.biases = ['mlp']"),
        ({"activation": "gelu"}, "model.activation = 'gelu'"),
        ({"norm_eps": 1e-6}, "model.norm_eps = 1e-06"),
        ({"rope_theta": 5e5}, "model.rope_theta = 500000.0"),
        ({"rope_scaling": config.RopeScaling(kind="linear", factor=2.0)}, "rope_scaling"),
        ({"head_dim": 8}, "model.head_dim = 8"),
        ({"qk_norm": True}, "model.qk_norm = True"),
        ({"window": 8}, "model.window = 8"),
        ({"norm": "layernorm"}, "model.norm = 'layernorm'"),
        ({"pattern": ("attention+moe",)}, "model.pattern"),
        ({"positions": "none"}, "model.positions"),
    ],
)
def test_what_the_format_has_no_place_for(make_model: Callable, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"the llama2c layout has no place for .*{re.escape(message)}"):
        model_bin.header_of(make_model(**options))


def test_wide_parameters_are_refused_and_nothing_is_left(
    make_model: Callable, make_params: Callable, tmp_path: Path
) -> None:
    cfg = make_model()
    _torch_folder(tmp_path / "torch", cfg, make_params(cfg, "float64"))
    with pytest.raises(UserError, match="has no place for float64, the dtype of token_embedding"):
        convert(tmp_path / "torch", tmp_path / "bin", "llama2c")
    _torch_folder(tmp_path / "torch", cfg, make_params(cfg), **{"tokenizer.json": Tokenizer.bytes_level().to_json()})
    with pytest.raises(UserError, match=r"tokenizer.json: 272 ids, the model has 300"):
        convert(tmp_path / "torch", tmp_path / "bin", "llama2c")
    assert [path.name for path in tmp_path.iterdir()] == ["torch"]


def _header(*numbers: int) -> Callable[[bytes], bytes]:
    return lambda content: struct.pack("<7i", *numbers) + content[28:]


def _number(place: int, value: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: 28 + 4 * place] + struct.pack("<f", value) + content[32 + 4 * place :]


_SIZE = 28 + 4 * (40 * 16 + 3 * (2 * 16 + 2 * 16 * 16 + 2 * 8 * 16 + 3 * 24 * 16) + 16 + 12 * 4)
BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (
        lambda content: content[:-4],
        f"truncated, {_SIZE - 4:,} bytes where the header needs {_SIZE:,}: dim 16",
    ),
    "too long": (lambda content: content + b"\0", f"too long, {_SIZE + 1:,} bytes where the header needs {_SIZE:,}"),
    "a header cut off": (lambda content: content[:20], "20 bytes are no header"),
    "empty": (lambda content: b"", "0 bytes are no header"),
    "another width": (_header(32, *SMALL[1:]), "truncated"),
    "another vocabulary": (_header(*SMALL[:5], 39, 12), "too long"),
    "a head that is not there": (_header(*SMALL[:5], -40, 12), "truncated"),
    "negative": (_header(-16, *SMALL[1:]), "a size is not positive: dim -16"),
    "zero": (_header(*SMALL[:2], 0, *SMALL[3:]), "a size is not positive.*n_layers 0"),
    "no heads": (_header(*SMALL[:3], 0, *SMALL[4:]), "a size is not positive.*n_heads 0"),
    "no vocabulary": (_header(*SMALL[:5], 0, 12), "a size is not positive.*vocab_size 0"),
    "heads that do not divide": (_header(*SMALL[:3], 3, *SMALL[4:]), "dim is no even multiple of n_heads: dim 16"),
    "odd heads": (_header(*SMALL[:3], 16, *SMALL[4:]), "no even multiple"),
    "kv heads that do not divide": (_header(*SMALL[:4], 3, *SMALL[5:]), "n_heads is no multiple of n_kv_heads"),
    "absurd": (_header(*[2**31 - 2] * 3, 1, 1, *[2**31 - 1] * 2), "truncated.*dim 2147483646"),
    "the smallest integer": (_header(*SMALL[:5], -(2**31), 12), "truncated"),
    "a pickle in a zip": (lambda content: b"PK\x03\x04" + content, "a pickle can run any program"),
    "a pickle": (lambda content: b"\x80\x02}q\x00(X" + content, "a pickle can run any program"),
    "a newer version": (lambda content: b"24ka\x02\0\0\0" + content, "version 2 of llama2.c's format.*--version 0"),
    "safetensors": (lambda content: b"\x40\0\0\0\0\0\0\0" + b'{"a":{}}' + content, "a size is not positive"),
    "another rotation": (
        _number((_SIZE - 28) // 4 - 48 + 4 * 2, 0.5),
        "cosine 0 of position 4 is 0.5, of the base",
    ),
    "NaN in the tables": (_number((_SIZE - 28) // 4 - 1, np.nan), "sine 1 of position 11 is nan"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_damaged_files_are_refused(write: Callable, rng: np.random.Generator, tmp_path: Path, name: str) -> None:
    damage, message = BROKEN[name]
    content = make_bin(rng, SMALL).content
    assert len(content) == _SIZE
    path = write(damage(content))
    with pytest.raises(UserError, match=message) as caught:
        convert(path, tmp_path / "out", "jaxlm")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("place", "tensor"), [(40 * 16, "rms_att.0"), (40 * 16 + 3 * 16 + 256, "wq.1"), (_SIZE // 4 - 56, "rms_final")]
)
@pytest.mark.parametrize("to", ["jaxlm", "torch", "llama", "llama2c"])
def test_numbers_that_are_none_are_refused(
    write: Callable, rng: np.random.Generator, tmp_path: Path, place: int, tensor: str, to: str
) -> None:
    path = write(_number(place, np.inf)(make_bin(rng, SMALL).content))
    with pytest.raises(UserError, match=rf"{tensor} is NaN or infinite"):
        convert(path, tmp_path / "out", to)
    assert [file.name for file in tmp_path.iterdir()] == ["model.bin"]


def test_a_width_of_640_is_no_pickle(write: Callable, rng: np.random.Generator) -> None:
    """Its first bytes are those of one."""
    made = make_bin(rng, (640, 1, 1, 2, 1, 2, 1))
    assert made.content[:2] == b"\x80\x02"
    assert open_model(write(made.content)).config.model.d_model == 640


def test_the_tokenizer_beside_it(write: Callable, rng: np.random.Generator, tmp_path: Path) -> None:
    from tests.data.test_llama2c import stored

    def vocabulary(name: str, size: int) -> bytes:
        content = stored([chr(0x4E00 + i) for i in range(size - 259)])
        (tmp_path / name).write_bytes(content)
        return content

    path = write(make_bin(rng, (*SMALL[:5], 270, 12)).content)
    assert open_model(path).tokenizer_path is None
    vocabulary("tokenizer.bin", 269)
    assert open_model(path).tokenizer_path is None
    content = vocabulary("tok270.bin", 270)
    assert open_model(path).tokenizer_path == tmp_path / "tok270.bin"

    convert(path, tmp_path / "torch", "torch")
    assert load(tmp_path / "torch").config.tokenizer == config.Tokenizer(
        kind="file", path=str(tmp_path / "torch" / "tokenizer.json")
    )
    convert(tmp_path / "torch", tmp_path / "back", "llama2c")
    assert (tmp_path / "back" / "tokenizer.bin").read_bytes() == content

    inner = json.loads((tmp_path / "torch" / "tokenizer.json").read_text())
    (tmp_path / "bare.json").write_text(json.dumps({**inner, "post_processor": None}))
    with pytest.raises(UserError, match=r"bare.json: no <s> stands before a text"):
        convert(path, tmp_path / "no", "llama2c", tokenizer=tmp_path / "bare.json")

    vocabulary("other.bin", 270)
    convert(path, tmp_path / "llama", "llama", tokenizer=tmp_path / "other.bin")
    hf = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert (hf["bos_token_id"], hf["eos_token_id"], hf["vocab_size"]) == (1, 2, 270)
    generation = json.loads((tmp_path / "llama" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 1], "pad_token_id": None}
    spelled = json.loads((tmp_path / "llama" / "tokenizer_config.json").read_text())
    assert (spelled["bos_token"], spelled["eos_token"]) == ("<s>", "</s>")

    vocabulary("large.bin", 271)
    with pytest.raises(UserError, match="the tokenizer has 271 ids, the model only"):
        convert(path, tmp_path / "no", "llama", tokenizer=tmp_path / "large.bin")
    with pytest.raises(UserError, match="no such"):
        convert(path, tmp_path / "no", "llama", tokenizer=tmp_path / "missing.bin")


def test_the_order_of_rows_is_that_of_the_file(make_model: Callable) -> None:
    """Else what is read would be what was written, and both wrong."""
    names = [row.theirs[0].partition(".")[0] for row in model_bin.rows(make_model())]
    assert names == [
        "token_embedding",
        "rms_att",
        "wq",
        "wk",
        "wv",
        "wo",
        "rms_ffn",
        "w1",
        "w2",
        "w3",
        "rms_final",
        "wcls",
    ]
