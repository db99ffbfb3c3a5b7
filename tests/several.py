"""The checks of each process of test_processes.py: `python several.py DATA`, with DATA as that test writes it."""

import argparse
import sys
from pathlib import Path

import jax
import numpy as np

from rag_jax.cli import output_options, process_options
from rag_jax.corpus.directory import Corpus
from rag_jax.index import encode_job
from rag_jax.index.host_index import HostIndex
from rag_jax.models.bert import BertConfig
from rag_jax.rag import Rag, RagConfig
from rag_jax.retrieval.search import SearchResult
from rag_jax.runs import checkpoint
from rag_jax.runs import directory as runs
from rag_jax.runs.index_location import OnHost
from rag_jax.system import distributed, sharding
from rag_jax.training.config import make_stage
from rag_jax.training.stage import StepSetting
from rag_jax.training.stage_index import feed

MESHES = ((8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8), (4, 1, 2))
STAGES = {
    "rag": make_stage("s", batch=8, n_docs=3),
    "gold": make_stage("s", batch=8, documents="gold"),
    "contrastive": make_stage("s", batch=8, objective="contrastive"),
    "hard": make_stage("s", batch=8, objective="contrastive", hard_negatives=2),
    "given": make_stage("s", batch=8, objective="contrastive", hard_negatives=2, negatives="given"),
}


class ByText:
    """A search whose results depend on the length of the question alone."""

    def search(self, queries, k):
        first_B1 = np.asarray([len(text) for text in queries.texts])[:, None]
        ids_BK = ((first_B1 + 3 * np.arange(k)) % 40).astype(np.int32)
        return SearchResult(ids_BK, np.zeros(ids_BK.shape, np.float32))


def mesh_of(sizes):
    return sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))


def model(corpus, mesh):
    encoder = BertConfig(vocab_size=corpus.encoder_tokenizer.vocab_size, width=16, layers=1, heads=8, hidden=32)
    rag = Rag(RagConfig(encoder=encoder, generator=None, tie_encoders=True, question_length=8))
    return rag, sharding.init(mesh, rag.init, jax.random.key(0))


def batch_of(corpus):
    """A batch with every field that `feed` reads."""
    rng = np.random.default_rng(0)
    return {
        "question_ids": rng.integers(0, 300, (8, 8)).astype(np.int32),
        "question_length": np.arange(1, 9, dtype=np.int32),
        "labels": rng.integers(0, 9, (8, 4)).astype(np.int32),
        "gold": np.arange(8, dtype=np.int32)[::-1, None] * 2,
        "source": np.arange(8, dtype=np.int32),
    }


def fed(corpus, mesh, rag, params, stage):
    """The whole arrays that a step gets on `mesh`, by name."""
    own = sharding.own_rows(mesh, 8)
    setting = StepSetting(rag, stage, mesh, len(corpus), ())
    embeddings_NE = np.arange(len(corpus) * 4, dtype=np.float32).reshape(-1, 4)
    index = HostIndex(embeddings_NE, np.arange(len(corpus), dtype=np.int32), ByText())
    location = OnHost(runs.Loaded(rag, corpus, mesh, None), None)
    batch = batch_of(corpus)
    if stage.objective.needs().negatives:
        batch["negatives"] = np.arange(16, dtype=np.int32).reshape(8, 2) - 1
    batch = {k: v[own] for k, v in batch.items()}
    given = feed(setting, location, lambda sources: ["x" * (5 * i + 1) for i in sources], params, batch, index)
    tree = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(given)}
    return {name: np.asarray(sharding.fetched(leaf)) for name, leaf in tree.items()}


def feeds(corpus, sizes):
    mesh = mesh_of(sizes)
    rag, params = model(corpus, mesh)
    return {
        f"{kind}{name}": value
        for kind, stage in STAGES.items()
        for name, value in fed(corpus, mesh, rag, params, stage).items()
    }


def checks(data):
    """All operations that several processes do together, compared with what the test wrote."""
    expected, corpus = dict(np.load(data / "expected.npz")), Corpus.open(data / "corpus")
    assert distributed.from_first(["of", jax.process_index()]) == ["of", 0]
    assert distributed.from_first("") == ""
    assert distributed.everywhere(True) and not distributed.everywhere(jax.process_index() != 2)
    numbers = np.arange(48).reshape(16, 3)
    for sizes in MESHES:
        mesh = mesh_of(sizes)
        own = sharding.own_rows(mesh, 16)
        on_devices = sharding.shard_batch(mesh, {"x": numbers[own], "n": np.float32(3)})
        for shard in on_devices["x"].addressable_shards:
            np.testing.assert_array_equal(shard.data, numbers[shard.index])
        whole = sharding.fetched(on_devices)
        np.testing.assert_array_equal(whole["x"], numbers)
        assert whole["n"] == 3
    for name, value in feeds(corpus, (2, 2, 2)).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)

    rag, params = model(corpus, mesh_of((1, 4, 2)))
    assert checkpoint.tree_hash(params) == str(expected["hash"])
    checkpoint.save_params(data / "params", params.items())
    with np.errstate(all="raise"):
        found = list(encode_job.blocks(rows_squared, range(3, 50), 13))
    np.testing.assert_array_equal(np.concatenate([rows for rows, _ in found]), np.arange(3, 50))
    np.testing.assert_array_equal(np.concatenate([x for _, x in found])[:, 0], np.arange(3, 50) ** 2)

    keeper = checkpoint.Checkpoints(data / "checkpoints")
    assert keeper.steps() == [2, 1]
    like = runs.param_places(rag, mesh_of((2, 2, 2)))
    try:
        keeper.restore(2, {"params": like})
        raise AssertionError("checkpoint 2 is damaged")
    except checkpoint.Damaged:
        keeper.set_aside(2)
    again = keeper.restore(1, {"params": like})
    assert checkpoint.tree_hash(again["params"]) == str(expected["hash"])
    keeper.save(3, {"params": params}, {})
    keeper.wait()
    assert checkpoint.tree_hash(keeper.restore(3, {"params": like})["params"]) == str(expected["hash"])
    keeper.close()


def rows_squared(first, last, done):
    """Embeddings whose values identify their rows."""
    assert first < last
    done(last - first)
    return np.arange(first, last, dtype=np.float32)[:, None] ** 2


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    process_options.add_arguments(parser)
    output_options.add_arguments(parser)
    args = parser.parse_args()
    with distributed.together(process_options.from_arguments(args)):
        checks(args.data)
    print("all is well")


if __name__ == "__main__":
    sys.exit(main())
