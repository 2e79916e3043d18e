"""Greedy decoding on the CPU, prompt of 64 and 256 new tokens, against transformers' `generate`: new tokens/s.

python -m benchmarks.decode

litgpt and llama.cpp take part where they are installed: see `decode_peers`. All have the same prompts; jaxlm's engine,
litgpt and llama.cpp have its weights too, and the JSON says how many of the first row's tokens are those of jaxlm.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import decode_peers, peers
from benchmarks.asked import listed, positive
from benchmarks.peers import Peer
from benchmarks.train_step import jaxlm_model, tokens, transformers_model

PROMPT, NEW = 64, 256
PEERS = (
    Peer("jaxlm"),
    Peer("jaxlm engine"),
    Peer("transformers eager"),
    Peer("transformers eager, best", best=True),
    Peer("transformers compiled, best", best=True),
    Peer("litgpt compiled"),
    Peer("litgpt compiled, best", best=True),
    Peer("llama.cpp"),
)
OURS = ("jaxlm", "jaxlm engine")


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


def engine_decode(batch: int) -> Callable[[], Any]:
    """All rows at once on an engine of so many, from ids to ids."""
    from benchmarks.engine import ask, engine

    made, prompts = engine(batch, 2 * NEW), tokens()[:batch, :PROMPT].tolist()
    return lambda: [[*reply.ids] for reply in ask(made, prompts, [NEW] * batch, batch)]


def transformers_decode(prompts: Sequence[Sequence[int]], new: int, compiled: bool) -> Callable[[], Any]:
    """`generate` with its growing cache, or compiled over a static one."""
    import torch

    model = transformers_model().eval()
    if compiled:
        model.forward = torch.compile(model.forward)
    ids = torch.tensor(prompts)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    options |= {"cache_implementation": "static"} if compiled else {}

    def decode() -> Any:
        with torch.inference_mode():
            return model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    return decode


def child(name: str, batch: int) -> None:
    """Be one of the peers."""
    prompts = tokens()[:batch, :PROMPT].tolist()
    if name in OURS:
        make = jaxlm_decode if name == "jaxlm" else engine_decode
        peers.serve(lambda: make(batch), peak_flops=peers.jax_peak, warm_up=1)
    elif name == "llama.cpp":
        peers.serve(lambda: decode_peers.llama_cpp_decode(prompts, NEW), peak_flops=peers.jax_peak, warm_up=1)
    elif name.startswith("litgpt"):
        peers.serve(lambda: decode_peers.litgpt_decode(prompts, NEW), peak_flops=peers.torch_peak, warm_up=1)
    else:
        make = lambda: transformers_decode(prompts, NEW, "compiled" in name)  # noqa: E731
        peers.serve(make, peak_flops=peers.torch_peak, warm_up=1)


def run(rounds: int, out: Path | None = None, only: Sequence[str] = ()) -> dict[str, Any]:
    """Time all peers, or some beside jaxlm and stock transformers, at batch 1 and 8; print a table, write the JSON."""
    results: dict[str, Any] = {"rounds": rounds}
    wanted = [peer for peer in PEERS if not only or peer.name in ("jaxlm", "transformers eager", *only)]
    taking_part = [peer for peer in wanted if decode_peers.installed(peer.name)]
    results["not_installed"] = [peer.name for peer in wanted if peer not in taking_part]
    for batch in (1, 8):
        found = peers.compare("benchmarks.decode", taking_part, rounds, ["--batch", str(batch)])
        expected = found["jaxlm"].pop("ids")
        for name, one in found.items():
            one["tokens_per_s"] = batch * NEW / one["median_s"]
            if ids := one.pop("ids", None):
                one["tokens_as_jaxlm"] = _common(ids, expected)
            print(
                f"decode, batch {batch}  {name:30} {one['tokens_per_s']:8,.0f} tokens/s  "
                f"median {one['median_s']:.3f}s  least {one['min_s']:.3f}s  most {one['max_s']:.3f}s"
            )
        ours, stock = found["jaxlm"]["tokens_per_s"], found["transformers eager"]["tokens_per_s"]
        best = max(one["tokens_per_s"] for name, one in found.items() if name not in OURS)
        results[f"batch_{batch}"] = {"peers": found, "ratios": {"over_stock": ours / stock, "over_best": ours / best}}
        print(f"over_stock {ours / stock:.2f}  over_best {ours / best:.2f}")
    peers.save("decode", results, out)
    return results


def _common(ids: Sequence[int], other: Sequence[int]) -> int:
    """Tokens at the beginning that two texts have in common."""
    pairs = zip(ids, other, strict=False)  # llama.cpp may leave out tokens that have no text
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(other)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--rounds", type=positive, default=7, help="completions of each peer")
    parser.add_argument("--out", type=Path, help="JSON file to write; default: benchmarks/results/decode.json")
    names = [peer.name for peer in PEERS]
    help_only = "peers besides jaxlm and stock transformers, with semicolons"
    parser.add_argument("--only", type=listed(names, ";"), default=[], help=help_only)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.batch)
        return
    if arguments.only and arguments.out is None:
        parser.error("--only needs --out FILE: the result that is kept holds all peers")
    run(arguments.rounds, arguments.out, arguments.only)


if __name__ == "__main__":
    main()
