"""Tokenised questions that a run keeps: reused only if they are intact and of the same data."""

import json
import shutil

import numpy as np
import pytest
import tiny
from test_checkpoint import flipped

from rag_jax.corpus.directory import Corpus
from rag_jax.data import example_cache, examples
from rag_jax.training import config, setup


@pytest.fixture(scope="module")
def data(tiny_data, tmp_path_factory):
    """A corpus and two files of questions that a test may change."""
    folder = tmp_path_factory.mktemp("questions")
    for name in ("a", "b"):
        shutil.copy(tiny_data / "world/train.jsonl", folder / f"{name}.jsonl")
    return folder


@pytest.fixture
def settings(tiny_data, data):
    def load(*assignments):
        return config.load(f"{tiny.__file__}:{tiny_data}", [f"train=3*{data}/a.jsonl + 1*{data}/b.jsonl", *assignments])

    return load


@pytest.fixture
def corpus(tiny_data):
    return Corpus.open(tiny_data / "corpus")


def kept(cfg, corpus, run):
    found = setup.prepare(cfg, corpus, run)
    setup.keep(run, found)
    return found


def test_kept_and_read_again(settings, corpus, tmp_path, capsys):
    cfg = settings("answers=every")
    made = kept(cfg, corpus, tmp_path)
    capsys.readouterr()
    again = setup.prepare(cfg, corpus, tmp_path)
    assert capsys.readouterr().err == "" and again.unkept is None and again.weights == made.weights
    assert again.examples.fingerprint() == made.examples.fingerprint()
    for name, array in again.examples.arrays().items():
        assert isinstance(array, np.memmap) or not array.size
        np.testing.assert_array_equal(array, made.examples.arrays()[name])
    for one, other in zip(*(setup.batches(cfg.stages[0], cfg, x, 0)[7].items() for x in (made, again)), strict=True):
        assert one[0] == other[0]
        np.testing.assert_array_equal(one[1], other[1])
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    setup.keep(tmp_path, again)
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}


@pytest.mark.parametrize(
    "changes",
    [
        ["target_length=13"],
        ["model.question_length=31"],
        ["answers=every"],
        ["stages.retriever.hard_negatives=1", "stages.retriever.negatives=given"],
    ],
)
def test_other_settings_are_made_anew(settings, corpus, tmp_path, capsys, changes):
    kept(settings(), corpus, tmp_path)
    found = setup.prepare(settings(*changes), corpus, tmp_path)
    assert found.unkept is not None and "made of other questions, tokenizers" in capsys.readouterr().err


def test_other_data_are_made_anew(settings, corpus, tiny_data, data, tmp_path, capsys):
    """They are tokenised again for another corpus, or another question in either file."""
    cfg = settings()
    kept(cfg, corpus, tmp_path)
    assert setup.prepare(cfg, Corpus.open(tiny_data / "edited-corpus"), tmp_path).unkept is not None
    file = data / "b.jsonl"
    text = file.read_text()
    file.write_text(text.replace("?", "??", 1))
    try:
        found = kept(cfg, corpus, tmp_path)
        assert found.unkept is not None and capsys.readouterr().err.count("made of other questions") == 2
        assert setup.prepare(cfg, corpus, tmp_path).unkept is None
    finally:
        file.write_text(text)


@pytest.mark.parametrize("how", ["flipped", "cut", "missing", "manifest", "no manifest", "nothing"])
def test_damaged_ones_are_made_anew(settings, corpus, tmp_path, capsys, how):
    cfg = settings()
    made = kept(cfg, corpus, tmp_path)
    folder = tmp_path / setup.EXAMPLES
    file, manifest = folder / "label.values.npy", folder / "manifest.json"
    if how == "flipped":
        flipped(file)
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-3])
    elif how == "missing":
        file.unlink()
    elif how == "manifest":
        manifest.write_text(manifest.read_text().replace("first", "every"))
    elif how == "no manifest":
        manifest.unlink()
    else:
        for path in folder.iterdir():
            path.unlink()
    capsys.readouterr()
    found = kept(cfg, corpus, tmp_path)
    assert found.unkept is not None and "the questions are read again" in capsys.readouterr().err
    assert found.examples.fingerprint() == made.examples.fingerprint()
    assert setup.prepare(cfg, corpus, tmp_path).unkept is None  # and written again


def test_where_it_cannot_be_written_training_goes_on(settings, corpus, tmp_path, capsys):
    (tmp_path / setup.EXAMPLES).write_text("a file, no directory")
    found = kept(settings(), corpus, tmp_path)
    assert found.unkept is not None and "not kept" in capsys.readouterr().err


def test_an_older_version_is_made_anew(settings, corpus, tmp_path, monkeypatch, capsys):
    cfg = settings()
    kept(cfg, corpus, tmp_path)
    monkeypatch.setattr(example_cache, "VERSION", example_cache.VERSION + 1)
    assert setup.prepare(cfg, corpus, tmp_path).unkept is not None
    assert "format version" in capsys.readouterr().err


def test_what_it_is_made_of_is_written_down(settings, corpus, tmp_path):
    cfg = settings()
    made = kept(cfg, corpus, tmp_path)
    said = json.loads((tmp_path / setup.EXAMPLES / "manifest.json").read_text())["made_of"]
    assert said["corpus"] == corpus.hash and said["answers"] == "first" and len(said["inputs"]) == 2
    assert isinstance(made.examples, examples.Examples)
