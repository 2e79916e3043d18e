"""AdamW by Optax: decoupled weight decay (Loshchilov & Hutter 2019), never on norms and biases."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm import config
from jaxlm.run.schedule import learning_rate

DECAYED = ("kernel", "embedding", "a", "b")


def make_optimizer(train: config.Train) -> optax.GradientTransformation:
    """AdamW with the schedule of `[train]`. Clipping belongs to the step, which knows the gradient norm."""
    return optax.adamw(
        lambda count: learning_rate(train, jnp.asarray(count, float), jnp),
        b1=train.beta1,
        b2=train.beta2,
        eps=train.eps,
        weight_decay=train.weight_decay,
        mask=decay_mask,
    )


def decay_mask(params: Any) -> Any:
    """True for kernels, embeddings and the matrices of adapters, which decay; False for norm scales and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)
