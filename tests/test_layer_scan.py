"""Layers as a loop are layers one by one: loss, gradients, encodings; and programs that hardly grow with depth."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.models import layer_scan
from rag_jax.models.bart import Bart, BartConfig
from rag_jax.models.bert import Bert, BertConfig
from rag_jax.models.decoder_only import Lm, LmConfig
from rag_jax.models.layers import Dropout
from rag_jax.models.t5 import T5, T5Config

V, B, L, T = 60, 3, 10, 5
N = layer_scan.SHORTEST
SHAPE = {"vocab_size": V, "width": 16, "heads": 2, "hidden": 32, "dropout": 0.0}
MODELS = {
    "bert": (Bert, BertConfig(**SHAPE, layers=N, positions=20)),
    "bart": (Bart, BartConfig(**SHAPE, encoder_layers=N + 1, decoder_layers=N, positions=20)),
    # only the encoder is a loop
    "bart_short": (Bart, BartConfig(**SHAPE, encoder_layers=N, decoder_layers=2, positions=20, norm="pre")),
    "t5": (T5, T5Config(**SHAPE, encoder_layers=N, decoder_layers=N, head_width=8)),
    "gpt2": (Lm, LmConfig(**SHAPE, attention_dropout=0.0, layers=N, positions=20)),
    "llama": (
        Lm,
        LmConfig(
            **SHAPE, attention_dropout=0.0, layers=N, groups=1, positions=20, position_kind="rotary", norm_kind="rms",
            activation="silu", gated=True, qkv_bias=False, out_bias=False, mlp_bias=False, tied=False,
        ),
    ),
}  # fmt: skip


def inputs(kind):
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(3, V, (B, L)))
    mask = jnp.arange(L) < jnp.asarray(rng.integers(3, L + 1, (B, 1)))
    return (ids, mask) if kind == "bert" else (ids, mask, jnp.asarray(rng.integers(3, V, (B, T))))


def both(kind, **changes):
    """The model with its layers one by one and as a loop, and parameters for either."""
    module, config = MODELS[kind]
    apart, looped = (module(dataclasses.replace(config, scan_layers=scan, **changes)) for scan in ("off", "on"))
    params, same = (
        nn.unbox(jax.jit(lambda model=model: model.init(jax.random.key(0), *inputs(kind)))())
        for model in (apart, looped)
    )
    jax.tree.map(np.testing.assert_array_equal, params, same)
    return apart, looped, params


def loss_and_gradients(model, params, kind):
    def loss(params):
        out = model.apply(params, *inputs(kind))
        return (out * jnp.sin(jnp.arange(out.size)).reshape(out.shape)).mean()

    return jax.jit(jax.value_and_grad(loss))(params)


def assert_same(found, expected):
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        scale = max(float(np.abs(b).max()), 1e-4)  # the bias of a key has no gradient
        np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=3e-6, err_msg=jax.tree_util.keystr(path))


CASES = [("bert", "full"), ("bart_short", "none"), ("llama", "dots")]
MORE = [(kind, remat) for kind in MODELS for remat in ("none", "full", "dots") if (kind, remat) not in CASES]


@pytest.mark.parametrize(("kind", "remat"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)])
def test_loss_and_gradients(kind, remat):
    apart, looped, params = both(kind, remat=remat)
    assert_same(loss_and_gradients(looped, params, kind), loss_and_gradients(apart, params, kind))


@pytest.mark.parametrize(
    "kind", ["t5", *(pytest.param(kind, marks=pytest.mark.slow) for kind in MODELS if kind not in ("bert", "t5"))]
)
def test_decoding(kind):
    """A cache decodes the same tokens from what `encode` of either gives, as lists of layers."""
    apart, looped, params = both(kind)
    ids, mask, target = inputs(kind)

    def decode(model):
        cross = model.apply(params, model.apply(params, ids, mask, method="encode"), method="cross")
        assert isinstance(cross.key, list)
        cache = model.init_cache(B, T)
        logits = []
        for t in range(T):
            found, cache = model.apply(params, target[:, t : t + 1], cross, mask, cache, t, method="decode")
            logits.append(found)
        return jnp.concatenate(logits, 1)

    found = decode(looped)
    assert_same(found, decode(apart))
    assert_same(found, looped.apply(params, ids, mask, target))


def products(config, module, kind):
    model = module(config)
    params = jax.eval_shape(lambda: nn.unbox(model.init(jax.random.key(0), *inputs(kind))))

    def loss(params, key):
        return model.apply(params, *inputs(kind), False, rngs={"dropout": key}).sum()

    program = jax.jit(jax.grad(loss)).lower(params, jax.random.key(0)).as_text()
    return sum("dot_general" in line for line in program.splitlines())


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("bert", ("layers",)),
        pytest.param("t5", ("encoder_layers", "decoder_layers"), marks=pytest.mark.slow),
        pytest.param("llama", ("layers",), marks=pytest.mark.slow),
    ],
)
def test_the_program_does_not_grow_with_depth(kind, fields):
    module, config = MODELS[kind]
    short, deep = (
        products(dataclasses.replace(config, scan_layers="on", dropout=0.1, **dict.fromkeys(fields, n)), module, kind)
        for n in (N, 4 * N)
    )
    assert short == deep > 0
    apart = dataclasses.replace(config, scan_layers="off", dropout=0.1)
    assert products(apart, module, kind) > 2 * short


def test_dropout_differs_between_layers():
    """Layers of the same parameters draw apart: a loop that gave all one key would repeat its mask."""
    module, config = MODELS["bert"]
    model = module(dataclasses.replace(config, scan_layers="on", dropout=0.5))
    ids, mask = inputs("bert")
    params = nn.unbox(model.init(jax.random.key(0), ids, mask))

    def call(layer, x, *_):
        return x, layer.drop(jnp.ones_like(x), deterministic=False)

    class Masks(nn.Module):
        config: BertConfig

        def setup(self):
            self.layer = [Masked(self.config) for _ in range(N)]

        def __call__(self, x):
            run = [layer for layer in self.layer if layer(x) is not None]
            return layer_scan.scan(self, run, x, call, None, False)[1]

    class Masked(nn.Module):
        config: BertConfig

        def setup(self):
            self.scale = self.param("scale", nn.initializers.ones, (1,))
            self.drop = Dropout(self.config.dropout)

        def __call__(self, x):
            return x * self.scale

    masks = Masks(model.config)
    x = jnp.ones((B, L, 16))
    key = {"dropout": jax.random.key(1)}
    drawn = masks.apply(masks.init({"params": jax.random.key(0), **key}, x), x, rngs=key)
    assert len({np.asarray(mask).tobytes() for mask in drawn}) == N
    looped = [model.apply(params, ids, mask, False, rngs={"dropout": jax.random.key(n)}) for n in (0, 0, 1)]
    assert (looped[0] == looped[1]).all() and (looped[0] != looped[2]).any()


def test_where_it_pays(monkeypatch):
    """By itself a loop is for TPUs, and for CPUs with rematerialisation; never for short stacks."""

    def applies(platform, **changes):
        monkeypatch.setattr(layer_scan.sharding, "platform", lambda: platform)
        return layer_scan.applies(Bert(dataclasses.replace(MODELS["bert"][1], **changes)).bind({"params": {}}), N)

    assert applies("tpu") and applies("cpu", remat="full") and applies("gpu", scan_layers="on")
    assert not applies("cpu") and not applies("gpu", remat="full") and not applies("tpu", scan_layers="off")
    bert = Bert(MODELS["bert"][1]).bind({"params": {}})
    assert not layer_scan.applies(bert, N - 1)
