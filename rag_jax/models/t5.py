"""T5 as the generator (Raffel et al. 2019): relative positions, RMS norms, no biases.

One module serves T5 1.0 (relu, the output layer is the shared embedding, scaled logits) and T5 1.1, Flan-T5 and mT5
(gated gelu, an output layer of its own; Shazeer 2020).
"""

import math
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
    Remat,
    RMSNorm,
    ScanLayers,
    embedding_init,
    remat,
)
from rag_jax.models.special_tokens import SpecialTokens
from rag_jax.ops.kv_cache import KeyValues, LayerKeyValues, Tree, empty_cache, line, write_cache
from rag_jax.system import sharding


@dataclass(frozen=True)
class T5Config(SpecialTokens):
    """Shape of a T5 generator; the defaults are T5 1.1 base, which is also Flan-T5 base.

    T5 1.0 is activation="relu", gated=False, tied=True, logit_scale=width ** -0.5. Decoding starts from padding.
    Kernels and embeddings are initialised as in the other models here (`layers.kernel_init`), not at T5's own scales;
    the biases of relative positions have T5's scale, width ** -0.5.

    hidden: F, width of the feed-forward layers.
    buckets: of distances, those before and after a token together.
    max_distance: distance from which on all share one bucket.
    tied: whether the output layer is the shared embedding.
    logit_scale: factor of the logits' matmul.
    dtype: type of the matmuls' operands.
    remat: what the backward pass recomputes.
    scan_layers: whether the layers are one loop, see models.layer_scan.
    """

    vocab_size: int = 32128
    width: int = 768
    encoder_layers: int = 12
    decoder_layers: int = 12
    heads: int = 12
    head_width: int = 64
    hidden: int = 2048
    activation: Activation = "gelu_new"
    gated: bool = True
    buckets: int = 32
    max_distance: int = 128
    dropout: float = 0.1
    eps: float = 1e-6
    tied: bool = False
    logit_scale: float = 1.0
    init: Init = "hf"
    dtype: str = "float32"
    remat: Remat = "none"
    scan_layers: ScanLayers = "auto"
    _: KW_ONLY  # fields of SpecialTokens, which would come first otherwise
    pad_id: int = 0
    eos_id: int = 1
    kind: Literal["t5"] = "t5"

    @property
    def positions(self) -> int:
        """Longest input, in tokens: unlimited but for int32, since there is no position table."""
        return 2**31 - 1


def bucket(distance: jax.Array, buckets: int, max_distance: int, both_sides: bool) -> jax.Array:
    """Bucket of every distance, the key's position minus the query's (Raffel et al. 2019, section 2.1).

    Half of the buckets are for one distance each, the others for ranges that grow by a constant factor up to
    max_distance; all larger distances share the last bucket.

    both_sides: the second half of all buckets is for keys after the query; otherwise these are in bucket 0.

    ValueError where buckets or max_distance are too few for this.
    """
    side = buckets // 2 if both_sides else buckets
    exact = side // 2
    if not 0 < exact < max_distance:
        raise ValueError(f"{buckets} buckets do not fit distances up to {max_distance}")
    # a table computed on the host, since devices round logarithms differently and a boundary could move; log2, since
    # the usual boundaries are powers of two
    steps = np.arange(max_distance + 1)
    ranges = np.log2(np.maximum(steps, 1) / exact) / math.log2(max_distance / exact) * (side - exact)
    table = jnp.asarray(np.where(steps < exact, steps, np.minimum(exact + ranges.astype(int), side - 1)), jnp.int32)
    before = table[jnp.clip(-distance, 0, max_distance)]
    return jnp.where(distance > 0, side + table[jnp.clip(distance, 0, max_distance)], before) if both_sides else before


class T5Layer(nn.Module):
    """One encoder or decoder layer, with the norm before every sublayer; arguments and results as in `bart.BartLayer`.

    bias_BHTL: relative-position bias of self-attention. T5 does not scale the scores by C ** -0.5.
    """

    config: T5Config
    decoder: bool

    def setup(self) -> None:
        c, dtype = self.config, jnp.dtype(self.config.dtype)

        def attention() -> Attention:
            without = {"use_bias": False, "use_out_bias": False}
            return Attention(c.heads, c.width, c.init, c.dropout, dtype, c.head_width, scale=1.0, **without)

        self.self_attention, self.self_norm = attention(), RMSNorm(c.eps, dtype)
        if self.decoder:
            self.cross_attention, self.cross_norm = attention(), RMSNorm(c.eps, dtype)
        self.feed_forward = FeedForward(
            c.width, c.hidden, c.init, c.dropout, dtype, c.activation, c.gated, use_bias=False
        )
        self.feed_forward_norm = RMSNorm(c.eps, dtype)
        self.drop = Dropout(c.dropout)

    def project_cross(self, source_BLD: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.cross_attention.project(source_BLD)

    def __call__(
        self,
        x_BTD: jax.Array,
        mask: jax.Array,
        bias_BHTL: jax.Array,
        cross: tuple[tuple[jax.Array, jax.Array], jax.Array] | None,
        cache: tuple[jax.Array, jax.Array, jax.Array | int] | None,
        deterministic: bool,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        written, whole = None, cache is None
        h_BTD = self.self_norm(x_BTD)
        kv = self.self_attention.project(h_BTD)
        if cache is not None:
            kv = written = write_cache(cache, kv)
        h_BTD = self.self_attention(h_BTD, [kv], mask, deterministic, bias_BHTL, whole=whole)
        x_BTD = x_BTD + self.drop(h_BTD, deterministic=deterministic)
        if cross is not None:
            h_BTD = self.cross_norm(x_BTD)
            h_BTD = self.cross_attention(h_BTD, [cross[0]], cross[1], deterministic, whole=whole)
            x_BTD = x_BTD + self.drop(h_BTD, deterministic=deterministic)
        h_BTD = self.feed_forward(self.feed_forward_norm(x_BTD), deterministic)
        return x_BTD + self.drop(h_BTD, deterministic=deterministic), written


class T5Stack(nn.Module):
    """The encoder's or decoder's layers: embedded tokens -> hidden states, and the updated cache if there is one.

    The layers share one table of biases by distance.
    """

    config: T5Config
    decoder: bool

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(c.width**-0.5)
        self.relative = Embed(c.buckets, c.heads, ("position", "heads"), init)
        count = c.decoder_layers if self.decoder else c.encoder_layers
        layer = T5Layer if layer_scan.applies(self, count) else remat(T5Layer, c.remat, 6)
        self.layer = [layer(c, self.decoder) for _ in range(count)]
        self.final_norm = RMSNorm(c.eps, jnp.dtype(c.dtype))
        self.drop = Dropout(c.dropout)

    def project_cross(self, source_BLD: jax.Array) -> KeyValues:
        pairs = [layer.project_cross(source_BLD) for layer in self.layer]
        return KeyValues([k for k, _ in pairs], [v for _, v in pairs])

    def __call__(
        self,
        tokens_BTD: jax.Array,
        mask: jax.Array,
        distance_BTL: jax.Array,
        cross: tuple[KeyValues | jax.Array, jax.Array] | None = None,
        cache: KeyValues | None = None,
        slot: jax.Array | int = 0,
        deterministic: bool = True,
    ) -> tuple[jax.Array, KeyValues | None]:
        c = self.config
        bucket_BTL = bucket(distance_BTL, c.buckets, c.max_distance, both_sides=not self.decoder)
        bias_BHTL = self.relative(bucket_BTL).transpose(0, 3, 1, 2)
        # here and after every layer: left to itself the compiler would also shard the width
        x = sharding.constrain(self.drop(tokens_BTD, deterministic=deterministic), "batch", "length", "width")
        source, source_mask = cross or (None, mask)
        projected, states = (source, None) if isinstance(source, KeyValues) else (None, source)

        def call(
            layer: T5Layer, x: jax.Array, own: LayerKeyValues | None, room: Any
        ) -> tuple[jax.Array, LayerKeyValues | None]:
            own = own if states is None else layer.project_cross(states)
            x, written = layer(x, mask, bias_BHTL, own and (own, source_mask), room, deterministic)
            return sharding.constrain(x, "batch", "length", "width"), written

        x, cache = layer_scan.run(self, self.layer, x, call, deterministic, projected, cache, slot)
        x = self.drop(self.final_norm(x), deterministic=deterministic)
        return x, cache


class T5(GeneratorBase):
    """T5 with the interface of models.protocols.Generator."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        dtype = jnp.dtype(c.dtype)
        self.shared = Embed(c.vocab_size, c.width, ("vocab", "embed"), embedding_init(c.init), dtype)
        self.encoder, self.decoder = T5Stack(c, decoder=False), T5Stack(c, decoder=True)
        if not c.tied:
            self.lm_head = Dense(c.vocab_size, ("embed", "vocab"), c.init, dtype, use_bias=False, out=jnp.float32)

    def encode(self, ids_BL: jax.Array, mask_BL: jax.Array, deterministic: bool = True) -> jax.Array:
        """Source ids and mask (True on real tokens) -> hidden states [B, L, D]."""
        mask = mask_BL.astype(bool)[:, None, None, :]
        at = jnp.arange(ids_BL.shape[1])
        distance_1LL = (at[None, :] - at[:, None])[None]
        return self.encoder(self.shared(ids_BL), mask, distance_1LL, deterministic=deterministic)[0]

    def cross(self, hidden_BLD: jax.Array) -> KeyValues:
        """Cross-attention keys and values of every decoder layer, computed once per source."""
        return self.decoder.project_cross(hidden_BLD)

    def read(self, ids_BL: jax.Array, mask_BL: jax.Array, deterministic: bool = True) -> jax.Array:
        """The encoding itself: in training every layer projects it, and its keys and values are not kept."""
        return self.encode(ids_BL, mask_BL, deterministic)

    def check_room(self, source: int, target: int) -> None:
        """Never raises: relative positions have no limit."""

    def init_cache(self, batch: int, length: int) -> KeyValues:
        """Empty self-attention cache for `length` target tokens."""
        c = self.config
        return empty_cache((batch, c.heads, length, c.head_width), c.decoder_layers, jnp.dtype(c.dtype))

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
            position is its slot and only the future is masked, not padding: ids_BT must be right-padded.
        """
        if tree is None:
            tree = line(ids_BT.shape[1], ids_BT.shape[1] if cache is None else cache.key[0].shape[3], slot)
        distance_BTS = tree.position_BS[:, None, :] - tree.position_BT[:, :, None]
        source = (cross, mask_BL.astype(bool)[:, None, None, :])
        x, cache = self.decoder(
            self.shared(ids_BT), tree.visible_BTS[:, None], distance_BTS, source, cache, slot, deterministic
        )
        return x, cache

    def head(self) -> tuple[jax.Array, jax.Array]:
        """Kernel [V, D] and bias [V] of the logits: kernel @ hidden * logit_scale + bias."""
        kernel_VD = self.shared.embedding if self.config.tied else self.lm_head.variables["params"]["kernel"].T
        return kernel_VD, jnp.zeros(self.config.vocab_size)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Logits [B, T, V] float32 of hidden states."""
        logits = self.shared.attend(x_BTD) if self.config.tied else self.lm_head(x_BTD)
        return logits.astype(jnp.float32) * self.config.logit_scale
