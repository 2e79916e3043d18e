"""Set-up of both test suites, made before jax or torch is imported; the processes that tests start inherit it."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os
import signal
import sys
import zlib
from collections.abc import Generator, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from tests.devices import on_devices
from tests.shared_checks import share_checks

share_checks()  # before the first module of jaxlm
gc.disable()  # until all modules are imported, below
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a job of a script's `&`, and by what it starts
ROOT = Path(__file__).parent
TESTS = itertools.count(1)

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # `make gpu-check` sets cuda,cpu
# Eight devices: meshes on any machine. XLA's passes run as ever, but LLVM does not optimise what they emit, and jaxlib
# 0.10 emits fusions the short way: programs compile in a quarter of the time. `make soak`, `make gpu-check` optimise.
# A program is one module of LLVM's, not up to 32 for as many threads, of which the workers of xdist have none to spare.
FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if version("jaxlib").startswith("0.10."):
    FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))  # shared by workers and by runs
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch and BLAS: the workers of xdist already fill the cores

# Compilation makes the first example slow, and a failure must come back on the next run.
settings.register_profile("jaxlm", deadline=None, derandomize=True)
settings.load_profile("jaxlm")


@pytest.fixture(autouse=True, scope="session")
def speaking() -> Iterator[None]:
    """The library shows what it does, as it does for the command line."""
    from jaxlm.cli.app import speaking

    with speaking():
        yield


SMALL = ((16, 16, 16), (32, 16, 32))


@pytest.fixture(autouse=True, scope="session")
def quick_runs() -> Iterator[None]:
    """Runs of this process draw no page (see `pages`), and time small products for their MFU: half a second each."""
    from jaxlm.run import peak
    from jaxlm.train import loop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peak, "SHAPES", SMALL)
        patch.setattr(loop, "write_report", lambda *_, **__: None)
        yield


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs of a test draw their pages."""
    from jaxlm.report.run_page import write_report
    from jaxlm.train import loop

    monkeypatch.setattr(loop, "write_report", write_report)


@pytest.fixture(scope="module")
def traced_once() -> Iterator[None]:
    """Runs of a module by one config share their programs, which each would trace and lower anew.

    Not where a test plants a fault in what is traced, nor where it compares a resumed run with a whole one.
    """
    import jax

    from jaxlm.config import toml
    from jaxlm.train.engine import JaxEngine

    begin, shared, made = JaxEngine.__init__, ("program", "decoder", "_step", "_eval", "_init", "_whole"), {}

    def begun(engine: Any, cfg: Any, recipe: Any, complete: Any) -> None:
        begin(engine, cfg, recipe, complete)
        devices = tuple(device.id for device in engine.layout.mesh.devices.flat)
        stage = toml.to_toml(dataclasses.replace(cfg, out_dir="")), getattr(recipe.objective.jax, "__qualname__", "")
        key = stage, devices, jax.config.read("jax_enable_x64")
        vars(engine).update(made.setdefault(key, {name: vars(engine)[name] for name in shared}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JaxEngine, "__init__", begun)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Imports make no garbage, and what they made stays: the collector leaves it alone, then and later."""
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(10_000)  # 700 new objects are soon there where functions are traced
        gc.enable()


@pytest.fixture(autouse=True)
def few_mappings() -> Iterator[None]:
    """Forget compiled programs before their memory mappings reach Linux's 65530 a process, where XLA crashes."""
    yield
    maps = Path("/proc/self/maps")  # long: read after every eighth test
    if next(TESTS) % 8 == 0 and "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        sys.modules["jax"].clear_caches()


@pytest.fixture(scope="module")
def on_one_device() -> Iterator[None]:
    """Runs of a module use one of the eight virtual devices, for eight cost a run of this process twice the time."""
    with on_devices(1):
        yield


@pytest.fixture
def one_device() -> Iterator[None]:
    """Runs of a test use one device."""
    with on_devices(1):
        yield


@pytest.fixture
def on_all_devices(on_one_device: None) -> Iterator[None]:
    """One test of such a module uses them all."""
    with on_devices(8):
        yield


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A number that is the test's own: different in each test, the same in each run."""
    return zlib.crc32(request.node.name.encode())


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """A numpy generator started from `seed`."""
    return np.random.default_rng(seed)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of text corpora: $JAXLM_DATA, or shared/data beside the repository."""
    path = Path(os.environ.get("JAXLM_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no corpora at {path}; name their folder in JAXLM_DATA")
    return path
