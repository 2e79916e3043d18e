"""What keeps the memory of a run flat is said to JAX while it still listens."""

import sys

CODE = """
import sys
from jax._src import xla_bridge
from jaxlm.cli import main
from jaxlm.recipes import start

setting = start.one_step_at_a_time

def noted():
    print("devices before:", list(xla_bridge._backends), flush=True)
    setting()

start.one_step_at_a_time = noted
sys.exit(main())
"""


def test_the_setting_comes_before_the_first_device(runs, tmp_path, monkeypatch):
    """`jaxlm train` as a process: JAX reads `jax_cpu_enable_async_dispatch` once, when it finds its devices."""
    command = runs.command
    monkeypatch.setattr(runs, "command", lambda *a, **b: [sys.executable, "-c", CODE, *command(*a, **b)[3:]])
    process = runs.start(tmp_path, "train.steps=1", "eval.every=0", "checkpoint.every=0")
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "devices before: []\n" in said
