"""What the preflight concludes from records: one fault at a time."""

from __future__ import annotations

from typing import Any

import pytest

from jaxlm.launch import checks

TOPOLOGY = """\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\x1b[0m
GPU0\t X \tNV18\t{link}\tPXB\t0-47
GPU1\tNV18\t X \tNV18\tSYS\t0-47
GPU2\t{link}\tNV18\t X \tSYS\t48-95
NIC0\tPXB\tSYS\tSYS\t X \t

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
"""


def record(**changed: Any) -> dict[str, Any]:
    return {"error": "", "read": True, "seen": [0, 1, 2], "free": 10_000_000_000} | changed


def test_equal_versions_pass() -> None:
    check = checks.same("versions", [{"jax": "1", "libtpu": "2"}] * 3)
    assert (check.verdict, check.text) == ("ok", "jax 1, libtpu 2")


@pytest.mark.parametrize(
    ("odd", "text"),
    [
        ({"jax": "2"}, "jax 1, but process 1 has 2"),
        ({}, "jax 1, but process 1 has None"),
        ({"jax": "1", "x": "9"}, "x None"),
    ],
)
def test_another_version_is_named(odd: dict[str, str], text: str) -> None:
    check = checks.same("versions", [{"jax": "1"}, odd, {"jax": "1"}])
    assert check.verdict == "FAIL" and check.text.startswith(text)


@pytest.mark.parametrize(
    ("counts", "kinds", "expected", "verdict", "text"),
    [
        ([8, 8], "HH", 16, "ok", "16 (H), processes: 2"),
        ([8, 8], "HH", 0, "ok", "16"),
        ([8, 8], "HH", 32, "FAIL", "32 expected"),
        ([8, 8, 7], "HHH", 0, "FAIL", "23 in all; local 8, but process 2 has 7"),
        ([8, 8, 8], "HAH", 0, "FAIL", "kind H, but process 1 has A"),
    ],
)
def test_devices(counts: list[int], kinds: str, expected: int, verdict: str, text: str) -> None:
    records = [{"count": count, "kind": kind} for count, kind in zip(counts, kinds, strict=True)]
    check = checks.devices(records, expected)
    assert check.verdict == verdict and text in check.text


@pytest.mark.parametrize(
    ("second", "needed", "text"),
    [
        (record(), 1, ""),
        (record(read=False), 1, "not shared: process 1"),
        (record(error="Read-only file system"), 1, "process 1 cannot write: Read-only file system"),
        (record(free=1_000), 2_000, "0.0 GB free, the checkpoints need"),
    ],
)
def test_storage(second: dict[str, Any], needed: int, text: str) -> None:
    check = checks.storage("/runs", [record(), second, record()], needed)
    assert (check.verdict == "ok") == (not text) and text in check.text


def test_a_folder_of_its_own_is_found_by_process_0_as_well() -> None:
    """A stale file of the same name would satisfy the reader; process 0 does not see what the other wrote."""
    check = checks.storage("/runs", [record(seen=[0, 2]), record(), record()], 1)
    assert "process 1 and process 0 do not see each other's files" in check.text


def test_clocks() -> None:
    late = [[10.0, 20.0], [10.4, 20.002], [13.0, 23.5]]
    check = checks.clocks(late)
    assert (check.verdict, check.text) == ("FAIL", "off against process 0: process 2 by +3.0 s")
    assert checks.clocks(late[:2]).text == "within 2 ms"  # the delay of one message is no skew


def test_all_reduce() -> None:
    row = {"bytes": 1e6, "seconds": 0.1, "gb_per_second": 1.5}
    assert checks.all_reduce([row], []).text == "1 MB at 1.50 GB/s"
    assert checks.all_reduce([row], [2]).verdict == "FAIL"


def test_a_slow_pair_is_named() -> None:
    rows = [{"processes": [i, i + 1], "hosts": [f"n{i}", f"n{i + 1}"], "gb_per_second": 20.0} for i in range(4)]
    assert checks.pairs(rows) == checks.Check("pairs", "ok", "median 20.00 GB/s")
    rows[2]["gb_per_second"] = 3.0
    check = checks.pairs(rows)
    assert check and check.verdict == "warn" and check.text.endswith("slow: 2-3 (n2 and n3) 3.00 GB/s")
    assert checks.pairs(rows[:1]) is None


@pytest.mark.parametrize(("link", "verdict"), [("NV18", "ok"), ("PIX", "ok"), ("SYS", "warn"), ("NODE", "warn")])
def test_links(link: str, verdict: str) -> None:
    check = checks.links({"n0": TOPOLOGY.format(link=link), "n1": ""})
    assert check and check.verdict == verdict
    assert check.text == (f"slow: n0 GPU0-GPU2 {link}" if verdict == "warn" else "3 pairs of GPUs")
    assert checks.links({"n0": ""}) is None
