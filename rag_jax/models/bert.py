"""BERT as a question or context encoder (Devlin et al. 2019; DPR, Karpukhin et al. 2020): token ids -> one vector."""

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from rag_jax.models import layer_scan
from rag_jax.models.layers import (
    Activation,
    Attention,
    Dense,
    Dropout,
    Dtype,
    Embed,
    FeedForward,
    Init,
    LayerNorm,
    NormPlacement,
    Remat,
    ScanLayers,
    embedding_init,
    position_init,
    remat,
    residual,
)
from rag_jax.models.protocols import Pooling
from rag_jax.ops import float32_sums
from rag_jax.system import sharding


@dataclass(frozen=True)
class BertConfig:
    """Shape of an encoder; the defaults are BERT-base as DPR uses it: CLS vector, no pooler, no projection.

    hidden: F, width of the feed-forward layers.
    positions: longest input, in tokens.
    attention_dropout: of attention weights; below 0: `dropout`.
    pooling: see `pool`.
    projection: width of a linear layer on the pooled vector; 0: none.
    vector_norm: length that every vector is scaled to; 0: not scaled.
    dtype: type of the matmuls' operands.
    remat: what the backward pass recomputes.
    scan_layers: whether the layers are one loop, see models.layer_scan.
    """

    vocab_size: int = 30522
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    positions: int = 512
    token_types: int = 2
    dropout: float = 0.1
    attention_dropout: float = -1.0
    eps: float = 1e-12
    activation: Activation = "gelu"
    norm: NormPlacement = "post"
    init: Init = "hf"
    pooling: Pooling = "cls"
    projection: int = 0
    vector_norm: float = 0.0
    dtype: str = "float32"
    remat: Remat = "none"
    scan_layers: ScanLayers = "auto"
    kind: Literal["bert"] = "bert"

    @property
    def weights_dropout(self) -> float:
        """Dropout of attention weights."""
        return self.dropout if self.attention_dropout < 0 else self.attention_dropout

    @property
    def output_width(self) -> int:
        """E, the retrieval width."""
        return self.projection or self.width


class BertLayer(nn.Module):
    """Self-attention and feed-forward, each with residual and LayerNorm."""

    config: BertConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array, mask_B11L: jax.Array, deterministic: bool) -> jax.Array:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        drop = Dropout(c.dropout)
        attend = Attention(c.heads, c.width, c.init, c.weights_dropout, dtype, name="attention")

        def attention(h: jax.Array) -> jax.Array:
            return drop(attend(h, [attend.project(h)], mask_B11L, deterministic), deterministic=deterministic)

        feed = FeedForward(c.width, c.hidden, c.init, 0.0, dtype, c.activation, name="feed_forward")
        x_BLD = residual(LayerNorm(c.eps, dtype, name="attention_norm"), c.norm, x_BLD, attention)
        return residual(
            LayerNorm(c.eps, dtype, name="feed_forward_norm"),
            c.norm,
            x_BLD,
            lambda h: drop(feed(h, deterministic), deterministic=deterministic),
        )


def pool(hidden_BLD: jax.Array, mask_BL: jax.Array, how: str) -> jax.Array:
    """One vector per row, pooled over the positions where the mask is True: [B, D] float32.

    how: a name of sentence-transformers. cls: the first position, whatever the mask; lasttoken: the last one; mean,
        max; mean_sqrt_len_tokens: sum divided by the square root of the number of tokens; weightedmean: mean weighted
        by position, counted from 1.

    A row without tokens gives zeros, but for cls, and for max, which gives -1e9.
    """
    hidden_BLD = hidden_BLD.astype(jnp.float32)
    if how == "cls":
        return hidden_BLD[:, 0]
    mask_BL1 = mask_BL.astype(bool)[..., None]
    if how == "max":
        return jnp.where(mask_BL1, hidden_BLD, -1e9).max(1)
    at_1L1 = jnp.arange(1, hidden_BLD.shape[1] + 1)[None, :, None]
    if how == "lasttoken":
        return (hidden_BLD * (mask_BL1 & (at_1L1 == (mask_BL1 * at_1L1).max(1, keepdims=True)))).sum(1)
    weights_BL1 = mask_BL1 * (at_1L1 if how == "weightedmean" else 1.0)
    total_B1 = jnp.maximum(weights_BL1.sum(1), 1.0)
    return (hidden_BLD * weights_BL1).sum(1) / (jnp.sqrt(total_B1) if how == "mean_sqrt_len_tokens" else total_B1)


class Bert(nn.Module):
    """BERT as an encoder: `hidden` returns states [B, L, D]; a call returns one vector per row [B, E] in float32."""

    config: BertConfig

    def setup(self) -> None:
        c = self.config
        dtype: Dtype = jnp.dtype(c.dtype)
        self.word = Embed(c.vocab_size, c.width, ("vocab", "embed"), embedding_init(c.init), dtype)
        self.position = Embed(c.positions, c.width, ("position", "embed"), position_init(c.init))
        self.token_type = Embed(c.token_types, c.width, ("position", "embed"), nn.initializers.normal(0.02))
        self.embedding_norm = LayerNorm(c.eps, dtype)
        layer = BertLayer if layer_scan.applies(self, c.layers) else remat(BertLayer, c.remat, 3)
        self.layer = [layer(c) for _ in range(c.layers)]
        if c.norm == "pre":
            self.final_norm = LayerNorm(c.eps, dtype)
        if c.projection:
            self.projection = Dense(c.projection, ("embed", "heads"), c.init, jnp.float32)
        self.drop = Dropout(c.dropout)

    def hidden(self, ids_BL: jax.Array, mask_BL: jax.Array, deterministic: bool = True) -> jax.Array:
        """Last hidden states [B, L, D]; the mask is True on real tokens. All token types are 0."""
        length = ids_BL.shape[1]
        if length > self.config.positions:
            raise ValueError(f"input of length {length}, but the encoder has {self.config.positions} positions")
        x_BLD = float32_sums.add(
            self.word(ids_BL), self.position(jnp.arange(length)) + self.token_type(jnp.zeros(1, int))
        )
        x_BLD = self.drop(self.embedding_norm(x_BLD), deterministic=deterministic)
        # here and after every layer: left to itself the compiler would also shard the width
        x_BLD = sharding.constrain(x_BLD, "batch", "length", "width")
        mask_B11L = mask_BL.astype(bool)[:, None, None, :]

        def call(layer: BertLayer, x_BLD: jax.Array, *_: None) -> tuple[jax.Array, None]:
            return sharding.constrain(layer(x_BLD, mask_B11L, deterministic), "batch", "length", "width"), None

        x_BLD, _ = layer_scan.run(self, self.layer, x_BLD, call, deterministic)
        return self.final_norm(x_BLD) if self.config.norm == "pre" else x_BLD

    def __call__(
        self, ids_BL: jax.Array, mask_BL: jax.Array, deterministic: bool = True, pooled: slice = slice(None)
    ) -> jax.Array:
        """Vectors [B, E]: pooled, projected and scaled as configured.

        pooled: only these positions are pooled; attention still sees all.
        """
        at_L = jnp.zeros(ids_BL.shape[1], bool).at[pooled].set(True)
        pooled_BD = pool(self.hidden(ids_BL, mask_BL, deterministic), mask_BL.astype(bool) & at_L, self.config.pooling)
        vector_BE = self.projection(pooled_BD) if self.config.projection else pooled_BD
        if not self.config.vector_norm:
            return vector_BE
        norm_B1 = jnp.sqrt(jnp.maximum(jnp.square(vector_BE).sum(-1, keepdims=True), 1e-24))
        return vector_BE * (self.config.vector_norm / norm_B1)
