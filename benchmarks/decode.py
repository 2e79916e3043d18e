"""Greedy decoding on the CPU, prompt of 64 and 256 new tokens, against transformers' `generate`: new tokens/s.

python -m benchmarks.decode
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.peers import Peer
from benchmarks.train_step import jaxlm_model, tokens, transformers_model

PROMPT, NEW = 64, 256
PEERS = (
    Peer("jaxlm"),
    Peer("transformers eager"),
    Peer("transformers eager, best", best=True),
    Peer("transformers compiled, best", best=True),
)


def jaxlm_decode(batch: int) -> Callable[[], Any]:
    """The loop of `jaxlm generate`, from ids to ids."""
    import jax

    from jaxlm.infer.generate import generate
    from jaxlm.models.decoder import Decoder, init_params
    from jaxlm.text.sampling import GREEDY

    decoder = Decoder(jaxlm_model())
    params = init_params(decoder, jax.random.key(0))
    prompts = tokens()[:batch, :PROMPT].tolist()
    return lambda: generate(decoder, params, prompts, GREEDY, max_new_tokens=NEW)


def transformers_decode(batch: int, compiled: bool) -> Callable[[], Any]:
    """`generate` with its growing cache, or compiled over a static one."""
    import torch

    model = transformers_model().eval()
    if compiled:
        model.forward = torch.compile(model.forward)
    prompts = torch.from_numpy(tokens()[:batch, :PROMPT])
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    options |= {"cache_implementation": "static"} if compiled else {}

    def decode() -> Any:
        with torch.inference_mode():
            return model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)

    return decode


def child(name: str, batch: int) -> None:
    """Be one of the peers."""
    if name == "jaxlm":
        peers.serve(lambda: jaxlm_decode(batch), peak_flops=peers.jax_peak, warm_up=1)
    else:
        make = lambda: transformers_decode(batch, "compiled" in name)  # noqa: E731
        peers.serve(make, peak_flops=peers.torch_peak, warm_up=1)


def run(rounds: int, out: Path | None = None) -> dict[str, Any]:
    """Time all peers at batch 1 and 8, print a table, write the JSON."""
    results: dict[str, Any] = {"rounds": rounds}
    for batch in (1, 8):
        found = peers.compare("benchmarks.decode", PEERS, rounds, ["--batch", str(batch)])
        for name, one in found.items():
            one["tokens_per_s"] = batch * NEW / one["median_s"]
            print(
                f"decode, batch {batch}  {name:30} {one['tokens_per_s']:8,.0f} tokens/s  "
                f"median {one['median_s']:.3f}s  least {one['min_s']:.3f}s  most {one['max_s']:.3f}s"
            )
        ours, stock = found["jaxlm"]["tokens_per_s"], found["transformers eager"]["tokens_per_s"]
        best = max(one["tokens_per_s"] for name, one in found.items() if name != "jaxlm")
        results[f"batch_{batch}"] = {"peers": found, "ratios": {"over_stock": ours / stock, "over_best": ours / best}}
        print(f"over_stock {ours / stock:.2f}  over_best {ours / best:.2f}")
    peers.save("decode", results, out)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="completions of each peer")
    parser.add_argument("--out", type=Path, help="JSON file to write; default: benchmarks/results/decode.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.batch)
    else:
        run(arguments.rounds, arguments.out)


if __name__ == "__main__":
    main()
