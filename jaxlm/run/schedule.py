"""The learning rate as a pure function of the step, in whichever array library the caller brings."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxlm import config


def learning_rate(train: config.Train, step: Any, xp: Any = np) -> Any:
    """Learning rate of the update number `step` (from 0).

    Rises linearly and reaches the peak at `warmup_steps`; then falls to `final_lr_fraction` of it at the last step by a
    half cosine (Loshchilov & Hutter 2017, equation 5), a line, or WSD's hold and line (Hu et al. 2024, section 4).

    Args:
        step: a number, or an array of the library `xp` (numpy or jax.numpy).
    """
    peak, final = train.learning_rate, train.learning_rate * train.final_lr_fraction
    left = max(train.steps - train.warmup_steps, 1)
    progress = xp.clip((step + 1 - train.warmup_steps) / left, 0.0, 1.0)
    if train.schedule == "cosine":
        rate = final + (peak - final) * 0.5 * (1 + xp.cos(np.pi * progress))
    elif train.schedule == "linear":
        rate = peak + (final - peak) * progress
    elif train.schedule == "wsd":
        hold = 1 - min(train.decay_fraction, 1.0)
        rate = peak + (final - peak) * xp.clip((progress - hold) / max(1 - hold, 1e-9), 0.0, 1.0)
    else:
        rate = peak + 0 * progress
    rise = (step + 1) / max(train.warmup_steps, 1)
    return xp.where(step + 1 < train.warmup_steps, peak * rise, rate)
