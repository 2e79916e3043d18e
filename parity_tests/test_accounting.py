"""Both engines count the same parameters and the same matrix products, so that their MFU means the same."""

from __future__ import annotations

import jax
import pytest

from jaxlm.counts import parameters
from jaxlm.models.decoder import Decoder, abstract_params
from parity_tests import pairs
from parity_tests.options import MIXTURES, OPTIONS
from torch_ref.models.decoder import Decoder as TorchDecoder
from torch_ref.train import engine


@pytest.mark.parametrize("name", [*OPTIONS, *MIXTURES])
def test_counts(name: str) -> None:
    options = {key: value for key, value in (OPTIONS | MIXTURES)[name].items() if key != "loss"}
    cfg = pairs.model(**options)
    mirror = TorchDecoder(cfg)
    assert parameters.matmul_params(Decoder(cfg)) == engine.matmul_params(mirror)
    total = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(Decoder(cfg))[0]))
    assert total == sum(parameter.numel() for parameter in mirror.parameters())
