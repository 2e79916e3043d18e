"""Chips that are not here: the devices of their compilers, and the training step compiled for them."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from jaxlm import config
from jaxlm.mesh import Layout
from jaxlm.plan import topology
from jaxlm.recipes import make_recipe
from jaxlm.train.program import abstract_inputs, training_program


@pytest.fixture(scope="session")
def tpu() -> Callable[[str], Sequence[Any]]:
    """A function from `v5p:2x2x1` to the abstract devices of that slice."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("libtpu, the compiler for TPUs, is for Linux on x86-64")
    if not topology.has_tpu_compiler():
        pytest.skip("the compiler for TPUs is not installed: pip install 'jaxlm[plan-tpu]'")

    def devices(name: str) -> Sequence[Any]:
        machine = topology.parse(name)
        with topology.environment(machine):
            return topology.target(machine).devices

    return devices


@pytest.fixture(scope="session")
def compiled() -> Callable[[config.Config, Sequence[Any]], Any]:
    """The training step of a config, compiled for devices."""

    def compile_step(cfg: config.Config, devices: Sequence[Any]) -> Any:
        layout = Layout.from_config(cfg.mesh, devices)
        program = training_program(cfg, layout, make_recipe(cfg))
        return program.step.lower(*abstract_inputs(cfg, layout, program)).compile()

    return compile_step
