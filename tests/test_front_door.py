"""The front door: what `import jaxlm` costs, what a model can do, and that using the library leaves no trace."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm import config
from jaxlm.errors import UserError
from jaxlm.infer import tree
from jaxlm.infer.model import Model
from jaxlm.models.decoder import Decoder, abstract_params
from jaxlm.text.tokenizer import Tokenizer
from tests.child_flags import with_devices

ROOT = Path(__file__).parents[1]
CFG = config.Model(vocab_size=272, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64)
FLOAT64 = config.Numerics(params="float64", compute="float64", matmul="highest")
IDS = [5, 8, 2, 100, 7]

NEW_RUN = """
recipe = "pretrain"
out_dir = "run"
[model]
d_model = 16
n_layers = 2
n_heads = 2
[tokenizer]
kind = "bytes"
[data]
source = "corpus"
cache_dir = "cache"
seq_len = 16
validation_fraction = 0.2
[train]
steps = 4
batch_size = 4
[eval]
every = 2
[sample]
prompts = ["def "]
max_new_tokens = 4
"""


def make(cfg: config.Model = CFG, numerics: config.Numerics = FLOAT64, seed: int = 0) -> Model:
    """A model with parameters large enough that every token matters."""
    settings = config.Config(model=cfg, numerics=numerics)
    with jax.enable_x64(True):
        shapes, _ = abstract_params(Decoder(cfg))
        rng = np.random.default_rng(seed)
        dtype = np.dtype(numerics.params)
        params = jax.tree.map(lambda leaf: jax.numpy.asarray(rng.standard_normal(leaf.shape) * 0.4, dtype), shapes)
    return Model(settings, params, Tokenizer.bytes_level())


def test_importing_the_package_is_quick_and_loads_no_framework() -> None:
    code = (
        "import time, sys; began = time.process_time(); import jaxlm; spent = time.process_time() - began;"
        "loaded = sorted({'jax', 'flax', 'torch', 'numpy', 'pydantic', 'typer'} & sys.modules.keys());"
        "assert callable(jaxlm.train) and callable(jaxlm.convert) and 'load' in dir(jaxlm);"
        "print(spent, loaded, sorted({'jax', 'torch'} & sys.modules.keys()))"
    )
    spent = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        seconds, _, loaded = done.stdout.strip().partition(" ")
        assert loaded == "[] []"
        spent.append(float(seconds))
    assert min(spent) < 0.05


def test_names_of_the_front_door_and_folders_of_the_same_name() -> None:
    import jaxlm.train.step as step
    from jaxlm.train import loop

    assert step.__name__ == "jaxlm.train.step" and loop.__name__ == "jaxlm.train.loop"
    assert inspect.ismodule(jaxlm.train) and "resume" in inspect.signature(jaxlm.train).parameters
    assert "to" in inspect.signature(jaxlm.convert).parameters
    for name in jaxlm.__all__:
        assert callable(getattr(jaxlm, name)), name
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = jaxlm.lode


def test_logits_hidden_and_log_probs() -> None:
    model = make()
    with jax.enable_x64(True):
        ids = jax.numpy.asarray([IDS])
        expected, _ = model.decoder.apply(
            {"params": model.params}, ids, jax.numpy.arange(5)[None], jax.numpy.ones_like(ids)
        )
        log_probs = jax.nn.log_softmax(expected[0], axis=-1)
        by_hand = [float(log_probs[i, token]) for i, token in enumerate(IDS[1:])]
    logits = model(IDS)
    assert logits.shape == (5, 272) and logits.dtype == np.float64
    np.testing.assert_allclose(logits, expected[0], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(model([IDS, IDS[::-1]])[0], logits)
    assert model.hidden(IDS).shape == (5, 32)
    np.testing.assert_allclose(model.log_probs(IDS), by_hand, rtol=0, atol=1e-12)
    both = model.log_probs([IDS, IDS[:3], IDS[:1]])
    assert [len(row) for row in both] == [4, 2, 0]
    np.testing.assert_allclose(both[1], by_hand[:2], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([5, 272], "ids up to 272, model.vocab_size is 272"),
        ([], "prompt 0 has no token"),
        ([0.5], r"tokens are float64 of shape \[1\]"),
        ([[[1]]], r"shape \[1, 1, 1\]"),
    ],
)
def test_tokens_that_are_none(tokens: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()(np.asarray(tokens, dtype=None if tokens else int))


def test_a_text_needs_a_tokenizer() -> None:
    model = dataclasses.replace(make(), tokenizer=None)
    for use in (model.encode, model, model.log_probs, model.generate, lambda text: next(model.stream(text))):
        with pytest.raises(UserError, match=r"there is no tokenizer.json"):
            use("def")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a model \(looked for config.toml and checkpoints/ \(a run\)"):
        jaxlm.load(tmp_path)
    with pytest.raises(UserError, match=r"not a run \(looked for config.toml"):
        jaxlm.Run(tmp_path)
    with pytest.raises(UserError, match=r"out_dir is empty"):
        jaxlm.train(config.Config(model=CFG))


def test_save_load_and_split(tmp_path: Path) -> None:
    model = make()
    model.save(tmp_path / "run")
    model.save(tmp_path / "llama", "llama")
    with pytest.raises(UserError, match="run exists"):
        model.save(tmp_path / "run")
    logits = np.asarray(model(IDS))
    for folder in ("run", "llama"):
        again = jaxlm.load(tmp_path / folder)
        np.testing.assert_array_equal(again(IDS), logits)
        assert again.tokenizer is not None
        assert again.generate("def", max_new_tokens=6) == model.generate("def", max_new_tokens=6)
    split = jaxlm.load(tmp_path / "run", mesh="zero3")
    assert len(split.params["embed"]["embedding"].sharding.device_set) == 8
    np.testing.assert_allclose(split([IDS] * 8)[0], logits, rtol=0, atol=1e-10)
    narrow = jaxlm.load(tmp_path / "run", dtype="float32")
    assert narrow.config.numerics.params == "float32" and narrow(IDS).dtype == np.float32
    np.testing.assert_allclose(narrow(IDS), logits, rtol=0, atol=1e-3)


def test_generate_and_stream() -> None:
    model = make()
    told: list[str] = []
    whole = model.generate("def", max_new_tokens=8, stream=lambda _, text: told.append(text))
    assert "".join(told) == whole.text == "".join(model.stream("def", max_new_tokens=8))
    warm = {"sampling": jaxlm.Sampling(temperature=2.0), "max_new_tokens": 8, "seed": 1}
    two = model.generate("def", num_samples=2, **warm)
    assert [row.tokens for row in model.generate(["def", "def"], **warm)] == [row.tokens for row in two]
    assert two[0].tokens != two[1].tokens


def test_a_model_shows_its_tree() -> None:
    model = make()
    text = repr(model)
    total = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    assert f"{total:,} parameters in float64" in text.splitlines()[0]
    assert "float64[272, 32]" in text and "8,704" in text
    layer = [{"kernel": np.zeros((2, 3))} for _ in range(12)]
    stack = {f"layers_{i}": leaf for i, leaf in enumerate(layer)} | {"head": np.zeros(4), "layers_12": np.zeros(6)}
    lines = tree.as_text(tree.branches(stack)).splitlines()
    assert [line.split()[0] for line in lines] == ["head", "layers_0", "kernel", "layers_12"]
    assert lines[1].split() == ["layers_0", "to", "layers_11,", "each", "6"]
    html = model._repr_html_()
    assert html.count("<details") == html.count("</details>") and "float64[272, 32]" in html


MANNERS = """
import json, logging, os, signal, sys, threading, warnings
import jax, matplotlib, numpy as np

def state():
    import matplotlib
    names = ("", "absl", "asyncio", "jax", "orbax", "matplotlib")
    loggers = {name: (logger.level, str(logger.handlers)) for name in names if (logger := logging.getLogger(name))}
    filters = {name: len(logging.getLogger(name).filters) for name in ("absl", "asyncio")}
    handlers = {int(number): str(signal.getsignal(number)) for number in signal.valid_signals()}
    return {
        "loggers": loggers, "filters": filters, "signals": handlers, "environment": dict(os.environ),
        "hooks": [str(hook) for hook in (sys.unraisablehook, sys.excepthook, sys.displayhook, threading.excepthook)],
        "matplotlib": matplotlib.rcParams._get("backend").__repr__() if hasattr(matplotlib.rcParams, "_get") else "",
        "jax": {name: str(value) for name, value in jax.config.values.items()},
    }

import jaxlm
matplotlib.use("svg")
before = state()
run = jaxlm.train("tiny.toml", "train.steps=4")
again = jaxlm.train(jaxlm.load_config("tiny.toml", ["train.steps=6"]), resume=True)
model = again.model()
text = model.generate("def", max_new_tokens=4).text + "".join(model.stream("def", max_new_tokens=4))
model.log_probs("def f"), model([1, 2]), repr(model), again._repr_html_(), model._repr_html_(), str(again)
jaxlm.convert("run", "hf", to="llama")
jaxlm.load("hf", dtype="float64")
model.save("copy")
report = jaxlm.check_parity("run", dtypes=["float64"], levels=["forward"])
after = state()
facts = {"same": report.same, "steps": again.checkpoints, "losses": again.column("validation_loss")[0]}
open("facts.json", "w").write(json.dumps({"before": before, "after": after, **facts}))
"""


def test_using_the_library_leaves_no_trace(tmp_path: Path) -> None:
    """It prints nothing and changes no logger, signal handler, hook, setting of JAX or backend of matplotlib.

    Nor the environment, which processes that are started later would inherit.
    """
    (tmp_path / "corpus").mkdir()
    for i in range(20):
        (tmp_path / "corpus" / f"module_{i}.py").write_text(f"def add_{i}(a, b):\n    return a + b + {i}\n\n" * 3)
    (tmp_path / "tiny.toml").write_text(NEW_RUN)
    (tmp_path / "use.py").write_text(MANNERS)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_PERSISTENT")}
    environment |= {"PYTHONPATH": str(ROOT), "XLA_FLAGS": with_devices()}
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:jaxlm", "use.py"],
        **{"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 280},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["after"] == facts["before"]
    assert facts["same"] and facts["steps"][-1] == 6 and facts["losses"] == [2, 4, 6]
