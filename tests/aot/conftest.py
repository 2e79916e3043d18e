"""Chips that are not here: abstract devices of their compilers, and the training step compiled for them."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from jaxlm import config
from jaxlm.mesh import Layout
from jaxlm.models.decoder import Decoder, abstract_params
from jaxlm.numerics import Policy
from jaxlm.recipes.pretrain import loss_fn
from jaxlm.train.engine import state_shardings
from jaxlm.train.optim import make_optimizer
from jaxlm.train.step import init_state, make_step

QUIET = {  # libtpu looks for the host of a TPU, and for a lock that only one process may hold
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@pytest.fixture(scope="session")
def tpu() -> Callable[[str], list[Any]]:
    """A function from `v5p:2x2x1` to the abstract devices of that slice."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("libtpu, the compiler for TPUs, is for Linux on x86-64")
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the compiler for TPUs is not installed: pip install 'jaxlm[plan-tpu]'")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    return lambda name: topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def compile_step(cfg: config.Config, devices: list[Any]) -> Any:
    """The training step of `cfg`, compiled for `devices`."""
    layout = Layout.from_config(cfg.mesh, devices)
    decoder, optimizer = Decoder(cfg.model, Policy.from_config(cfg.numerics)), make_optimizer(cfg.train)
    shardings = state_shardings(decoder, optimizer, layout)
    state = jax.eval_shape(lambda params: init_state(params, optimizer), abstract_params(decoder)[0])
    placed = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), state, shardings)
    kinds = dict.fromkeys(("tokens", "targets", "positions", "segments"), jnp.int32) | {"weights": jnp.float32}
    rows = cfg.train.batch_size, cfg.data.seq_len
    batch = {name: jax.ShapeDtypeStruct(rows, kind, sharding=layout.batch) for name, kind in kinds.items()}
    step = make_step(loss_fn(decoder, cfg.train), optimizer, cfg.train, seed=0, layout=layout, model=cfg.model)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, layout.replicated))
    return jitted.lower(placed, batch).compile()


@pytest.fixture(scope="session")
def compiled() -> Callable[[config.Config, list[Any]], Any]:
    """`compile_step`."""
    return compile_step
