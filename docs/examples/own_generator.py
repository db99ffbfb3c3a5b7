"""Trains existing models, one of Flax Linen and one of Flax NNX, as the generator.

    python own_generator.py                     # the Linen model; under a minute on a laptop's CPU
    python own_generator.py --kind my_nnx

Both models are small encoder-decoders that know nothing of rag_jax: no cache, no beams, no names of axes. `LinenReader`
puts one behind rag_jax.models.protocols.Generator, and a row of GENERATORS gives it the name that configurations use. A
program that opens such a run has to add the row first. The texts are those of own_data.py, which has to lie beside
this file.
"""

import argparse
import tempfile
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from own_data import make_config, make_texts

import rag_jax
from rag_jax import rag
from rag_jax.models.layers import GeneratorBase
from rag_jax.models.special_tokens import SpecialTokens
from rag_jax.ops.kv_cache import KeyValues, Tree, line

# --- the two models as they might be found -------------------------------------------------------------------------


class LinenModel(nn.Module):
    """An encoder-decoder of one layer each. The output layer is the token table."""

    vocab: int
    width: int
    positions: int

    def setup(self) -> None:
        self.token, self.position = nn.Embed(self.vocab, self.width), nn.Embed(self.positions, self.width)
        self.within, self.back, self.across = (nn.MultiHeadDotProductAttention(num_heads=4) for _ in range(3))
        self.norm, self.inner, self.outer = nn.LayerNorm(), nn.Dense(2 * self.width), nn.Dense(self.width)

    def embed(self, ids: jax.Array) -> jax.Array:
        return self.token(ids) + self.position(jnp.arange(ids.shape[1]))

    def encode(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        x = self.embed(ids)
        return x + self.within(x, x, mask=mask[:, None, None, :])

    def decode(self, ids: jax.Array, encoded: jax.Array, mask: jax.Array) -> jax.Array:
        x = self.embed(ids)
        x = x + self.back(x, x, mask=nn.make_causal_mask(ids))
        x = x + self.across(x, encoded, mask=mask[:, None, None, :])
        return self.norm(x + self.outer(nn.relu(self.inner(x))))

    def output(self) -> jax.Array:
        return self.token.embedding


class NnxModel(nnx.Module):
    """An encoder-decoder of one layer each. The output layer is a matrix of its own."""

    def __init__(self, vocab: int, width: int, positions: int, rngs: nnx.Rngs) -> None:
        self.token, self.position = nnx.Embed(vocab, width, rngs=rngs), nnx.Embed(positions, width, rngs=rngs)
        self.within = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.across = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.back = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.norm, self.head = nnx.LayerNorm(width, rngs=rngs), nnx.Linear(width, vocab, use_bias=False, rngs=rngs)

    def embed(self, ids: jax.Array) -> jax.Array:
        return self.token(ids) + self.position(jnp.arange(ids.shape[1]))

    def encode(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        x = self.embed(ids)
        return x + self.within(x, mask=mask[:, None, None, :])

    def decode(self, ids: jax.Array, encoded: jax.Array, mask: jax.Array) -> jax.Array:
        x = self.embed(ids)
        x = x + self.back(x, mask=nnx.make_causal_mask(ids))
        return self.norm(x + self.across(x, encoded, mask=mask[:, None, None, :]))

    def output(self) -> jax.Array:
        return self.head.kernel[...].T


# --- what rag_jax needs of them ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinenConfig(SpecialTokens):
    """The fields that every GeneratorConfig has, and the width. `kind` is the name in configurations."""

    vocab_size: int = 0  # filled in from the corpus' tokenizer
    positions: int = 96
    width: int = 64
    logit_scale: float = 1.0
    init: str = "hf"
    dtype: str = "float32"
    kind: Literal["my_linen"] = "my_linen"


@dataclass(frozen=True)
class NnxConfig(LinenConfig):
    """The configuration of the NNX model."""

    kind: Literal["my_nnx"] = "my_nnx"  # type: ignore[assignment]


class LinenReader(GeneratorBase):
    """A model without a cache behind the Protocol. B rows, L source and T target tokens, S slots of the cache.

    The cache keeps the ids of the tokens written so far, and `states` reads each beginning again from its first token.
    That is slower than a cache of keys and values, but it works for any model.
    """

    config: Any

    def setup(self) -> None:
        c = self.config
        self.model = LinenModel(c.vocab_size, c.width, c.positions)

    def encode(self, ids_BL: jax.Array, mask_BL: jax.Array, deterministic: bool = True) -> jax.Array:
        return self.model.encode(ids_BL, mask_BL)  # a model with dropout is given `deterministic`, too

    def cross(self, encoded_BLD: jax.Array) -> KeyValues:
        return KeyValues([], [encoded_BLD[:, None]])  # as the values of one layer with one head

    def check_room(self, source: int, target: int) -> None:
        if max(source, target) > self.config.positions:
            raise ValueError(f"{source} source and {target} target tokens do not fit {self.config.positions} positions")

    def init_cache(self, batch: int, length: int) -> KeyValues:
        return KeyValues([jnp.zeros((batch, 1, 1, length), jnp.int32)], [])

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
        encoded_BLD = cross.value[0][:, 0]
        if cache is None:  # training: the whole target at once
            return self.model.decode(ids_BT, encoded_BLD, mask_BL), None
        written_BS = jax.lax.dynamic_update_slice_in_dim(cache.key[0][:, 0, 0], ids_BT, slot, axis=1)
        (B, T), S = ids_BT.shape, written_BS.shape[1]
        tree = line(T, S, slot) if tree is None else tree
        # The beginning that each of the T tokens ends: the tokens that it sees, each at its position. What comes after
        # the end is 0, and the causal mask hides it.
        P = min(S, self.config.positions)
        visible_BTS = jnp.broadcast_to(tree.visible_BTS, (B, T, S)).astype(jnp.int32)
        at_BSP = jnp.broadcast_to(jax.nn.one_hot(tree.position_BS, P, dtype=jnp.int32), (B, S, P))
        before_BTP = jnp.einsum("bts,bs,bsp->btp", visible_BTS, written_BS, at_BSP)
        sources = jnp.repeat(encoded_BLD, T, axis=0), jnp.repeat(mask_BL, T, axis=0)
        hidden_BTPD = self.model.decode(before_BTP.reshape(B * T, P), *sources).reshape(B, T, P, -1)
        end_BT = jnp.broadcast_to(tree.position_BT, (B, T))
        hidden_BTD = jnp.take_along_axis(hidden_BTPD, end_BT[:, :, None, None], axis=2)[:, :, 0]
        return hidden_BTD, KeyValues([written_BS[:, None, None]], [])

    def head(self) -> tuple[jax.Array, jax.Array]:
        return self.model.output(), jnp.zeros(self.config.vocab_size)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        kernel_VD, bias_V = self.head()
        return x_BTD @ kernel_VD.T * self.config.logit_scale + bias_V


class NnxReader(LinenReader):
    """The NNX model as a Linen module; its methods have the same names, so that all else is inherited."""

    def setup(self) -> None:
        c = self.config
        self.model = nnx.bridge.to_linen(NnxModel, c.vocab_size, c.width, c.positions, metadata_fn=None)


def named(params: Any, config: Any) -> Any:
    """The parameters with names for their axes, as sharding needs them; None: the axis is not sharded.

    To shard a large model, give names of rag_jax.system.sharding.RULES, such as ("embed", "mlp").
    """
    return jax.tree.map(lambda x: nn.LogicallyPartitioned(x, (None,) * x.ndim), nn.unbox(params))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=["my_linen", "my_nnx"], default="my_linen")
    parser.add_argument("--steps", type=int, default=100, help="of all stages together (default: %(default)s)")
    args = parser.parse_args()
    rag.GENERATORS["my_linen"] = rag.ModelFamily(LinenConfig, LinenReader, named)
    rag.GENERATORS["my_nnx"] = rag.ModelFamily(NnxConfig, NnxReader, named)
    config = make_config(args.steps)
    config["model"]["generator"] = {"kind": args.kind}
    config["stages"] = config["stages"][:2]
    texts, seen = make_texts(), []
    with tempfile.TemporaryDirectory() as folder:
        hook = lambda moment: seen.append(moment.metrics["loss"]) if moment.stage == "read" else None  # noqa: E731
        pipeline = rag_jax.fit(config, f"{folder}/run", data=texts, hooks=[hook]).pipeline()
        answer = pipeline.ask(texts.dev[0]["question"])
    print(f"loss of reading: {', '.join(f'{loss:.2f}' for loss in seen)}")
    assert seen[-1] < seen[0], "the loss did not fall"
    print(f"{texts.dev[0]['question']}\n{answer.text}   (right: {texts.dev[0]['answers'][0]})")


if __name__ == "__main__":
    main()
