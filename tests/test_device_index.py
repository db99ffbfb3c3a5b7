"""Rebuild and refresh of the index on devices, against embeddings of single passages."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_train_step
from test_train_step import ENCODER, GENERATOR, Bags, drawn_params, embed_all, index_of

from rag_jax.corpus.directory import Corpus
from rag_jax.index import device_index, refresh
from rag_jax.index.device_index import Index
from rag_jax.index.refresh import Refresher
from rag_jax.models.bert import BertConfig
from rag_jax.rag import RagConfig
from rag_jax.runs import directory as runs
from rag_jax.system import sharding

E = 6


def bags(corpus):
    return test_train_step.bags(corpus, encoder=BertConfig(width=E, heads=1))


@pytest.fixture(scope="module")
def corpus(tiny_data):
    return Corpus.open(tiny_data / "corpus")


@pytest.fixture(scope="module", params=[1, 8])
def mesh(request):
    return sharding.make_mesh(None, jax.devices()[: request.param])


@pytest.fixture(scope="module")
def passages(corpus, mesh):
    return runs.load(RagConfig(encoder=BertConfig(vocab_size=0, positions=96)), corpus, mesh).passages


@pytest.fixture(scope="module")
def params(corpus):
    size = corpus.encoder_tokenizer.vocab_size
    return {"context_encoder": jnp.asarray(np.random.default_rng(0).normal(size=(size, E)), jnp.float32)}


@pytest.fixture
def small_blocks(monkeypatch):
    """Makes several blocks and chunks for a corpus of 40 passages, the last ones not full."""
    monkeypatch.setattr(refresh, "CHUNK", 3)
    monkeypatch.setattr(refresh, "BLOCK", 7)


def assert_fresh(index, corpus, params, rows=slice(None), step=None, **close):
    expected = embed_all(params["context_encoder"], corpus)[rows]
    found = np.asarray(device_index.stored(index, jnp.arange(len(corpus))))[rows]
    np.testing.assert_allclose(found, expected, **({"atol": 1e-5} | close))
    if step is not None:
        assert (np.asarray(index.step_N)[: len(corpus)][rows] == step).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_all_passages_made_anew(corpus, mesh, passages, params, dtype, small_blocks):
    make = refresh.on_devices(bags(corpus), mesh, passages, dtype)
    index = make(params, 5, None, True)
    rtol = {"float32": 0, "bfloat16": 2**-8, "int8": 0}[dtype]
    atol = {"float32": 1e-5, "bfloat16": 0, "int8": np.abs(embed_all(params["context_encoder"], corpus)).max() / 200}
    assert_fresh(index, corpus, params, step=5, rtol=rtol, atol=atol[dtype])
    rows = sharding.sharding(mesh, ("rows", None))
    assert index.embeddings_NE.dtype == dtype and index.embeddings_NE.sharding.is_equivalent_to(rows, 2)
    again = make({"context_encoder": -params["context_encoder"]}, 6, index, True)
    assert index.embeddings_NE.is_deleted()  # it was donated
    assert_fresh(again, corpus, {"context_encoder": -params["context_encoder"]}, step=6, rtol=rtol, atol=atol[dtype])


@pytest.mark.parametrize("turn", [1, 3, 11, 1000])
def test_rolling_reaches_every_row_within_a_turn(corpus, mesh, passages, params, turn):
    """Stored rows lack the drift so far, which is the sum of the blocks' mean changes; here in NumPy."""
    rag, n = bags(corpus), len(passages.encoder_length_N)
    local = n // mesh.size
    roll = jax.jit(lambda index, step: refresh.roll(rag, mesh, params, index, passages, step, turn))
    fresh = embed_all(params["context_encoder"], corpus)
    stored, drift = np.random.default_rng(1).normal(size=fresh.shape), np.zeros(E)
    index = index_of(mesh, stored, -1)
    size, turn_steps = refresh.rows_at_once(n, mesh.size, turn), min(turn, local)
    blocks = -(-local // size)
    for step in range(100, 100 + 2 * turn_steps):
        index = roll(index, jnp.int32(step))
        own = np.minimum(step % blocks + blocks * np.arange(size), local - 1)  # spread evenly over each device's rows
        rows = (np.arange(mesh.size)[:, None] * local + own).reshape(-1)
        drift = drift + (fresh[rows] - stored[rows] - drift).mean(0)
        stored[rows] = fresh[rows] - drift
        assert set(np.flatnonzero(np.asarray(index.step_N) == step)) == set(rows.tolist())
        if step + 1 - 100 >= turn_steps:
            assert (step - np.asarray(index.step_N)).max() < turn
    np.testing.assert_allclose(index.drift_E, drift, atol=2e-5)
    np.testing.assert_allclose(np.asarray(index.embeddings_NE)[: len(corpus)], stored, atol=2e-5)


def test_what_all_embeddings_share_does_not_favour_the_rows_made_last(corpus, mesh, passages, params):
    """All embeddings move by one vector: after a block the index equals a rebuilt one, thanks to the drift; without
    this correction, refreshed rows all rank before stale ones.
    """
    rag, move = bags(corpus), np.array([4.0, 0, 0, -3, 0, 2])
    old = embed_all(params["context_encoder"], corpus)
    moved = {"context_encoder": params["context_encoder"] + jnp.asarray(move, jnp.float32)}  # the mean of the words
    roll = jax.jit(lambda index, step: refresh.roll(rag, mesh, moved, index, passages, step, 4))
    index = roll(index_of(mesh, old), jnp.int32(3))
    new = np.asarray(index.step_N)[: len(corpus)] == 3
    assert 0 < new.sum() < len(corpus)
    np.testing.assert_allclose(device_index.stored(index, jnp.arange(len(corpus))), old + move, atol=1e-4)
    np.testing.assert_allclose(np.asarray(index.embeddings_NE)[: len(corpus)], old, atol=1e-4)
    plain = roll(index_of(mesh, old)._replace(drift_E=None), jnp.int32(3))
    scores = np.asarray(plain.embeddings_NE)[: len(corpus)] @ move
    assert scores[new].min() > scores[~new].max()


def test_deleted_passages_do_not_count_as_drift(corpus, mesh, passages, params):
    rag = bags(corpus)
    fresh, live = embed_all(params["context_encoder"], corpus), np.arange(len(corpus)) % 3 > 0
    stored = np.where(live[:, None], fresh - 1.0, 50.0)
    index = index_of(mesh, stored)._replace(live_N=sharding.shard_rows(mesh, live, False))
    index = jax.jit(lambda index: refresh.roll(rag, mesh, params, index, passages, jnp.int32(0), 1))(index)
    np.testing.assert_allclose(index.drift_E, np.ones(E), atol=1e-5)


def test_no_device_sees_the_rows_of_another(corpus, passages, params, mesh):
    """The compiled rolling block has no collective over rows of the index or of the token table; only the drift is
    summed over devices.
    """
    rag, n = bags(corpus), len(passages.encoder_length_N)
    roll = jax.jit(lambda index, step: refresh.roll(rag, mesh, params, index, passages, step, 4))
    text = roll.lower(index_of(mesh, np.zeros((n, E))), jnp.int32(0)).compile().as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))
    sums = [line.split(" = ")[1] for line in text.splitlines() if re.search(r" all-reduce(-start)?\(", line)]
    shapes = [shape for line in sums for shape in re.findall(r"\[([\d,]*)\]", line.split(" all-reduce")[0])]
    sizes = [int(np.prod([int(x) for x in shape.split(",") if x])) for shape in shapes]
    assert all(size <= 2 * E for size in sizes) and (mesh.size == 1 or sizes)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_put(mesh, dtype):
    rng = np.random.default_rng(0)
    old, new = rng.normal(size=(40, E)).astype(np.float32), rng.normal(size=(4, E)).astype(np.float32)
    index = index_of(mesh, old)
    if dtype == "int8":
        rows, scale = device_index.encoded(index.embeddings_NE, jnp.dtype("int8"))
        index = Index(rows, index.step_N, scale, drift_E=index.drift_E)
    rows = np.array([3, 39, 0, 3])
    new[3] = new[0]  # row 3 twice, with the same embedding
    atol = 1e-6 if dtype == "float32" else np.abs(old).max() / 100
    drift = (new - old[rows]).mean(0)
    for measure in (True, False):
        put = jax.jit(refresh.put, static_argnums=4)(index, rows, new, jnp.int32(9), measure)
        expected, steps = old + measure * drift, np.zeros(40)
        expected[rows], steps[rows] = new, 9
        np.testing.assert_allclose(put.drift_E, measure * drift, atol=atol)
        np.testing.assert_allclose(device_index.stored(put, jnp.arange(40)), expected, atol=atol)
        assert np.asarray(put.step_N).tolist() == steps.tolist()


def test_overlap():
    rng = np.random.default_rng(0)
    q, stored, fresh = (rng.normal(size=(n, E)).astype(np.float32) for n in (5, 30, 30))
    live = rng.random(30) < 0.8
    best = [[set(sorted(np.flatnonzero(live), key=lambda row: -(d[row] @ x))[:4]) for x in q] for d in (stored, fresh)]
    expected = np.mean([len(a & b) / 4 for a, b in zip(*best, strict=True)])
    np.testing.assert_allclose(refresh.overlap(q, stored, fresh, live, 4), expected, rtol=1e-6)
    assert 0 < expected < 1 and refresh.overlap(q, stored, stored, live, 4) == 1


@pytest.mark.parametrize(("n", "size"), [(10, 10), (10, 99), (1000, 7), (21_015_300, 1024)])
def test_sample(n, size):
    drawn = [refresh.sample((0, step), n, size) for step in range(3)]
    for rows in drawn:
        assert len(rows) == min(n, size) and (np.diff(rows) > 0).all() and rows[0] >= 0 and rows[-1] < n
    assert (drawn[0] == refresh.sample((0, 0), n, size)).all()
    assert size >= n or (drawn[0] != drawn[1]).any()


def test_beside_training(corpus, mesh, passages, params, small_blocks):
    """A background build uses a copy of the parameters from its beginning, even if these are deleted."""
    refresher = Refresher(refresh.on_devices(bags(corpus), mesh, passages, "float32"), mesh, "context_encoder")
    on_device = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
    refresher.begin(on_device, 7)
    jax.tree.map(lambda x: x.delete(), on_device)  # as a step does to which they are donated
    step, encoder = refresher.pending
    assert step == 7
    index = refresher.take()
    assert refresher.pending is None
    assert_fresh(index, corpus, params, step=7)
    refresher.resume(encoder, 7)
    np.testing.assert_array_equal(refresher.take().embeddings_NE, index.embeddings_NE)
    refresher.begin(params, 8)
    refresher.drop()
    assert refresher.pending is None


def test_a_failed_build_is_said_when_it_is_taken(mesh):
    def make(*args):
        raise ValueError("no passages")

    refresher = Refresher(make, mesh, "context_encoder")
    refresher.begin({"context_encoder": np.ones(3)}, 0)
    with pytest.raises(ValueError, match="no passages"):
        refresher.take()


def test_with_a_real_encoder_and_sharded_parameters(corpus):
    """On a mesh with all axes the rolling block gives the encoder's embedding of each passage alone."""
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    model = RagConfig(
        encoder=dataclasses.replace(ENCODER, dropout=0.1), generator=GENERATOR, source_length=152, question_length=24
    )
    loaded = runs.load(model, corpus, mesh)
    params = drawn_params(loaded)
    assert not isinstance(loaded.rag, Bags)
    index = device_index.blank(mesh, len(loaded.passages.encoder_length_N), ENCODER.width)
    roll = jax.jit(lambda params, index, step: refresh.roll(loaded.rag, mesh, params, index, loaded.passages, step, 1))
    index = roll(params, index, jnp.int32(0))
    row = 17
    ids = jnp.asarray(corpus.encoder_ids[row : row + 1, : corpus.encoder_length[row]], jnp.int32)
    alone = loaded.rag.embed_passages(jax.device_get(params), ids, jnp.ones(ids.shape, bool))
    np.testing.assert_allclose(device_index.stored(index, jnp.int32(row)), alone[0], atol=2e-5)
