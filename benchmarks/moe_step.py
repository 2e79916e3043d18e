"""One training step of a mixture of experts on the CPU, against transformers' Mixtral: tokens/s and memory.

The dense model of `train_step` with 8 experts of width 512 in each layer, of which a token passes 2.

python -m benchmarks.moe_step
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from benchmarks import peers, train_step
from benchmarks.peers import Peer
from benchmarks.train_step import FFN, HEADS, KV_HEADS, LAYERS, LENGTH, ROWS, VOCAB, WIDTH

EXPERTS, CHOSEN = 8, 2
PEERS = (
    Peer("jaxlm"),
    Peer("transformers"),
    Peer("transformers, experts eager"),
    Peer("transformers, best", best=True),
    Peer("transformers, experts eager, best", best=True),
)


def jaxlm_model() -> Any:
    """The `[model]` of this benchmark."""
    from jaxlm import config

    experts = config.MoE(n_experts=EXPERTS, top_k=CHOSEN, d_ff=FFN // 2)
    return dataclasses.replace(train_step.jaxlm_model(), pattern=("attention+moe",), moe=experts)


def transformers_model(experts: str | None) -> Any:
    """The same model in transformers; `experts` is how it computes them (None: its default)."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(peers.threads())
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=FFN // 2,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=LENGTH,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        tie_word_embeddings=False,
    )
    if experts:
        config._experts_implementation = experts
    return MixtralForCausalLM(config)


def child(name: str) -> None:
    """Be one of the peers."""
    if name == "jaxlm":
        peers.serve(lambda: train_step.jaxlm_step(jaxlm_model()), peak_flops=peers.jax_peak)
    else:
        experts = "eager" if "experts eager" in name else None
        make = lambda: transformers_model(experts)  # noqa: E731
        peers.serve(lambda: train_step.transformers_step(False, make()), peak_flops=peers.torch_peak)


def run(rounds: int, out: Path | None = None) -> dict[str, Any]:
    """Time all peers, print a table, write the JSON."""
    found = peers.compare("benchmarks.moe_step", PEERS, rounds)
    for one in found.values():
        one["tokens_per_s"] = ROWS * LENGTH / one["median_s"]
    ours, theirs = found["jaxlm"], {name: one for name, one in found.items() if name != "jaxlm"}
    stock = max(one["tokens_per_s"] for name, one in theirs.items() if "best" not in name)
    ratios = {
        "over_stock": ours["tokens_per_s"] / stock,
        "over_best": ours["tokens_per_s"] / max(one["tokens_per_s"] for one in theirs.values()),
        "memory_over_stock": ours["peak_bytes"] / theirs["transformers"]["peak_bytes"],
        "memory_over_least": ours["peak_bytes"] / min(one["peak_bytes"] for one in theirs.values()),
    }
    peers.print_steps("MoE train step", found, ratios)
    results = {"rounds": rounds, "peers": found, "ratios": ratios}
    peers.save("moe_step", results, out)
    return results


def main() -> None:
    peers.main_of_steps("moe_step", __doc__, child, run)


if __name__ == "__main__":
    main()
