"""Open anything, write it as anything."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config
from jaxlm.config import toml
from jaxlm.convert import native
from jaxlm.convert.files import storage
from jaxlm.convert.open_model import load, open_model
from jaxlm.convert.write_model import convert
from jaxlm.errors import UserError
from jaxlm.text.tokenizer import Tokenizer
from jaxlm.train.checkpoint import Checkpointer
from jaxlm.train.optim import make_optimizer
from jaxlm.train.step import init_state

FLOATS = ["float16", "bfloat16", "float32", "float64"]


@pytest.fixture
def write_torch(tmp_path: Path, make_params: Callable[..., Any]) -> Callable[..., tuple[Path, Any]]:
    """Writes a torch_ref folder; returns it and the live tree."""

    def write(cfg: config.Model, dtype: str = "float32") -> tuple[Path, Any]:
        numerics = config.Numerics(params="float64" if dtype == "float64" else "float32")
        settings = config.Config(model=cfg, numerics=numerics)
        params = make_params(cfg, dtype)
        files = {"config.toml": toml.to_toml(settings), "tokenizer.json": Tokenizer.bytes_level().to_json()}
        storage.write_folder(tmp_path / "torch", storage.planned(native.to_torch(params, cfg)), files, layout="torch")
        return tmp_path / "torch", params

    return write


@pytest.mark.parametrize("dtype", FLOATS)
def test_around_all_layouts(write_torch: Callable, make_model: Callable, same: Callable, dtype: str) -> None:
    cfg = make_model(layer_loop="scan", tie_embeddings=False, biases=("mlp",), rope_layout="interleaved")
    src, params = write_torch(cfg, dtype)
    at = src.parent

    told = str(convert(src, at / "llama", "llama"))
    assert told.startswith(f"{at / 'llama'}: llama, 51 tensors, {_size(at / 'llama')} MB in 0.") and told.endswith(" s")
    llama = load(at / "llama")
    assert (llama.kind, llama.tokenizer_path) == ("llama", at / "llama" / "tokenizer.json")
    assert json.loads((at / "llama" / "config.json").read_text())["dtype"] == dtype
    assert dataclasses.replace(llama.config.model, layer_loop="scan") == cfg
    same(native.from_torch(dict(native.to_torch(llama.params, llama.config.model)), cfg), params)

    convert(at / "llama", at / "run", "jaxlm")
    run = load(at / "run")
    assert (run.kind, run.config.out_dir) == ("run", str(at / "run"))
    assert run.config.numerics.params == ("float64" if dtype == "float64" else "float32")
    assert run.config.numerics.compute == (dtype if dtype in ("bfloat16", "float64") else "float32")
    same(native.from_torch(dict(native.to_torch(run.params, run.config.model)), cfg), params)
    assert (at / "run" / "tokenizer.json").read_bytes() == (src / "tokenizer.json").read_bytes()

    convert(at / "run", at / "torch2", "torch")
    back = load(at / "torch2")
    beside = str(at / "torch2" / "tokenizer.json")
    assert (back.kind, back.config.out_dir, back.config.tokenizer.path) == ("torch", "", beside)
    same(native.from_torch(dict(native.to_torch(back.params, back.config.model)), cfg), params)


def _size(folder: Path) -> str:
    return f"{sum(p.stat().st_size for p in folder.iterdir() if p.name != 'manifest.json') / 1e6:,.1f}"


def test_an_exported_model_comes_back_file_by_file(torch_folder: Path, tmp_path: Path) -> None:
    convert(torch_folder, tmp_path / "run", "jaxlm", shard_bytes=10_000)
    assert len(list((tmp_path / "run" / "checkpoints" / "0").glob("model-*.safetensors"))) > 1
    convert(tmp_path / "run", tmp_path / "again", "torch")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (torch_folder / name).read_bytes()


def test_shards(torch_folder: Path, tmp_path: Path, same: Callable) -> None:
    convert(torch_folder, tmp_path / "one", "llama")
    convert(torch_folder, tmp_path / "many", "llama", shard_bytes=10_000)
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    same(load(tmp_path / "many").params, load(tmp_path / "one").params)
    (tmp_path / "many" / files[0]).unlink()
    (tmp_path / "many" / "manifest.json").unlink()
    with pytest.raises(UserError, match=f"{files[0]}: no such file"):
        load(tmp_path / "many")


def test_steps_of_a_run(tmp_path: Path, make_model: Callable, make_params: Callable, same: Callable) -> None:
    cfg = make_model(layer_loop="scan")
    (tmp_path / "config.toml").write_text(toml.to_toml(config.Config(model=cfg)))
    old, new = make_params(cfg), make_params(cfg)
    checkpoints = Checkpointer(tmp_path)
    for step, params in ((3, old), (12, new)):
        state = init_state(jax.tree.map(jnp.asarray, params), make_optimizer(config.Train()))
        checkpoints.save(state._replace(step=jnp.int32(step)), {})
    checkpoints.close()
    same(load(tmp_path).params, new)
    same(load(tmp_path, step=3).params, old)
    assert load(tmp_path).tokenizer_path is None
    for step, params in ((None, new), (3, old)):
        convert(tmp_path, tmp_path / "torch", "torch", step=step)
        same(load(tmp_path / "torch").params, params)
    with pytest.raises(UserError, match=r"checkpoints: no step 4 \(there are: 3, 12\)"):
        load(tmp_path, step=4)
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "checkpoints", other / "checkpoints")
    (other / "config.toml").write_text(toml.to_toml(config.Config(model=dataclasses.replace(cfg, d_ff=40))))
    for opened in (load, open_model):
        with pytest.raises(UserError, match="the config asks for"):
            opened(other)
    values = max((tmp_path / "checkpoints" / "12" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(values.read_bytes())
    data[len(data) // 2] ^= 1
    values.write_bytes(data)
    with pytest.raises(UserError, match=r"checkpoints/12 is damaged: .*\(--step names an earlier one\)"):
        convert(tmp_path, tmp_path / "torch", "torch")
    same(load(tmp_path / "torch").params, old)  # the result of before is still there
    same(load(tmp_path).params, old)  # and whoever only reads gets the checkpoint before


def test_a_run_trained_by_torch(tmp_path: Path, make_model: Callable, make_params: Callable, same: Callable) -> None:
    cfg = make_model()
    (tmp_path / "config.toml").write_text(toml.to_toml(config.Config(model=cfg)))
    trees = {2: make_params(cfg), 10: make_params(cfg)}
    for step, params in trees.items():
        folder = tmp_path / "checkpoints" / str(step)
        folder.mkdir(parents=True)
        storage.write_folder(folder, storage.planned(native.to_torch(params, cfg)), {}, layout="torch")
    (tmp_path / "checkpoints" / "11.partial").mkdir()
    same(load(tmp_path).params, trees[10])
    same(load(tmp_path, step=2).params, trees[2])


def test_numpy_leaves_on_the_host(torch_folder: Path, tmp_path: Path) -> None:
    convert(torch_folder, tmp_path / "run", "jaxlm")
    for path in (torch_folder, tmp_path / "run"):
        assert {type(leaf) for leaf in jax.tree.leaves(load(path).params)} == {np.ndarray}


WANTED = "looked for config.toml and checkpoints/ (a run), config.toml and model.safetensors (torch_ref), config.json"


def test_unknown_folders(tmp_path: Path, torch_folder: Path) -> None:
    for path, what in [
        (tmp_path / "gone", "no such folder"),
        (torch_folder / "config.toml", "not a folder"),
        (tmp_path, "not a model"),
    ]:
        with pytest.raises(UserError) as caught:
            load(path)
        assert caught.value.message == f"{path}: {what}" and caught.value.hint.startswith(WANTED)
    with pytest.raises(UserError, match="is not a run, it has no step 3"):
        load(torch_folder, step=3)
    shutil.rmtree(torch_folder)
    (torch_folder / "checkpoints").mkdir(parents=True)
    (torch_folder / "config.toml").write_text("[model]\nvocab_size = 300\n")
    with pytest.raises(UserError, match="checkpoints: no checkpoint"):
        load(torch_folder)
    (torch_folder / "config.toml").write_text("")
    with pytest.raises(UserError, match=r"model.vocab_size is 0"):
        load(torch_folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "bert"}', "model_type 'bert' is not known (known: llama, mistral"),
        ('{"model_type": ["llama"]}', "model_type ['llama'] is not known (known: llama, "),
        ("{}", "model_type None is not known"),
        ("{", "not readable as JSON"),
        ("[]", "not a JSON object"),
        ('{"model_type": "llama"}', "vocab_size is missing"),
    ],
)
def test_a_foreign_config_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ") and message in str(caught.value)


def test_weights_that_do_not_fit_their_config(torch_folder: Path) -> None:
    (torch_folder / "manifest.json").unlink()
    text = (torch_folder / "config.toml").read_text()
    (torch_folder / "config.toml").write_text(text.replace("n_layers = 4", "n_layers = 3"))
    with pytest.raises(UserError) as caught:
        load(torch_folder)
    assert caught.value.message.startswith(f"{torch_folder}: 9 tensors not expected: layers.3.ffn.down_proj.weight, ")


def test_refusals_of_convert(torch_folder: Path, tmp_path: Path, make_model: Callable, write_torch: Callable) -> None:
    with pytest.raises(UserError, match=r"--to lama: no such layout \(did you mean 'llama'\?\)"):
        convert(torch_folder, tmp_path / "x", "lama")
    for dst in (torch_folder, torch_folder / "..", tmp_path):
        with pytest.raises(UserError, match="is or holds the source"):
            convert(torch_folder, dst, "torch", overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for to in ("jaxlm", "torch", "llama"):
        with pytest.raises(UserError, match="exists and is not an earlier result"):
            convert(torch_folder, tmp_path / "mine", to)
    convert(torch_folder, tmp_path / "mine", "jaxlm", overwrite=True)
    assert load(tmp_path / "mine").kind == "run"
    with pytest.raises(UserError, match="exists and is not an earlier result"):
        convert(torch_folder, tmp_path / "mine", "jaxlm")  # a run is never replaced unasked
    Tokenizer.train(["abc " * 9], 287).save(torch_folder / "tokenizer.json")
    src, _ = write_torch(make_model(vocab_size=250, norm="layernorm"))
    with pytest.raises(UserError, match=r"the tokenizer has \d+ ids, the model only model.vocab_size = 250"):
        convert(src, tmp_path / "x", "llama")
    src, _ = write_torch(make_model(norm="layernorm"))
    with pytest.raises(UserError, match=r"the llama layout has no place for model.norm = 'layernorm'"):
        convert(src, tmp_path / "x", "llama")
    assert not (tmp_path / "x").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
