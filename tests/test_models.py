"""BERT and BART against transformers, and without it: caches, padding, precision, axis names."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.models import bert, layers
from rag_jax.models.bart import Bart, BartConfig
from rag_jax.models.bert import Bert, BertConfig
from rag_jax.system import sharding

BERT = BertConfig(vocab_size=29, width=16, layers=2, heads=2, hidden=24, positions=12)
BART = BartConfig(vocab_size=29, width=16, encoder_layers=2, decoder_layers=2, heads=2, hidden=24, positions=12)
B, L, T = 3, 9, 6
LENGTHS = np.array([9, 5, 2])
MASK = np.arange(L) < LENGTHS[:, None]
RNG = np.random.default_rng(0)
IDS = np.where(MASK, RNG.integers(3, 29, (B, L)), 1).astype(np.int32)
TARGET = RNG.integers(3, 29, (B, T)).astype(np.int32)


def randomised(module, *args):
    """Random parameters at a scale at which all of them affect the output, including those that start at 0 or 1."""
    params = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *args)["params"])
    rng = np.random.default_rng(3)

    def draw(path, x):
        return jnp.asarray(rng.normal(1.0 if path[-1].key == "scale" else 0.0, 0.3, x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(draw, params)


@pytest.fixture(scope="module")
def bert_params():
    return randomised(Bert(BERT), IDS, MASK)


@pytest.fixture(scope="module", params=["post", "pre"])
def bart(request):
    """(module, parameters, teacher-forced logits of the whole sequences)"""
    scale = {"pre": {"norm": "pre", "embedding_scale": 4.0, "logit_scale": 0.25}, "post": {}}[request.param]
    module = Bart(dataclasses.replace(BART, encoder_layers=1, **scale))
    params = randomised(module, IDS, MASK, TARGET)
    return module, params, jax.jit(module.apply)({"params": params}, IDS, MASK, TARGET)


# --- parity -----------------------------------------------------------------------------------------------------------


def dense(state, name):
    return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}


def norm(state, name):
    return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}


def from_bert(state, n_layers):
    """The tree of our parameters from transformers' BertModel."""
    tables = {"word": "word", "position": "position", "token_type": "token_type"}
    params = {
        ours: {"embedding": state[f"embeddings.{theirs}_embeddings.weight"]} for ours, theirs in tables.items()
    } | {"embedding_norm": norm(state, "embeddings.LayerNorm")}
    for i in range(n_layers):
        at = f"encoder.layer.{i}"
        params[f"layer_{i}"] = {
            "attention": {n: dense(state, f"{at}.attention.self.{n}") for n in ("query", "key", "value")}
            | {"out": dense(state, f"{at}.attention.output.dense")},
            "attention_norm": norm(state, f"{at}.attention.output.LayerNorm"),
            "feed_forward": {
                "inner": dense(state, f"{at}.intermediate.dense"),
                "outer": dense(state, f"{at}.output.dense"),
            },
            "feed_forward_norm": norm(state, f"{at}.output.LayerNorm"),
        }
    return params


def from_bart(state, n_layers):
    """The tree of our parameters from transformers' BartForConditionalGeneration or its MBart counterpart."""
    params = {
        "shared": {"embedding": state["model.shared.weight"]},
        "logits_bias": state["final_logits_bias"][0],
    }

    def attention(at):
        names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
        return {ours: dense(state, f"{at}.{theirs}") for ours, theirs in names.items()}

    for side in ("encoder", "decoder"):
        stack = params[side] = {
            "position": {"embedding": state[f"model.{side}.embed_positions.weight"]},
            "embedding_norm": norm(state, f"model.{side}.layernorm_embedding"),
        }
        if f"model.{side}.layer_norm.weight" in state:
            stack["final_norm"] = norm(state, f"model.{side}.layer_norm")
        for i in range(n_layers):
            at = f"model.{side}.layers.{i}"
            layer = stack[f"layer_{i}"] = {
                "self_attention": attention(f"{at}.self_attn"),
                "self_norm": norm(state, f"{at}.self_attn_layer_norm"),
                "feed_forward": {"inner": dense(state, f"{at}.fc1"), "outer": dense(state, f"{at}.fc2")},
                "feed_forward_norm": norm(state, f"{at}.final_layer_norm"),
            }
            if side == "decoder":
                layer["cross_attention"] = attention(f"{at}.encoder_attn")
                layer["cross_norm"] = norm(state, f"{at}.encoder_attn_layer_norm")
    return params


def randomised_torch(model):
    """The model with random parameters and buffers, and its state as NumPy arrays."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in [*model.named_parameters(), *model.named_buffers()]:
            if x.is_floating_point():
                is_scale = x.ndim == 1 and name.endswith("weight")
                x.copy_(torch.randn(x.shape, generator=generator) * 0.3 + (1.0 if is_scale else 0.0))
    return model.eval(), {name: x.detach().numpy() for name, x in model.state_dict().items()}


def same_tree(params, module, *args):
    """Checks that a mapping gives every parameter of ours, in its shape, and no other."""
    expected = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *args)["params"])
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)


@pytest.mark.parity
def test_bert_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    import transformers

    config = transformers.DPRConfig(
        vocab_size=29, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=12, projection_dim=5,
    )  # fmt: skip
    theirs, state = randomised_torch(transformers.DPRQuestionEncoder(config))
    bert_at = "question_encoder.bert_model."
    params = from_bert({k.removeprefix(bert_at): v for k, v in state.items() if k.startswith(bert_at)}, 2)
    params["projection"] = dense(state, "question_encoder.encode_proj")
    ours = Bert(dataclasses.replace(BERT, projection=5))
    same_tree(params, ours, IDS, MASK)
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor(IDS).long(), "attention_mask": torch.tensor(MASK).long()}
        vector = theirs(**inputs).pooler_output
        hidden = theirs.question_encoder.bert_model(**inputs).last_hidden_state
    np.testing.assert_allclose(jax.jit(ours.apply)({"params": params}, IDS, MASK), vector, atol=1e-4)
    found = jax.jit(partial(ours.apply, method="hidden"))({"params": params}, IDS, MASK)
    np.testing.assert_allclose(found[MASK], hidden.numpy()[MASK], atol=1e-4)
    assert np.std(vector.numpy()) > 0.1


@pytest.mark.parity
@pytest.mark.parametrize(("family", "norm_at", "scaled"), [("Bart", "post", False), ("MBart", "pre", True)])
def test_bart_is_that_of_transformers(family, norm_at, scaled):
    torch = pytest.importorskip("torch")
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=29, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=12,
        scale_embedding=scaled, bos_token_id=0, pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    theirs, state = randomised_torch(getattr(transformers, f"{family}ForConditionalGeneration")(config))
    params = from_bart(state, 2)
    ours = Bart(dataclasses.replace(BART, norm=norm_at, embedding_scale=4.0 if scaled else 1.0))
    same_tree(params, ours, IDS, MASK, TARGET)
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor(IDS).long(), "attention_mask": torch.tensor(MASK).long()}
        out = theirs(**inputs, decoder_input_ids=torch.tensor(TARGET).long())
    hidden = jax.jit(partial(ours.apply, method="encode"))({"params": params}, IDS, MASK)
    np.testing.assert_allclose(hidden[MASK], out.encoder_last_hidden_state.numpy()[MASK], atol=1e-4)
    logits = jax.jit(ours.apply)({"params": params}, IDS, MASK, TARGET)
    np.testing.assert_allclose(logits, out.logits, atol=1e-4)
    assert np.std(out.logits.numpy()) > 0.5


# --- without torch ----------------------------------------------------------------------------------------------------


def test_layer_norm_is_that_of_numpy():
    x, scale, bias = (RNG.normal(size=s).astype(np.float32) for s in ((3, 8), (8,), (8,)))
    found = layers.LayerNorm(0.1).apply({"params": {"scale": scale, "bias": bias}}, x)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.1) * scale + bias
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_sinusoids_start_at_the_offset_and_depend_on_distance_alone():
    table = np.asarray(layers.sinusoids(2)(jax.random.key(0), (12, 8)))
    np.testing.assert_allclose(table[2], [0, 1] * 4, atol=1e-6)
    products = table @ table.T
    for distance in range(1, 5):
        assert np.ptp(np.diagonal(products, distance)) < 1e-5


def test_initialisation_has_the_scale_it_says():
    key, shape = jax.random.key(0), (900, 100)
    for init in (layers.kernel_init("hf"), layers.embedding_init("hf"), layers.position_init("hf")):
        assert abs(np.std(init(key, shape)) - 0.02) < 0.001
    assert abs(np.std(layers.embedding_init("copy")(key, shape)) - 1) < 0.02
    assert abs(np.std(layers.kernel_init("copy")(key, shape)) * np.sqrt(900) - 1) < 0.02


def test_decoding_with_a_cache_is_the_whole_forward_pass(bart):
    module, params, whole = bart
    variables = {"params": params}
    cross = jax.jit(partial(module.apply, method=lambda m, ids, mask: m.cross(m.encode(ids, mask))))(
        variables, IDS, MASK
    )
    step = jax.jit(lambda ids, cache, t: module.apply(variables, ids, cross, MASK, cache, t, method="decode"))
    for first in (1, 3):  # how many tokens the first call takes
        cache, found, t = module.init_cache(B, T + 1), [], 0
        while t < T:
            n = first if t == 0 else 1
            logits, cache = step(TARGET[:, t : t + n], cache, jnp.int32(t))
            found, t = [*found, logits], t + n
        np.testing.assert_allclose(np.concatenate(found, 1), whole, atol=2e-5)


def test_the_future_is_not_seen(bart):
    module, params, whole = bart
    changed = TARGET.copy()
    changed[:, 4:] = 7
    found = jax.jit(module.apply)({"params": params}, IDS, MASK, changed)
    np.testing.assert_allclose(found[:, :4], whole[:, :4], atol=1e-6)
    assert np.abs(found[:, 4:] - whole[:, 4:]).max() > 0.1


MORE_IDS = np.concatenate([np.where(MASK, IDS, 5), np.full((B, 3), 7, np.int32)], 1)
MORE_MASK = np.concatenate([MASK, np.zeros((B, 3), bool)], 1)


def test_padding_does_not_change_what_the_generator_reads(bart):
    module, params, whole = bart
    found = jax.jit(module.apply)({"params": params}, MORE_IDS, MORE_MASK, TARGET)
    np.testing.assert_allclose(found, whole, atol=2e-5)


def test_padding_does_not_change_a_vector(bert_params):
    encode = jax.jit(Bert(dataclasses.replace(BERT, pooling="mean")).apply)
    a, b = (encode({"params": bert_params}, *x) for x in ((IDS, MASK), (MORE_IDS, MORE_MASK)))
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_mean_pooling_is_over_what_is_not_padding():
    hidden = RNG.normal(size=(B, L, 4)).astype(np.float32)
    expected = np.stack([hidden[b, :n].mean(0) for b, n in enumerate(LENGTHS)])
    np.testing.assert_allclose(bert.pool(hidden, MASK, "mean"), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(bert.pool(hidden, MASK, "cls"), hidden[:, 0])
    assert np.isfinite(bert.pool(hidden, np.zeros_like(MASK), "mean")).all()


@pytest.mark.parametrize(
    ("kind", "config", "args"),
    [
        # The keys of dropout must be the same when a layer is run again; BERT's layers show it.
        (Bert, dataclasses.replace(BERT, layers=1, dropout=0.3), (IDS, MASK)),
        (Bart, dataclasses.replace(BART, encoder_layers=1, decoder_layers=1, dropout=0.0), (IDS, MASK, TARGET)),
    ],
)
def test_rematerialisation_changes_no_gradient(kind, config, args):
    params = randomised(kind(config), *args)

    def gradients(module):
        def loss(p):
            out = module.apply({"params": p}, *args, False, rngs={"dropout": jax.random.key(1, impl="rbg")})
            return jnp.square(out).mean()

        return jax.jit(jax.value_and_grad(loss))(params)

    plain, *others = (gradients(kind(dataclasses.replace(config, remat=remat))) for remat in ("none", "full", "dots"))
    for again in others:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), plain, again)


def test_dropout_follows_its_key(bert_params):
    module = Bert(dataclasses.replace(BERT, dropout=0.3))
    apply = jax.jit(lambda key: module.apply({"params": bert_params}, IDS, MASK, False, rngs={"dropout": key}))
    a, b, c = (apply(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.1


def test_bfloat16_is_close_to_float32(bart):
    module, params, whole = bart
    half = Bart(dataclasses.replace(module.config, dtype="bfloat16"))
    found = jax.jit(half.apply)({"params": params}, IDS, MASK, TARGET)
    assert found.dtype == jnp.float32
    assert 0 < np.abs(found - whole).max() < 0.1 * np.abs(whole).max()
    made = jax.eval_shape(half.init, jax.random.key(0), IDS, MASK, TARGET)
    assert {x.dtype for x in jax.tree.leaves(made)} == {np.dtype("float32")}


def test_bfloat16_vectors_are_close_to_float32(bert_params):
    a, b = (
        jax.jit(Bert(dataclasses.replace(BERT, dtype=dtype)).apply)({"params": bert_params}, IDS, MASK)
        for dtype in ("float32", "bfloat16")
    )
    assert a.dtype == b.dtype == jnp.float32
    assert 0 < np.abs(a - b).max() < 0.1 * np.abs(a).max()


def test_input_longer_than_the_positions_is_refused():
    long_ids, long_mask = np.ones((1, 13), np.int32), np.ones((1, 13), bool)
    with pytest.raises(ValueError, match=r"length 13.*encoder has 12"):
        jax.eval_shape(Bert(BERT).init, jax.random.key(0), long_ids, long_mask)
    with pytest.raises(ValueError, match=r"length 13.*generator has 12"):
        jax.eval_shape(Bart(BART).init, jax.random.key(0), long_ids, long_mask, TARGET[:1])
    with pytest.raises(ValueError, match=r"length 13.*generator has 12"):
        jax.eval_shape(Bart(BART).init, jax.random.key(0), IDS, MASK, np.ones((B, 13), np.int32))
    with pytest.raises(ValueError, match=r"length 13.*generator has 12"):
        Bart(BART).check_room(4, 13)


@pytest.mark.parametrize("norm_at", ["post", "pre"])
def test_every_parameter_names_its_axes(norm_at):
    made = [
        jax.eval_shape(Bert(dataclasses.replace(BERT, norm=norm_at, projection=5)).init, jax.random.key(0), IDS, MASK),
        jax.eval_shape(Bart(dataclasses.replace(BART, norm=norm_at)).init, jax.random.key(0), IDS, MASK, TARGET),
    ]
    leaves = jax.tree.leaves(made, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    for leaf in leaves:
        assert isinstance(leaf, nn.LogicallyPartitioned)
        assert len(leaf.names) == leaf.value.ndim
        sharding.spec(leaf.names)  # raises for a name that RULES does not know, and for a mesh axis used twice
    assert {name for leaf in leaves for name in leaf.names} == {"embed", "heads", "mlp", "vocab", "position", "norm"}
