"""Decoder-only generators against transformers, and without it: caches, padding, positions."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.errors import InputError
from rag_jax.models.decoder_only import Lm, LmConfig, frequencies
from rag_jax.models.hf import GENERATORS, naming
from rag_jax.models.hf import decoder_only as tables
from rag_jax.ops.attention import rotate
from rag_jax.system import sharding

GPT2 = LmConfig(vocab_size=29, width=16, layers=2, heads=2, hidden=24, positions=18, dropout=0.0, attention_dropout=0.0)
LLAMA = dataclasses.replace(
    GPT2, heads=4, groups=2, head_width=6, activation="silu", gated=True, norm_kind="rms", position_kind="rotary",
    rope_scaling="llama3", rope_theta=30.0, rope_factor=8.0, rope_original=64, qkv_bias=False, out_bias=False,
    mlp_bias=False, tied=False,
)  # fmt: skip
B, L, T = 3, 9, 6
LENGTHS = np.array([9, 5, 2])
MASK = np.arange(L) < LENGTHS[:, None]
RNG = np.random.default_rng(0)
IDS = np.where(MASK, RNG.integers(3, 29, (B, L)), 1).astype(np.int32)
TARGET = RNG.integers(3, 29, (B, T)).astype(np.int32)


def randomised(config, scale=0.3):
    """Random parameters at a scale at which all of them affect the output, including those that start at 0 or 1."""
    params = nn.unbox(jax.eval_shape(Lm(config).init, jax.random.key(0), IDS, MASK, TARGET)["params"])
    rng = np.random.default_rng(3)

    def draw(path, x):
        return jnp.asarray(rng.normal(1.0 if path[-1].key == "scale" else 0.0, scale, x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(draw, params)


def logits_of(config, params, ids=IDS, mask=MASK, target=TARGET):
    return jax.jit(Lm(config).apply)({"params": params}, ids, mask, target)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def lm(request):
    """(module, parameters, teacher-forced logits of the whole sequences)"""
    config = {"gpt2": dataclasses.replace(GPT2, logit_scale=0.5), "llama": LLAMA}[request.param]
    params = randomised(config)
    return Lm(config), params, logits_of(config, params)


# --- parity -----------------------------------------------------------------------------------------------------------

ROTARY = {
    "vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 80, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
    "rms_norm_eps": 1e-3,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 50.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "gpt2": {
        "vocab_size": 29, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 18, "layer_norm_epsilon": 1e-3,
        "bos_token_id": 0, "eos_token_id": 2,
    },
    "llama": ROTARY | {"head_dim": 8, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    "llama_tied": ROTARY | {
        "tie_word_embeddings": True, "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0},
    },
    "mistral": ROTARY | {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    "qwen2": ROTARY | {"use_sliding_window": False, "hidden_act": "gelu"},
}  # fmt: skip


def parameters(family, config, state):
    """The tree of parameters from a checkpoint, by the family's table; every tensor must be used or known."""
    state = {name.removeprefix(family.spellings[0][1]): x for name, x in state.items()}
    tree = {}
    for entry in family.entries(config):
        tensor = state.pop(entry.theirs)
        found = naming.to_ours(entry, tensor)
        assert naming.their_shape(entry, [x.shape for x in found]) == tensor.shape
        np.testing.assert_array_equal(naming.to_theirs(entry, found), tensor)
        for path, x in zip(entry.ours, found, strict=True):
            *parents, leaf = path.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            assert leaf not in node
            node[leaf] = x
    assert not {name for name in state if name not in family.copies(config) and not family.ignores(name)}
    return tree


def exported(family, config, params):
    """The state dictionary from a tree of parameters, by the family's table."""

    def leaf(path):
        node = params
        for key in path.split("/"):
            node = node[key]
        return node

    state = {e.theirs: naming.to_theirs(e, [leaf(path) for path in e.ours]) for e in family.entries(config)}
    return {family.spellings[0][1] + name: np.ascontiguousarray(x) for name, x in state.items()}


@pytest.mark.parity
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name):
    torch = pytest.importorskip("torch")
    import transformers

    family = GENERATORS[name.split("_")[0]]
    architecture = getattr(transformers, family.architecture)
    theirs = architecture(architecture.config_class(**CONFIGS[name])).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, x in theirs.named_parameters():
            is_scale = x.ndim == 1 and key.endswith("weight")
            x.copy_(torch.randn(x.shape, generator=generator) * 0.3 + (1.0 if is_scale else 0.0))

    def rows(model):
        """Logits of the last T tokens of each row, which is run as one text without padding."""
        with torch.no_grad():
            texts = [torch.tensor([[*IDS[b, :n], *TARGET[b]]]).long() for b, n in enumerate(LENGTHS)]
            return np.stack([model(input_ids=text).logits[0, -T:].numpy() for text in texts])

    expected = rows(theirs)
    assert np.std(expected) > 0.3
    config = family.config(theirs.config.to_dict(), "config.json")
    state = {key: x.detach().numpy().copy() for key, x in theirs.state_dict().items()}
    params = parameters(family, config, state)
    made = nn.unbox(jax.eval_shape(Lm(config).init, jax.random.key(0), IDS, MASK, TARGET)["params"])
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, made)
    np.testing.assert_allclose(logits_of(config, params), expected, atol=1e-4)

    # the export, read by transformers
    family = GENERATORS[tables.lm_family(config)]
    architecture = getattr(transformers, family.architecture)
    again = architecture(architecture.config_class(**family.describe(config))).eval()
    state = {key: torch.tensor(x) for key, x in exported(family, config, params).items()}
    left = again.load_state_dict(state, strict=False)
    assert not left.unexpected_keys and set(left.missing_keys) <= set(family.copies(config))
    np.testing.assert_allclose(rows(again), expected, atol=1e-5)


# --- without torch ----------------------------------------------------------------------------------------------------


def test_decoding_with_a_cache_is_the_whole_forward_pass(lm):
    module, params, whole = lm
    variables = {"params": params}
    cross = jax.jit(partial(module.apply, method=lambda m, *x: m.cross(m.encode(*x))))(variables, IDS, MASK)
    step = jax.jit(lambda ids, cache, t: module.apply(variables, ids, cross, MASK, cache, t, method="decode"))
    for first in (1, 3):  # how many tokens the first call takes
        cache, found, t = module.init_cache(B, T + 1), [], 0
        while t < T:
            n = first if t == 0 else 1
            logits, cache = step(TARGET[:, t : t + n], cache, jnp.int32(t))
            found, t = [*found, logits], t + n
        np.testing.assert_allclose(np.concatenate(found, 1), whole, atol=2e-5)
    c = module.config
    G, C = c.groups or c.heads, c.head_width or c.width // c.heads
    assert {x.shape for x in cache.key} == {(B, G, C, T + 1)} and {x.shape for x in cache.value} == {(B, G, T + 1, C)}
    assert len(jax.tree.leaves(cross)) == 2 * c.layers


def test_where_the_prefix_ends_does_not_matter(lm):
    module, params, whole = lm
    n = 2
    ids, mask = np.full((B, L + n), 5, np.int32), np.arange(L + n) < LENGTHS[:, None] + n
    for b, length in enumerate(LENGTHS):
        ids[b, : length + n] = [*IDS[b, :length], *TARGET[b, :n]]
    found = logits_of(module.config, params, ids, mask, TARGET[:, n:])
    np.testing.assert_allclose(found, whole[:, n:], atol=2e-5)


def test_the_future_is_not_seen(lm):
    module, params, whole = lm
    changed = TARGET.copy()
    changed[:, 4:] = 7
    found = logits_of(module.config, params, target=changed)
    np.testing.assert_allclose(found[:, :4], whole[:, :4], atol=1e-6)
    assert np.abs(found[:, 4:] - whole[:, 4:]).max() > 0.1


def test_no_token_of_the_prefix_sees_a_later_one(lm):
    module, params, _ = lm
    encode = jax.jit(partial(module.apply, {"params": params}, method="encode"))
    changed = IDS.copy()
    changed[:, 4:] = 7
    before, after = encode(IDS, MASK), encode(changed, MASK)
    keys = [(a.swapaxes(2, 3), b.swapaxes(2, 3)) for a, b in zip(before.key, after.key, strict=True)]
    for a, b in (*keys, *zip(before.value, after.value, strict=True)):
        np.testing.assert_allclose(a[:, :, :4], b[:, :, :4], atol=1e-6)
        assert np.abs(a[:, :, 4:] - b[:, :, 4:]).max() > 0.1


def test_padding_does_not_change_the_logits(lm):
    module, params, whole = lm
    ids = np.concatenate([np.where(MASK, IDS, 5), np.full((B, 3), 7, np.int32)], 1)
    mask = np.concatenate([MASK, np.zeros((B, 3), bool)], 1)
    np.testing.assert_allclose(logits_of(module.config, params, ids, mask), whole, atol=2e-5)


def test_every_row_can_do_without_a_prefix(lm):
    module, params, _ = lm
    found = logits_of(module.config, params, mask=np.zeros_like(MASK))
    alone = logits_of(module.config, params, IDS[:, :1], np.zeros((B, 1), bool))
    np.testing.assert_allclose(found, alone, atol=2e-5)


@pytest.mark.parametrize("scaling", ["none", "linear", "llama3"])
def test_rotary_products_depend_on_distance_alone(scaling):
    c = dataclasses.replace(LLAMA, rope_scaling=scaling)
    query, key = (np.tile(RNG.normal(size=(1, 1, 1, 6)), (1, 1, 12, 1)).astype(np.float32) for _ in range(2))
    query, key = (np.asarray(rotate(x, np.arange(12)[None], frequencies(c)))[0, 0] for x in (query, key))
    products = query @ key.T
    for distance in range(-11, 12):
        assert np.ptp(np.diagonal(products, distance)) < 1e-4
    assert np.ptp(products) > 0.1


def test_rotary_angles_are_float32():
    x = RNG.normal(size=(1, 1, 1, 6)).astype(np.float32)
    position, rate = np.array([[1001]]), frequencies(LLAMA)
    half = rotate(x.astype(jnp.bfloat16), position, rate)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), rotate(x, position, rate), atol=2e-2)


def test_frequencies_are_those_of_the_pieces():
    c = dataclasses.replace(LLAMA, head_width=16)
    plain = [30.0 ** (-2 * i / 16) for i in range(8)]
    np.testing.assert_allclose(frequencies(dataclasses.replace(c, rope_scaling="none")), plain, rtol=1e-6)
    np.testing.assert_allclose(
        frequencies(dataclasses.replace(c, rope_scaling="linear")), [x / 8 for x in plain], rtol=1e-6
    )
    expected, pieces = [], set()
    for rate in plain:
        turns = 64 * rate / (2 * np.pi)
        piece = "kept" if turns > 4 else "slowed" if turns < 1 else "blended"
        share = (turns - 1) / 3
        expected.append({"kept": rate, "slowed": rate / 8, "blended": share * rate + (1 - share) * rate / 8}[piece])
        pieces.add(piece)
    assert len(pieces) == 3
    np.testing.assert_allclose(frequencies(c), expected, rtol=1e-6)


def test_logits_are_scaled(lm):
    module, params, whole = lm
    twice = dataclasses.replace(module.config, logit_scale=2 * module.config.logit_scale)
    np.testing.assert_allclose(logits_of(twice, params), 2 * whole, rtol=1e-5)


def test_grouped_attention_is_that_of_repeated_heads():
    params = randomised(LLAMA)

    def repeat(path, x):
        if path[-2].key not in ("key", "value"):
            return x
        return jnp.repeat(x.reshape(16, 2, 6), 2, axis=1).reshape(16, 24)

    whole = logits_of(dataclasses.replace(LLAMA, groups=4), jax.tree_util.tree_map_with_path(repeat, params))
    np.testing.assert_allclose(logits_of(LLAMA, params), whole, atol=2e-5)


def test_rematerialisation_changes_no_gradient():
    config = dataclasses.replace(LLAMA, layers=1, dropout=0.3, attention_dropout=0.3)
    params = randomised(config)

    def gradients(remat):
        def loss(p):
            rngs = {"dropout": jax.random.key(1, impl="rbg")}
            module = Lm(dataclasses.replace(config, remat=remat))
            return jnp.square(module.apply({"params": p}, IDS, MASK, TARGET, False, rngs=rngs)).mean()

        step = jax.value_and_grad(loss)
        assert ("remat" in str(jax.make_jaxpr(step)(params))) == (remat != "none")
        return jax.jit(step)(params)

    plain, again = gradients("none"), gradients("full")
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), plain, again)
    assert min(np.abs(x).max() for x in jax.tree.leaves(plain)) > 0


def test_dropout_is_where_gpt2_has_it():
    config = dataclasses.replace(GPT2, layers=1)
    params = randomised(config)
    other = np.where(MASK, (IDS + 1) % 29, 1)

    def dropped(ids, **rates):
        module = Lm(dataclasses.replace(config, **rates))
        apply = jax.jit(lambda x: module.apply(x, ids, MASK, TARGET, False, rngs={"dropout": jax.random.key(0)}))
        return apply({"params": params})

    # without embeddings and what the layers add nothing is left but the last bias
    nothing = params["final_norm"]["bias"] @ params["token"]["embedding"].T
    np.testing.assert_allclose(dropped(IDS, dropout=1.0), np.broadcast_to(nothing, (B, T, 29)), atol=1e-5)
    # without attention the prefix is not seen
    np.testing.assert_allclose(dropped(IDS, attention_dropout=1.0), dropped(other, attention_dropout=1.0), atol=1e-6)
    assert np.abs(dropped(IDS) - dropped(other)).max() > 0.1


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_bfloat16_is_close_to_float32(config):
    params = randomised(config, 0.2)
    whole, half = (logits_of(dataclasses.replace(config, dtype=dtype), params) for dtype in ("float32", "bfloat16"))
    assert half.dtype == jnp.float32
    assert 0 < np.linalg.norm(half - whole) < 2e-2 * np.linalg.norm(whole)
    module = Lm(dataclasses.replace(config, dtype="bfloat16"))
    made = jax.eval_shape(module.init, jax.random.key(0), IDS, MASK, TARGET)
    assert {x.dtype for x in jax.tree.leaves(made)} == {np.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(module.init_cache(1, 2))} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_input_longer_than_the_positions_is_refused(config):
    module = Lm(config)

    def shapes(prefix, target, **kwargs):
        ids = np.ones((1, prefix), np.int32)
        args = (ids, ids > 0, np.ones((1, target), np.int32)) if target else (ids, ids > 0)
        jax.eval_shape(partial(module.init, **kwargs), jax.random.key(0), *args)

    shapes(12, 6)
    with pytest.raises(ValueError, match=r"prefix of length 12 and target of length 7.*generator has 18"):
        shapes(12, 7)
    with pytest.raises(ValueError, match=r"prefix of length 19.*generator has 18"):
        shapes(19, 0, method="encode")
    with pytest.raises(ValueError, match=r"target of length 19.*generator has 18"):
        module.check_room(0, 19)
    with pytest.raises(ValueError, match=r"prefix of length 12 and target of length 7"):  # only one is given
        ids, cache = np.ones((1, 12), np.int32), module.init_cache(1, 7)
        prefix = module.init_cache(1, 12)
        jax.eval_shape(partial(module.init, method="decode"), jax.random.key(0), ids[:, :1], prefix, ids > 0, cache)


def test_every_parameter_names_its_axes():
    biased = dataclasses.replace(LLAMA, qkv_bias=True, out_bias=True, mlp_bias=True)
    made = [jax.eval_shape(Lm(c).init, jax.random.key(0), IDS, MASK, TARGET) for c in (GPT2, LLAMA, biased)]
    leaves = jax.tree.leaves(made, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    for leaf in leaves:
        assert isinstance(leaf, nn.LogicallyPartitioned)
        assert len(leaf.names) == leaf.value.ndim
        sharding.spec(leaf.names)  # raises for a name that RULES does not know, and for a mesh axis used twice
    assert {name for leaf in leaves for name in leaf.names} == {"embed", "heads", "mlp", "vocab", "position", "norm"}


# --- config.json ------------------------------------------------------------------------------------------------------


def read(name, **changes):
    return GENERATORS[name.split("_")[0]].config(CONFIGS[name] | changes, "config.json")


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_described_reads_the_same(name):
    family, config = GENERATORS[name.split("_")[0]], read(name)
    described = family.describe(config)
    if name != "gpt2":
        config = dataclasses.replace(config, head_width=config.head_width or config.width // config.heads)
    # readers know either spelling of rotary positions, or both
    for unknown in ((), ("rope_parameters",), ("rope_theta", "rope_scaling")):
        assert family.config({key: value for key, value in described.items() if key not in unknown}, "") == config


def test_rotary_positions_in_the_old_spelling():
    without_theta = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    old = {key: value for key, value in CONFIGS["llama"].items() if key != "rope_parameters"}
    assert tables.llama_config(old | {"rope_theta": 50.0, "rope_scaling": without_theta}, "") == read("llama")
    linear = tables.llama_config(old | {"rope_scaling": {"type": "linear", "factor": 3}}, "")
    assert (linear.rope_scaling, linear.rope_factor, linear.rope_theta) == ("linear", 3.0, 10_000.0)
    assert tables.llama_config(old | {"rope_theta": 7, "rope_scaling": None}, "").rope_theta == 7.0


def test_ids_of_start_padding_and_end():
    def ids(config):
        return config.bos_id, config.pad_id, config.eos_id

    assert ids(read("gpt2")) == (0, 2, 2)
    assert ids(tables.gpt2_config({k: v for k, v in CONFIGS["gpt2"].items() if "token" not in k}, "")) == (50256,) * 3
    assert ids(read("llama")) == (0, 1, 2)
    assert ids(read("llama", eos_token_id=[5, 6], bos_token_id=None, pad_token_id=None)) == (5, 5, 5)
    with pytest.raises(InputError, match="eos_token_id is missing"):
        tables.qwen2_config({k: v for k, v in CONFIGS["qwen2"].items() if k != "eos_token_id"}, "here")


def test_what_is_missing_is_what_the_class_says():
    without_groups, without_bias = ("num_key_value_heads",), ("attention_bias", "mlp_bias")

    def less(name, keys):
        return GENERATORS[name].config({k: v for k, v in CONFIGS[name].items() if k not in keys}, "")

    assert [less(name, without_groups).groups for name in ("llama", "mistral", "qwen2")] == [0, 8, 32]
    assert not less("llama", without_bias).qkv_bias and not less("llama", without_bias).mlp_bias
    assert read("gpt2").hidden == 64 and read("gpt2", n_inner=24).hidden == 24
    assert read("qwen2").qkv_bias and not read("qwen2").out_bias


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("gpt2", {"embd_pdrop": 0.5}, "embd_pdrop"),
        ("gpt2", {"activation_function": "quick_gelu"}, "quick_gelu"),
        ("gpt2", {"n_embd": None}, "n_embd is None"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn'"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type='longrope'"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "from layer to layer"),
        ("llama", {"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": None}}, "low_freq_factor is None"),
    ],
)
def test_what_is_not_built_here_is_refused(name, changes, message):
    read(name)
    with pytest.raises(InputError, match=message):
        read(name, **changes)


def test_a_window_is_known_and_longer_inputs_are_refused():
    silent = {k: v for k, v in CONFIGS["mistral"].items() if k != "sliding_window"}
    assert tables.mistral_config(silent, "").window == 4096 and read("mistral").window == 0
    both = ["full_attention", "sliding_attention"]
    for changes, window in (
        ({"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}, 20),
        ({"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 28}, 0),
        ({"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 28, "layer_types": both}, 20),
        ({"use_sliding_window": False, "sliding_window": 20, "layer_types": both}, 0),
    ):
        assert read("qwen2", **changes).window == window
    small = read("mistral", sliding_window=12)
    module = Lm(small)
    ids, mask, target = np.ones((1, 8), np.int32), np.ones((1, 8), bool), np.ones((1, 4), np.int32)
    params = module.init(jax.random.key(0), ids, mask, target)
    assert tables.describe_mistral(small)["sliding_window"] == 12
    with pytest.raises(ValueError, match="window of 12 tokens"):
        module.apply(params, ids, mask, np.ones((1, 5), np.int32))


def test_the_family_of_a_configuration():
    families = {name: tables.lm_family(read(name)) for name in CONFIGS}
    assert families == {
        "gpt2": "gpt2", "llama": "llama", "llama_tied": "llama", "mistral": "llama", "qwen2": "qwen2",
    }  # fmt: skip
    for base, change in [
        (GPT2, {"tied": False}),
        (GPT2, {"position_kind": "rotary"}),
        (GPT2, {"norm_kind": "rms"}),
        (GPT2, {"out_bias": False}),
        (GPT2, {"groups": 1}),
        (GPT2, {"head_width": 4}),
        (GPT2, {"logit_scale": 0.5}),
        (LLAMA, {"out_bias": True}),
        (LLAMA, {"qkv_bias": True, "mlp_bias": True}),
        (LLAMA, {"gated": False}),
    ]:
        tables.lm_family(base)
        with pytest.raises(InputError, match="no decoder with these settings"):
            tables.lm_family(dataclasses.replace(base, **change))
    with pytest.raises(InputError, match="the form of gpt2, not of llama"):
        tables.describe_llama(GPT2)
    with pytest.raises(InputError, match="Mistral has no biases"):
        tables.describe_mistral(read("llama"))


def test_names_that_carry_nothing():
    gpt2, llama = GENERATORS["gpt2"], GENERATORS["llama"]
    assert gpt2.ignores("h.11.attn.bias") and gpt2.ignores("transformer.h.0.attn.masked_bias")
    assert not gpt2.ignores("h.0.attn.c_attn.bias")
    assert llama.ignores("model.layers.0.self_attn.rotary_emb.inv_freq") and llama.ignores("model.rotary_emb.inv_freq")
