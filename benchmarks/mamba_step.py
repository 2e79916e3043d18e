"""One training step of models with state spaces on the CPU, against transformers': tokens/s, memory.

python -m benchmarks.mamba_step            Mamba and Mamba-2 against MambaForCausalLM
python -m benchmarks.mamba_step --hybrid   mamba+mlp and attention+mlp in turn, against JambaForCausalLM

The opponent's best path is its optional package mambapy (`pip install mambapy`); without it, its compiled step is.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import peers, train_step
from benchmarks.asked import positive
from benchmarks.peers import Peer

PATTERNS = {
    "jaxlm mamba": ("mamba",),
    "jaxlm mamba2": ("mamba2",),
    "jaxlm hybrid": ("mamba+mlp", "attention+mlp"),
}


def opponents(compiled: bool) -> list[Peer]:
    """transformers as stock and in its best environment; compiling its loop over 512 tokens takes many minutes."""
    names = [
        *["transformers mambapy"] * bool(importlib.util.find_spec("mambapy")),
        *["transformers compiled"] * compiled,
    ]
    return [Peer(name + ", best" * best, best=best) for name in names for best in (False, True)]


def jaxlm_model(pattern: tuple[str, ...]) -> Any:
    """The model of `benchmarks.train_step` with other blocks."""
    import dataclasses

    return dataclasses.replace(train_step.jaxlm_model(), pattern=pattern)


def transformers_model(hybrid: bool, mambapy: bool) -> Any:
    """The same model in transformers."""
    import torch
    from transformers import JambaConfig, JambaForCausalLM, MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(peers.threads())
    shared: dict[str, Any] = {
        "vocab_size": train_step.VOCAB,
        "hidden_size": train_step.WIDTH,
        "num_hidden_layers": train_step.LAYERS,
        "tie_word_embeddings": False,
        "use_mambapy": mambapy,
    }
    if not hybrid:
        return MambaForCausalLM(MambaConfig(**shared))
    return JambaForCausalLM(
        JambaConfig(
            **shared,
            intermediate_size=train_step.FFN,
            num_attention_heads=train_step.HEADS,
            num_key_value_heads=train_step.KV_HEADS,
            num_experts=1,
            attn_layer_period=2,
            attn_layer_offset=1,
            pad_token_id=0,
        )
    )


def child(name: str, hybrid: bool) -> None:
    """Be one of the peers."""
    if name in PATTERNS:
        model = jaxlm_model(PATTERNS[name])
        peers.serve(lambda: train_step.jaxlm_step(model), peak_flops=peers.jax_peak)
    else:
        model = transformers_model(hybrid, "mambapy" in name)
        step: Callable[[], Any] = lambda: train_step.transformers_step("compiled" in name, model)  # noqa: E731
        peers.serve(step, peak_flops=peers.torch_peak, warm_up=1)


def run(hybrid: bool, compiled: bool, rounds: int, out: Path | None = None) -> dict[str, Any]:
    """Time all peers, print a table, write the JSON."""
    ours = [name for name in PATTERNS if ("hybrid" in name) == hybrid]
    table = [*(Peer(name) for name in ours), *opponents(compiled)]
    found = peers.compare("benchmarks.mamba_step", table, rounds, ["--hybrid"] * hybrid)
    for one in found.values():
        one["tokens_per_s"] = train_step.ROWS * train_step.LENGTH / one["median_s"]
    others = [one for name, one in found.items() if name not in PATTERNS]
    ratios: dict[str, float] = {}
    for name in ours if others else ():
        mine, label = found[name], name.removeprefix("jaxlm ")
        ratios[f"{label}_over_best"] = min(one["median_s"] for one in others) / mine["median_s"]
        ratios[f"{label}_over_best_cpu"] = min(one["cpu_s"] for one in others) / mine["cpu_s"]
        ratios[f"{label}_memory_over_least"] = mine["peak_bytes"] / min(one["peak_bytes"] for one in others)
    peers.print_steps("hybrid train step" if hybrid else "Mamba train step", found, ratios)
    results = {"rounds": rounds, "peers": found, "ratios": ratios}
    peers.save("hybrid_step" if hybrid else "mamba_step", results, out)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mamba_step", description=__doc__)
    parser.add_argument("--hybrid", action="store_true", help="the hybrid instead of Mamba and Mamba-2")
    parser.add_argument("--compiled", action="store_true", help="time transformers' compiled step as well")
    parser.add_argument("--rounds", type=positive, default=6, help="steps of each peer")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.hybrid)
    else:
        run(arguments.hybrid, arguments.compiled, arguments.rounds, arguments.out)


if __name__ == "__main__":
    main()
