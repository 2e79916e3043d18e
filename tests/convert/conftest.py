"""Models whose every parameter has values of its own, and folders that hold them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
import numpy as np
import pytest

from jaxlm import config
from jaxlm.config import toml
from jaxlm.convert import native
from jaxlm.convert.canonical import from_canonical, leaves
from jaxlm.convert.files import storage
from jaxlm.text.tokenizer import Tokenizer


@pytest.fixture
def make_model() -> Callable[..., config.Model]:
    """A config of four small layers with these options."""
    base = {
        "vocab_size": 300,
        "d_model": 16,
        "n_layers": 4,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_ff": 24,
        "max_seq_len": 32,
    }
    return lambda **options: config.Model(**{**base, **options})


@pytest.fixture
def make_params(rng: np.random.Generator) -> Callable[..., Any]:
    """A live tree with random values in every leaf."""

    def make(cfg: config.Model, dtype: str = "float32") -> Any:
        tensors = {name: rng.standard_normal(leaf.shape).astype(dtype) for name, leaf in leaves(cfg).items()}
        return from_canonical(tensors, cfg)

    return make


@pytest.fixture
def torch_folder(tmp_path: Path, make_model: Callable[..., config.Model], make_params: Callable[..., Any]) -> Path:
    """A torch_ref folder of a small model."""
    settings = config.Config(model=make_model())
    tensors = native.to_torch(make_params(settings.model), settings.model)
    files = {"config.toml": toml.to_toml(settings), "tokenizer.json": Tokenizer.bytes_level().to_json()}
    storage.write_folder(tmp_path / "torch", storage.planned(tensors), files, layout="torch")
    return tmp_path / "torch"


@pytest.fixture
def same() -> Callable[[Any, Any], None]:
    """Fails unless two trees have the same structure, dtypes and bits."""

    def check(a: Any, b: Any) -> None:
        assert jax.tree.structure(a) == jax.tree.structure(b)
        for path, leaf in jax.tree_util.tree_leaves_with_path(a):
            other = b
            for key in path:
                other = other[key.key]
            assert (leaf.dtype, leaf.shape) == (other.dtype, other.shape), path
            assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes(), path

    return check
