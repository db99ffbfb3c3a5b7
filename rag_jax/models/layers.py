"""Building blocks shared by every Transformer here: attention as a plain function, modules that only own parameters.

Parameters are float32 and carry logical axis names (`rag_jax.system.sharding.RULES` maps them to mesh axes); matrix
products run in `dtype`, LayerNorm and softmax in float32.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rag_jax.ops import float32_sums, matmul, position_hash
from rag_jax.system import sharding

Init = Literal["hf", "copy", "lexical"]
NormPlacement = Literal["post", "pre"]
Activation = Literal["gelu", "gelu_new", "relu", "silu"]
Dtype = Any
# What the backward pass does not keep but compute again: nothing; all within a layer; all but its matrix products.
Remat = Literal["none", "full", "dots"]


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution function of x (Hendrycks and Gimpel 2016), by erf, as torch has it.

    (jax.nn.gelu goes by erfc, two of whose branches a CPU computes for every number.)
    """
    return x * _normal_cdf(x)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * np.sqrt(0.5).astype(x.dtype)))


@gelu.defjvp
def _gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    cdf, density = _normal_cdf(x), jnp.exp(-0.5 * x * x) * np.sqrt(0.5 / np.pi).astype(x.dtype)
    return x * cdf, (cdf + x * density) * dx


# under the names of Hugging Face's configurations: gelu is the exact one (erf), gelu_new its tanh approximation
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class KeyValues(NamedTuple):
    """Keys [B, G, C, L] and values [B, G, L, C] of all layers of a decoder; G heads, or groups of heads.

    This is how the products of attention want them: while decoding, nothing is transposed.
    """

    key: list[jax.Array]
    value: list[jax.Array]


class Tree(NamedTuple):
    """Where the tokens of a call stand when they do not simply follow one another: beams or candidates in one cache.

    position_BT of the tokens, position_BS of the cache's entries (B may be 1 in both), and which entries a token sees,
    itself among them: visible_BTS.
    """

    position_BT: jax.Array
    position_BS: jax.Array
    visible_BTS: jax.Array


def empty_cache(shape: tuple[int, int, int, int], layers: int, dtype: Dtype) -> KeyValues:
    """Zeros for `layers` layers; shape: (B, G, L, C)."""
    B, G, L, C = shape
    keys = [jnp.zeros((B, G, C, L), dtype) for _ in range(layers)]
    return KeyValues(keys, [jnp.zeros(shape, dtype) for _ in range(layers)])


def line(length: int, size: int, slot: jax.Array | int) -> Tree:
    """The tree that is a line: `length` tokens after `slot` others in a cache of `size`."""
    query, key = jnp.arange(length) + slot, jnp.arange(size)
    return Tree(query[None], key[None], (key <= query[:, None])[None])


def kernel_init(init: Init) -> Callable:
    """`hf`: normal with std 0.02 (BERT, BART); `copy`, `lexical`: fan-in scaled, for training from scratch."""
    return nn.initializers.normal(0.02) if init == "hf" else nn.initializers.lecun_normal()


def embedding_init(init: Init) -> Callable:
    """`hf`: std 0.02; `copy`, `lexical`: unit scale, so that at the start all tokens are told apart."""
    return nn.initializers.normal(0.02 if init == "hf" else 1.0)


def sinusoids(offset: int) -> Callable:
    """Initialiser of a position table [P, D]: sinusoids (Vaswani et al. 2017, section 3.5) from row `offset` on.

    A shift by one position is then a linear map, so "the token after this one" is easy to learn from scratch.
    """

    def init(_key: jax.Array, shape: tuple[int, int], dtype: Dtype = jnp.float32) -> jax.Array:
        positions = np.arange(shape[0])[:, None] - offset
        rates = np.exp(-np.log(10_000.0) * np.arange(0, shape[1], 2) / shape[1])
        table = np.zeros(shape)
        table[:, 0::2] = np.sin(positions * rates)
        table[:, 1::2] = np.cos(positions * rates)[:, : shape[1] // 2]
        return jnp.asarray(table, dtype)

    return init


def position_init(init: Init, offset: int = 0) -> Callable:
    """`hf`: normal with std 0.02; `copy`, `lexical`: sinusoids, still learned."""
    return nn.initializers.normal(0.02) if init == "hf" else sinusoids(offset)


Source = tuple[jax.Array, jax.Array]  # keys [B, G, C, L] and values [B, G, L, C]


def attention(
    query_BHTC: jax.Array,
    sources: Sequence[Source],
    mask_B1TL: jax.Array,
    dropout: "Drop | None" = None,
    bias_BHTL: jax.Array | None = None,
    scale: float | None = None,
    whole: bool = True,
) -> jax.Array:
    """Scaled dot-product attention (Vaswani et al. 2017, equation 1), [B, H, T, C]. C is the width of a head; mask is
    True where to look.

    The sources are looked at as if they were one, L the sum of theirs, without being joined in memory. H / G
    neighbouring heads share keys and values (Ainslie et al. 2023). The bias (its B may be 1) is added to the scores,
    which are multiplied by `scale`, C ** -0.5 by default; `dropout` is applied to the weights. A row whose mask is all
    False gives the mean of the values, never NaN. whole: the queries are all tokens of a text, not a step of decoding
    beside a cache, whose keys a kernel of another layout would transpose at every step.
    """
    if whole and dropout is None and has_fused(query_BHTC, sources):
        return fused_attention(query_BHTC, *sources[0], mask_B1TL, bias_BHTL, scale, "cudnn")
    query_BHTC = query_BHTC * (query_BHTC.shape[-1] ** -0.5 if scale is None else scale)
    keys, values = [key for key, _ in sources], [value for _, value in sources]
    copies = query_BHTC.shape[1] // keys[0].shape[1]
    if copies > 1:
        keys, values = ([_repeated(x, copies) for x in side] for side in (keys, values))
    words, rate = dropout or (None, 0.0)
    return _attend(query_BHTC, keys, values, mask_B1TL, bias_BHTL, words, rate)


def _repeated(x_BGXY: jax.Array, copies: int) -> jax.Array:
    """Every group [B, G, ...] for each of its heads [B, G * copies, ...]; the gradient is summed in float32."""
    B, G, *rest = x_BGXY.shape
    copied = jnp.broadcast_to(x_BGXY[:, :, None].astype(jnp.float32), (B, G, copies, *rest))
    return copied.astype(x_BGXY.dtype).reshape(B, G * copies, *rest)


def has_fused(query_BHTC: jax.Array, sources: Sequence[Source]) -> bool:
    """Whether cuDNN's attention, which never writes the scores to memory, takes this: in programs for a GPU, 2-byte
    types, one source, even lengths, heads of at most 128.
    """
    T, C, L = *query_BHTC.shape[2:], sources[0][0].shape[3]
    fits = len(sources) == 1 and T % 2 == 0 and L % 2 == 0 and C % 8 == 0 and C <= 128
    return fits and query_BHTC.dtype.itemsize == 2 and sharding.platform() == "gpu"


def fused_attention(
    query_BHTC: jax.Array,
    key_BGCL: jax.Array,
    value_BGLC: jax.Array,
    mask_B1TL: jax.Array,
    bias_BHTL: jax.Array | None,
    scale: float | None,
    implementation: Literal["xla", "cudnn"],
) -> jax.Array:
    """`attention` by jax.nn.dot_product_attention, whose axes are [B, L, H, C]."""
    query, key, value = query_BHTC.swapaxes(1, 2), key_BGCL.transpose(0, 3, 1, 2), value_BGLC.swapaxes(1, 2)
    bias = None if bias_BHTL is None else bias_BHTL.astype(query.dtype)
    mask = jnp.broadcast_to(mask_B1TL, (mask_B1TL.shape[0], 1, query.shape[1], key.shape[1]))
    out = jax.nn.dot_product_attention(query, key, value, bias, mask, scale=scale, implementation=implementation)
    return out.swapaxes(1, 2)


def _parts(x_BHTL: jax.Array, values: list[jax.Array]) -> list[jax.Array]:
    """The columns of each source."""
    ends = np.cumsum([value.shape[2] for value in values])
    return jnp.split(x_BHTL, ends[:-1], axis=-1) if len(values) > 1 else [x_BHTL]


def _products(equation: str, x_BHTC: jax.Array, sources: list[jax.Array], **kind: Any) -> jax.Array:
    """What `equation` (of einsum) makes of x and every source [B, H, T, L]."""
    found = [matmul.einsum(equation, x_BHTC, source, **kind) for source in sources]
    return jnp.concatenate(found, axis=-1) if len(found) > 1 else found[0]


def _mix(sums: str, weights: list[jax.Array], sources: list[jax.Array]) -> jax.Array:
    """Weighted sums of the sources [B, H, T, C]."""
    pairs = zip(weights, sources, strict=True)
    return reduce(jnp.add, [matmul.einsum(sums, weight, source) for weight, source in pairs])


def _weights(
    query_BHTC: jax.Array, keys: list[jax.Array], mask_B1TL: jax.Array, bias_BHTL: jax.Array | None
) -> jax.Array:
    scores_BHTL = _products("bhtc,bhcl->bhtl", query_BHTC, keys, preferred_element_type=jnp.float32)
    if bias_BHTL is not None:
        scores_BHTL = scores_BHTL + bias_BHTL.astype(jnp.float32)
    return jax.nn.softmax(jnp.where(mask_B1TL, scores_BHTL, jnp.finfo(jnp.float32).min), axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(
    query_BHTC: jax.Array,
    keys: list[jax.Array],
    values: list[jax.Array],
    mask_B1TL: jax.Array,
    bias_BHTL: jax.Array | None,
    words: jax.Array | None,
    rate: float,
) -> jax.Array:
    """Attention whose own gradient passes over the [B, H, T, L] scores half as often as the derived one."""
    return _attend_forward(query_BHTC, keys, values, mask_B1TL, bias_BHTL, words, rate)[0]


def _attend_forward(
    query: jax.Array,
    keys: list[jax.Array],
    values: list[jax.Array],
    mask: jax.Array,
    bias: jax.Array | None,
    words: jax.Array | None,
    rate: float,
) -> tuple[jax.Array, tuple]:
    weights = _weights(query, keys, mask, bias).astype(values[0].dtype)
    out = _mix("bhtl,bhlc->bhtc", _parts(_dropped(weights, words, rate), values), values)
    return out, (query, keys, values, mask, bias, words, weights, out)


def _each(weights_BHTL: jax.Array, x_BHTC: jax.Array) -> jax.Array:
    """The sums over T [B, H, L, C]. On a CPU the weights are turned over first: XLA's fast products there do not take
    them as they stand, and the others need twice as long.
    """
    return matmul.einsum("bhlt,bhtc->bhlc", matmul.in_rows(weights_BHTL.swapaxes(2, 3)), x_BHTC)


def _attend_backward(rate: float, saved: tuple, d_out: jax.Array) -> tuple:
    query, keys, values, mask, bias, words, weights, out = saved
    dropped = _dropped(weights, words, rate)
    d_values = [_each(part, d_out) for part in _parts(dropped, values)]
    d_weights = _dropped(_products("bhtc,bhlc->bhtl", d_out, values, preferred_element_type=jnp.float32), words, rate)
    wide = weights.astype(jnp.float32)
    if wide.dtype == weights.dtype and sharding.platform() == "cpu":  # products to 24 bits: out . d_out is the same
        inner = (out * d_out).sum(-1, keepdims=True)
    else:  # from the very numbers below, or what the values have in common would not cancel; rounded weights miss 1
        inner = (wide * d_weights).sum(-1, keepdims=True) / wide.sum(-1, keepdims=True)
    d_scores = wide * (d_weights - inner)
    # where all is masked the weights are even, but no score was used
    d_scores = jnp.where(mask.any(-1, keepdims=True), d_scores, 0.0)
    d_bias = None
    if bias is not None:
        d_bias = d_scores.sum(0, keepdims=True) if len(bias) == 1 else d_scores
        d_bias = d_bias.astype(bias.dtype)
    d_scores = d_scores.astype(query.dtype)
    parts = _parts(d_scores, values)
    d_keys = [_each(part, query).swapaxes(2, 3) for part in parts]
    return _mix("bhtl,bhcl->bhtc", parts, keys), d_keys, d_values, None, d_bias, None


_attend.defvjp(_attend_forward, _attend_backward)


def write_cache(
    cache: tuple[jax.Array, jax.Array, jax.Array | int], new: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The keys and values of a cache (keys, values, slot) with new ones written from the slot on."""
    key, value, slot = cache
    return (
        jax.lax.dynamic_update_slice_in_dim(key, new[0].astype(key.dtype), slot, axis=3),
        jax.lax.dynamic_update_slice_in_dim(value, new[1].astype(value.dtype), slot, axis=2),
    )


def rotate(x_BHTC: jax.Array, position_BT: jax.Array, frequency_C2: jax.Array) -> jax.Array:
    """Rotary positions (Su et al. 2021): dimensions i and i + C/2 of a head turned by position * frequency[i]."""
    angle_B1TC = (position_BT[..., None].astype(jnp.float32) * frequency_C2)[:, None]
    sin, cos = jnp.sin(angle_B1TC), jnp.cos(angle_B1TC)
    first, second = jnp.split(x_BHTC.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BHTC.dtype)


class Drop(NamedTuple):
    """A dropout of its own: two random words, uint32 [2], and the rate; see `kept`."""

    words: jax.Array
    rate: float

    @classmethod
    def drawn(cls, key: jax.Array, rate: float) -> "Drop":
        return cls(jax.random.bits(key, (2,), jnp.uint32), rate)


def _dropped(x: jax.Array, words: jax.Array | None, rate: float) -> jax.Array:
    """x / (1 - rate) where `kept`, else 0; x itself where there are no words."""
    return x if words is None else jnp.where(kept(Drop(words, rate), x.shape), x / (1 - rate), 0)


def kept(drop: Drop, shape: Sequence[int]) -> jax.Array:
    """bool [shape]: each True with probability 1 - rate (to 2^-32), by its place in the array and the words alone.

    Two rounds of an integer hash of the place (`places.mixed`), each after a random word: four products a number, which
    a compiler computes where the mask is used. jax.random's cipher takes 20 rounds and a pass through memory, a tenth
    of a small step on a CPU; a mask needs no such strength. Arrays of more than 2^32 repeat.
    """
    before, between = drop.words
    bits = position_hash.mixed(position_hash.mixed(position_hash.numbers(shape) ^ before) + between)
    return bits >= np.uint32(min(round(drop.rate * 2**32), 2**32 - 1))


class Dropout(nn.Module):
    """Numbers are 0 with probability `rate`, and the others divided by 1 - rate (Srivastava et al. 2014)."""

    rate: float

    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        if deterministic or self.rate == 0.0:
            return x
        return _dropped(x, *Drop.drawn(self.make_rng("dropout"), self.rate))


class Dense(nn.Module):
    """y = x W + b with W [in, out] and logical axis names for both. `out`: type of y, `dtype` if None."""

    features: int
    names: tuple[str, str]
    init: Init = "hf"
    dtype: Dtype = jnp.float32
    use_bias: bool = True
    out: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.with_logical_partitioning(kernel_init(self.init), self.names), shape)
        # the kernel's gradient is a sum over one axis then: a CPU has a faster product for it, a TPU would copy x
        flat = x.reshape(-1, x.shape[-1]) if sharding.platform() == "cpu" else x
        y = float32_sums.matmul(flat.astype(self.dtype), kernel, self.names, self.out)
        if self.use_bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), self.names[1:])
            bias = self.param("bias", zeros, shape[1:])
            y = float32_sums.add(y, sharding.gathered(bias, self.names[1:], bias.dtype))
        return y.reshape(*x.shape[:-1], -1)


class LayerNorm(nn.Module):
    """LayerNorm with scale and bias, computed in float32."""

    eps: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        names = ("norm",)
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones_init(), names), x.shape[-1:])
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros_init(), names), x.shape[-1:])
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        return (centred * inverse * scale + bias).astype(self.dtype)


class RMSNorm(nn.Module):
    """x / rms(x), with a scale and no bias (Zhang and Sennrich 2019), computed in float32."""

    eps: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
        scale = self.param("scale", ones, x.shape[-1:])
        x = x.astype(jnp.float32)
        return (x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps) * scale).astype(self.dtype)


class Embed(nn.Module):
    """A table [rows, D]; `attend` uses it as the output projection (tied)."""

    rows: int
    features: int
    names: tuple[str, str]
    initializer: Callable
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        init = nn.with_logical_partitioning(self.initializer, self.names)
        self.embedding = self.param("embedding", init, (self.rows, self.features))

    def __call__(self, ids: jax.Array) -> jax.Array:
        return float32_sums.lookup(self.embedding, ids, self.names, self.dtype)

    def attend(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> [..., rows] in float32: logits rounded to bfloat16 would be off by several thousandths."""
        return float32_sums.matmul(hidden.astype(self.dtype), self.embedding.T, self.names[::-1], jnp.float32)


class Attention(nn.Module):
    """Multi-head attention; `project` gives keys and values, `__call__` attends to them.

    By default as in BERT and BART: head_width = width / heads, a key and a value for every head, biased projections.
    `turn` (rotary positions) is applied to the heads of queries and keys.
    """

    heads: int
    width: int
    init: Init = "hf"
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    head_width: int = 0
    groups: int = 0  # of heads that share keys and values; 0: every head has its own
    use_bias: bool = True  # of queries, keys and values
    use_out_bias: bool = True
    scale: float | None = None  # of the scores; None: head_width ** -0.5

    def setup(self) -> None:
        size, groups = self.head_width or self.width // self.heads, self.groups or self.heads

        def inner(heads: int) -> Dense:
            return Dense(heads * size, ("embed", "heads"), self.init, self.dtype, self.use_bias)

        self.query, self.key, self.value = inner(self.heads), inner(groups), inner(groups)
        self.out = Dense(self.width, ("heads", "embed"), self.init, self.dtype, self.use_out_bias)

    def split(self, x_BLX: jax.Array) -> jax.Array:
        """[B, L, heads * C] -> [B, heads, L, C]"""
        return x_BLX.reshape(*x_BLX.shape[:-1], -1, self.head_width or self.width // self.heads).swapaxes(1, 2)

    def project(
        self, source_BLD: jax.Array, turn: Callable[[jax.Array], jax.Array] | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Keys [B, G, C, L] and values [B, G, L, C] of the source."""
        key = self.split(self.key(source_BLD))
        key = key if turn is None else turn(key)
        return key.swapaxes(2, 3), self.split(self.value(source_BLD))

    def __call__(
        self,
        x_BTD: jax.Array,
        sources: Sequence[Source],
        mask_B1TL: jax.Array,
        deterministic: bool = True,
        bias_BHTL: jax.Array | None = None,
        turn: Callable[[jax.Array], jax.Array] | None = None,
        whole: bool = True,
    ) -> jax.Array:
        drop = None if deterministic or not self.dropout else Drop.drawn(self.make_rng("dropout"), self.dropout)
        query = self.split(self.query(x_BTD))
        query = query if turn is None else turn(query)
        out_BHTC = attention(query, sources, mask_B1TL, drop, bias_BHTL, self.scale, whole)
        return self.out(out_BHTC.swapaxes(1, 2).reshape(*x_BTD.shape[:-1], -1))


class FeedForward(nn.Module):
    """W2 f(W1 x), f the exact gelu as in BERT and BART by default; gated: W2 (f(W1 x) * W3 x) (Shazeer 2020)."""

    width: int
    hidden: int
    init: Init = "hf"
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    activation: Activation = "gelu"
    gated: bool = False
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        def inner(name: str) -> jax.Array:
            return Dense(self.hidden, ("embed", "mlp"), self.init, self.dtype, self.use_bias, name=name)(x)

        h = ACTIVATIONS[self.activation](inner("inner"))
        h = h * inner("linear") if self.gated else h
        h = Dropout(self.dropout)(h, deterministic=deterministic)
        return Dense(self.width, ("mlp", "embed"), self.init, self.dtype, self.use_bias, name="outer")(h)


def remat(layer: Any, policy: Remat, deterministic_at: int) -> Any:
    """The class of a layer, rematerialised (Chen et al. 2016); deterministic_at: which argument of it is static."""
    if policy == "none":
        return layer
    saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if policy == "dots" else None
    return nn.remat(layer, static_argnums=(deterministic_at,), methods=["__call__"], policy=saved)


def residual(norm: Callable, placement: NormPlacement, x: jax.Array, sublayer: Callable) -> jax.Array:
    """x + f(LN(x)) for `pre`, LN(x + f(x)) for `post`."""
    return x + sublayer(norm(x)) if placement == "pre" else norm(x + sublayer(x))


class Generator(nn.Module):
    """What the generators share: logits from states, and teacher forcing end to end.

    A generator has `encode` (source ids and mask -> hidden), `cross` (hidden -> what its decoder attends to, once per
    source), `init_cache`, `check_room`, `states` (tokens -> hidden states), `logits` of them, and their `head`.
    """

    def decode(
        self,
        ids_BT: jax.Array,
        cross: KeyValues,
        mask_BL: jax.Array,
        cache: KeyValues | None = None,
        slot: jax.Array | int = 0,
        deterministic: bool = True,
        tree: Tree | None = None,
    ) -> tuple[jax.Array, KeyValues | None]:
        """Logits [B, T, V] float32 for the tokens after ids_BT; the rest as of `states`."""
        x_BTD, cache = self.states(ids_BT, cross, mask_BL, cache, slot, deterministic, tree)
        return self.logits(x_BTD), cache

    def taught(
        self, ids_BL: jax.Array, mask_BL: jax.Array, target_BT: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """Teacher forcing: last states [B, T, D]; those at t are for the token after target_BT[:, t]."""
        cross = self.cross(self.encode(ids_BL, mask_BL, deterministic))
        return self.states(target_BT, cross, mask_BL, deterministic=deterministic)[0]

    def __call__(
        self, ids_BL: jax.Array, mask_BL: jax.Array, target_BT: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """Teacher forcing: logits [B, T, V]."""
        return self.logits(self.taught(ids_BL, mask_BL, target_BT, deterministic))
