"""The collectives of a compiled step move what the mesh predicts, and what loops carry is added up once."""

from __future__ import annotations

import pytest

from benchmarks.scaling import traffic

WITHIN = 0.01
"""Beside the arrays that are counted there are sums of a few numbers: losses, norms, maxima of logits."""


@pytest.mark.parametrize(
    "sizes",
    [{"data": 8}, {"fsdp": 8}, {"data": 2, "tensor": 4}, {"fsdp": 4, "tensor": 2}],
    ids=lambda sizes: " x ".join(f"{axis} {size}" for axis, size in sizes.items()),
)
def test_traffic_is_as_predicted(sizes: dict[str, int]) -> None:
    found = traffic(sizes)
    assert found["moved"].keys() == found["predicted"].keys()
    for axis, size in found["predicted"].items():
        assert found["moved"][axis] == pytest.approx(size, rel=WITHIN), (axis, found["kinds"])
