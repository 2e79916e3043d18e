"""One training step of a 15.7M dense model on the CPU, against transformers' Llama: tokens/s, memory, MFU.

python -m benchmarks.train_step
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.peers import Peer

VOCAB, WIDTH, LAYERS, HEADS, KV_HEADS, FFN = 8192, 384, 6, 6, 2, 1024
ROWS, LENGTH = 8, 512
PEERS = (
    Peer("jaxlm"),
    Peer("transformers eager"),
    Peer("transformers compiled"),
    Peer("transformers eager, best", best=True),
    Peer("transformers compiled, best", best=True),
)


def jaxlm_model() -> Any:
    """The `[model]` of this benchmark."""
    from jaxlm import config

    return config.Model(
        vocab_size=VOCAB,
        d_model=WIDTH,
        n_layers=LAYERS,
        n_heads=HEADS,
        n_kv_heads=KV_HEADS,
        d_ff=FFN,
        max_seq_len=LENGTH,
        tie_embeddings=False,
    )


def transformers_model() -> Any:
    """The same model in transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(peers.threads())
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=False,
        )
    )


def tokens() -> np.ndarray:
    """[ROWS, LENGTH + 1] random ids."""
    return np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH + 1))


def one_document_a_row(ids: np.ndarray) -> dict[str, np.ndarray]:
    """The batch of these ids [B, T + 1]: each row is one document, and every token has a target."""
    ids = ids.astype(np.int32)
    tokens_BT, ones_BT = ids[:, :-1], np.ones_like(ids[:, 1:])
    positions_BT = np.cumsum(ones_BT, axis=1, dtype=np.int32) - 1
    weights_BT = ones_BT.astype(np.float32)
    columns = {"tokens": tokens_BT, "targets": ids[:, 1:], "positions": positions_BT}
    return {**columns, "segments": ones_BT, "weights": weights_BT}


def jaxlm_step(model: Any = None) -> Callable[[], float]:
    """The step of `jaxlm train`: its engine, its recipe's loss, its memory settings."""
    from jaxlm.processes.freed_memory import keep_freed_memory, one_step_at_a_time

    keep_freed_memory()
    one_step_at_a_time()
    import tempfile

    from jaxlm import config
    from jaxlm.recipes import make_recipe
    from jaxlm.train.engine import JaxEngine

    cfg = config.Config(
        model=model or jaxlm_model(),
        data=config.Data(seq_len=LENGTH, cache_dir=tempfile.mkdtemp(prefix="jaxlm-benchmark-")),
        train=config.Train(batch_size=ROWS, learning_rate=1e-3),
    )
    engine = JaxEngine(cfg, make_recipe(cfg), lambda *_: [])
    batch = one_document_a_row(tokens())
    return lambda: engine.fetch([engine.step(batch)])[0]["loss"]


def transformers_step(compiled: bool, model: Any = None) -> Callable[[], float]:
    """AdamW, clipping, the model's own loss."""
    import torch

    model = (model or transformers_model()).train()
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids = torch.from_numpy(tokens())[:, :-1]

    def step() -> float:
        loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def child(name: str) -> None:
    """Be one of the peers."""
    if name == "jaxlm":
        peers.serve(jaxlm_step, peak_flops=peers.jax_peak)
    else:
        peers.serve(lambda: transformers_step("compiled" in name), peak_flops=peers.torch_peak)


def flops_per_token() -> float:
    """Forward and backward, as `jaxlm train` counts them for its MFU."""
    from jaxlm.counts import flops
    from jaxlm.counts.parameters import matmul_params
    from jaxlm.models.decoder import Decoder

    model = jaxlm_model()
    return flops.flops_per_token(model, matmul_params(Decoder(model)), LENGTH)


def run(rounds: int, out: Path | None = None) -> dict[str, Any]:
    """Time all peers, print a table, write the JSON."""
    found = peers.compare("benchmarks.train_step", PEERS, rounds)
    peak = max(one["peak_flops"] for one in found.values())
    for one in found.values():
        one["tokens_per_s"] = ROWS * LENGTH / one["median_s"]
        one["mfu"] = one["tokens_per_s"] * flops_per_token() / peak
    stock = max(found[peer.name]["tokens_per_s"] for peer in PEERS[1:3])
    best = max(found[peer.name]["tokens_per_s"] for peer in PEERS[1:])
    ours = found["jaxlm"]
    memory = min(one["peak_bytes"] for name, one in found.items() if name != "jaxlm")
    ratios = {
        "over_stock_eager": ours["tokens_per_s"] / found["transformers eager"]["tokens_per_s"],
        "over_stock": ours["tokens_per_s"] / stock,
        "over_best": ours["tokens_per_s"] / best,
        "memory_over_eager": ours["peak_bytes"] / found["transformers eager"]["peak_bytes"],
        "memory_over_least": ours["peak_bytes"] / memory,
    }
    peers.print_steps("train step", found, ratios)
    results = {"rounds": rounds, "peak_flops": peak, "peers": found, "ratios": ratios}
    peers.save("train_step", results, out)
    return results


def main() -> None:
    peers.main_of_steps("train_step", __doc__, child, run)


if __name__ == "__main__":
    main()
