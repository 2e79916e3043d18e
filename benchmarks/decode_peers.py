"""Decoding by litgpt and by llama.cpp, where they are installed: the weights and the prompts of `benchmarks.decode`.

pip install --no-deps --target DIR litgpt lightning lightning-utilities torchmetrics jsonargparse xllamacpp
PYTHONPATH=DIR python -m benchmarks.decode
"""

from __future__ import annotations

import importlib.util
import itertools
import string
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.train_step import VOCAB, jaxlm_model

PACKAGES = {"litgpt compiled": "litgpt", "litgpt compiled, best": "litgpt", "llama.cpp": "xllamacpp"}
"""What each peer needs."""
LETTERS = 3
WORDS = ["".join(word) for word in itertools.islice(itertools.product(string.ascii_lowercase, repeat=LETTERS), VOCAB)]
"""The made-up text of each id."""


def installed(name: str) -> bool:
    """True if a peer can be imported here."""
    return name not in PACKAGES or importlib.util.find_spec(PACKAGES[name]) is not None


def llama_tensors() -> dict[str, np.ndarray]:
    """The weights of the model, by the names of `LlamaForCausalLM`."""
    import jax

    from jaxlm.convert.families.llama import FAMILY
    from jaxlm.convert.rows import to_layout
    from jaxlm.models.decoder import Decoder, init_params

    cfg = jaxlm_model()
    params = init_params(Decoder(cfg), jax.random.key(0))
    return {name: np.ascontiguousarray(one) for name, one in to_layout(params, cfg, FAMILY.rows(cfg))}


def litgpt_decode(prompts: Sequence[Sequence[int]], new: int) -> Callable[[], list[list[int]]]:
    """Greedy tokens by litgpt's model and cache: prompts of one length at once, one compiled step a token."""
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama

    torch.set_num_threads(peers.threads())
    cfg = jaxlm_model()
    options = {"n_layer": cfg.n_layers, "n_head": cfg.n_heads, "n_embd": cfg.d_model, "n_query_groups": cfg.n_kv_heads}
    config = Config(
        name="same",
        block_size=cfg.max_seq_len,
        vocab_size=cfg.vocab_size,
        padded_vocab_size=cfg.vocab_size,
        intermediate_size=cfg.d_ff,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=cfg.norm_eps,
        mlp_class_name="LLaMAMLP",
        rope_base=int(cfg.rope_theta),
        **options,
    )
    weights: dict[str, Any] = {}
    tensors = {name: torch.from_numpy(one.copy()) for name, one in llama_tensors().items()}
    copy_weights_hf_llama(config, {}, weights, tensors)
    model = GPT(config).eval()
    model.load_state_dict(weights)
    length = len(prompts[0]) + new
    model.max_seq_length = length
    model.set_kv_cache(len(prompts))
    step, rows = torch.compile(model), torch.tensor(prompts)

    def decode() -> list[list[int]]:
        with torch.inference_mode():
            token = model(rows, torch.arange(rows.shape[1]))[:, -1:].argmax(-1)
            drawn = [token]
            for position in range(rows.shape[1], length - 1):
                token = step(token, torch.tensor([position]))[:, -1:].argmax(-1)
                drawn.append(token)
            return torch.cat(drawn, 1).tolist()

    return decode


def llama_cpp_decode(prompts: Sequence[Sequence[int]], new: int) -> Callable[[], list[list[int]]]:
    """Greedy tokens by llama.cpp's server in this process, a slot for each prompt; float32 weights and cache."""
    import xllamacpp

    folder = tempfile.mkdtemp(prefix="jaxlm-gguf-")
    write_gguf(Path(folder, "model.gguf"), llama_tensors())
    params = xllamacpp.CommonParams()
    params.model.path = str(Path(folder, "model.gguf"))
    params.n_parallel, params.n_ctx = len(prompts), len(prompts) * (len(prompts[0]) + new + 8)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = peers.threads()
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_gpu_layers, params.verbosity = 0, 0
    server, pool = xllamacpp.Server(params), ThreadPoolExecutor(len(prompts))
    options = {"n_predict": new, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
    number = {word: i for i, word in enumerate(WORDS)}

    def one(prompt: Sequence[int]) -> list[int]:
        text = server.handle_completions({"prompt": [*prompt], **options})["choices"][0]["text"]
        return [number[text[i : i + LETTERS]] for i in range(0, len(text), LETTERS)]

    return lambda: [*pool.map(one, prompts)]


def write_gguf(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write the model as llama.cpp's converter does, with a vocabulary of made-up words."""
    import gguf

    cfg = jaxlm_model()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(cfg.n_layers)
    writer.add_context_length(cfg.max_seq_len)
    writer.add_embedding_length(cfg.d_model)
    writer.add_feed_forward_length(cfg.d_ff)
    writer.add_head_count(cfg.n_heads)
    writer.add_head_count_kv(cfg.n_kv_heads)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([1] * len(WORDS))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, cfg.n_layers)
    for name, values in tensors.items():
        for part, heads in (("q_proj", cfg.n_heads), ("k_proj", cfg.n_kv_heads)):
            if part in name:  # llama.cpp has the two elements of a rotary pair beside each other
                values = values.reshape(heads, 2, -1, cfg.d_model).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(f"{names.get_name(name.removesuffix('.weight'))}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
