"""T5 against transformers, and without it: buckets, caches, padding, precision, axis names."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from rag_jax.errors import InputError
from rag_jax.models.hf import GENERATORS, naming
from rag_jax.models.t5 import T5, T5Config, bucket
from rag_jax.ops.attention import attention
from rag_jax.system import sharding

# Heads are not width / heads wide, and the inputs are longer than max_distance, so that the last buckets are used.
GATED = T5Config(
    vocab_size=29, width=16, encoder_layers=2, decoder_layers=2, heads=2, head_width=6, hidden=24, buckets=8,
    max_distance=10,
)  # fmt: skip
PLAIN = dataclasses.replace(GATED, activation="relu", gated=False, tied=True, logit_scale=0.25)  # T5 1.0
CONFIGS = {"t5 1.0": PLAIN, "t5 1.1": GATED}
B, L, T = 3, 17, 14
LENGTHS = np.array([17, 13, 2])
MASK = np.arange(L) < LENGTHS[:, None]
RNG = np.random.default_rng(0)
IDS = np.where(MASK, RNG.integers(2, 29, (B, L)), 0).astype(np.int32)
TARGET = RNG.integers(2, 29, (B, T)).astype(np.int32)
TARGET[:, 0] = 0  # decoding starts from padding, which must be seen


def shapes(config):
    return nn.unbox(jax.eval_shape(T5(config).init, jax.random.key(0), IDS, MASK, TARGET)["params"])


def randomised(config):
    """Random parameters at a scale at which all of them affect the output, including those that start at 1."""
    rng = np.random.default_rng(3)

    def draw(path, x):
        return jnp.asarray(rng.normal(1.0 if path[-1].key == "scale" else 0.0, 0.3, x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes(config))


def read_source(module, ids, mask):
    """The encoder's output, prepared for the decoder's cross-attention."""
    return module.cross(module.encode(ids, mask))


@pytest.fixture(scope="module", params=CONFIGS)
def t5(request):
    """(module, parameters, teacher-forced logits of the whole sequences)"""
    module = T5(dataclasses.replace(CONFIGS[request.param], encoder_layers=1))
    params = randomised(module.config)
    return module, params, jax.jit(module.apply)({"params": params}, IDS, MASK, TARGET)


# --- parity -----------------------------------------------------------------------------------------------------------

THEIRS = {
    "vocab_size": 29, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 2,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10, "decoder_start_token_id": 0,
}  # fmt: skip


def configuration(family, settings, names=("shared.weight", "lm_head.weight")):
    """Our configuration from a config.json and the names of a checkpoint's tensors, by default with its own head."""
    table = GENERATORS[family]
    made = table.adapt(table.config(settings, "config.json"), names)
    assert made.tokens_from == "checkpoint" and made.ends == (made.eos_id,)
    return dataclasses.replace(made, tokens_from="tokenizer")


def randomised_torch(model):
    """The model with random parameters, and its state as NumPy arrays."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            is_scale = x.ndim == 1 and name.endswith("weight")
            x.copy_(torch.randn(x.shape, generator=generator) * 0.3 + (1.0 if is_scale else 0.0))
    return model.eval(), {name: x.detach().numpy() for name, x in model.state_dict().items()}


def read(family, config, state):
    """Parameters from a state_dict by the table of names; every tensor must be a parameter or a copy of one."""
    entries, copies = family.entries(config), family.copies(config)
    assert sorted(state) == sorted([entry.theirs for entry in entries] + list(copies))
    for name, original in copies.items():
        np.testing.assert_array_equal(state[name], state[original])
    pairs = [
        pair for entry in entries for pair in zip(entry.ours, naming.to_ours(entry, state[entry.theirs]), strict=True)
    ]
    assert len(dict(pairs)) == len(pairs)
    return unflatten_dict({tuple(path.split("/")): x for path, x in pairs})


@pytest.mark.parity
@pytest.mark.parametrize(
    ("family", "settings", "config"),
    [
        ("T5", {}, PLAIN),
        ("T5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, GATED),
        ("MT5", {"feed_forward_proj": "gated-silu", "num_decoder_layers": 1},
         dataclasses.replace(GATED, activation="silu", decoder_layers=1)),
    ],
)  # fmt: skip
def test_t5_is_that_of_transformers(family, settings, config):
    torch = pytest.importorskip("torch")
    import transformers

    theirs = getattr(transformers, f"{family}ForConditionalGeneration")(
        getattr(transformers, f"{family}Config")(**THEIRS, **settings)
    )
    if not config.tied:  # transformers 5 ties it in every new model, but not in one read from a checkpoint with both
        theirs.lm_head.weight = torch.nn.Parameter(torch.empty(29, 16))
    theirs, state = randomised_torch(theirs)
    table = GENERATORS[family.lower()]
    names = [name for name in state if not (config.tied and name == "lm_head.weight")]  # as safetensors has them
    assert configuration(family.lower(), theirs.config.to_dict(), names) == config
    params = read(table, config, state)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes(config))
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor(IDS).long(), "attention_mask": torch.tensor(MASK).long()}
        out = theirs(**inputs, decoder_input_ids=torch.tensor(TARGET).long())
    ours = T5(config)
    hidden = jax.jit(partial(ours.apply, method="encode"))({"params": params}, IDS, MASK)
    np.testing.assert_allclose(hidden[MASK], out.encoder_last_hidden_state.numpy()[MASK], atol=1e-4)
    logits = jax.jit(ours.apply)({"params": params}, IDS, MASK, TARGET)
    np.testing.assert_allclose(logits, out.logits, atol=1e-4)
    assert np.std(out.logits.numpy()) > 0.2


@pytest.mark.parity
def test_buckets_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = np.arange(-600, 601)
    for buckets, most in ((32, 128), (32, 20), (64, 256), (8, 10), (4, 3)):
        for both in (True, False):
            expected = T5Attention._relative_position_bucket(torch.tensor(distance), both, buckets, most)
            np.testing.assert_array_equal(bucket(distance, buckets, most, both), expected)


@pytest.mark.parity
@pytest.mark.parametrize("family", ["T5", "MT5"])
def test_transformers_reads_the_configuration_as_it_was(family):
    pytest.importorskip("torch")
    import transformers

    tied = dataclasses.replace(GATED, tied=True)
    configs = [
        GATED,
        tied,
        dataclasses.replace(GATED, activation="gelu", decoder_layers=1, bos_id=3, pad_id=4, eos_id=5),
    ]
    if family == "T5":
        configs += [PLAIN, dataclasses.replace(PLAIN, activation="silu", dropout=0.2, eps=1e-5)]
    for config in configs:
        theirs = getattr(transformers, f"{family}Config")(**GENERATORS[family.lower()].describe(config))
        names = ["shared.weight", *([] if config.tied else ["lm_head.weight"])]
        assert configuration(family.lower(), theirs.to_dict(), names) == config
        assert (theirs.dense_act_fn, theirs.is_gated_act) == (config.activation, config.gated)
        assert getattr(theirs, "scale_decoder_outputs", False) == (config.logit_scale != 1)


# --- config.json ------------------------------------------------------------------------------------------------------


def test_configurations_as_published():
    """Older ones lack settings that transformers 5 writes."""
    without = {"decoder_start_token_id": None, "pad_token_id": 7, "num_decoder_layers": None}
    for names in (["shared.weight"], ["shared.weight", "lm_head.weight"]):  # old ones have the head too, a copy
        assert configuration("t5", THEIRS | without, names) == dataclasses.replace(
            PLAIN, bos_id=7, pad_id=7, start_id=7
        )
    flan = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    assert configuration("t5", THEIRS | flan) == GATED
    assert configuration("mt5", THEIRS) == GATED
    assert configuration("mt5", THEIRS | {"tie_word_embeddings": False}) == GATED
    saved = flan | {"tie_word_embeddings": True, "scale_decoder_outputs": False}  # by transformers 5
    assert configuration("t5", THEIRS | saved) == GATED
    assert configuration("t5", THEIRS | saved, []) == dataclasses.replace(GATED, tied=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feed_forward_proj": "gated-tanh"}, "dense_act_fn='tanh'"),
        ({"feed_forward_proj": "twice-gelu"}, "dense_act_fn='twice-gelu'"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"d_kv": None}, "d_kv is missing"),
        ({"relative_attention_num_buckets": 3}, "num_buckets=3"),
        ({"relative_attention_max_distance": 4}, "max_distance of 4"),
    ],
)
def test_settings_that_are_not_built_are_refused(settings, message):
    with pytest.raises(InputError, match=rf"config\.json: .*{message}"):
        GENERATORS["t5"].config(THEIRS | settings, "config.json")
    with pytest.raises(InputError, match=r"logit_scale=0\.5"):
        GENERATORS["t5"].describe(dataclasses.replace(GATED, logit_scale=0.5))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_table_of_names_fills_every_parameter(config):
    entries = GENERATORS["t5"].entries(config)
    ours = [path for entry in entries for path in entry.ours]
    leaves = jax.tree_util.tree_leaves_with_path(shapes(config))
    assert sorted(ours) == sorted("/".join(key.key for key in path) for path, _ in leaves)
    assert len({entry.theirs for entry in entries}) == len(entries)


# --- without torch ----------------------------------------------------------------------------------------------------


def plain_bucket(distance, buckets, most, both):
    """The bucket in integers: a range ends where d / exact reaches (most / exact) ** (k / ranges)."""
    side = buckets // 2 if both else buckets
    exact = side // 2
    ranges = side - exact
    d = abs(distance) if both else max(-distance, 0)
    ended = sum(d**ranges * exact**k >= most**k * exact**ranges for k in range(1, ranges))
    return (side if both and distance > 0 else 0) + (d if d < exact else exact + ended)


@pytest.mark.parametrize("both", [True, False])
def test_buckets_are_those_of_plain_python(both):
    distance = np.arange(-300, 301)
    for buckets, most in ((32, 128), (32, 20), (8, 10), (4, 3)):
        found = np.asarray(jax.jit(partial(bucket, buckets=buckets, max_distance=most, both_sides=both))(distance))
        np.testing.assert_array_equal(found, [plain_bucket(int(d), buckets, most, both) for d in distance])
    used = set(np.asarray(bucket(distance, 32, 128, both)).tolist())
    assert used == set(range(32)) - ({16} if both else set())  # no key at distance 0 is after the query
    with pytest.raises(ValueError, match="3 buckets"):
        bucket(distance, 3, 10, True)
    with pytest.raises(ValueError, match="up to 4"):
        bucket(distance, 8, 4, False)


def test_gradient_of_the_biases_is_the_derived_one():
    rng = np.random.default_rng(0)
    query, key, value, weight = (rng.normal(size=(2, 2, n, 4)).astype(np.float32) for n in (6, 9, 9, 6))
    table = rng.normal(size=(8, 2)).astype(np.float32)
    mask = rng.random((2, 1, 6, 9)) < 0.6
    mask[..., 0] = True
    at = bucket(np.arange(9)[None] - np.arange(6)[:, None], 8, 5, True)

    def gradients(attend):
        def loss(query, key, value, table):
            return (attend(query, key, value, table[at].transpose(2, 0, 1)[None]) * weight).sum()

        return jax.grad(loss, (0, 1, 2, 3))(query, key, value, table)

    def unscaled(query, key, value, bias):
        return attention(query, [(key.swapaxes(2, 3), value)], mask, bias_BHTL=bias, scale=1.0)

    def plain(query, key, value, bias):
        scores = jnp.where(mask, jnp.einsum("bhtc,bhlc->bhtl", query, key) + bias, -jnp.inf)
        return jnp.einsum("bhtl,bhlc->bhtc", jax.nn.softmax(scores, axis=-1), value)

    own, derived = jax.jit(lambda: (gradients(unscaled), gradients(plain)))()
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), own, derived)
    assert (np.abs(own[3]).max(1) > 1e-3).sum() == len(np.unique(at))


def test_decoding_with_a_cache_is_the_whole_forward_pass(t5):
    module, params, whole = t5
    variables = {"params": params}
    cross = jax.jit(partial(module.apply, method=read_source))(variables, IDS, MASK)
    step = jax.jit(lambda ids, cache, t: module.apply(variables, ids, cross, MASK, cache, t, method="decode"))
    for first in (1, 3):  # how many tokens the first call takes
        cache, found, t = module.init_cache(B, T + 1), [], 0
        while t < T:
            n = first if t == 0 else 1
            logits, cache = step(TARGET[:, t : t + n], cache, jnp.int32(t))
            found, t = [*found, logits], t + n
        np.testing.assert_allclose(np.concatenate(found, 1), whole, atol=2e-5)


def test_the_future_is_not_seen(t5):
    module, params, whole = t5
    changed = TARGET.copy()
    changed[:, 4:] = 7
    found = jax.jit(module.apply)({"params": params}, IDS, MASK, changed)
    np.testing.assert_allclose(found[:, :4], whole[:, :4], atol=1e-6)
    assert np.abs(found[:, 4:] - whole[:, 4:]).max() > 0.1


def test_padding_does_not_change_what_the_generator_reads(t5):
    module, params, whole = t5
    ids = np.concatenate([np.where(MASK, IDS, 5), np.full((B, 3), 7, np.int32)], 1)
    mask = np.concatenate([MASK, np.zeros((B, 3), bool)], 1)
    found = jax.jit(module.apply)({"params": params}, ids, mask, TARGET)
    np.testing.assert_allclose(found, whole, atol=2e-5)


def test_rematerialisation_changes_no_gradient():
    config = dataclasses.replace(GATED, encoder_layers=1, decoder_layers=1, dropout=0.3)
    params = randomised(config)

    def loss(params, remat):
        rngs = {"dropout": jax.random.key(1, impl="rbg")}
        module = T5(dataclasses.replace(config, remat=remat))
        return jnp.square(module.apply({"params": params}, IDS, MASK, TARGET, False, rngs=rngs)).mean()

    plain, again = (jax.jit(jax.value_and_grad(partial(loss, remat=remat))) for remat in ("none", "full"))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), plain(params), again(params))
    found = [str(jax.make_jaxpr(partial(loss, remat=remat))(params)).count("prevent_cse") for remat in ("none", "full")]
    assert found == [0, 2]  # every layer


def test_dropout_follows_its_key_and_comes_last():
    config = dataclasses.replace(PLAIN, encoder_layers=1, dropout=0.3)
    params, module = randomised(config), T5(config)
    encode = partial(module.apply, {"params": params}, IDS, MASK, False, method="encode")
    a, b, c = (jax.jit(lambda key: encode(rngs={"dropout": key}))(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.1
    assert abs((np.asarray(a) == 0).mean() - 0.3) < 0.06  # after the last norm


def test_bfloat16_is_close_to_float32(t5):
    module, params, whole = t5
    half = T5(dataclasses.replace(module.config, dtype="bfloat16"))
    found = jax.jit(half.apply)({"params": params}, IDS, MASK, TARGET)
    assert found.dtype == jnp.float32
    assert 0 < np.linalg.norm(found - whole) < 0.02 * np.linalg.norm(whole)
    cross = jax.eval_shape(partial(half.apply, method=read_source), {"params": params}, IDS, MASK)
    assert {x.dtype for x in jax.tree.leaves(cross)} == {np.dtype(jnp.bfloat16)}
    made = jax.eval_shape(half.init, jax.random.key(0), IDS, MASK, TARGET)
    assert {x.dtype for x in jax.tree.leaves(made)} == {np.dtype("float32")}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_parameter_names_its_axes(config):
    made = jax.eval_shape(T5(config).init, jax.random.key(0), IDS, MASK, TARGET)
    leaves = jax.tree.leaves(made, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    for leaf in leaves:
        assert isinstance(leaf, nn.LogicallyPartitioned)
        assert len(leaf.names) == leaf.value.ndim
        sharding.spec(leaf.names)  # raises for a name that RULES does not know, and for a mesh axis used twice
    assert {name for leaf in leaves for name in leaf.names} == {"embed", "heads", "mlp", "vocab", "position", "norm"}
