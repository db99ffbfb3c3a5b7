"""The training step on every mesh, in micro-batches and whole: the same loss, metrics and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.index.device_index import Index, no_drift
from rag_jax.models.bart import BartConfig
from rag_jax.models.bert import BertConfig
from rag_jax.models.decoder_only import LmConfig
from rag_jax.models.t5 import T5Config
from rag_jax.rag import Rag, RagConfig, TokenTables
from rag_jax.runs import directory as runs
from rag_jax.system import sharding
from rag_jax.training import config, train_step
from rag_jax.training.optimizer import OptimizerConfig
from rag_jax.training.stage import StepSetting

B, K, N, E, L, T = 8, 2, 40, 16, 20, 6
ENCODER_V, V = 45, 48  # the first does not divide over a tensor axis, the second does
GENERATORS = {
    "bart": BartConfig(V, E, 1, 1, 4, 32, 40, dropout=0.0, init="copy"),
    "t5": T5Config(V, E, 1, 1, 8, head_width=4, hidden=32, dropout=0.0, init="copy", buckets=8),
    "lm": LmConfig(V, E, 1, 4, hidden=32, positions=40, dropout=0.0, init="copy", tied=False),
}
LOSSES = {
    "token": {"label_smoothing": 0.1, "n_docs": K, "source_length": L, "logit_chunk": 20},
    "contrastive": {"objective": "contrastive", "hard_negatives": 2},
    "denoise": {"objective": "denoise", "source_length": L, "logit_chunk": 20},
}
MESHES = [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 8}]


def given(rng):
    """A batch, passages and embeddings, on the host."""

    def ids(vocabulary, *shape):
        return rng.integers(3, vocabulary, shape).astype(np.int32)

    labels = ids(V, B, T)
    labels[:, 0] = 0
    labels[np.arange(T) >= rng.integers(3, T + 1, (B, 1))] = 1
    batch = {"question_ids": ids(ENCODER_V, B, 6), "question_length": rng.integers(2, 7, B).astype(np.int32)}
    batch |= {"tail_ids": ids(V, B, 6), "tail_length": rng.integers(2, 7, B).astype(np.int32), "labels": labels}
    batch["gold"] = rng.integers(0, N, (B, 1)).astype(np.int32)
    lengths = rng.integers(3, 9, (2, N)).astype(np.int32)
    passages = TokenTables(
        ids(ENCODER_V, N, 8).astype(np.uint16), lengths[0], ids(V, N, 8).astype(np.uint16), lengths[1]
    )
    return batch, passages, rng.normal(0, 1, (N, E)).astype(np.float32)


@functools.cache
def updated(kind, loss, mesh, **changes):
    """(metrics, parameters before and after) for a step at rate 1 whose update is nearly the gradient."""
    mesh = sharding.make_mesh(dict(mesh), jax.devices() if mesh else jax.devices()[:1])
    model = RagConfig("token", BertConfig(ENCODER_V, E, 1, 4, 32, 40, dropout=0.0, init="copy"), GENERATORS[kind])
    groups = {"contrastive": ("question_encoder", "context_encoder"), "denoise": ("generator",)}
    groups = groups.get(loss, ("question_encoder", "context_encoder", "generator"))
    optimizer = OptimizerConfig(1.0, "constant", eps=1.0, clip_norm=0.0, groups=dict.fromkeys(groups, 1.0))
    changes = LOSSES[loss] | changes
    stage = config.make_stage("s", batch=B, optimizer=optimizer, **changes)
    rag = Rag(model)
    setting = StepSetting(rag, stage, mesh, N, (0,))
    batch, passages, embeddings = given(np.random.default_rng(0))
    params = sharding.init(mesh, rag.init, jax.random.key(0))
    wanted = runs.param_places(rag, mesh)
    assert jax.tree.map(lambda x: x.sharding, params) == jax.tree.map(lambda x: x.sharding, wanted)
    before = jax.device_get(params)
    state = train_step.first_state(rag, stage, mesh, params, 0)
    rows = sharding.shard_rows(mesh, embeddings, 0)
    index = Index(rows, sharding.shard_rows(mesh, np.zeros(N, np.int32), 0), drift_E=no_drift(mesh, E))
    tables = TokenTables(*(sharding.shard_rows(mesh, table, 1) for table in passages))
    if loss == "contrastive":
        batch = {name: batch[name] for name in ("question_ids", "question_length", "gold")}
    step = train_step.jit_step(setting, 0, state, index)
    state, _, metrics = step(state, sharding.shard_batch(mesh, batch), index, tables, jax.random.key(1))
    return jax.device_get((metrics, before, state.params))


def assert_same(found, expected):
    for name, value in expected[0].items():
        np.testing.assert_allclose(found[0][name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    for (path, a), b in zip(jax.tree.leaves_with_path(found[-1]), jax.tree.leaves(expected[-1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=jax.tree_util.keystr(path))


def test_the_parameters_are_changed_at_all():
    _, before, after = updated("bart", "token", ())
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after))
    assert np.mean([x > 1e-4 for x in moved]) > 0.8  # the bias of a key has no gradient


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize(
    ("kind", "loss"),
    [("bart", "token"), ("bart", "contrastive"), ("bart", "denoise"), ("t5", "token"), ("lm", "token")],
)
def test_every_mesh_gives_the_same_for_every_generator_and_loss(kind, loss, mesh):
    assert_same(updated(kind, loss, tuple(mesh.items())), updated(kind, loss, ()))


@pytest.mark.parametrize(
    "loss", ["token", *(pytest.param(name, marks=pytest.mark.slow) for name in ("contrastive", "denoise"))]
)
def test_a_batch_in_parts_gives_the_same(loss):
    """Micro-batches, one document at a time for the generator, and whole logits, on a mesh that shards every axis."""
    chunk = {"doc_chunk": 1, "logit_chunk": 0} if loss == "token" else {}
    mesh = {"fsdp": 2, "tensor": 2, "data": 2}
    found, expected = updated("bart", loss, tuple(mesh.items()), accumulate=2, **chunk), updated("bart", loss, ())
    exact = {
        name: value
        for name, value in expected[0].items()
        if not name.startswith(("unique", "recall", "nll_per", "token_acc"))
    }
    assert_same(found, (exact, expected[-1]))
    assert set(found[0]) == set(expected[0])


def test_documents_that_do_not_divide_are_named():
    rag = Rag(RagConfig(generator=GENERATORS["bart"]))
    ids = jnp.zeros((1, 3, 4), jnp.int32)
    with pytest.raises(ValueError, match="doc_chunk=2 does not divide the 3 documents"):
        rag.states({}, ids, ids > 0, jnp.zeros((1, 3), jnp.int32), doc_chunk=2)


def test_an_axis_that_does_not_divide_is_named():
    mesh = sharding.make_mesh({"fsdp": 8})
    with pytest.raises(sharding.InputError, match=r"\(20, 7\).*20 does not divide over the 8 devices.*'embed'"):
        sharding.placed(mesh, ("embed", "heads"), (20, 7))
    assert sharding.placed(sharding.make_mesh({"tensor": 8}), ("vocab", "embed"), (45, 16)).spec[0] is None
