"""One step of LoRA on a model of SmolLM2-135M's shapes on the CPU, against full fine-tuning and against PEFT.

The same 8 rows of 64 tokens, rank 8 on all linear maps, AdamW, clipped gradients; parameters are random.

python -m benchmarks.lora_step
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.peers import Peer
from benchmarks.train_step import one_document_a_row

VOCAB, WIDTH, LAYERS, HEADS, KV_HEADS, FFN = 49152, 576, 30, 9, 3, 1536
ROWS, LENGTH = 8, 64
RANK, ALPHA = 8, 16.0
BASE = "drawn from the seed"
"""The name of a base that is never opened: the engine is given random parameters."""
OURS = (Peer("jaxlm full"), Peer("jaxlm LoRA"))
THEIRS = (
    Peer("peft eager"),
    Peer("peft compiled"),
    Peer("peft eager, best", best=True),
    Peer("peft compiled, best", best=True),
)


def tokens() -> np.ndarray:
    """[ROWS, LENGTH + 1] random ids."""
    return np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH + 1))


def jaxlm_step(adapters: bool) -> Callable[[], float]:
    """The step of `jaxlm train` with `recipe = "sft"`: its engine, its memory settings."""
    from jaxlm.processes.freed_memory import keep_freed_memory, one_step_at_a_time

    keep_freed_memory()
    one_step_at_a_time()
    import tempfile

    import jax

    from jaxlm import config
    from jaxlm.models.decoder import init_params
    from jaxlm.recipes import make_recipe
    from jaxlm.train.engine import JaxEngine
    from jaxlm.train.recipe import MODEL, base_name

    model = config.Model(
        vocab_size=VOCAB,
        d_model=WIDTH,
        n_layers=LAYERS,
        n_heads=HEADS,
        n_kv_heads=KV_HEADS,
        d_ff=FFN,
        max_seq_len=LENGTH,
        tie_embeddings=True,
    )
    cfg = config.Config(
        recipe="sft",
        model=model,
        lora=config.LoRA(rank=RANK if adapters else 0, alpha=ALPHA),
        data=config.Data(seq_len=LENGTH, cache_dir=tempfile.mkdtemp(prefix="jaxlm-benchmark-")),
        train=config.Train(batch_size=ROWS, learning_rate=1e-4, init_from=BASE if adapters else ""),
    )
    engine = JaxEngine(cfg, make_recipe(cfg), lambda *_: [])
    if adapters:
        engine.freeze(base_name(MODEL), jax.device_get(init_params(engine.decoder, jax.random.key(0))))
    batch = one_document_a_row(tokens())
    return lambda: engine.fetch([engine.step(batch)])[0]["loss"]


def peft_step(compiled: bool) -> Callable[[], float]:
    """The same adapters by PEFT on transformers' Llama, with the loss of the model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(peers.threads())
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
        )
    )
    options = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, options).train()
    forward = torch.compile(model) if compiled else model
    moved = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(moved, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids = torch.from_numpy(tokens())[:, :-1]

    def step() -> float:
        loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(moved, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def child(name: str) -> None:
    """Be one of the peers."""
    if name.startswith("jaxlm"):
        peers.serve(lambda: jaxlm_step("LoRA" in name), peak_flops=peers.jax_peak)
    else:
        peers.serve(lambda: peft_step("compiled" in name), peak_flops=peers.torch_peak)


def run(rounds: int, out: Path | None = None) -> dict[str, Any]:
    """Time all peers, print a table, write the JSON."""
    found = peers.compare("benchmarks.lora_step", (*OURS, *THEIRS), rounds)
    for one in found.values():
        one["tokens_per_s"] = ROWS * LENGTH / one["median_s"]
    full, lora = (found[peer.name] for peer in OURS)
    stock = max(found[peer.name]["tokens_per_s"] for peer in THEIRS if not peer.best)
    best = max(found[peer.name]["tokens_per_s"] for peer in THEIRS)
    ratios = {
        "lora_time_over_full": lora["median_s"] / full["median_s"],
        "over_stock_eager": lora["tokens_per_s"] / found["peft eager"]["tokens_per_s"],
        "over_stock": lora["tokens_per_s"] / stock,
        "over_best": lora["tokens_per_s"] / best,
    }
    peers.print_steps("LoRA step", found, ratios)
    results = {"rounds": rounds, "peers": found, "ratios": ratios}
    peers.save("lora_step", results, out)
    return results


def main() -> None:
    peers.main_of_steps("lora_step", __doc__, child, run)


if __name__ == "__main__":
    main()
