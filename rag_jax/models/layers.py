"""Building blocks shared by every Transformer here: Flax modules that only own parameters, and activations.

Parameters are float32 and carry logical axis names (`rag_jax.system.sharding.RULES` maps them to mesh axes). Matmuls
run in `dtype`, LayerNorm and softmax in float32.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rag_jax.ops import float32_sums
from rag_jax.ops.attention import Source, attention
from rag_jax.ops.dropout import Drop, dropped
from rag_jax.ops.kv_cache import KeyValues, Tree
from rag_jax.system import sharding

Init = Literal["hf", "copy", "lexical"]
NormPlacement = Literal["post", "pre"]
Activation = Literal["gelu", "gelu_new", "relu", "silu"]
Dtype = Any
# Rematerialisation, by what the backward pass recomputes: "none", nothing; "full", everything inside a layer; "dots",
# everything but the results of matmuls with parameters.
Remat = Literal["none", "full", "dots"]
# Whether the layers of a stack are one loop (models.layer_scan): "auto": on TPUs, and on CPUs with rematerialisation,
# which XLA undoes there without a loop.
ScanLayers = Literal["auto", "on", "off"]


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU (Hendrycks and Gimpel 2016): x times the normal distribution function of x, by erf as in torch.

    jax.nn.gelu uses erfc, which is slower: a CPU computes two of its branches for every number.
    """
    return x * _normal_cdf(x)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * np.sqrt(0.5).astype(x.dtype)))


@gelu.defjvp
def _gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    cdf, density = _normal_cdf(x), jnp.exp(-0.5 * x * x) * np.sqrt(0.5 / np.pi).astype(x.dtype)
    return x * cdf, (cdf + x * density) * dx


# by the names in Hugging Face's configurations: gelu is the exact one (erf), gelu_new its tanh approximation
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def kernel_init(init: Init) -> Callable:
    """Initialiser of kernels. `hf`: normal with std 0.02 (BERT, BART); `copy`, `lexical`: LeCun normal (by fan-in)."""
    return nn.initializers.normal(0.02) if init == "hf" else nn.initializers.lecun_normal()


def embedding_init(init: Init) -> Callable:
    """Initialiser of token embeddings: normal with std 0.02 for `hf`, 1 for `copy` and `lexical`.

    Unit scale makes all tokens distinguishable at the start of training from scratch.
    """
    return nn.initializers.normal(0.02 if init == "hf" else 1.0)


def sinusoids(offset: int) -> Callable:
    """Initialiser of a position table [P, D]: sinusoids (Vaswani et al. 2017, section 3.5), position 0 at row `offset`.

    A shift by one position is a linear map of sinusoids, so "the token after this one" is easy to learn from scratch.
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
    """Initialiser of a position table. `hf`: normal with std 0.02; `copy`, `lexical`: sinusoids. Both are trained."""
    return nn.initializers.normal(0.02) if init == "hf" else sinusoids(offset)


def parameter(
    module: nn.Module, name: str, init: Callable, names: tuple[str, ...], shape: tuple[int, ...]
) -> jax.Array:
    """The module's parameter `name`: the one passed to `apply`, else drawn by `init` with logical axes `names`.

    Flax's own `param` traces the initialiser to check the shape of a passed parameter, a fifth of all tracing here; so
    the shape is compared directly. ScopeParamShapeError where it differs.
    """
    if not module.has_variable("params", name):
        return module.param(name, nn.with_logical_partitioning(init, names), shape)
    value = nn.unbox(module.get_variable("params", name))
    if value.shape != shape:
        raise flax.errors.ScopeParamShapeError(name, "/".join(module.path), value.shape, shape)
    return value


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014): each number is 0 with probability `rate`, else divided by 1 - rate."""

    rate: float

    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        if deterministic or self.rate == 0.0:
            return x
        return dropped(x, *Drop.drawn(self.make_rng("dropout"), self.rate))


class Dense(nn.Module):
    """Linear layer y = x W + b with W [in, features].

    names: logical axes of W; the second is that of b.
    dtype: type of the operands.
    out: type of y; None: `dtype`.
    """

    features: int
    names: tuple[str, str]
    init: Init = "hf"
    dtype: Dtype = jnp.float32
    use_bias: bool = True
    out: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.features)
        kernel = parameter(self, "kernel", kernel_init(self.init), self.names, shape)
        # with flat rows the kernel's gradient contracts one axis, for which a CPU has a faster matmul; a TPU would
        # copy x for the reshape
        flat = x.reshape(-1, x.shape[-1]) if sharding.platform() == "cpu" else x
        y = float32_sums.matmul(flat.astype(self.dtype), kernel, self.names, self.out)
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, self.names[1:], shape[1:])
            y = float32_sums.add(y, sharding.gathered(bias, self.names[1:], bias.dtype))
        return y.reshape(*x.shape[:-1], -1)


class LayerNorm(nn.Module):
    """LayerNorm with scale and bias, computed in float32."""

    eps: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", nn.initializers.ones, ("norm",), x.shape[-1:])
        bias = parameter(self, "bias", nn.initializers.zeros, ("norm",), x.shape[-1:])
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        return (centred * inverse * scale + bias).astype(self.dtype)


class RMSNorm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019): x / rms(x) with a scale and no bias, computed in float32."""

    eps: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", nn.initializers.ones, ("norm",), x.shape[-1:])
        x = x.astype(jnp.float32)
        return (x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps) * scale).astype(self.dtype)


class Embed(nn.Module):
    """An embedding table [rows, features]; `attend` uses it as the tied output projection."""

    rows: int
    features: int
    names: tuple[str, str]
    initializer: Callable
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        self.embedding = parameter(self, "embedding", self.initializer, self.names, (self.rows, self.features))

    def __call__(self, ids: jax.Array) -> jax.Array:
        return float32_sums.lookup(self.embedding, ids, self.names, self.dtype)

    def attend(self, hidden: jax.Array) -> jax.Array:
        """Logits [..., rows] of hidden [..., D], in float32: bfloat16 would round them by several thousandths."""
        return float32_sums.matmul(hidden.astype(self.dtype), self.embedding.T, self.names[::-1], jnp.float32)


class Attention(nn.Module):
    """Multi-head attention: `project` computes keys and values, `__call__` attends to them.

    The defaults are those of BERT and BART.

    width: D of input and output.
    dropout: of the attention weights.
    head_width: C; 0: width / heads.
    groups: G groups of heads that share keys and values; 0: every head has its own.
    use_bias, use_out_bias: biases of queries, keys and values, and of the output projection.
    scale: of the scores; None: head_width ** -0.5.
    """

    heads: int
    width: int
    init: Init = "hf"
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    head_width: int = 0
    groups: int = 0
    use_bias: bool = True
    use_out_bias: bool = True
    scale: float | None = None

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
        """Keys [B, G, C, L] and values [B, G, L, C] of the source; turn: rotary positions, applied to the keys."""
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
        """Attention of x to the sources [B, T, D]; turn: rotary positions of the queries; the rest: ops.attention."""
        drop = None if deterministic or not self.dropout else Drop.drawn(self.make_rng("dropout"), self.dropout)
        query = self.split(self.query(x_BTD))
        query = query if turn is None else turn(query)
        out_BHTC = attention(query, sources, mask_B1TL, drop, bias_BHTL, self.scale, whole)
        return self.out(out_BHTC.swapaxes(1, 2).reshape(*x_BTD.shape[:-1], -1))


class FeedForward(nn.Module):
    """Feed-forward layer W2 f(W1 x), or if gated W2 (f(W1 x) * W3 x) (Shazeer 2020).

    width: D of input and output.
    hidden: F, width of the layer inside.
    dropout: after the activation.
    activation: f; the default is the exact GELU, as in BERT and BART.
    """

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


def saved_by(policy: Remat) -> Callable | None:
    """The policy of jax.checkpoint for `policy`; None: save nothing for the backward pass."""
    # matmuls with parameters have no batch dimensions and are saved; attention's have, and are recomputed
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable if policy == "dots" else None


def remat(layer: Any, policy: Remat, deterministic_at: int) -> Any:
    """A layer class whose `__call__` is rematerialised (Chen et al. 2016).

    deterministic_at: position of its argument `deterministic`, which is static; self is 0.
    """
    if policy == "none":
        return layer
    return nn.remat(layer, static_argnums=(deterministic_at,), methods=["__call__"], policy=saved_by(policy))


def residual(norm: Callable, placement: NormPlacement, x: jax.Array, sublayer: Callable) -> jax.Array:
    """A sublayer f with residual and LayerNorm: x + f(LN(x)) for `pre`, LN(x + f(x)) for `post`."""
    return x + sublayer(norm(x)) if placement == "pre" else norm(x + sublayer(x))


class GeneratorBase(nn.Module):
    """Base class of the generators: `decode`, `taught` and teacher forcing, from the other methods of a generator.

    The interface is models.protocols.Generator.
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
        """Logits [B, T, V] float32 for the tokens after ids_BT, and the cache; arguments as in `states`."""
        x_BTD, cache = self.states(ids_BT, cross, mask_BL, cache, slot, deterministic, tree)
        return self.logits(x_BTD), cache

    def read(self, ids_BL: jax.Array, mask_BL: jax.Array, deterministic: bool = True) -> Any:
        """The source as `states` takes it in training."""
        return self.cross(self.encode(ids_BL, mask_BL, deterministic))

    def taught(
        self, ids_BL: jax.Array, mask_BL: jax.Array, target_BT: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """Last hidden states [B, T, D] by teacher forcing; the state at t predicts the token after target_BT[:, t]."""
        source = self.read(ids_BL, mask_BL, deterministic)
        return self.states(target_BT, source, mask_BL, deterministic=deterministic)[0]

    def __call__(
        self, ids_BL: jax.Array, mask_BL: jax.Array, target_BT: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """Logits [B, T, V] by teacher forcing; `init` draws the parameters through this call."""
        return self.logits(self.taught(ids_BL, mask_BL, target_BT, deterministic))
