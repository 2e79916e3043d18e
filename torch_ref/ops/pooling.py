"""One vector for each document of a row: that of its last token, or the mean of all.

Documents are found by their segment, never by the end of the row: rows may be padded on either side, or packed.

Shapes: B batch, T length, D width, M documents of a row.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from torch_ref.numerics import wide


def present(segments_BT: Int[Tensor, "b t"], documents: int) -> Bool[Tensor, "b m"]:
    """Which of the segments 1 to `documents` a row has."""
    return _members(segments_BT, documents).any(dim=1)


def last_token(
    x_BTD: Float[Tensor, "b t d"], segments_BT: Int[Tensor, "b t"], documents: int
) -> Float[Tensor, "b m d"]:
    """The vector of the last token of each segment 1 to `documents`; zeros for one that the row does not have."""
    members_BTM = _members(segments_BT, documents)
    index_T1 = torch.arange(segments_BT.shape[1], device=segments_BT.device)[:, None]
    last_BM = torch.where(members_BTM, index_T1, 0).amax(dim=1)
    picked_BMD = torch.take_along_dim(x_BTD, last_BM[..., None], dim=1)
    return torch.where(members_BTM.any(dim=1)[..., None], picked_BMD, 0)


def mean(x_BTD: Float[Tensor, "b t d"], segments_BT: Int[Tensor, "b t"], documents: int) -> Float[Tensor, "b m d"]:
    """The mean vector of each segment 1 to `documents`, summed wide; zeros for one that the row does not have."""
    width = wide(x_BTD.dtype)
    members_BTM = _members(segments_BT, documents).to(width)
    sum_BMD = torch.einsum("btm,btd->bmd", members_BTM, x_BTD.to(width))
    count_BM = members_BTM.sum(dim=1).clamp(min=1)
    return (sum_BMD / count_BM[..., None]).to(x_BTD.dtype)


def _members(segments_BT: Tensor, documents: int) -> Tensor:
    return segments_BT[..., None] == torch.arange(1, documents + 1, device=segments_BT.device)
