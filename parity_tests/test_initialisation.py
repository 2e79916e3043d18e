"""Both frameworks begin as `docs/initialisation.md` says, parameter by parameter: the test reads the table."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from scipy import stats

from jaxlm import config
from jaxlm.convert import native
from jaxlm.convert.canonical import canonical, leaves
from jaxlm.convert.rows import Parameters
from jaxlm.models import decoder as jax_decoder
from torch_ref.models import decoder as torch_decoder

TABLE = Path(__file__).parents[1] / "docs" / "initialisation.md"
BASE: dict[str, Any] = {"vocab_size": 300, "d_model": 64, "n_layers": 6, "n_heads": 4, "d_ff": 192, "max_seq_len": 32}
CASES: dict[str, dict[str, Any]] = {
    "attention and mlp": {
        "biases": ("qkv", "attention_out", "mlp", "head"),
        "positions": "learned",
        "norm": "layernorm",
        "tie_embeddings": False,
        "qk_norm": True,
    },
    "sinks": {"sink_tokens": 40, "sink_logits": True, "n_heads": 32, "head_dim": 8},
    "experts": {
        "pattern": ("attention+moe",),
        "biases": ("router", "experts", "mlp"),
        "moe": config.MoE(n_experts=4, n_shared=1, noisy=True, selection_bias=True, d_ff=48),
    },
    "mamba": {"pattern": ("mamba", "attention+mlp"), "mamba": config.Mamba(proj_bias=True, inner_norms=True)},
    "mamba2": {"pattern": ("mamba2",), "mamba": config.Mamba(head_dim=2, d_state=16)},
}
LEAST = 1e-4
"""Probability that a sample of a distribution strays as far as it does; the seeds are fixed."""

Draws = dict[str, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]
Sample = Callable[[np.ndarray, config.Model, tuple[int, ...]], tuple[np.ndarray, Any]]
DISTRIBUTIONS: dict[str, Sample] = {
    "N(0, std)": lambda x, cfg, shape: (x, stats.norm(0, cfg.init_std)),
    "N(0, std / √(b L))": lambda x, cfg, shape: (x, stats.norm(0, cfg.init_std / branches(cfg) ** 0.5)),
    "0": lambda x, cfg, shape: (x, 0.0),
    "1": lambda x, cfg, shape: (x, 1.0),
    "log 1 … log P": lambda x, cfg, shape: (x.reshape(-1, *shape) - np.log(np.arange(1, shape[1] + 1)), 0.0),
    "log U(1, 16)": lambda x, cfg, shape: (np.exp(x), stats.uniform(1, 15)),
    "U(-1/√K, 1/√K)": lambda x, cfg, shape: (x, stats.uniform(-(shape[0] ** -0.5), 2 * shape[0] ** -0.5)),
    "U(-1/√R, 1/√R)": lambda x, cfg, shape: (x, stats.uniform(-(shape[0] ** -0.5), 2 * shape[0] ** -0.5)),
    "softplus⁻¹ exp U(log dt_min, log dt_max)": lambda x, cfg, shape: (
        np.log(np.log1p(np.exp(x))),
        stats.uniform(np.log(cfg.mamba.dt_min), np.log(cfg.mamba.dt_max / cfg.mamba.dt_min)),
    ),
}


def branches(cfg: config.Model) -> int:
    """b L of the block that `cfg` was resolved for."""
    return (2 if "+" in cfg.pattern[0] else 1) * cfg.n_layers


def rows() -> Iterator[tuple[str, str]]:
    """Pattern of names and distribution, from the table."""
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 6 and "`" in cells[2]:
            for name in re.findall("`(.+?)`", cells[2]):
                yield name, cells[3].strip("`")


def row_of(name: str, cfg: config.Model) -> str:
    """The entry of the table for a parameter."""
    mixer = cfg.halves(kind_of(name, cfg)).mixer_name if name.startswith("layers.") else ""
    names = [pattern for pattern, _ in rows()]
    own = [p for p in names if p.endswith(f"@{mixer}") and fnmatch.fnmatchcase(name, p.removesuffix(f"@{mixer}"))]
    found = own or [pattern for pattern in names if fnmatch.fnmatchcase(name, pattern)]
    assert len(found) == 1, f"{name}: {found or 'not in the table'}"
    return found[0]


def kind_of(name: str, cfg: config.Model) -> str:
    return cfg.pattern[int(name.split(".")[1]) % len(cfg.pattern)]


def half_of(name: str, cfg: config.Model) -> config.Model:
    """`[model]` as the module sees it."""
    if not name.startswith("layers."):
        return cfg
    halves = cfg.halves(kind_of(name, cfg))
    return halves.mixer if ".mixer" in name else halves.ffn if ".ffn." in name else cfg


def draws(cfg: config.Model) -> Draws:
    """A random model in both frameworks: by parameter without its layer, the values of each layer."""
    ours = dict(canonical(jax_decoder.init_params(jax_decoder.Decoder(cfg), jax.random.key(7)), cfg))
    state = torch_decoder.init_params(torch_decoder.Decoder(cfg), 7).state_dict()
    theirs = Parameters({name: tensor.numpy() for name, tensor in state.items()}, cfg, native.rows(cfg))
    found: Draws = {}
    for name in ours:
        slot = int(name.split(".")[1]) % len(cfg.pattern) if name.startswith("layers.") else 0
        group = found.setdefault(f"{slot} {re.sub('[0-9]+', '', name, count=1)}", ({}, {}))
        group[0][name], group[1][name] = ours[name], theirs[name]
    return found


def check_sample(what: str, x: np.ndarray, distribution: Any) -> None:
    """Mean, spread and shape of a sample, or the constant that it is."""
    x = np.asarray(x, np.float64).ravel()
    if isinstance(distribution, float):
        np.testing.assert_allclose(x, distribution, rtol=0, atol=1e-6, err_msg=what)
        return
    mean, std = distribution.mean(), distribution.std()
    assert abs(x.mean() - mean) < 5 * std / x.size**0.5, f"{what}: mean {x.mean():.4g} for {mean:.4g}"
    assert abs(x.std() / std - 1) < 5 / x.size**0.5, f"{what}: spread {x.std():.4g} for {std:.4g}"
    likely = stats.kstest(x, distribution.cdf).pvalue
    assert likely > LEAST, f"{what}: Kolmogorov-Smirnov {likely:.1e}"


def check_draws(cfg: config.Model, found: Draws) -> None:
    """Every parameter is in the table and distributed as that says."""
    table = dict(rows())
    for ours, theirs in found.values():
        name = next(iter(ours))
        row, half, shape = row_of(name, cfg), half_of(name, cfg), ours[name].shape
        samples, distribution = [], None
        for what, values in (("jaxlm", ours), ("torch_ref", theirs)):
            x, distribution = DISTRIBUTIONS[table[row]](np.stack(list(values.values())), half, shape)
            check_sample(f"{what} {name}", x, distribution)
            samples.append(x.ravel())
        if not isinstance(distribution, float):
            assert stats.ks_2samp(*samples).pvalue > LEAST, f"{name}: the frameworks differ"


def model(**options: Any) -> config.Model:
    return config.Model(**{**BASE, **options}, init_std=0.05)


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_table(case: str) -> None:
    cfg = model(**CASES[case])
    check_draws(cfg, draws(cfg))


def test_scores_are_those_of_the_table() -> None:
    """Of many classes, since a single score has few parameters."""
    cfg = model(head="classes", classes=40)
    ours = jax_decoder.init_params(jax_decoder.Decoder(cfg), jax.random.key(7))["score"]
    theirs = torch_decoder.init_params(torch_decoder.Decoder(cfg), 7).score
    assert {row_of(f"score.{kind}", cfg) for kind in ours} == {"score.kernel", "score.bias"}
    for what, kernel, bias in (
        ("jaxlm", ours["kernel"], ours["bias"]),
        ("torch_ref", theirs.weight.detach().numpy(), theirs.bias.detach().numpy()),
    ):
        check_sample(what, np.asarray(kernel), stats.norm(0, 0.05))
        check_sample(what, np.asarray(bias), 0.0)


def test_no_row_is_idle() -> None:
    """Each row of the table speaks of a parameter that some model has."""
    used = {row_of(name, cfg) for cfg in (model(**options) for options in CASES.values()) for name in leaves(cfg)}
    assert used | {"score.kernel", "score.bias"} == {name for name, _ in rows()}
    assert {distribution for _, distribution in rows()} == set(DISTRIBUTIONS)


FAULTS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "no scaling of the residual": ("o_proj", lambda x: x * 12**0.5),
    "scaled by depth alone": ("down_proj", lambda x: x * 2**0.5),
    "uniform of the same spread": ("up_proj", lambda x: 0.05 * 3**0.5 * (2 * stats.norm(0, 0.05).cdf(x) - 1)),
    "shifted": ("embed", lambda x: x + 0.005),
    "a norm of zeros": ("final_norm.scale", np.zeros_like),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str) -> None:
    part, change = FAULTS[fault]
    found = draws(model())
    for _, theirs in found.values():
        theirs |= {name: change(x) for name, x in theirs.items() if part in name}
    with pytest.raises(AssertionError, match="torch_ref"):
        check_draws(model(), found)
