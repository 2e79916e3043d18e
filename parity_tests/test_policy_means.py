"""Metrics of a policy that are means over trained tokens, in both frameworks, whatever divides its loss."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch

from jaxlm import config
from jaxlm.models.decoder import Decoder, abstract_params
from jaxlm.numerics import Policy
from jaxlm.recipes import grpo, ppo
from jaxlm.train.optim import make_optimizer
from jaxlm.train.step import Part, init_state, make_steps
from torch_ref.train.optim import adamw
from torch_ref.train.step import Part as TorchPart
from torch_ref.train.step import TrainState as TorchState
from torch_ref.train.step import make_steps as torch_steps


@pytest.mark.parametrize("recipe", [grpo, ppo])
def test_each_of_them_is_a_sum_of_the_objective(recipe: Any) -> None:
    model = config.Model(vocab_size=20, n_layers=1, d_model=8, n_heads=2, n_kv_heads=1, d_ff=12, max_seq_len=12)
    cfg = config.Config(model=model, rl=config.RL(rewards=("exact_text",), iterations=2))
    stage, policy = recipe.recipe(cfg), Policy.from_config(cfg.numerics)
    modules = {name: Decoder(tree.model, policy) for name, tree in stage.models.trained.items()}
    trees = {name: abstract_params(module)[0] for name, module in modules.items()}
    trained = trees if stage.models.several else trees["model"]
    batch = {name: jax.ShapeDtypeStruct(column.shape(4, 12), column.dtype) for name, column in stage.columns.items()}
    _, sums = jax.eval_shape(lambda *args: recipe.objective(modules, cfg)(*args, None), trained, {}, batch)
    assert sums.keys() > {*stage.objective.divisors, *stage.objective.divisors.values()}


def test_they_are_divided_by_tokens() -> None:
    """Two microbatches of two samples with three tokens each: a sum of six a sample is two a token."""

    def sums(rows: Any) -> dict[str, Any]:
        samples = rows.sum()
        rest = {"loss": samples, "weight": samples, "tokens": 3 * samples, "reward": 5 * samples}
        return rest | dict.fromkeys(grpo.BY_TOKENS, 6 * samples)

    train, divisors = config.Train(), grpo.BY_TOKENS
    part, params = Part("model", train, make_optimizer(train)), {"w": jnp.ones(())}
    loss = lambda params, _, batch, key: (params["w"] * batch["x"].sum(), sums(batch["x"]))  # noqa: E731
    step = make_steps(loss, [part], 2, seed=0, divisors=divisors)
    found: list[Any] = [step(init_state(params, part.optimizer), {}, {"x": jnp.ones(4)})[1]]
    weight = torch.nn.Parameter(torch.ones(()))
    theirs = TorchPart("model", train, adamw([(weight, True)], train))
    torch_loss = lambda batch: (weight * batch["x"].sum(), sums(batch["x"]))  # noqa: E731
    torch_step = torch_steps(torch_loss, [theirs], 2, seed=0, divisors=divisors)
    found.append(torch_step(TorchState(), {"x": torch.ones(4)})[1])
    for metrics in found:
        assert all(metrics[name] == 2 for name in grpo.BY_TOKENS)
        assert metrics["loss"] == 1 and metrics["reward"] == 5
