"""BART as the generator (Lewis et al. 2019): encode, project once for cross-attention, decode with a cache."""

from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from rag_jax.models import layer_scan
from rag_jax.models.layers import (
    Activation,
    Attention,
    Dropout,
    Embed,
    FeedForward,
    GeneratorBase,
    Init,
    LayerNorm,
    NormPlacement,
    Remat,
    ScanLayers,
    embedding_init,
    parameter,
    position_init,
    remat,
    residual,
)
from rag_jax.models.special_tokens import SpecialTokens
from rag_jax.ops import float32_sums
from rag_jax.ops.kv_cache import KeyValues, LayerKeyValues, Tree, empty_cache, line, write_cache
from rag_jax.system import sharding

POSITION_OFFSET = 2  # rows 0 and 1 of the position tables are unused, a leftover of fairseq that checkpoints keep


@dataclass(frozen=True)
class BartConfig(SpecialTokens):
    """Shape of a BART generator; the defaults are BART-large.

    hidden: F, width of the feed-forward layers.
    positions: longest source and longest target, in tokens.
    attention_dropout, activation_dropout: of attention weights, and after the activation of feed-forward layers.
    norm: "pre" is mBART's form, which also has a LayerNorm after each stack.
    init: initialisation; `copy` is init_copying.
    embedding_scale: factor of the token embeddings; sqrt(width) for Hugging Face's scale_embedding.
    logit_scale: factor of the logits' matmul; width ** -0.5 with the unit-scale embeddings of init="copy".
    dtype: type of the matmuls' operands.
    remat: what the backward pass recomputes.
    scan_layers: whether the layers are one loop, see models.layer_scan.
    """

    vocab_size: int = 50265
    width: int = 1024
    encoder_layers: int = 12
    decoder_layers: int = 12
    heads: int = 16
    hidden: int = 4096
    positions: int = 1024
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    eps: float = 1e-5
    activation: Activation = "gelu"
    norm: NormPlacement = "post"
    init: Init = "hf"
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    dtype: str = "float32"
    remat: Remat = "none"
    scan_layers: ScanLayers = "auto"
    kind: Literal["bart"] = "bart"


def check_length(length: int, config: BartConfig) -> None:
    """ValueError where `length` tokens are more than the positions."""
    if length > config.positions:
        raise ValueError(f"input of length {length}, but the generator has {config.positions} positions")


class BartLayer(nn.Module):
    """One encoder or decoder layer; a call returns the new hidden states and the updated (keys, values) or None.

    mask: of self-attention, True where a query attends.
    cross: ((keys, values), mask) of the source, which a decoder attends to; None for an encoder.
    cache: (keys, values, slot) of self-attention; this call's keys and values are written from the slot on. None: the
        tokens attend to one another only, and None is returned.
    """

    config: BartConfig
    decoder: bool

    def setup(self) -> None:
        c, dtype = self.config, jnp.dtype(self.config.dtype)

        def attention() -> Attention:
            return Attention(c.heads, c.width, c.init, c.attention_dropout, dtype)

        self.self_attention, self.self_norm = attention(), LayerNorm(c.eps, dtype)
        if self.decoder:
            self.cross_attention, self.cross_norm = attention(), LayerNorm(c.eps, dtype)
        self.feed_forward = FeedForward(c.width, c.hidden, c.init, c.activation_dropout, dtype, c.activation)
        self.feed_forward_norm = LayerNorm(c.eps, dtype)
        self.drop = Dropout(c.dropout)

    def project_cross(self, source_BLD: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.cross_attention.project(source_BLD)

    def __call__(
        self,
        x_BTD: jax.Array,
        mask: jax.Array,
        cross: tuple[tuple[jax.Array, jax.Array], jax.Array] | None,
        cache: tuple[jax.Array, jax.Array, jax.Array | int] | None,
        deterministic: bool,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        written, whole = None, cache is None

        def self_attention(h: jax.Array) -> jax.Array:
            nonlocal written
            kv = self.self_attention.project(h)
            if cache is not None:
                kv = written = write_cache(cache, kv)
            attended = self.self_attention(h, [kv], mask, deterministic, whole=whole)
            return self.drop(attended, deterministic=deterministic)

        place = self.config.norm
        x_BTD = residual(self.self_norm, place, x_BTD, self_attention)
        if cross is not None:
            kv, cross_mask = cross

            def cross_attention(h: jax.Array) -> jax.Array:
                attended = self.cross_attention(h, [kv], cross_mask, deterministic, whole=whole)
                return self.drop(attended, deterministic=deterministic)

            x_BTD = residual(self.cross_norm, place, x_BTD, cross_attention)

        def feed_forward(h: jax.Array) -> jax.Array:
            return self.drop(self.feed_forward(h, deterministic), deterministic=deterministic)

        return residual(self.feed_forward_norm, place, x_BTD, feed_forward), written


class BartStack(nn.Module):
    """The encoder's or decoder's layers: embedded tokens -> hidden states, and the updated cache if there is one."""

    config: BartConfig
    decoder: bool

    def setup(self) -> None:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        rows = c.positions + POSITION_OFFSET
        init = position_init(c.init, POSITION_OFFSET)
        self.position = Embed(rows, c.width, ("position", "embed"), init)
        self.embedding_norm = LayerNorm(c.eps, dtype)
        count = c.decoder_layers if self.decoder else c.encoder_layers
        layer = BartLayer if layer_scan.applies(self, count) else remat(BartLayer, c.remat, 5)
        self.layer = [layer(c, self.decoder) for _ in range(count)]
        if c.norm == "pre":
            self.final_norm = LayerNorm(c.eps, dtype)
        self.drop = Dropout(c.dropout)

    def project_cross(self, source_BLD: jax.Array) -> KeyValues:
        pairs = [layer.project_cross(source_BLD) for layer in self.layer]
        return KeyValues([k for k, _ in pairs], [v for _, v in pairs])

    def __call__(
        self,
        tokens_BTD: jax.Array,
        mask: jax.Array,
        cross: tuple[KeyValues | jax.Array, jax.Array] | None = None,
        cache: KeyValues | None = None,
        slot: jax.Array | int = 0,
        position_BT: jax.Array | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, KeyValues | None]:
        if position_BT is None:
            check_length(tokens_BTD.shape[1], self.config)
            position_BT = jnp.arange(tokens_BTD.shape[1])[None]
        x = float32_sums.add(tokens_BTD, self.position(position_BT + POSITION_OFFSET))
        x = self.drop(self.embedding_norm(x), deterministic=deterministic)
        # here and after every layer: left to itself the compiler would also shard the width
        x = sharding.constrain(x, "batch", "length", "width")
        source, source_mask = cross or (None, mask)
        projected, states = (source, None) if isinstance(source, KeyValues) else (None, source)

        def call(
            layer: BartLayer, x: jax.Array, own: LayerKeyValues | None, room: Any
        ) -> tuple[jax.Array, LayerKeyValues | None]:
            own = own if states is None else layer.project_cross(states)
            x, written = layer(x, mask, own and (own, source_mask), room, deterministic)
            return sharding.constrain(x, "batch", "length", "width"), written

        x, cache = layer_scan.run(self, self.layer, x, call, deterministic, projected, cache, slot)
        x = self.final_norm(x) if self.config.norm == "pre" else x
        return x, cache


class Bart(GeneratorBase):
    """BART with the interface of models.protocols.Generator."""

    config: BartConfig

    def setup(self) -> None:
        c = self.config
        dtype = jnp.dtype(c.dtype)
        self.shared = Embed(c.vocab_size, c.width, ("vocab", "embed"), embedding_init(c.init), dtype)
        self.encoder, self.decoder = BartStack(c, decoder=False), BartStack(c, decoder=True)
        self.logits_bias = parameter(self, "logits_bias", nn.initializers.zeros, ("vocab",), (c.vocab_size,))

    def embed(self, ids: jax.Array) -> jax.Array:
        return self.shared(ids) * self.config.embedding_scale

    def encode(self, ids_BL: jax.Array, mask_BL: jax.Array, deterministic: bool = True) -> jax.Array:
        """Source ids and mask (True on real tokens) -> hidden states [B, L, D]."""
        mask = mask_BL.astype(bool)[:, None, None, :]
        return self.encoder(self.embed(ids_BL), mask, deterministic=deterministic)[0]

    def cross(self, hidden_BLD: jax.Array) -> KeyValues:
        """Cross-attention keys and values of every decoder layer, computed once per source."""
        return self.decoder.project_cross(hidden_BLD)

    def read(self, ids_BL: jax.Array, mask_BL: jax.Array, deterministic: bool = True) -> jax.Array:
        """The encoding itself: in training every layer projects it, and its keys and values are not kept."""
        return self.encode(ids_BL, mask_BL, deterministic)

    def check_room(self, source: int, target: int) -> None:
        """ValueError where the positions are too few for so many source and target tokens."""
        check_length(max(source, target), self.config)

    def init_cache(self, batch: int, length: int) -> KeyValues:
        """Empty self-attention cache for `length` target tokens."""
        c = self.config
        shape = (batch, c.heads, length, c.width // c.heads)
        return empty_cache(shape, c.decoder_layers, jnp.dtype(c.dtype))

    def states(
        self,
        ids_BT: jax.Array,
        cross: KeyValues | jax.Array,
        mask_BL: jax.Array,
        cache: KeyValues | None = None,
        slot: jax.Array | int = 0,
        deterministic: bool = True,
        tree: Tree | None = None,
    ) -> tuple[jax.Array, KeyValues | None]:
        """Last hidden states [B, T, D] of the tokens ids_BT, and the updated cache (None without one).

        cross: keys and values of the source, or its hidden states.
        cache: keys and values of earlier tokens; those of ids_BT are written from `slot` on.
        tree: positions and visibility of tokens that do not follow one another in the cache. Without it a token's
            position is its slot and only the future is masked, not padding: ids_BT must be right-padded. ValueError
            where these tokens, or a whole cache, are more than the positions.
        """
        if tree is None:
            tree = line(ids_BT.shape[1], ids_BT.shape[1] if cache is None else cache.key[0].shape[3], slot)
            check_length(tree.position_BS.shape[1], self.config)
        source = (cross, mask_BL.astype(bool)[:, None, None, :])
        visible_B1TS = tree.visible_BTS[:, None]
        x, cache = self.decoder(self.embed(ids_BT), visible_B1TS, source, cache, slot, tree.position_BT, deterministic)
        return x, cache

    def head(self) -> tuple[jax.Array, jax.Array]:
        """Kernel [V, D] and bias [V] of the logits: kernel @ hidden * logit_scale + bias."""
        return self.shared.embedding, self.logits_bias

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Logits [B, T, V] float32 of hidden states."""
        logits = self.shared.attend(x_BTD).astype(jnp.float32) * self.config.logit_scale
        return logits + self.logits_bias
