"""Floating-point operations of a model for one token: a formula of the config, shared by both backends.

A product of a vector and a matrix of n parameters is 2 n FLOP (Kaplan et al. 2020, section 2.1); `mixing_flops` is
what mixers compute without parameters. Norms, activations, rotation and softmax are left out, as is usual.

Imports neither jax nor torch.
"""

from __future__ import annotations

from jaxlm import config


def flops_per_token(model: config.Model, matmul_params: int, seq_len: int, adapters: int = 0, whole: int = 0) -> int:
    """FLOP of forward and backward, three times the forward pass. Recomputation (remat) is not counted.

    Args:
        matmul_params: parameters in matrix products for one token, of experts only those that the token passes.
        adapters: parameters of adapters, if these alone are trained: a frozen matrix has no gradient of its own.
        whole: those of `matmul_params` that are trained beside adapters.
    """
    if adapters:
        return 4 * matmul_params + 3 * mixing_flops(model, seq_len) + 6 * adapters + 2 * whole
    return 3 * forward_flops(model, matmul_params, seq_len)


def forward_flops(model: config.Model, matmul_params: int, seq_len: int) -> int:
    """FLOP of the forward pass for one token of a text of `seq_len` tokens."""
    return 2 * matmul_params + mixing_flops(model, seq_len)


def mixing_flops(model: config.Model, seq_len: int) -> int:
    """FLOP that the mixers of all blocks spend on one token, their projections apart."""
    costs = {"attention": _attention, "mamba": _mamba, "mamba2": _mamba2}
    halves = (model.halves(kind) for kind in model.pattern)
    return round(model.repeats * sum(costs[half.mixer_name](half.mixer, seq_len) for half in halves))


def _attention(model: config.Model, seq_len: int) -> float:
    """Two products with every key seen: `4 N H keys`, where a causal text of T tokens shows T / 2 keys on average.

    A window of W shows W (1 - W / 2T): all tokens but the first W see W.
    """
    window = min(model.window + model.keep_first if model.window else seq_len, seq_len)
    keys = window * (1 - window / (2 * seq_len)) + model.sink_tokens
    return 4 * model.n_heads * model.head_dim * keys


def _mamba(model: config.Model, seq_len: int) -> int:
    """The convolution, and for each channel and number of state 7 FLOP of the recurrence (Gu & Dao 2023, equation 2).

    They are dt A, its exponential, (dt x) B, the update (2) and the output (2). dt x, D x and the gate are 4 a channel.
    """
    part = model.mamba
    channels = part.expand * model.d_model
    return channels * (2 * part.d_conv + 7 * (part.d_state or 16) + 4)


def _mamba2(model: config.Model, seq_len: int) -> float:
    """The convolution, and the four products of a chunk of Q tokens (Dao & Gu 2024, section 6), wholly counted.

    C B^T is 2 Q P for each group, its product with x 2 Q a channel, the states of the chunks and their output 2 P each.
    The recurrence over chunks is 2 P / Q a channel; dt x, D x and the gate are 4.
    """
    part = model.mamba
    channels, state, chunk = part.expand * model.d_model, part.d_state or 128, min(part.chunk, seq_len)
    conv = 2 * part.d_conv * (channels + 2 * part.n_groups * state)
    scan = 2 * chunk * state * part.n_groups + channels * (2 * chunk + 4 * state + 2 * state / chunk + 4)
    return conv + scan
