"""Whole runs of reinforcement learning in both frameworks, float64: the same tokens, rewards and parameters.

Both begin from the same weights and seed. In every phase each draws its own samples from its own policy, grades them
and updates; nothing is handed from one to the other.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import jaxlm
from jaxlm import config
from jaxlm.convert.adapters import to_torch as adapters_to_torch
from jaxlm.convert.files.safetensors_file import MappedFile
from jaxlm.convert.native import to_torch
from jaxlm.data.prompts import open_task
from jaxlm.infer.model import Model
from jaxlm.models.decoder import Decoder as JaxDecoder
from jaxlm.models.decoder import abstract_params
from jaxlm.numerics import Policy as JaxPolicy
from jaxlm.parity.inputs import random_params
from jaxlm.parity.stage import compare_stage
from jaxlm.recipes import grpo as jax_grpo
from jaxlm.recipes import ppo as jax_ppo
from jaxlm.recipes import start  # two threads that import at once break Python's ast
from jaxlm.recipes.rollouts import graders
from jaxlm.recipes.rollouts.jax_actor import JaxActor
from jaxlm.recipes.rollouts.phases import Phase, Phases
from jaxlm.recipes.rollouts.rewards import REWARDS, find_rewards
from jaxlm.recipes.rollouts.source import RolloutData
from jaxlm.run.metrics import read_metrics
from jaxlm.text.tokenizer import Tokenizer
from jaxlm.train import engine as jax_engine
from jaxlm.train.adapters import targets as adapter_targets
from jaxlm.train.optim import make_optimizer as jax_optimizer
from parity_tests import pairs
from parity_tests.tolerances import FLOAT64
from torch_ref.models import attach_lora
from torch_ref.models.decoder import Decoder as TorchDecoder
from torch_ref.numerics import Policy as TorchPolicy
from torch_ref.recipes import grpo as torch_grpo
from torch_ref.recipes import ppo as torch_ppo
from torch_ref.train.optim import make_optimizer as torch_optimizer
from torch_ref.train.optim import set_learning_rate

IMPORTED = (jax_engine,)
PHASES = 10
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "experts": {"pattern": ("attention+moe",), "moe": {"n_experts": 4, "d_ff": 24, "balance_loss": 0.1}},
    "mamba": {"pattern": ("mamba+mlp", "attention+mlp")},
}
SOAK = pytest.mark.soak
REWARDED = {"kl": "reward", "kl_kind": "k1", "kl_horizon": 40}
RUNS = [
    pytest.param("dense", {"temperature": 0.6}, id="grpo, one update"),
    pytest.param("dense", {"iterations": 2, "minibatches": 2, "kl": "loss", "advantage": "rloo"}, id="rloo with kl"),
    pytest.param("dense", {"iterations": 2, "ratio": "sequence", **REWARDED, "kl_target": 0.1}, id="gspo", marks=SOAK),
    pytest.param("experts", {"iterations": 2, "clipping": "cispo", "divisor": "constant"}, id="experts", marks=SOAK),
    pytest.param("mamba", {"iterations": 2, "kl": "loss", "kl_kind": "unbiased"}, id="mamba", marks=SOAK),
]
CRITICS = [
    pytest.param("dense", {"iterations": 2, "group": 1, "prompts": 16, "kl": "reward", "kl_kind": "k1"}, id="dense"),
    pytest.param("experts", {"iterations": 2, "lam": 0.9, "discount": 0.98}, id="experts", marks=SOAK),
    pytest.param("mamba", {"minibatches": 2, "value_clip": 0.05}, id="mamba", marks=SOAK),
]
ENDS: dict[str, Any] = {"eos_id": Tokenizer.bytes_level().special("eot"), "pad": Tokenizer.bytes_level().pad}


def settings(model: str, rl: dict[str, Any]) -> config.Config:
    base = {"n_layers": 2, "d_model": 16, "n_heads": 2, "n_kv_heads": 1, "d_ff": 24, "layer_loop": "unroll"}
    size = {"vocab_size": Tokenizer.bytes_level().vocab_size, "max_seq_len": 32}
    sampled = {"task": "reverse(length=2)", "prompts": 4, "group": 4, "max_new_tokens": 5}
    return config.Config(
        model=pairs.model(**(base | size | MODELS[model])),
        data=config.Data(seq_len=12),
        train=config.Train(learning_rate=3e-3, warmup_steps=0, steps=100, batch_size=16, loss_block=60),
        numerics=config.Numerics(params="float64", compute="float64", matmul="highest"),
        rl=config.RL(rewards=("even_letters", "length(per_token=0.05) * -0.5"), **(sampled | rl)),
        seed=3,
    )


def value_model(cfg: config.Config) -> config.Model:
    return dataclasses.replace(cfg.model, head="value")


def even_letters(prompt: str, completion: str, row: Any) -> float:
    """The share of letters with an even code: a random model is often right, so that groups differ."""
    return sum(ord(letter) % 2 == 0 for letter in completion) / max(len(completion), 1)


@pytest.fixture(autouse=True)
def graded_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REWARDS, "even_letters", even_letters)
    monkeypatch.setattr(graders, "QUICK", frozenset({"even_letters", "length"}))


class JaxSide:
    """Trees by name, each with its optimiser; it looks like an engine to the recipes."""

    def __init__(self, cfg: config.Config, recipe: Any, trees: dict[str, Any]) -> None:
        policy = JaxPolicy.from_config(cfg.numerics)
        self.decoder = JaxDecoder(cfg.model, policy)
        modules = {"model": self.decoder, "value": JaxDecoder(value_model(cfg), policy)}
        self.trees, self.frozen, self.recipe = trees, {"reference": trees["model"]}, recipe
        self.program = SimpleNamespace(modules=modules)
        optimizer = jax_optimizer(cfg.train)
        self.states = {name: optimizer.init(tree) for name, tree in trees.items()}
        loss = recipe.objective(modules, cfg)

        @jax.jit
        def update(trees: Any, states: Any, batch: Any) -> Any:
            one = recipe is jax_grpo
            grads, sums = jax.grad(
                lambda trees: loss(trees["model"] if one else trees, self.frozen, batch, None), has_aux=True
            )(trees)
            new_trees, new_states = {}, {}
            for name, tree in trees.items():
                scaled = jax.tree.map(lambda g: g / sums["weight"], grads[name])
                moves, new_states[name] = optimizer.update(scaled, states[name], tree)
                new_trees[name] = optax.apply_updates(tree, moves)
            return new_trees, new_states

        self._update = update

    @property
    def params(self) -> Any:
        return self.trees["model"]

    def tree(self, name: str) -> Any:
        return self.trees[name]

    def step(self, batch: Any) -> None:
        self.trees, self.states = self._update(self.trees, self.states, batch)

    def actor(self, cfg: config.Config) -> Any:
        if self.recipe is jax_ppo:
            return jax_ppo.JaxCritic(self, cfg, **ENDS)
        return JaxActor(self.decoder, self.params, self.frozen["reference"], cfg, **ENDS)

    def parameters(self, cfg: config.Config) -> dict[str, np.ndarray]:
        found = dict(pairs.torch_names(self.params, self.decoder))
        if "value" in self.trees:
            named = to_torch(self.trees["value"], value_model(cfg))
            found |= {f"value.{name}": np.asarray(x, np.float64) for name, x in named}
        return found


class TorchSide:
    """The same in PyTorch."""

    def __init__(self, cfg: config.Config, recipe: Any, trees: dict[str, Any]) -> None:
        self.decoder, self.recipe, self.config = pairs.pair(cfg.model, trees["model"]).torch, recipe, cfg
        self.modules: dict[str, Any] = {"model": self.decoder}
        if "value" in trees:
            value = TorchDecoder(value_model(cfg), TorchPolicy(torch.float64, torch.float64))
            value.load_state_dict(
                {n: torch.tensor(np.asarray(x)) for n, x in to_torch(trees["value"], value_model(cfg))}
            )
            self.modules["value"] = value
        self.trained = list(self.modules.values())
        self.modules["reference"] = copy.deepcopy(self.decoder)
        self.loss = recipe.objective(self.modules, cfg)
        self.optimizers = [torch_optimizer(module, cfg.train) for module in self.trained]

    def step(self, batch: Any) -> None:
        for module, optimizer in zip(self.trained, self.optimizers, strict=True):
            module.train()
            optimizer.zero_grad(set_to_none=False)
            set_learning_rate(optimizer, self.config.train)
        loss, sums = self.loss(pairs.tensors(batch))
        (loss / sums["weight"]).backward()
        for optimizer in self.optimizers:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()

    def actor(self, cfg: config.Config) -> Any:
        if self.recipe is torch_ppo:
            return torch_ppo.TorchCritic(self, cfg, **ENDS)
        return torch_grpo.TorchActor(self.decoder, self.modules["reference"], cfg, **ENDS)

    def parameters(self, cfg: config.Config) -> dict[str, np.ndarray]:
        found = {name: parameter.detach().numpy() for name, parameter in self.decoder.named_parameters()}
        if "value" in self.modules:
            found |= {f"value.{name}": p.detach().numpy() for name, p in self.modules["value"].named_parameters()}
        return found


def run(side: JaxSide | TorchSide, cfg: config.Config, phases: Phases) -> list[Phase]:
    made = []
    for number in range(PHASES):
        made.append(phases.run(side.actor(cfg), number))
        for batch in made[-1].batches:
            side.step(batch)
    return made


def compare_phases(ours: list[Phase], theirs: list[Phase]) -> None:
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert [one.ids for one in a.samples] == [one.ids for one in b.samples], f"other tokens in phase {number}"
        assert [one.reward for one in a.samples] == [one.reward for one in b.samples]
        assert a.metrics == pytest.approx(b.metrics, rel=1e-10, abs=1e-12)
        FLOAT64.check(pairs.error(a.advantages, b.advantages), f"advantages of phase {number}")


def check_same(model: str, rl: dict[str, Any], kind: str, rng: np.random.Generator) -> list[Phase]:
    """Token for token, reward for reward, and every parameter at the end."""
    cfg = settings(model, rl)
    widened = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, "float64")), tree)  # noqa: E731
    trees = {"model": widened(pairs.random_params(cfg.model, rng))}
    if kind == "ppo":
        shapes = abstract_params(JaxDecoder(value_model(cfg), JaxPolicy.from_config(cfg.numerics)))[0]
        trees["value"] = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape)), shapes)
    jax_recipe, torch_recipe = (jax_ppo, torch_ppo) if kind == "ppo" else (jax_grpo, torch_grpo)
    with graders.GraderPool(find_rewards(cfg.rl.rewards)) as pool:
        make = jax_ppo.CriticPhases if kind == "ppo" else Phases
        task, tokenizer = open_task(cfg.rl.task), Tokenizer.bytes_level()
        sides = JaxSide(cfg, jax_recipe, trees), TorchSide(cfg, torch_recipe, trees)
        ours, theirs = (run(side, cfg, make(cfg, task, tokenizer, pool)) for side in sides)
    compare_phases(ours, theirs)
    for name, distance, _ in pairs.differences(*(side.parameters(cfg) for side in reversed(sides))):
        FLOAT64.check(distance, name)
    return ours


@pytest.mark.parametrize(("model", "rl"), RUNS)
def test_policies_alone(model: str, rl: dict[str, Any], rng: np.random.Generator) -> None:
    phases = check_same(model, rl, "grpo", rng)
    samples = [one for phase in phases for one in phase.samples]
    assert len({tuple(one.ids) for one in samples}) > 20 and len({one.reward for one in samples}) > 3
    assert any(phase.advantages.any() for phase in phases)
    for phase in phases:  # ids are handed on: what is trained on is what was drawn
        for batch in phase.batches[:1]:
            drawn = sorted(tuple(row[mask > 0]) for row, mask in zip(batch["targets"], batch["weights"], strict=True))
            assert set(drawn) <= {tuple(one.ids) for one in phase.samples}


Runs = tuple[dict[str, list[Phase]], dict[str, Any], config.Config]
"""Of both backends the phases and the engine, and the config."""


def runs_of_the_command(
    recipe: str, rl: dict[str, Any], folder: Path, rng: np.random.Generator, *, phases: int = PHASES, **beside: Any
) -> Runs:
    """`jaxlm train` and `--backend torch` from one start: loop, engine, optimiser, checkpoint and all.

    The policy begins with the same weights, a value model with their trunk and a head drawn from the seed.
    """
    cfg = settings("dense", rl)
    widened = jax.tree.map(lambda leaf: np.asarray(leaf, "float64"), pairs.random_params(cfg.model, rng))
    Model(cfg, widened, Tokenizer.bytes_level()).save(folder / "start")
    tokenizer = config.Tokenizer(kind="bytes")
    updates = cfg.rl.iterations * cfg.rl.minibatches
    train = dataclasses.replace(cfg.train, init_from=str(folder / "start"), steps=updates * phases)
    options: dict[str, Any] = {"sample": config.Sample(prompts=()), "log": config.Log(every=1), **beside}
    cfg = dataclasses.replace(cfg, recipe=recipe, tokenizer=tokenizer, train=train, **options)
    made: dict[str, list[Phase]] = {"jax": [], "torch": []}
    engines: dict[str, Any] = {}
    for backend in made:
        original = RolloutData.begin_phase

        def begin(data: RolloutData, number: int, engine: Any, original: Any = original, name: str = backend) -> None:
            original(data, number, engine)
            made[name].append(data.phase)  # pyright: ignore[reportArgumentType]
            engines[name] = engine

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RolloutData, "begin_phase", begin)
            start.run(dataclasses.replace(cfg, out_dir=str(folder / backend)), backend=backend)  # pyright: ignore
    assert len(made["jax"]) == phases
    compare_phases(made["jax"], made["torch"])
    return made, engines, cfg


def test_whole_runs_of_the_command(tmp_path: Path, rng: np.random.Generator, pages: None) -> None:
    rl = {"iterations": 2, **REWARDED, "kl_target": 0.1, "stop_kl": 0.02, "evaluate_every": 5, "held_out": 4}
    made, engines, cfg = runs_of_the_command("ppo", rl, tmp_path, rng)
    weights = [phase.metrics["kl_weight"] for phase in made["jax"]]
    assert weights[0] == cfg.rl.kl_weight and len(set(weights)) == PHASES, "the weight follows its target"
    ours, theirs = (
        [row["stopped"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row] for name in made
    )
    for name in made:  # the program that draws, one token after the other, computes what the trainer does
        steps = [row for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for measure in ("mismatch", "mismatch_kl", "mismatch_max"):
            assert max(abs(row[measure]) for row in steps) < (1e-6 if measure == "mismatch_max" else 1e-10)
        assert max(phase.metrics["mismatch_max"] for phase in made[name]) < 1e-10
    assert ours == theirs and not any(ours[::2]) and 0 < sum(ours[1::2]) < PHASES, "some second updates are not made"
    models = {"model": cfg.model, "value": value_model(cfg)}
    for tree, model in models.items():
        ours = {name: np.asarray(x) for name, x in to_torch(jax.device_get(engines["jax"].state.params[tree]), model)}
        theirs = {name: x.detach().numpy() for name, x in engines["torch"].modules[tree].named_parameters()}
        for name, distance, _ in pairs.differences(theirs, ours):
            FLOAT64.check(distance, f"{tree}: {name}")


ADAPTED = {
    "grpo": {"iterations": 2, "kl": "loss", "evaluate_every": 2, "held_out": 4},
    "ppo": {"iterations": 2, "evaluate_every": 2, "held_out": 4, "kl": "reward", "kl_kind": "k1"},
}


@pytest.mark.parametrize("recipe", ADAPTED)
def test_runs_with_adapters(recipe: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """The same tokens in every phase from base and adapters, the base as the reference, and the same adapters then.

    Checkpoints have adapters and, of the value model, its whole head; the run opens as a whole model that generates.
    """
    lora = config.LoRA(rank=2, alpha=8.0)
    _, engines, cfg = runs_of_the_command(recipe, ADAPTED[recipe], tmp_path, rng, phases=4, lora=lora)
    names = ["model", "value"] if recipe == "ppo" else ["model"]
    stored = {*MappedFile(tmp_path / "torch" / "checkpoints" / "8" / "model.safetensors").entries}
    heads = {"value/score.weight", "value/score.bias"} if recipe == "ppo" else set[str]()
    assert {name for name in stored if ".adapter." not in name} == heads
    for tree in names:
        module, model = engines["torch"].modules[tree], cfg.model if tree == "model" else value_model(cfg)
        params = engines["jax"].state.params
        params = jax.device_get(params[tree] if recipe == "ppo" else params)
        targets = adapter_targets(engines["jax"].program.modules[tree], lora)
        ours = {name: np.asarray(x) for name, x in adapters_to_torch(params, targets, model)}
        theirs = {name: x.detach().numpy() for name, x in module.named_parameters() if x.requires_grad}
        assert ours.keys() == theirs.keys() and ("score.weight" in ours) == (tree == "value")
        for name, distance, _ in pairs.differences(theirs, ours):
            FLOAT64.check(distance, f"{tree}: {name}")
            assert np.abs(ours[name]).max() > 0, f"{tree}: {name} has not moved"
    assert "reference" not in engines["torch"].modules and "reference" not in engines["jax"].frozen
    ours, theirs = (jaxlm.load(tmp_path / name) for name in ("jax", "torch"))
    for a, b in zip(*map(jax.tree.leaves, (theirs.params, ours.params)), strict=True):
        FLOAT64.check(pairs.error(np.asarray(a), np.asarray(b)), "the merged model")
    assert ours.generate("12=", max_new_tokens=4).tokens == theirs.generate("12=", max_new_tokens=4).tokens


@pytest.mark.parametrize(("model", "rl"), CRITICS)
def test_policies_with_a_value_model(model: str, rl: dict[str, Any], rng: np.random.Generator) -> None:
    phases = check_same(model, rl, "ppo", rng)
    assert all(phase.advantages.any() for phase in phases)


@pytest.mark.parametrize("fault", ["", "the head is frozen"])
def test_the_stage_with_adapters(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `jaxlm parity` proves of PPO: two trees with adapters, of which one has a head that is trained whole."""
    cfg = settings("dense", {"kl": "reward", "kl_kind": "k1"})
    train = dataclasses.replace(cfg.train, init_from="unread")
    cfg = dataclasses.replace(cfg, recipe="ppo", train=train, lora=config.LoRA(rank=2))
    if fault:
        monkeypatch.setattr(attach_lora, "moves", lambda lora: lambda name: ".adapter." in name)
    findings = [one for one in compare_stage(cfg, random_params(cfg.model)) if not one.ok]
    if fault:
        assert "value: score.weight" in {one.name for one in findings if one.level == "stage update 1"}
    else:
        assert findings == []


def corrected() -> Any:
    """Sums and updates of GRPO on random rows, whose sampler is far from the trainer: most weights are at the cap."""
    rl = {"correction": "truncate", "correction_level": "sequence", "correction_cap": 1e-20}
    cfg = dataclasses.replace(settings("dense", rl), recipe="grpo", tokenizer=config.Tokenizer(kind="bytes"))
    return list(compare_stage(cfg, random_params(cfg.model)))


def test_values_never_drop_out(rng: np.random.Generator) -> None:
    """Neither framework drops anything from the value model, as its old values are compared with its new ones."""
    cfg = pairs.model(head="value", n_layers=1, dropout=0.5, max_seq_len=128)
    pair, batch = pairs.pair(cfg, pairs.random_params(cfg, rng)), pairs.packed_batch(cfg, rng, 128)
    ours = np.asarray(jax_ppo.values_of((None, pair.jax), {"value": pair.params}, jax.tree.map(jnp.asarray, batch)))
    theirs = torch_ppo.values_of({"value": pair.torch.train()}, pairs.tensors(batch)).detach().numpy()
    assert pair.torch.training, "as it was before"
    drawn = batch["segments"] > 0
    FLOAT64.check(pairs.error(theirs[drawn], ours[drawn]), "values")


def test_a_correction_of_the_sampler() -> None:
    assert [finding for finding in corrected() if not finding.ok] == []


def test_a_correction_that_one_side_leaves_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_grpo, "correction_weights", lambda trainer_BT, *_, **__: torch.ones_like(trainer_BT))
    assert {"stage loss", "stage update 1"} <= {finding.level for finding in corrected() if not finding.ok}


def test_a_fault_in_the_credit_is_seen(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Advantages that are not whitened on one side."""
    monkeypatch.setattr("parity_tests.test_rl.PHASES", 1)
    monkeypatch.setattr(torch_ppo, "whiten", lambda advantages_BT, weights_BT: advantages_BT)
    with pytest.raises(AssertionError, match="advantages of phase 0"):
        check_same("dense", {"group": 1, "prompts": 16}, "ppo", rng)
