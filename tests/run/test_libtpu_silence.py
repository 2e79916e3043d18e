"""Commands say nothing about TPUs on a machine that has none, and leave one that has some alone."""

import os
import subprocess
import sys

import pytest

from jaxlm.cli import main
from jaxlm.processes.libtpu_silence import libtpu_silence

ASKED = "TPU_ACCELERATOR_TYPE"
LOOK = """
import jax
from jaxlm.processes.libtpu_silence import libtpu_silence
with libtpu_silence():
    print(jax.devices())
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in (ASKED, "TPU_WORKER_HOSTNAMES", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)


def test_no_line_about_a_tpu():
    pytest.importorskip("libtpu", reason="libtpu is for Linux on x86-64, and comes with jaxlm[plan-tpu]")
    plain = {name: x for name, x in os.environ.items() if name != "JAX_PLATFORMS" and not name.startswith("TPU_")}
    plain["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # beside other processes too
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, env=plain, check=True)
    assert (done.stderr, "CpuDevice" in done.stdout) == ("", True)


@pytest.mark.parametrize(("vendor", "told"), [("0x8086", True), ("0x1ae0", False)])
def test_a_device_of_googles_is_left_alone(monkeypatch, tmp_path, vendor, told):
    monkeypatch.setattr("jaxlm.processes.libtpu_silence.DEVICES", tmp_path)
    (tmp_path / "0000:00:05.0").mkdir()
    (tmp_path / "0000:00:05.0" / "vendor").write_text(vendor + "\n")
    with libtpu_silence():
        assert (ASKED in os.environ) is told
    assert ASKED not in os.environ


@pytest.mark.parametrize(("words", "told"), [(["--version"], True), (["launch", "--help"], False)])
def test_jobs_elsewhere_look_for_themselves(monkeypatch, tmp_path, words, told):
    monkeypatch.setattr("jaxlm.processes.libtpu_silence.DEVICES", tmp_path)
    monkeypatch.setattr(sys, "argv", ["jaxlm", *words])
    monkeypatch.setattr(sys.modules["jaxlm.cli.app"], "app", lambda **_: 7 if ASKED in os.environ else 8)
    assert main() == (7 if told else 8)
