"""Names of topologies, and the devices that they become."""

import pytest

from jaxlm.errors import UserError
from jaxlm.plan.chips import CHIPS
from jaxlm.plan.topology import parse


@pytest.mark.parametrize(
    ("text", "devices", "hosts"),
    [
        ("v5p:4x4x4", 64, 16),
        ("v5p:8x8x8", 512, 128),
        ("v6e:16x16", 256, 64),
        ("2*v6e:16x16", 512, 128),
        ("v7x:2x2x1", 8, 1),  # two devices a chip
        ("v5e:1x1", 1, 1),
        ("h100:512", 512, 64),
        ("A100-40:4", 4, 1),
        ("cpu:8", 8, 1),
    ],
)
def test_topology(text, devices, hosts):
    topology = parse(text)
    assert (topology.devices, topology.hosts) == (devices, hosts)
    assert str(topology) == text.lower()


def test_slices_as_an_option():
    assert parse("v5p:2x2x2", slices=4) == parse("4*v5p:2x2x2")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v5p", "write CHIP:SHAPE"),
        ("v5p:4x4", "v5p takes 3 sides (such as v5p:4x4x4)"),
        ("v6e:8", "v6e takes 2 sides"),
        ("h100:8x8", "h100 takes a number"),
        ("h10:8", "did you mean 'h100'?"),
        ("v6e:0x4", "v6e takes 2 sides"),
        ("v6e:3x5", "let the first two sides be even"),
        ("v6e:32x16", "512 chips in one slice (a slice has 256 at most"),
        ("cpu:99999999", "99,999,999 devices (65,536 are the most)"),
    ],
)
def test_refused(text, words):
    with pytest.raises(UserError) as caught:
        parse(text)
    assert words in str(caught.value)


def test_chips_are_plausible():
    """A slip of a power of ten would stand out: balances of arithmetic, memory and links of real chips."""
    for chip in CHIPS.values():
        if chip.platform != "cpu":
            assert 100 < chip.flops / chip.hbm_bandwidth < 700, chip
            assert 5 < chip.hbm_bandwidth / chip.link < 100, chip
            assert 4 < chip.link / chip.network < 40, chip
            assert 15 * 2**30 < chip.hbm < 200 * 2**30, chip
