"""torch_ref with a fault in its own configuration or in its inputs, as sides for the explainer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxlm import config
from jaxlm.parity.sides.torch_side import TorchSide
from jaxlm.parity.trace import Arrays


class Ignoring(TorchSide):
    """Holds all tensors, as stored, and computes with those that its config has a use for."""

    def weights(self) -> Arrays:
        return dict(self.all)

    def __init__(self, settings: config.Config, tensors: Mapping[str, np.ndarray]) -> None:
        from torch_ref.models.decoder import Decoder

        self.all = tensors
        super().__init__(settings, {name: tensors[name] for name in Decoder(settings.model).state_dict()})


def shifted(step: int) -> type[TorchSide]:
    class Shifted(TorchSide):
        def forward(self, dtype: str, rows: Mapping[str, np.ndarray]) -> Arrays:
            return super().forward(dtype, {**rows, "positions": rows["positions"] + step})

    return Shifted


class OneDocument(TorchSide):
    """Sees a row as one document; `going_on`: with positions that go on."""

    going_on = False

    def forward(self, dtype: str, rows: Mapping[str, np.ndarray]) -> Arrays:
        places = {"positions": np.cumsum(np.ones_like(rows["positions"]), 1) - 1} if self.going_on else {}
        return super().forward(dtype, {**rows, **places, "segments": np.minimum(rows["segments"], 1)})


class OneText(OneDocument):
    going_on = True


class Half(TorchSide):
    """Computes in bfloat16 whatever it is asked for."""

    def forward(self, dtype: str, rows: Mapping[str, np.ndarray]) -> Arrays:
        return super().forward("bfloat16", rows)
