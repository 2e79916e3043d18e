"""TRL 1.16.0's losses on plain tensors, without a Trainer, a hub or a GPU: methods unbound, with a stub for `self`."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what TRL's own imports deprecate is not ours to mend
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.kto_trainer import KTOTrainer
    from trl.trainer.reward_trainer import RewardTrainer
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax


def same(x: Any, *_: Any, **__: Any) -> Any:
    """One process gathers what it has."""
    return x


ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"),
    gather=same,
    gather_for_metrics=same,
    reduce=same,
    num_processes=1,
    sync_gradients=True,
)


def stub(**options: Any) -> SimpleNamespace:
    logs: Any = defaultdict(lambda: defaultdict(list))
    return SimpleNamespace(accelerator=ACCELERATOR, _metrics=logs, _total_train_tokens=0, _tp_size=1, **options)


class Fixed(torch.nn.Module):
    """A model that returns given log-probabilities [rows, T-1], zero where the label is masked."""

    is_gradient_checkpointing = False

    def __init__(self, logps: torch.Tensor) -> None:
        super().__init__()
        self.__dict__["logps"] = logps

    def forward(self, labels: torch.Tensor, **_: Any) -> SimpleNamespace:
        zero = torch.zeros_like(self.logps)
        logps = self.logps * (labels[:, 1:] != -100)
        flags = {"is_top1": zero.bool(), "log_sum_sq_probs": zero, "entropy": zero, "mean_logits": zero}
        return SimpleNamespace(log_probs=logps, **flags)


def dpo(kind, policy, reference, ids, completion_mask, beta=0.1, smoothing=0.0):
    """Rows: the chosen ones, then the rejected ones. `kind`: sigmoid, hinge, ipo, robust, ..."""
    me = stub(
        model=Fixed(policy),
        ref_model=Fixed(reference),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        beta=beta,
        label_smoothing=smoothing,
        loss_types=[kind],
        loss_weights=[1.0],
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
        precompute_ref_logps=False,
        aux_loss_enabled=False,
    )
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion_mask}
    return DPOTrainer._compute_loss(me, me.model, batch, False)


def kto(policy, reference, mismatched, ids, completion_mask, labels, beta, desirable, undesirable):
    """`mismatched`: log ratios of the mismatched pairs [rows], as sums under policy and reference."""
    me = stub(
        model=Fixed(policy),
        ref_model=Fixed(reference),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        beta=beta,
        desirable_weight=desirable,
        undesirable_weight=undesirable,
        loss_type="kto",
        calculate_KL=True,
        precompute_ref_logps=False,
        aux_loss_enabled=False,
    )
    me._compute_kl_logps = lambda model, _: mismatched if model is me.model else torch.zeros_like(mismatched)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion_mask}
    return KTOTrainer._compute_loss(me, me.model, batch | {"label": labels}, False)


def grpo(kind, level, logps, old, reference, advantages, mask, beta=0.0, low=0.2, high=0.28, longest=None, **args):
    """`kind`: grpo, bnpo, dr_grpo, dapo, cispo, ...; `level`: token or sequence; advantages [B] or [B, C]."""
    options = {"use_bias_correction_kl": False, "delta": None, "steps_per_generation": 1, **args}
    me = stub(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(**options),
        loss_type=kind,
        beta=beta,
        importance_sampling_level=level,
        epsilon_low=low,
        epsilon_high=high,
        use_vllm=False,
        max_completion_length=longest or logps.shape[1],
        current_gradient_accumulation_steps=1,
        vllm_importance_sampling_correction=False,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        _entropy_bonus_enabled=False,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
    )
    prompt = torch.zeros(len(logps), 1, dtype=torch.long)
    batch = {
        "prompt_ids": prompt,
        "prompt_mask": prompt + 1,
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }
    return GRPOTrainer._compute_loss(me, None, batch)


def reward(scores, margin=None, centring=None):
    """Scores [2B, 1]: chosen, then rejected."""
    me = stub(model=SimpleNamespace(training=True), args=SimpleNamespace(center_rewards_coefficient=centring))
    batch = {"attention_mask": torch.ones(1, 1)} | ({} if margin is None else {"margin": margin})
    return RewardTrainer.compute_loss(me, lambda **_: SimpleNamespace(logits=scores), batch)


def simpo(chosen_mean, rejected_mean, beta=2.0, gamma=0.5):
    me = stub(alpha=0.0, beta=beta, simpo_gamma=gamma, label_smoothing=0.0, loss_type="simpo")
    return CPOTrainer.cpo_loss(me, chosen_mean, rejected_mean)[0]


def cdpo(chosen, rejected, beta, smoothing):
    me = stub(alpha=0.0, beta=beta, label_smoothing=smoothing, loss_type="sigmoid")
    return CPOTrainer.cpo_loss(me, chosen, rejected)[0]


def orpo(chosen_mean, rejected_mean, beta=0.1):
    """The term that TRL subtracts from the mean negative log-likelihood; it is computed in float32."""
    return ORPOTrainer.odds_ratio_loss(stub(beta=beta), chosen_mean, rejected_mean)[0]


jsd = GKDTrainer.generalized_jsd_loss
"""(student_logits, teacher_logits, labels with -100, beta, temperature): 0 is KL(teacher, student), 1 the reverse."""

__all__ = ["cdpo", "dpo", "entropy_from_logits", "grpo", "jsd", "kto", "orpo", "reward", "selective_log_softmax"]
__all__ += ["simpo"]
