"""The decoder: embed, repeat the pattern of blocks, norm, unembed. One forward serves training, prefill and decoding.

    decoder = Decoder(config.model, policy)
    params = init_params(decoder, jax.random.key(0))
    logits_BTV, cache = decoder.apply({"params": params}, tokens, positions, segments, cache)

A model whose `config.head` is not `lm` scores instead: `score`, an output matrix of as many columns as it says numbers
for a token, takes the place of `head`; all other parameters keep their names.

The live tree has one entry `layers_i` a block when the layers are unrolled, and `layers.slot_s` with a leading axis of
repeats when they are scanned; `unstack_layers` turns the second into the first.

Shapes: B batch, T length, D width, V vocabulary (or numbers of the head), M documents of a row, R repeats.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm import config
from jaxlm.mesh import Axes, constrain
from jaxlm.models import adapted
from jaxlm.models.block import Repeat, Tables, empty_cache, rematerialised
from jaxlm.models.layers import Embed, Head, Norm
from jaxlm.numerics import Policy, wide
from jaxlm.ops import pooling
from jaxlm.ops.attention.visible import Places
from jaxlm.ops.rope import rope_table_of, sinusoidal_table

Params = dict[str, Any]
Cache = tuple[Any, ...]
Tokens = Int[Array, "b t"] | Float[Array, "b t d"]
"""Ids, or vectors in place of their embeddings."""


class Decoder(nn.Module):
    """A decoder-only model of language, or one that scores; everything about it is in the config."""

    config: config.Model
    policy: Policy = Policy()

    def setup(self) -> None:
        cfg, policy = self.config, self.policy
        self.embed = Embed(cfg.vocab_size, cfg.d_model, "vocab", cfg.init_std, policy)
        if cfg.positions == "learned":
            self.position_embed = Embed(cfg.max_seq_len, cfg.d_model, None, cfg.init_std, policy)
        self.dropout = nn.Dropout(cfg.dropout)
        if cfg.scanned:
            scanned = nn.scan(
                Repeat,
                variable_axes={"params": 0, "intermediates": 0, "routing": 0, **adapted.VARIABLE_AXES},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, nn.broadcast, 0, 0),  # pyright: ignore[reportArgumentType]
                length=cfg.repeats,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            self.layers: Any = scanned(cfg, policy)
        else:
            kinds = cfg.pattern * cfg.repeats
            block_class = nn.jit(rematerialised(cfg))  # equal blocks are traced once
            self.layers = [block_class(kind, cfg, policy) for kind in kinds]
        if cfg.final_norm:
            self.final_norm = Norm(cfg.norm, cfg.norm_eps, policy)
        if cfg.head != "lm":
            self.score = Head(cfg.d_model, cfg.outputs, cfg.init_std, policy, True, None)
        elif not cfg.tie_embeddings:
            self.head = Head(cfg.d_model, cfg.vocab_size, cfg.init_std, policy, "head" in cfg.biases)

    def __call__(
        self,
        tokens_BT: Tokens,
        positions_BT: Int[Array, "b t"],
        segments_BT: Int[Array, "b t"],
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "b t v"], Cache | None]:
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
        return found_BTV if self.config.head == "lm" else jnp.where(segments_BT[..., None] != 0, found_BTV, 0), cache

    def score_documents(
        self,
        tokens_BT: Int[Array, "b t"],
        positions_BT: Int[Array, "b t"],
        segments_BT: Int[Array, "b t"],
        documents: int,
    ) -> tuple[Float[Array, "b m v"], Bool[Array, "b m"]]:
        """What the head says of the segments 1 to `documents`, 0 where a row has none, and whether it has it.

        It sees the last token of a document (Stiennon et al. 2020, section 3.4), or the mean of all: `model.pooling`.
        """
        hidden_BTD, _ = self.hidden(tokens_BT, positions_BT, segments_BT)
        pool = pooling.mean if (self.config.head, self.config.pooling) == ("classes", "mean") else pooling.last_token
        present_BM = pooling.present(segments_BT, documents)
        scores_BMV = self.unembed(pool(hidden_BTD, segments_BT, documents))
        return jnp.where(present_BM[..., None], scores_BMV, 0), present_BM

    def hidden(
        self,
        tokens_BT: Tokens,
        positions_BT: Int[Array, "b t"],
        segments_BT: Int[Array, "b t"],
        cache: Cache | None = None,
        layers: tuple[int, ...] = (),
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        """What the head sees, after the final norm: training computes the loss from it block by block.

        Args:
            layers: numbers of blocks, from 0; their outputs [B, T, D] by number are sown as `kept` in `outputs`.

        Raises:
            ValueError: there is no such block.
        """
        cfg = self.config
        if absent := [layer for layer in layers if not 0 <= layer < cfg.n_layers]:
            raise ValueError(f"layers {absent}: the model has {cfg.n_layers}, from 0 on")
        places = Places(positions_BT, segments_BT)
        with jax.default_matmul_precision(self.policy.matmul):
            x_BTD, ropes = self._embedded(tokens_BT, positions_BT)
            kept = {layer: jnp.zeros_like(x_BTD) for layer in layers}
            if cfg.scanned:
                repeats = jnp.arange(cfg.repeats) if layers else None
                (x_BTD, kept), cache = self.layers((x_BTD, kept), places, ropes, cache, repeats)
            else:
                after = []
                for i, layer in enumerate(self.layers):
                    x_BTD, layer_cache = layer(x_BTD, places, ropes, None if cache is None else cache[i])
                    after.append(layer_cache)
                    kept |= {i: x_BTD} if i in layers else {}
                cache = None if cache is None else tuple(after)
            self.sow("outputs", "kept", kept)
            return self.final_norm(x_BTD) if cfg.final_norm else x_BTD, cache

    def unembed(self, hidden_BTD: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Logits in float32 or wider of what `hidden` returned, or of a part of it."""
        kernel_DV, bias_V = self.unembedding()
        with jax.default_matmul_precision(self.policy.matmul):
            logits_BTV = jnp.einsum("btd,dv->btv", hidden_BTD, kernel_DV, preferred_element_type=wide(hidden_BTD.dtype))
        return logits_BTV if bias_V is None else logits_BTV + bias_V

    def unembedding(self) -> tuple[Float[Array, "d v"], Float[Array, " v"] | None]:
        """The output matrix, in the compute dtype, and its bias."""
        if self.config.head != "lm":
            return self.score.kernel.astype(self.policy.compute), self.score.bias
        if self.config.tie_embeddings:
            return self.embed.embedding.T.astype(self.policy.compute), None
        return self.head.kernel.astype(self.policy.compute), self.head.bias

    def _embedded(self, tokens_BT: Tokens, positions_BT: Array) -> tuple[Array, Tables]:
        cfg, compute = self.config, self.policy.compute
        x_BTD = self.embed(tokens_BT) if tokens_BT.ndim == 2 else tokens_BT.astype(compute)
        if cfg.positions == "learned":
            x_BTD = x_BTD + self.position_embed(positions_BT)
        elif cfg.positions == "sinusoidal":
            table_SD = jnp.asarray(sinusoidal_table(cfg.max_seq_len, cfg.d_model), x_BTD.dtype)
            x_BTD = x_BTD * cfg.d_model**0.5 + table_SD[positions_BT]  # the scale of Vaswani et al. 2017, section 3.4
        ropes = tuple(rope_table_of(positions_BT, rope, compute) for rope in cfg.ropes)
        x_BTD = self.dropout(x_BTD, deterministic=not self.has_rng("dropout"))
        return constrain(x_BTD, "batch", "seq", "features"), ropes


def abstract_params(decoder: Decoder) -> tuple[Params, Params]:
    """Shapes and logical axes of every parameter, without allocating anything: the side table of the sharding.

    They are traced once for equal decoders; `trace_modules` traces each time.
    """
    boxed = _traced_init.eval_shape(decoder)
    is_box = lambda leaf: isinstance(leaf, nn.Partitioned)  # noqa: E731
    axes: Any = jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=is_box)
    return nn.meta.unbox(boxed), axes


def trace_modules(decoder: Decoder) -> None:
    """Call every module once with shapes alone, for `flax.linen.intercept_methods` around it."""
    jax.eval_shape(lambda: _init(decoder, jax.random.key(0)))


def init_params(decoder: Decoder, key: jax.Array) -> Params:
    """Random parameters: the same whether layers are scanned or unrolled, and on any mesh.

    They are made by the scanned decoder, which compiles one repeat; under a `jax.jit` with output shardings, in place.
    """
    scanned = decoder.clone(config=dataclasses.replace(decoder.config, layer_loop="scan"))

    def make(key: jax.Array) -> Params:
        params = nn.meta.unbox(_init(scanned, key))
        return params if decoder.config.scanned else unstack_layers(params, scanned.config)

    return jax.jit(make)(key)


def init_cache(decoder: Decoder, batch: int, slots: int) -> Cache:
    """An empty cache for `batch` rows of up to `slots` tokens, shaped as the decoder's layers are."""
    cfg = decoder.config
    kinds = cfg.pattern if cfg.scanned else cfg.pattern * cfg.repeats  # each its own buffers, which can be donated
    pattern = tuple(empty_cache(kind, cfg, decoder.policy, batch, slots) for kind in kinds)
    if not cfg.scanned:
        return pattern
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (cfg.repeats, *leaf.shape)), pattern)


def unstack_layers(params: Params, cfg: config.Model) -> Params:
    """The tree of the unrolled decoder: layer r * len(pattern) + s is repeat r of slot s."""
    if not cfg.scanned:
        return params
    slots = len(cfg.pattern)
    layers = {
        f"layers_{r * slots + s}": jax.tree.map(lambda leaf, r=r: leaf[r], params["layers"][f"slot_{s}"])
        for r in range(cfg.repeats)
        for s in range(slots)
    }
    return {name: leaf for name, leaf in params.items() if name != "layers"} | layers


def unrolled(decoder: Decoder) -> Decoder:
    """The same model with its layers unrolled; it takes the tree of `unstack_layers`."""
    return decoder.clone(config=dataclasses.replace(decoder.config, layer_loop="unroll"))


def _init(decoder: Decoder, key: jax.Array) -> Any:
    ids = jnp.zeros((1, 1), jnp.int32)
    return decoder.init(key, ids, ids, jnp.ones_like(ids))["params"]


@functools.partial(jax.jit, static_argnums=0)
def _traced_init(decoder: Decoder) -> Any:
    """Never compiled: a start asks many times for the shapes of one decoder."""
    return _init(decoder, jax.random.key(0))


__all__ = [
    "Axes",
    "Cache",
    "Decoder",
    "Params",
    "abstract_params",
    "init_cache",
    "init_params",
    "trace_modules",
    "unrolled",
    "unstack_layers",
]
