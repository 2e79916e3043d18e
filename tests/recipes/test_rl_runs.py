"""Reinforcement learning through the front door: runs that learn, resume bit for bit, and mistakes in one line."""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

import jaxlm
from jaxlm import config
from jaxlm.cli.app import app
from jaxlm.config import toml
from jaxlm.data.prompts import Prompt
from jaxlm.errors import UserError
from jaxlm.recipes import answers, grpo, make_recipe, start  # two threads that import at once break Python's ast
from jaxlm.recipes.rollouts.phases import Drawn, Phases, length_correlation
from jaxlm.report.plots import measures_of
from jaxlm.run.progress import Display
from jaxlm.run.rollouts import best_and_worst, read_rollouts, write_rollouts
from jaxlm.train import engine

IMPORTED = answers, grpo, engine
pytestmark = pytest.mark.usefixtures("traced_once")
SOAK = pytest.mark.soak
CRITIC = ("value_loss", "value_clip_share", "value_grad_norm", "value_learning_rate", "explained_variance")

TINY = """
recipe = "{recipe}"
[model]
d_model = 16
n_layers = 1
n_heads = 2
n_kv_heads = 1
d_ff = 24
[tokenizer]
kind = "bytes"
[data]
seq_len = 8
[rl]
task = "reverse(length=1)"
rewards = ["exact_text"]
prompts = 4
group = 4
max_new_tokens = 3
held_out = 4
{rl}
[train]
steps = {steps}
batch_size = 16
learning_rate = 1e-2
warmup_steps = 0
schedule = "constant"
{train}
[eval]
every = 0
batches = 1
[sample]
prompts = ["7="]
max_new_tokens = 3
[log]
every = 1
"""

REWARDED = 'kl = "reward"\nkl_kind = "k1"\nkl_target = 0.1'


def load(folder: Path, recipe: str, *, steps: int = 4, rl: str = "", train: str = "") -> config.Config:
    path = folder / f"{recipe}.toml"
    path.write_text(TINY.format(recipe=recipe, steps=steps, rl=rl, train=train))
    return toml.load(path, [f'out_dir="{folder / recipe}"'])


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, on_one_device: None) -> Path:
    """The answers, learnt for a while."""
    folder = tmp_path_factory.mktemp("rl")
    start.run(load(folder, "answers", steps=40))
    return folder


def test_answers_are_learnt(begun: Path) -> None:
    losses = [row["loss"] for row in rows(begun / "answers") if "loss" in row]
    assert losses[-1] < losses[0] / 2


def test_an_answer_that_does_not_fit_is_told(tmp_path: Path) -> None:
    """At the start, of whichever prompt; of a file that of any epoch."""
    cfg = load(tmp_path, "answers")
    with pytest.raises(UserError, match=r"its answer of 4 tokens do not fit into data.seq_len = 3 \(data.seq_len=4\)"):
        answers.AnswerData(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, seq_len=3)))
    records = [{"prompt": f"{n}?", "answer": "1234567" if n == 33 else "1"} for n in range(40)]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, records)))
    few = dataclasses.replace(cfg.train, batch_size=1)
    long = dataclasses.replace(cfg.rl, task=str(tmp_path / "long.jsonl"))
    with pytest.raises(UserError, match=r"the prompt '33\?' and its answer of 11 tokens do not fit"):
        answers.AnswerData(dataclasses.replace(cfg, rl=long, train=few))


def test_few_held_out_prompts_are_judged(tmp_path: Path) -> None:
    """Fewer than a batch: the other rows have no weight."""
    data = answers.AnswerData(load(tmp_path, "answers"))
    (batch,) = data.held_out_batches(batch_size=16, rows=None, max_batches=0)
    judged = batch["weights"].any(axis=1)
    assert judged.sum() == len(data.task.held_out(16)) and batch["tokens"].shape == (16, 8) and not judged.all()


@pytest.mark.parametrize(
    ("recipe", "trunk"),
    [pytest.param("grpo", "", marks=SOAK), ("ppo", "own"), pytest.param("ppo", "shared", marks=SOAK)],
)
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_run_resumes_bit_for_bit(
    begun: Path, tmp_path: Path, backend: Any, recipe: str, trunk: str, request: pytest.FixtureRequest
) -> None:
    """Two updates a phase and a reference; the run that stops in between draws the same samples again.

    Of PPO the weight of the divergence follows a target, and no second update is near enough to be made.
    """
    follows = 'kl = "reward"\nkl_kind = "k1"\nkl_target = 0.1\nkl_horizon = 100\nstop_kl = 1e-9'
    follows += f'\nvalue_trunk = "{trunk}"'
    kept = {"grpo": 'kl = "loss"', "ppo": follows}[recipe]
    if recipe == "ppo":
        request.getfixturevalue("on_all_devices")
    options = {"rl": f"iterations = 2\n{kept}", "train": f'init_from = "{begun / "answers"}"'}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    cfg = load(whole, recipe, steps=4, **options)
    start.run(cfg, backend=backend)
    start.run(load(parts, recipe, steps=2, **options), backend=backend)
    start.run(load(parts, recipe, steps=4, **options), resume=True, backend=backend)
    names = ("loss", "reward", "grad_norm", "kl_reference", "clip_share", "held_out_reward", "ended", "length")
    names = (*names, *CRITIC, "kl_start", "kl_weight", "stopped") if recipe == "ppo" else names
    ours: list[list[Any]]
    ours, theirs = (
        [[row.get(name) for name in names] for row in rows(folder / recipe) if "loss" in row]
        for folder in (whole, parts)
    )
    assert ours == theirs and len(ours) == 4
    counted = [row["tokens"] / row["step"] for row in rows(whole / recipe) if "loss" in row]
    assert counted == 4 * [cfg.train.batch_size * cfg.data.seq_len], "of rows, as for other recipes"
    assert {"answer_nll"} <= {key for row in rows(whole / recipe) for key in row}
    assert None not in ours[0]
    trees = [jaxlm.load(folder / recipe).params for folder in (whole, parts)]
    jax.tree.map(np.testing.assert_array_equal, *trees)
    if recipe == "grpo":
        assert ours[1][3] > 0, "after the first update the policy is no longer its reference"
    else:
        steps = [dict(zip(names, row, strict=True)) for row in ours]
        assert [row["stopped"] for row in steps] == [0, 1, 0, 1]
        assert steps[0]["kl_weight"] > steps[2]["kl_weight"] == np.float32(0.05 * (1 - 0.2 * 16 / 100))
        assert steps[0]["kl_start"] == 0 and steps[2]["kl_start"] != 0
    assert np.isfinite([row[0] for row in ours]).all()


@pytest.mark.usefixtures("on_all_devices")
def test_the_samples_of_a_step_are_kept(begun: Path, tmp_path: Path) -> None:
    """Ids of the phase as texts, with their rewards, advantages and distances from the reference; best and worst."""
    options = {"rl": 'keep_every = 2\nkl = "loss"', "train": f'init_from = "{begun / "answers"}"'}
    start.run(load(tmp_path, "grpo", steps=4, **options))
    run = tmp_path / "grpo"
    assert [file.name for file in sorted((run / "rollouts").iterdir())] == ["00000001.jsonl", "00000003.jsonl"]
    first, last = read_rollouts(run, 2), read_rollouts(run)
    assert (first.step, last.step) == (1, 3) and len(last.rows) == 16
    for row in first.rows:
        assert abs(row["logp"] - row["reference_logp"]) < 1e-5, "the first phase is drawn from the reference"
        assert row["reward"] == float(row["text"] == row["answer"]) == row["grades"]["exact_text"]
    assert any(abs(row["logp"] - row["reference_logp"]) > 1e-4 for row in last.rows)
    for group in range(0, 16, 4):
        rows = first.rows[group : group + 4]
        assert len({row["prompt"] for row in rows}) == 1
        assert sum(row["advantage"] for row in rows) == pytest.approx(0, abs=1e-5)
    best, worst = best_and_worst(last.rows, 3)
    assert best[0]["reward"] == max(row["reward"] for row in last.rows)
    assert worst[0]["reward"] == min(row["reward"] for row in last.rows) and len(best) == len(worst) == 3
    found = CliRunner().invoke(app, ["rollouts", str(run), "--step", "2"])
    assert found.exit_code == 0 and "step 1: 16 samples, 0 ungraded" in found.output and "best" in found.output
    lines = CliRunner().invoke(app, ["rollouts", str(run), "--json"]).output.splitlines()
    assert len(lines) == 16 and json.loads(lines[0])["step"] == 3
    with pytest.raises(UserError, match="no samples are kept here"):
        read_rollouts(begun / "answers")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        read_rollouts(begun / "nowhere")
    write_rollouts(tmp_path, 7, [{"text": "one\u2028two\x85three"}, {"text": ""}])
    assert [row["text"] for row in read_rollouts(tmp_path).rows] == ["one\u2028two\x85three", ""]


@pytest.mark.usefixtures("on_one_device")
def test_lengths_of_prompts_compile_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Samples, greedy answers, the update, validation, and log-probabilities of the samples that are kept: once each.

    The longest prompt of a phase has 12 to 16 characters, and greedy answers are given four times.
    """
    cfg = load(tmp_path, "grpo", steps=8, rl="evaluate_every = 2")
    rl = dataclasses.replace(cfg.rl, task="list_operations(length=4)", prompts=2, group=8)
    cfg = dataclasses.replace(cfg, rl=rl, data=dataclasses.replace(cfg.data, seq_len=24))
    with jax.log_compiles(), caplog.at_level("WARNING"):
        start.run(cfg)
    compiled = collections.Counter(re.findall(r"Compiling jit\((\w+)\)", caplog.text))
    assert {name: compiled[name] for name in ("_complete", "traced", "_logps")} == {
        "_complete": 2,
        "traced": 2,
        "_logps": 1,
    }


def test_rewards_are_compared_with_lengths_among_samples_of_a_prompt() -> None:
    prompt = Prompt("1+1=", "2", {})

    def found(*groups: list[tuple[int, float | None]]) -> float:
        drawn = [[Drawn(prompt, [1], [0] * n, "end", "", reward=reward) for n, reward in group] for group in groups]
        return length_correlation(drawn)

    longer, shorter, middle = [(2, 1.0), (4, 3.0)], [(2, 3.0), (4, 1.0)], [(9, 7.0), (9, 8.0)]
    assert found(longer) == pytest.approx(1) and found(shorter) == pytest.approx(-1)
    assert found([(2, 1.0), (4, 3.0), (90, None)]) == pytest.approx(1), "a sample without a grade says nothing"
    assert found(longer, shorter) == pytest.approx(0)
    assert found([(2, 5.0), (2, 5.0)], [(9, 8.0), (9, 8.0)], [(1, None)]) == 0, "prompts differ, samples do not"
    assert found(longer, middle) == pytest.approx(2 / (2.5 * 2) ** 0.5)
    assert found([(2, 1.0)], [(4, 3.0)], [(6, 5.0)]) == pytest.approx(1), "groups of one are one group"


@pytest.mark.usefixtures("pages")
def test_a_reward_for_length_is_seen(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted reward, longer is better: samples grow, a line says so within 20 steps, and the page shows them."""
    lines: list[str] = []
    monkeypatch.setattr(Display, "say", lambda _, line: lines.append(line))
    load(tmp_path, "grpo", steps=20, train=f'init_from = "{begun / "answers"}"')
    options = [
        'rl.rewards=["length(per_token=1.0)"]',
        "rl.max_new_tokens=6",
        "data.seq_len=12",
        "train.learning_rate=1e-2",
    ]
    start.run(toml.load(tmp_path / "grpo.toml", [*options, f'out_dir="{tmp_path / "grpo"}"']), backend="torch")
    steps = [row for row in rows(tmp_path / "grpo") if "length" in row]
    assert steps[-1]["length"] > 1.5 * steps[0]["length"] and steps[-1]["ended"] < steps[0]["ended"]
    (alert,) = [line for line in lines if "samples have grown" in line]
    assert int(alert.split()[1].rstrip(":")) <= 20 and "is the reward for length?" in alert
    assert {"reward", "length", "ended", "entropy", "kl_old", "clip_share"} <= {*measures_of(steps)}
    page = (tmp_path / "grpo" / "report.html").read_text()
    assert "each measure of the recipe against step" in page
    assert "Samples of update 1<" in page and "Samples of update 11<" in page and "ended by" in page


@pytest.mark.parametrize(
    ("rl", "train", "message"),
    [
        ('kl = "loss"', "", "there is none"),
        ("top_p = 0.9", "", "are for evaluation"),
        ("top_k = 5", "", "are for evaluation"),
        ("clip_dual = 1.1", "", "must be above"),
        ("minibatches = 3", "", "does not divide"),
        ('kl = "reward"', "", "has another gradient"),
        ("minibatches = 2", "", "train.batch_size = 16 is not"),
    ],
)
def test_mistakes(tmp_path: Path, rl: str, train: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_recipe(load(tmp_path, "grpo", rl=rl, train=train)).data(None)


def test_ppo_without_a_reward(tmp_path: Path) -> None:
    cfg = load(tmp_path, "ppo")
    with pytest.raises(UserError, match=r"PPO without a reward: rl\.rewards is empty"):
        make_recipe(dataclasses.replace(cfg, rl=dataclasses.replace(cfg.rl, rewards=())))


def test_the_value_model_has_options_of_its_own(begun: Path, tmp_path: Path) -> None:
    path = begun / "answers"
    rl = f'value_learning_rate = 0.5\nvalue_from = "{path}"'
    value = make_recipe(load(tmp_path, "ppo", rl=rl)).models.trained["value"]
    assert (value.model.head, value.train.learning_rate, value.path) == ("value", 0.5, str(path))


def test_a_shared_trunk_begins_with_no_other_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rl\.value_from = 'runs/other': a shared trunk is the policy's"):
        load(tmp_path, "ppo", rl='value_trunk = "shared"\nvalue_from = "runs/other"')


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("kl_target = 0.1", r"rl\.kl_target = 0\.1 moves the weight of the divergence in the reward"),
        (f"{REWARDED}\nkl_weight = 0.0", r"rl\.kl_target = 0\.1: a weight of 0 cannot follow it"),
        (f"{REWARDED}\nkl_horizon = 1", r"rl\.kl_horizon = 1: \d+ samples a phase could turn rl\.kl_weight negative"),
        ("stop_kl = 0.1", r"rl\.stop_kl = 0\.1: with one update a phase"),
    ],
)
def test_a_weight_that_cannot_follow_its_target_is_refused(tmp_path: Path, options: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, "grpo", rl=options)


def test_groups_of_one_are_refused(tmp_path: Path) -> None:
    cfg = load(tmp_path, "grpo")
    alone = dataclasses.replace(cfg, rl=dataclasses.replace(cfg.rl, group=1))
    with pytest.raises(UserError, match="a sample alone has nothing to be measured against"):
        make_recipe(alone)


def test_prompts_that_do_not_fit(tmp_path: Path) -> None:
    """The longest is told before anything is drawn, wherever in the file it stands."""
    load(tmp_path, "grpo")
    cfg = toml.load(tmp_path / "grpo.toml", ["data.seq_len=4"])
    with pytest.raises(UserError, match=r"the prompt '\d=' of 2 tokens .* data.seq_len = 4 \(data.seq_len=5\)"):
        make_recipe(cfg).data(None)
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": "x" * n, "answer": "1"}) + "\n" for n in [*[1] * 60, 20, *range(30)]))
    cfg = toml.load(tmp_path / "grpo.toml", [f'rl.task="{file}"'])
    file.write_text(file.read_text().replace('"prompt": ""', '"prompt": "a"'))
    with pytest.raises(UserError, match=r"prompts.jsonl': the prompt 'x+' of 29 tokens .*\(data.seq_len=32\)"):
        make_recipe(cfg).data(None)


def test_a_resumed_run_reports_the_last_greedy_answers(tmp_path: Path) -> None:
    """They are given every twentieth phase: a run that resumes in between said that they were worth nothing."""
    before, after = (make_recipe(load(tmp_path, "grpo")).data(None) for _ in range(2))
    before.held_out_reward = 0.75
    state = json.loads(json.dumps(before.batches(batch_size=16, rows=None).get_state()))
    after.batches(batch_size=16, rows=None).set_state(state)
    assert after.held_out_reward == 0.75


def test_answers_that_no_sample_can_reach_are_not_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An answer of four ids where three are drawn: in a row of seven it would end one behind it."""
    load(tmp_path, "grpo")
    for drawn, count in ((3, 0), (4, 1)):
        options = ['rl.task="reverse(length=3)"', f"rl.max_new_tokens={drawn}", f"data.seq_len={4 + drawn}"]
        data = make_recipe(toml.load(tmp_path / "grpo.toml", options)).data(None)
        assert len([*data.held_out_batches(batch_size=16, rows=None, max_batches=1)]) == count
        data.held_out(batch_size=16, rows=None, max_batches=1)
    (record,) = caplog.records
    assert "held-out answers are longer than rl.max_new_tokens = 3" in record.getMessage()


OWN = """
def raises(prompt, completion, row): return 1 / 0
def says(prompt, completion, row): return "good"
def nothing(prompt, completion, row): return None
"""


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ("own_rewards:raises", "the reward own_rewards:raises fails on right answers of the task: ZeroDivisionError"),
        ("own_rewards:says", "fails on right answers of the task: it returned str"),
        ("matches(pattern='(')", "the reward matches fails on right answers of the task: .*missing \\)"),
        ("length(per_token='x')", "the reward length fails on right answers"),
        ("own_broken:f", "the reward own_broken:f: its module fails: SyntaxError: "),
    ],
)
def test_rewards_that_always_fail_are_told_before_anything_is_drawn(
    tmp_path: Path, rewards: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_rewards.py").write_text(OWN)
    (tmp_path / "own_broken.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    load(tmp_path, "grpo")
    with pytest.raises(UserError, match=message):
        make_recipe(toml.load(tmp_path / "grpo.toml", [f'rl.rewards=["{rewards}"]'])).data(None)
    make_recipe(toml.load(tmp_path / "grpo.toml", ['rl.rewards=["own_rewards:nothing"]'])).data(None)


def test_what_was_trained_is_saved_when_samples_cannot_be_graded(begun: Path, tmp_path: Path) -> None:
    """All rewards become equal after two phases, and no refill helps: the run ends in one line, with a checkpoint."""
    load(tmp_path, "grpo", train=f'init_from = "{begun / "answers"}"')
    options = [f'out_dir="{tmp_path / "grpo"}"', "rl.refills=1", "checkpoint.every=0"]
    phases, one = [], Phases._samples

    def equal(self: Any, actor: Any, number: int, refill: int) -> Any:
        phases.append(number)
        return [
            sample._replace(reward=1.0 if number > 1 else i % 2)
            for i, sample in enumerate(one(self, actor, number, refill))
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Phases, "_samples", equal)
        with pytest.raises(UserError, match="phase 2: the samples of every prompt had equal rewards, and 1 refills"):
            start.run(toml.load(tmp_path / "grpo.toml", options), backend="torch")
    assert phases[-2:] == [2, 2]
    assert jaxlm.Run(tmp_path / "grpo").checkpoints == [2]
