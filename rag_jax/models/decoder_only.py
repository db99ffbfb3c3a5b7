"""Decoder-only generators, GPT-2 and Llama: the prefix is read once, its keys and values are all that the answer needs.

GPT-2 (Radford et al. 2019, section 2.3): learned positions, LayerNorm, one feed-forward matrix in, biases. Llama
(Touvron et al. 2023, section 2.2): rotary positions, RMSNorm, gated feed-forward, no biases; later ones, Mistral and
Qwen2 share keys and values among heads (Ainslie et al. 2023). Every choice is a field of `LmConfig`.

The interface is that of `Bart`. Where Bart encodes the source and attends to it across, here the source is a prefix,
padded on the right; the target goes on at each row's own length, as if no padding stood between.
"""

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

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
    embedding_init,
    position_init,
    remat,
)
from rag_jax.models.special_tokens import SpecialTokens
from rag_jax.ops import float32_sums
from rag_jax.ops.attention import rotate
from rag_jax.ops.kv_cache import KeyValues, Tree, empty_cache, line, write_cache
from rag_jax.system import sharding


@dataclass(frozen=True)
class LmConfig(SpecialTokens):
    """Shape of a decoder-only generator. The defaults are GPT-2, the small one."""

    vocab_size: int = 50257
    width: int = 768
    layers: int = 12
    heads: int = 12
    groups: int = 0  # of heads that share keys and values; 0: every head has its own
    head_width: int = 0  # 0: width / heads
    hidden: int = 3072
    positions: int = 1024  # that prefix and target have together
    window: int = 0  # positions back that a token attends to; longer inputs are refused; 0: all
    dropout: float = 0.1
    attention_dropout: float = 0.1
    eps: float = 1e-5
    activation: Activation = "gelu_new"
    gated: bool = False
    norm_kind: Literal["layer", "rms"] = "layer"
    position_kind: Literal["learned", "rotary"] = "learned"
    rope_theta: float = 10_000.0
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    rope_factor: float = 1.0  # by how much the slow rotations are slowed down further
    rope_low: float = 1.0  # llama3: rotations of fewer turns than this over rope_original are slow,
    rope_high: float = 4.0  # those of more than this are not, and what is between is blended
    rope_original: int = 8192  # llama3: positions before they were extended
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    tied: bool = True
    init: Init = "hf"
    logit_scale: float = 1.0
    bos_id: int = 50256  # stands between prefix and target
    pad_id: int = 50256
    eos_id: int = 50256
    dtype: str = "float32"
    remat: Remat = "none"
    kind: Literal["lm"] = "lm"

    def opening(self, prefix_ids: tuple[int, ...] = ()) -> tuple[int, ...]:
        """What a label begins with: the start alone, which ends the prefix."""
        return (self.start_id,)

    def check_length(self, length: int) -> None:
        """ValueError where so many tokens, prefix and target, do not fit the window within which all see all."""
        if 0 < self.window < length:
            raise ValueError(
                f"the generator attends to a window of {self.window} tokens, which is not built; up to {self.window} "
                f"of passage, question and answer together are the same without it, and here they are {length}: "
                "shorten model.source_length, or target_length (max_length of an answer)"
            )


def frequencies(c: LmConfig) -> np.ndarray:
    """Radians per position of every pair of a head's dimensions [C/2] (Su et al. 2021, section 3.2.2).

    linear: all slowed down by the factor, so that more positions fit the angles seen in training (Chen et al. 2023,
    section 2.3). llama3: the slow ones only, as released with Llama 3.1.
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
    if prefix + target > c.positions:
        raise ValueError(
            f"prefix of length {prefix} and target of length {target}, but the generator has {c.positions} positions"
        )
    c.check_length(prefix + target)


def norm(c: LmConfig) -> LayerNorm | RMSNorm:
    return (LayerNorm if c.norm_kind == "layer" else RMSNorm)(c.eps, jnp.dtype(c.dtype))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)).

    `prefix` is what stands before these tokens, (keys, values); `cache` is (keys, values, slot), room for their own
    and where in it to write. The mask is over the prefix, then their own. Returns the new hidden states and the
    tokens' own keys and values, as long as the cache where there is one.
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
    """The generator interface: `encode`, `cross`, `decode`, `init_cache`; calling it is teacher forcing end to end."""

    config: LmConfig

    def setup(self) -> None:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        self.token = Embed(c.vocab_size, c.width, ("vocab", "embed"), embedding_init(c.init), dtype)
        if c.position_kind == "learned":
            self.position = Embed(c.positions, c.width, ("position", "embed"), position_init(c.init))
        layer = remat(Layer, c.remat, 6)
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
        """Tokens through all layers: hidden states [B, T, D] and the tokens' own keys and values, see `Layer`."""
        x = self.token(ids_BT)
        if self.config.position_kind == "learned":
            x = float32_sums.add(x, self.position(position_BT))
        x = sharding.constrain(self.drop(x, deterministic=deterministic), "batch", "length", "width")
        own = KeyValues([], [])
        for i, layer in enumerate(self.layer):
            before = None if prefix is None else (prefix.key[i], prefix.value[i])
            room = None if cache is None else (cache.key[i], cache.value[i], start)
            x, (key, value) = layer(x, position_BT, mask_B1TL, before, room, deterministic)
            x = sharding.constrain(x, "batch", "length", "width")
            own.key.append(key)
            own.value.append(value)
        return x, own

    def encode(self, ids_BL: jax.Array, mask_BL: jax.Array, deterministic: bool = True) -> KeyValues:
        """Prefix ids and mask (True on real tokens, which come first) -> its keys and values in every layer."""
        check_length(ids_BL.shape[1], 0, self.config)
        at_L = jnp.arange(ids_BL.shape[1])
        mask_B1LL = (at_L <= at_L[:, None]) & mask_BL.astype(bool)[:, None, None, :]
        return self.run(ids_BL, at_L[None], mask_B1LL, None, None, 0, deterministic)[1]

    def cross(self, prefix: KeyValues) -> KeyValues:
        """What `encode` gave is already what `decode` attends to."""
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
        """Hidden states [B, T, D] of the tokens ids_BT, from which `head` makes logits. The tokens are written to the
        cache from `slot` on.

        With a cache, also the cache to go on with. Without a tree the slot is the position after the prefix too, and
        of the target nothing is masked but the future, so right-pad ids_BT. ValueError where prefix and target (or
        its cache) do not fit the positions.
        """
        (B, T), L = ids_BT.shape, mask_BL.shape[1]
        length = T if cache is None else cache.key[0].shape[3]
        if tree is None:
            tree = line(T, length, slot)
            check_length(L, length, self.config)
        seen_B1TL = jnp.broadcast_to(mask_BL.astype(bool)[:, None, None, :], (B, 1, T, L))
        own_B1TS = jnp.broadcast_to(tree.visible_BTS[:, None], (B, 1, T, length))
        position_BT = mask_BL.astype(jnp.int32).sum(-1, keepdims=True) + tree.position_BT
        mask = jnp.concatenate([seen_B1TL, own_B1TS], axis=-1)
        x, own = self.run(ids_BT, position_BT, mask, cross, cache, slot, deterministic)
        return self.final_norm(x), None if cache is None else own

    def head(self) -> tuple[jax.Array, jax.Array]:
        """Kernel [V, D] and bias [V] of the logits: kernel @ hidden * logit_scale + bias."""
        kernel_VD = self.token.embedding if self.config.tied else self.lm_head.variables["params"]["kernel"].T
        return kernel_VD, jnp.zeros(self.config.vocab_size)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Of hidden states, [B, T, V] float32."""
        logits = self.token.attend(x_BTD) if self.config.tied else self.lm_head(x_BTD)
        return logits.astype(jnp.float32) * self.config.logit_scale
