"""Processes compile before one of them runs, and what they compile is the same program."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxlm.errors import MissingPeersError, UserError
from jaxlm.processes import compiled_together, meet
from jaxlm.processes.compiled_together import CompiledTogether, connect

STEP = """
import hashlib
from jaxlm.config import toml
from jaxlm.mesh import Layout
from jaxlm.recipes import make_recipe
from jaxlm.train.program import abstract_inputs, training_program
sizes = "vocab_size=64 d_model=16 n_layers=2 n_heads=4 n_kv_heads=4 d_ff=32".split()
mesh = "mesh.data=2 mesh.context=2 mesh.tensor=2 data.seq_len=16 train.batch_size=16 tokenizer.kind=bytes".split()
options = ['model.pattern=["attention+moe", "mamba+mlp"]', *(f"model.{size}" for size in sizes), *mesh]
cfg = toml.load("configs/quickstart.toml", options)
layout = Layout.from_config(cfg.mesh)
program = training_program(cfg, layout, make_recipe(cfg))
print(hashlib.sha256(program.step.lower(*abstract_inputs(cfg, layout, program)).as_text().encode()).hexdigest())
"""


@pytest.fixture
def happened(monkeypatch):
    """This process takes itself for one of two; a list of what it compiled, agreed on, and ran."""
    events = []

    def agree(facts):
        events.append(("agree", *facts))

    def compiled(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            events.append("compile")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(meet, "agree", agree)
    jax.monitoring.register_event_duration_secs_listener(compiled)
    yield events
    jax.monitoring.unregister_event_duration_listener(compiled)


def test_all_compile_then_meet_and_jax_compiles_nothing_again(happened):
    short, long = np.arange(3.0, dtype=np.float32), np.arange(7.0, dtype=np.float32)
    double = CompiledTogether(jax.jit(lambda x, scale: scale["by"] * x), "it")
    met = ["compile", ("agree", "the program of it")]
    for by, (array, expected) in enumerate([(short, met), (short + 1, []), (long, met), (short, [])]):
        happened.clear()
        result = double(array, {"by": np.float32(by)})
        assert happened == expected
        np.testing.assert_array_equal(result, by * array)


def test_programs_that_differ_do_not_run(monkeypatch, happened):
    facts = []

    def differ(mine):
        facts.append(mine)
        raise UserError(meet.difference([mine, {"the program of it": "another"}]))

    monkeypatch.setattr(meet, "agree", differ)
    ran = []
    call = CompiledTogether(jax.jit(lambda x: (jax.debug.callback(lambda: ran.append(1)), x)[1]), "it")
    for _ in range(2):
        with pytest.raises(UserError, match=r"the processes differ in the program of it: [0-9a-f]{12} on process 0; "):
            call(jnp.ones(2))
    assert facts[0] == facts[1] and not ran
    with pytest.raises(UserError):
        CompiledTogether(jax.jit(lambda x: x + 1), "it")(jnp.ones(2))
    assert facts[2] != facts[1], "another program"


class Gone:
    """The client of a coordinator that answers no longer."""

    def key_value_set(self, *_: Any) -> None: ...

    def blocking_key_value_get(self, *_: Any) -> str:
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect\nand more")


def test_without_its_coordinator_a_process_says_one_line(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(meet, "client", Gone)
    with pytest.raises(
        MissingPeersError, match=r"^process 0: the coordinator answers no longer: UNAVAILABLE: .* \("
    ) as it:
        meet.agree({})
    assert it.value.exit_code == 1 and "\n" not in str(it.value)


def test_one_process_neither_waits_nor_lowers(monkeypatch):
    monkeypatch.setattr(meet, "agree", lambda _: pytest.fail("nobody to meet"))
    monkeypatch.setattr(compiled_together, "_form", lambda _: pytest.fail("work on the hot path"))
    assert CompiledTogether(jax.jit(lambda x: x + 1), "one more")(1) == 2
    monkeypatch.setattr(compiled_together, "_exchange", lambda _: pytest.fail("nobody to exchange anything with"))
    connect(Mesh(np.array(jax.devices()[:2]), ("data",)))


def test_the_step_does_not_depend_on_the_hashes_of_strings(request):
    """Each process has its own: a set of names in a traced function gives each process another program."""
    programs = []
    for seed in "12":  # data and context come in two orders
        environment = os.environ | {"PYTHONHASHSEED": seed, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
        options: Any = {"capture_output": True, "text": True, "env": environment, "cwd": request.config.rootpath}
        done = subprocess.run([sys.executable, "-c", STEP], timeout=240, **options)
        assert done.returncode == 0, done.stderr
        programs.append(done.stdout)
    assert programs[0] == programs[1]
