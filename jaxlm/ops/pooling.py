"""One vector for each document of a row: that of its last token, or the mean of all.

Documents are found by their segment, never by the end of the row: rows may be padded on either side, or packed.

Shapes: B batch, T length, D width, M documents of a row.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.numerics import wide
from jaxlm.typed_jax import einsum


def present(segments_BT: Int[Array, "b t"], documents: int) -> Bool[Array, "b m"]:
    """Which of the segments 1 to `documents` a row has."""
    return _members(segments_BT, documents).any(axis=1)


def last_token(x_BTD: Float[Array, "b t d"], segments_BT: Int[Array, "b t"], documents: int) -> Float[Array, "b m d"]:
    """The vector of the last token of each segment 1 to `documents`; zeros for one that the row does not have."""
    members_BTM = _members(segments_BT, documents)
    index_T1 = jnp.arange(segments_BT.shape[1])[:, None]
    # The largest index of a member. A segment without members gives index 0, whose vector is read and then replaced by
    # zeros, so that shapes do not depend on the data.
    last_BM = jnp.max(jnp.where(members_BTM, index_T1, 0), axis=1)
    picked_BMD = jnp.take_along_axis(x_BTD, last_BM[..., None], axis=1)
    return jnp.where(members_BTM.any(axis=1)[..., None], picked_BMD, 0)


def mean(x_BTD: Float[Array, "b t d"], segments_BT: Int[Array, "b t"], documents: int) -> Float[Array, "b m d"]:
    """The mean vector of each segment 1 to `documents`, summed wide; zeros for one that the row does not have."""
    width = wide(x_BTD.dtype)
    members_BTM = _members(segments_BT, documents).astype(width)
    # A product of matrices with the 0-1 membership sums all documents of a row at once, whatever their lengths. Padding
    # has segment 0 and is a member of none.
    sum_BMD = einsum("btm,btd->bmd", members_BTM, x_BTD.astype(width))
    count_BM = jnp.maximum(members_BTM.sum(axis=1), 1)
    return (sum_BMD / count_BM[..., None]).astype(x_BTD.dtype)


def _members(segments_BT: Array, documents: int) -> Array:
    return segments_BT[..., None] == jnp.arange(1, documents + 1)
