"""What a model that scores is asked to do where a proof needs a loss: to say numbers between 0 and 1 that it is shown.

Its own stage may have any loss, which `parity.stage` proves; this one gives every parameter a gradient, and is written
twice, once in each framework. Of a language model it is the loss of pretraining.

Shapes: B batch, T length, V numbers of the head.
"""

from __future__ import annotations

from typing import Any

from jaxlm import config
from jaxlm.recipes import pretrain
from jaxlm.train.expert_balance import collect
from jaxlm.train.step import LossFn


def jax_loss(decoder: Any, train: config.Train) -> LossFn:
    """Half the squared distance of every number from the share of the target in the vocabulary, balancing included."""
    if decoder.config.head == "lm":
        return pretrain.loss_fn(decoder, train)

    def compute(params: Any, frozen: Any, batch: Any, key: Any) -> tuple[Any, dict[str, Any]]:
        rows = batch["tokens"], batch["positions"], batch["segments"]
        (scores_BTV, _), collections = decoder.apply({"params": params}, *rows, mutable=["routing"])
        wanted_BT1 = batch["targets"][..., None].astype(scores_BTV.dtype) / decoder.config.vocab_size
        weights_BT = batch["weights"].astype(scores_BTV.dtype)
        weight = weights_BT.sum()
        nll = (((scores_BTV - wanted_BT1) ** 2).sum(-1) * weights_BT).sum() / 2
        sums = {"loss": nll, "nll": nll, "weight": weight}
        if decoder.config.moes:
            routed = collect(collections["routing"], decoder.config)
            sums |= {name: term * weight for name, term in routed.means.items()} | routed.counts
            sums["loss"] = nll + routed.loss * weight
        return sums["loss"], sums

    return compute


def torch_loss(decoder: Any, train: config.Train) -> Any:
    """The twin of `jax_loss`."""
    import torch_ref.recipes.pretrain
    from torch_ref.train import expert_balance

    if decoder.config.head == "lm":
        return torch_ref.recipes.pretrain.loss_fn(decoder, train)

    def compute(batch: Any) -> tuple[Any, dict[str, Any]]:
        scores_BTV, _ = decoder(batch["tokens"], batch["positions"], batch["segments"])
        wanted_BT1 = batch["targets"][..., None].to(scores_BTV.dtype) / decoder.config.vocab_size
        weights_BT = batch["weights"].to(scores_BTV.dtype)
        weight = weights_BT.sum()
        nll = (((scores_BTV - wanted_BT1) ** 2).sum(-1) * weights_BT).sum() / 2
        sums = {"loss": nll, "nll": nll, "weight": weight}
        if decoder.config.moes:
            routed = expert_balance.collect(decoder)
            sums |= {name: term * weight for name, term in routed.means.items()} | routed.counts
            sums["loss"] = nll + routed.loss * weight
        return sums["loss"], sums

    return compute
