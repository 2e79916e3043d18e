"""The decoder: embed, repeat the pattern of blocks, norm, unembed. One forward serves training, prefill and decoding.

    decoder = Decoder(config.model, policy)
    init_params(decoder, seed=0)  # or decoder.load_state_dict(...)
    logits_BTV, cache = decoder(tokens, positions, segments, cache)

A model whose `config.head` is not `lm` scores instead: `score`, an output matrix of as many rows as it says numbers for
a token, takes the place of `head`; all other parameters keep their names.

Block i is `layers.i`. Weights of jaxlm have these names after `jaxlm.convert.native.to_torch`.

Shapes: B batch, T length, D width, V vocabulary (or numbers of the head), M documents of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jaxlm import config
from torch_ref.models.block import Block, Tables, empty_cache
from torch_ref.models.layers import Embed, Head, Norm, Rotation
from torch_ref.numerics import Policy, wide_matmul
from torch_ref.ops import pooling
from torch_ref.ops.attention.attend import Places
from torch_ref.ops.rope import sinusoidal_table

Cache = tuple[Any, ...]
Tokens = Int[Tensor, "b t"] | Float[Tensor, "b t d"]
"""Ids, or vectors in place of their embeddings."""


class Decoder(nn.Module):
    """A decoder-only model of language, or one that scores; everything about it is in the config."""

    sinusoids_SD: Tensor

    def __init__(self, config: config.Model, policy: Policy = Policy()) -> None:  # noqa: B008 (Policy is immutable)
        super().__init__()
        self.config, self.policy = config, policy
        self.embed = Embed(config.vocab_size, config.d_model, config.init_std, policy)
        if config.positions == "learned":
            self.position_embed = Embed(config.max_seq_len, config.d_model, config.init_std, policy)
        elif config.positions == "sinusoidal":
            table = sinusoidal_table(config.max_seq_len, config.d_model)
            self.register_buffer("sinusoids_SD", torch.as_tensor(table, dtype=policy.compute), persistent=False)
        self.rotations: Any = nn.ModuleList(Rotation(rope, policy) for rope in config.ropes)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(kind, config, policy) for kind in config.pattern * config.repeats)
        if config.final_norm:
            self.final_norm = Norm(config.norm, config.norm_eps, policy, config.d_model)
        if config.head != "lm":
            self.score = Head(config.d_model, config.outputs, config.init_std, policy, True)
        elif not config.tie_embeddings:
            self.head = Head(config.d_model, config.vocab_size, config.init_std, policy, "head" in config.biases)

    def forward(
        self,
        tokens_BT: Tokens,
        positions_BT: Int[Tensor, "b t"],
        segments_BT: Int[Tensor, "b t"],
        cache: Cache | None = None,
    ) -> tuple[Float[Tensor, "b t v"], Cache | None]:
        """Logits of the next token in float32 or wider, and the cache after these tokens.

        Of another head its numbers for each token, 0 for padding.

        Args:
            tokens_BT: ids, or vectors [B, T, D] in place of their embeddings, such as those of an image.
            positions_BT: place of each token within its document, from 0.
            segments_BT: document of each token within the row, from 1; 0 is padding.
            cache: of `init_cache`; a row is then one document.
        """
        hidden_BTD, cache = self.hidden(tokens_BT, positions_BT, segments_BT, cache)
        found_BTV = self.unembed(hidden_BTD)
        return found_BTV if self.config.head == "lm" else torch.where(segments_BT[..., None] != 0, found_BTV, 0), cache

    def score_documents(
        self,
        tokens_BT: Int[Tensor, "b t"],
        positions_BT: Int[Tensor, "b t"],
        segments_BT: Int[Tensor, "b t"],
        documents: int,
    ) -> tuple[Float[Tensor, "b m v"], Bool[Tensor, "b m"]]:
        """What the head says of the segments 1 to `documents`, 0 where a row has none, and whether it has it.

        It sees the last token of a document (Stiennon et al. 2020, section 3.4), or the mean of all: `model.pooling`.
        """
        hidden_BTD, _ = self.hidden(tokens_BT, positions_BT, segments_BT)
        pool = pooling.mean if (self.config.head, self.config.pooling) == ("classes", "mean") else pooling.last_token
        present_BM = pooling.present(segments_BT, documents)
        scores_BMV = self.unembed(pool(hidden_BTD, segments_BT, documents))
        return torch.where(present_BM[..., None], scores_BMV, 0), present_BM

    def hidden(
        self,
        tokens_BT: Tokens,
        positions_BT: Int[Tensor, "b t"],
        segments_BT: Int[Tensor, "b t"],
        cache: Cache | None = None,
        outputs: dict[int, Any] | None = None,
    ) -> tuple[Float[Tensor, "b t d"], Cache | None]:
        """What the head sees, after the final norm: training computes the loss from it block by block.

        Args:
            outputs: its keys are numbers of blocks, from 0; it takes their outputs [B, T, D].
        """
        cfg = self.config
        places = Places(positions_BT, segments_BT)
        x_BTD, ropes = self._embedded(tokens_BT, positions_BT)
        # The recomputation of `dots` is that of `full`: PyTorch has no policy that is as cheap as XLA's.
        recompute = cfg.remat != "none" and torch.is_grad_enabled()
        after = []
        for i, layer in enumerate(self.layers):
            inputs = (x_BTD, places, ropes, None if cache is None else cache[i])
            x_BTD, layer_cache = checkpoint(layer, *inputs, use_reentrant=False) if recompute else layer(*inputs)
            after.append(layer_cache)
            if outputs is not None and i in outputs:
                outputs[i] = x_BTD
        cache = None if cache is None else tuple(after)
        return self.final_norm(x_BTD) if cfg.final_norm else x_BTD, cache

    def unembed(self, hidden_BTD: Float[Tensor, "b t d"]) -> Float[Tensor, "b t v"]:
        """Logits in float32 or wider of what `hidden` returned, or of a part of it."""
        kernel_DV, bias_V = self.unembedding()
        logits_BTV = wide_matmul(hidden_BTD, kernel_DV)
        return logits_BTV if bias_V is None else logits_BTV + bias_V

    def unembedding(self) -> tuple[Float[Tensor, "d v"], Float[Tensor, " v"] | None]:
        """The output matrix, in the compute dtype, and its bias."""
        if self.config.head != "lm":
            return self.score.weight.T.to(self.policy.compute), self.score.bias
        if self.config.tie_embeddings:
            return self.embed.weight.T.to(self.policy.compute), None
        return self.head.weight.T.to(self.policy.compute), self.head.bias

    def _embedded(self, tokens_BT: Tokens, positions_BT: Tensor) -> tuple[Tensor, Tables]:
        cfg = self.config
        x_BTD = self.embed(tokens_BT) if tokens_BT.ndim == 2 else tokens_BT.to(self.policy.compute)
        if cfg.positions == "learned":
            x_BTD = x_BTD + self.position_embed(positions_BT)
        elif cfg.positions == "sinusoidal":
            x_BTD = x_BTD * cfg.d_model**0.5 + self.sinusoids_SD[positions_BT]
        return self.dropout(x_BTD), tuple(rotation.table(positions_BT) for rotation in self.rotations)


def init_params(decoder: Decoder, seed: int) -> Decoder:
    """Fill `decoder` with random parameters of jaxlm's distributions, the same values on any device. Returns it."""
    generator = torch.Generator().manual_seed(seed)
    for module in decoder.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters(generator)  # pyright: ignore[reportCallIssue]
    return decoder


def init_cache(decoder: Decoder, batch: int, slots: int) -> Cache:
    """An empty cache for `batch` rows of up to `slots` tokens, on the decoder's device."""
    cfg, device = decoder.config, decoder.embed.weight.device
    return tuple(empty_cache(kind, cfg, decoder.policy, batch, slots, device) for kind in cfg.pattern * cfg.repeats)


__all__ = ["Cache", "Decoder", "init_cache", "init_params"]
