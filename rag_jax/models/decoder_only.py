"""Decoder-only generators, GPT-2 and Llama: keys and values of the prefix are computed once and serve the whole answer.

GPT-2 (Radford et al. 2019, section 2.3): learned positions, LayerNorm, feed-forward without gate, biases. Llama
(Touvron et al. 2023, section 2.2): rotary positions, RMSNorm, gated feed-forward, no biases; later Llamas, Mistral and
Qwen2 share keys and values among heads (Ainslie et al. 2023). Every choice is a field of `LmConfig`.

The interface is that of `Bart`. Bart encodes the source and cross-attends to it; here the source is a prefix of the
target, padded on the right. Each row's target continues at the positions after its own prefix, as if there were no
padding in between.
"""

from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rag_jax.models import layer_scan
from rag_jax.models.layers import (
    Activation,
    Attention,
    Dense,
    Dropout,
    Embed,
    FeedForward,
    GeneratorBase,
    Init,
    LayerNorm,
    Remat,
    RMSNorm,
    ScanLayers,
    embedding_init,
    position_init,
    remat,
)
from rag_jax.models.special_tokens import SpecialTokens
from rag_jax.ops import float32_sums
from rag_jax.ops.attention import rotate
from rag_jax.ops.kv_cache import KeyValues, LayerKeyValues, Tree, empty_cache, line, write_cache
from rag_jax.system import sharding


@dataclass(frozen=True)
class LmConfig(SpecialTokens):
    """Shape of a decoder-only generator; the defaults are GPT-2 small.

    groups: groups of heads that share keys and values; 0: every head has its own.
    head_width: C; 0: width / heads.
    hidden: F, width of the feed-forward layers.
    positions: longest prefix and target together, in tokens.
    window: tokens back that a checkpoint attends to; longer inputs are refused; 0: all.
    attention_dropout: of attention weights.
    rope_theta, rope_scaling, rope_factor: base of the rotary frequencies, and which are divided by rope_factor, see
        `frequencies`.
    rope_low, rope_high: for llama3; frequencies with fewer than rope_low full rotations in rope_original positions are
        divided by rope_factor, those with more than rope_high are kept, and those in between are interpolated.
    rope_original: for llama3; positions before they were extended.
    qkv_bias, out_bias, mlp_bias: whether queries, keys and values, attention's output and feed-forward have biases.
    tied: whether the output layer is the token embedding.
    logit_scale: factor of the logits' matmul.
    bos_id: token between prefix and target.
    dtype: type of the matmuls' operands.
    remat: what the backward pass recomputes.
    scan_layers: whether the layers are one loop, see models.layer_scan.
    """

    vocab_size: int = 50257
    width: int = 768
    layers: int = 12
    heads: int = 12
    groups: int = 0
    head_width: int = 0
    hidden: int = 3072
    positions: int = 1024
    window: int = 0
    dropout: float = 0.1
    attention_dropout: float = 0.1
    eps: float = 1e-5
    activation: Activation = "gelu_new"
    gated: bool = False
    norm_kind: Literal["layer", "rms"] = "layer"
    position_kind: Literal["learned", "rotary"] = "learned"
    rope_theta: float = 10_000.0
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    rope_factor: float = 1.0
    rope_low: float = 1.0
    rope_high: float = 4.0
    rope_original: int = 8192
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    tied: bool = True
    init: Init = "hf"
    logit_scale: float = 1.0
    dtype: str = "float32"
    remat: Remat = "none"
    scan_layers: ScanLayers = "auto"
    _: KW_ONLY  # fields of SpecialTokens, which would come first otherwise
    bos_id: int = 50256
    pad_id: int = 50256
    eos_id: int = 50256
    kind: Literal["lm"] = "lm"

    def opening(self, prefix_ids: tuple[int, ...] = ()) -> tuple[int, ...]:
        """First tokens of a label: the start token alone, which separates prefix and target."""
        return (self.start_id,)

    def check_length(self, length: int) -> None:
        """ValueError where prefix and target, `length` tokens, exceed the attention window (not implemented)."""
        if 0 < self.window < length:
            raise ValueError(
                f"the generator attends to a window of {self.window} tokens, which is not built; up to {self.window} "
                f"of passage, question and answer together are the same without it, and here they are {length}: "
                "shorten model.source_length, or target_length (max_length of an answer)"
            )


def frequencies(c: LmConfig) -> np.ndarray:
    """Rotary frequencies [C/2]: radians per position of every pair of a head's dimensions (Su et al. 2021, s. 3.2.2).

    rope_scaling="linear" divides all by rope_factor, so that more positions fit the angles seen in training (Chen et
    al. 2023, section 2.3). "llama3" divides the slow ones only, as released with Llama 3.1.
    """
    size = c.head_width or c.width // c.heads
    rate = c.rope_theta ** (-np.arange(0, size, 2) / size)
    if c.rope_scaling == "none":
        return rate.astype(np.float32)
    turns = c.rope_original * rate / (2 * np.pi)
    linear = c.rope_scaling == "linear"
    kept = 0.0 if linear else np.clip((turns - c.rope_low) / (c.rope_high - c.rope_low), 0.0, 1.0)
    return (rate * (kept + (1 - kept) / c.rope_factor)).astype(np.float32)


def check_length(prefix: int, target: int, c: LmConfig) -> None:
    """ValueError where prefix and target, both in tokens, do not fit the positions or the attention window."""
    if prefix + target > c.positions:
        raise ValueError(
            f"prefix of length {prefix} and target of length {target}, but the generator has {c.positions} positions"
        )
    c.check_length(prefix + target)


def norm(c: LmConfig) -> LayerNorm | RMSNorm:
    """A new norm layer of the configured kind."""
    return (LayerNorm if c.norm_kind == "layer" else RMSNorm)(c.eps, jnp.dtype(c.dtype))


class DecoderOnlyLayer(nn.Module):
    """One layer: x + attention(norm(x)), then x + feed_forward(norm(x)).

    A call returns the new hidden states and the target's (keys, values): the updated cache, or without one those of
    these tokens.

    mask_B1TL: True where a token attends; L is the prefix, then the target (the whole cache where there is one).
    prefix: (keys, values) of the prefix; None while the prefix itself is read.
    cache: (keys, values, slot) of the target; those of these tokens are written from the slot on.
    """

    config: LmConfig

    def setup(self) -> None:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        self.attention = Attention(
            c.heads,
            c.width,
            c.init,
            c.attention_dropout,
            dtype,
            head_width=c.head_width,
            groups=c.groups,
            use_bias=c.qkv_bias,
            use_out_bias=c.out_bias,
        )
        self.attention_norm, self.feed_forward_norm = norm(c), norm(c)
        self.feed_forward = FeedForward(
            c.width, c.hidden, c.init, 0.0, dtype, c.activation, gated=c.gated, use_bias=c.mlp_bias
        )
        self.drop = Dropout(c.dropout)

    def __call__(
        self,
        x_BTD: jax.Array,
        position_BT: jax.Array,
        mask_B1TL: jax.Array,
        prefix: tuple[jax.Array, jax.Array] | None,
        cache: tuple[jax.Array, jax.Array, jax.Array | int] | None,
        deterministic: bool,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        def rotary(x_BHTC: jax.Array) -> jax.Array:
            return rotate(x_BHTC, position_BT, jnp.asarray(frequencies(self.config)))

        turn = rotary if self.config.position_kind == "rotary" else None
        h = self.attention_norm(x_BTD)
        own = self.attention.project(h, turn)
        if cache is not None:
            own = write_cache(cache, own)
        sources, whole = [own] if prefix is None else [prefix, own], cache is None
        attended = self.attention(h, sources, mask_B1TL, deterministic, turn=turn, whole=whole)
        x_BTD = x_BTD + self.drop(attended, deterministic=deterministic)
        h = self.feed_forward(self.feed_forward_norm(x_BTD), deterministic)
        return x_BTD + self.drop(h, deterministic=deterministic), own


class Lm(GeneratorBase):
    """A decoder-only model with the interface of models.protocols.Generator."""

    config: LmConfig

    def setup(self) -> None:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        self.token = Embed(c.vocab_size, c.width, ("vocab", "embed"), embedding_init(c.init), dtype)
        if c.position_kind == "learned":
            self.position = Embed(c.positions, c.width, ("position", "embed"), position_init(c.init))
        layer = DecoderOnlyLayer if layer_scan.applies(self, c.layers) else remat(DecoderOnlyLayer, c.remat, 6)
        self.layer = [layer(c) for _ in range(c.layers)]
        self.final_norm = norm(c)
        if not c.tied:
            self.lm_head = Dense(c.vocab_size, ("embed", "vocab"), c.init, dtype, use_bias=False, out=jnp.float32)
        self.drop = Dropout(c.dropout)

    def run(
        self,
        ids_BT: jax.Array,
        position_BT: jax.Array,
        mask_B1TL: jax.Array,
        prefix: KeyValues | None,
        cache: KeyValues | None,
        start: jax.Array | int,
        deterministic: bool,
    ) -> tuple[jax.Array, KeyValues]:
        """Hidden states [B, T, D] after all layers, before the last norm, and keys and values (`DecoderOnlyLayer`)."""
        x = self.token(ids_BT)
        if self.config.position_kind == "learned":
            x = float32_sums.add(x, self.position(position_BT))
        # here and after every layer: left to itself the compiler would also shard the width
        x = sharding.constrain(self.drop(x, deterministic=deterministic), "batch", "length", "width")

        def call(
            layer: DecoderOnlyLayer, x: jax.Array, before: LayerKeyValues | None, room: Any
        ) -> tuple[jax.Array, LayerKeyValues]:
            x, own = layer(x, position_BT, mask_B1TL, before, room, deterministic)
            return sharding.constrain(x, "batch", "length", "width"), own

        x, own = layer_scan.run(self, self.layer, x, call, deterministic, prefix, cache, start)
        assert own is not None  # every layer returns its own
        return x, own

    def read(self, ids_BL: jax.Array, mask_BL: jax.Array, deterministic: bool = True) -> KeyValues:
        """Keys and values of the prefix in every layer, as `run` returns them; arguments as in `encode`."""
        check_length(ids_BL.shape[1], 0, self.config)
        at_L = jnp.arange(ids_BL.shape[1])
        mask_B1LL = (at_L <= at_L[:, None]) & mask_BL.astype(bool)[:, None, None, :]
        return self.run(ids_BL, at_L[None], mask_B1LL, None, None, 0, deterministic)[1]

    def encode(self, ids_BL: jax.Array, mask_BL: jax.Array, deterministic: bool = True) -> KeyValues:
        """Keys and values of the prefix in every layer; mask: True on real tokens, which must come first."""
        prefix = self.read(ids_BL, mask_BL, deterministic)
        return KeyValues(list(prefix.key), list(prefix.value))

    def cross(self, prefix: KeyValues) -> KeyValues:
        """The prefix as it is: `encode` already returns the keys and values that `decode` attends to."""
        return prefix

    def check_room(self, source: int, target: int) -> None:
        """ValueError where the positions are too few for so many source and target tokens."""
        check_length(source, target, self.config)

    def init_cache(self, batch: int, length: int) -> KeyValues:
        """Empty cache for `length` target tokens."""
        c = self.config
        shape = (batch, c.groups or c.heads, length, c.head_width or c.width // c.heads)
        return empty_cache(shape, c.layers, jnp.dtype(c.dtype))

    def states(
        self,
        ids_BT: jax.Array,
        cross: KeyValues,
        mask_BL: jax.Array,
        cache: KeyValues | None = None,
        slot: jax.Array | int = 0,
        deterministic: bool = True,
        tree: Tree | None = None,
    ) -> tuple[jax.Array, KeyValues | None]:
        """Last hidden states [B, T, D] of the target tokens ids_BT, and the updated cache (None without one).

        cache: keys and values of earlier target tokens; those of ids_BT are written from `slot` on.
        tree: positions, counted from the end of the prefix, and visibility of tokens that do not follow one another in
            the cache. Without it a token's position is its slot and only the future is masked, not padding: ids_BT
            must be right-padded. ValueError where prefix and target (or its cache) do not fit the positions.
        """
        (B, T), L = ids_BT.shape, mask_BL.shape[1]
        length = T if cache is None else cache.key[0].shape[3]
        if tree is None:
            tree = line(T, length, slot)
            check_length(L, length, self.config)
        seen_B1TL = jnp.broadcast_to(mask_BL.astype(bool)[:, None, None, :], (B, 1, T, L))
        own_B1TS = jnp.broadcast_to(tree.visible_BTS[:, None], (B, 1, T, length))
        # each row's target continues after its own prefix, not after the prefix's padding
        position_BT = mask_BL.astype(jnp.int32).sum(-1, keepdims=True) + tree.position_BT
        mask = jnp.concatenate([seen_B1TL, own_B1TS], axis=-1)
        x, own = self.run(ids_BT, position_BT, mask, cross, cache, slot, deterministic)
        return self.final_norm(x), None if cache is None else own

    def head(self) -> tuple[jax.Array, jax.Array]:
        """Kernel [V, D] and bias [V] of the logits: kernel @ hidden * logit_scale + bias."""
        kernel_VD = self.token.embedding if self.config.tied else self.lm_head.variables["params"]["kernel"].T
        return kernel_VD, jnp.zeros(self.config.vocab_size)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Logits [B, T, V] float32 of hidden states."""
        logits = self.token.attend(x_BTD) if self.config.tied else self.lm_head(x_BTD)
        return logits.astype(jnp.float32) * self.config.logit_scale
