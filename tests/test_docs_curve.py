"""Answers as a function of the number of documents: one search, decoded again only where necessary."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from rag_jax import metrics
from rag_jax.data.readers import formats
from rag_jax.errors import InputError
from rag_jax.evaluation import docs_curve
from rag_jax.inference.pipeline import Answer, AnswerConfig, Pipeline, ReadPassage
from rag_jax.retrieval.config import SearchConfig

TEXTS = ["who?", "where?"]


class Pretended:
    """A pipeline whose answers state how many documents were read, and that records its calls."""

    def __init__(self, directory: Any, dies_at: int = 0) -> None:
        self.directory, self.dies_at = directory, dies_at
        self.asked: list[tuple[bool, int]] = []
        self.search, self.snapshot = SearchConfig(kind="bm25"), SimpleNamespace(hash="index")
        corpus = SimpleNamespace(n_live=30, rows=lambda names: np.array([int(name) for name in names]))
        self.loaded = SimpleNamespace(corpus=corpus, rag=SimpleNamespace(config=SimpleNamespace(n_docs=3)))
        (directory / "params").mkdir(parents=True, exist_ok=True)
        (directory / "params/manifest.json").write_text("parameters")

    def search_manifest(self) -> dict[str, Any]:
        return {"kind": "bm25"}

    def answer(self, texts: list[str], cfg: AnswerConfig, known: Any = None) -> list[Answer]:
        if cfg.n_docs == self.dies_at and not cfg.retrieval_only:
            raise KeyboardInterrupt
        self.asked.append((cfg.retrieval_only, cfg.n_docs))
        if cfg.retrieval_only:  # the search ranks 7 before 4, the prior 4 before 7
            passages = [ReadPassage(name, "", "", prior, prior) for name, prior in (("4", 0.75), ("7", 0.25))]
            return [Answer("", 0.0, tuple(passages), ("7", "4")) for _ in texts]
        assert known.ids_BK.tolist()[0][:3] == [7, 4, -1] and known.ids_BK.shape == (len(texts), 20)
        np.testing.assert_allclose(known.scores_BK[0][:3], [np.log(0.25), np.log(0.75), -np.inf])
        return [Answer(f"{cfg.n_docs} of {text}", -float(cfg.n_docs), (), ()) for text in texts]


def said(pipeline: Any, directory: Any, numbers: list[int], known: Any = None, **changes: Any) -> Any:
    cfg = AnswerConfig(**changes)
    return docs_curve.answers_by_docs(pipeline, cfg, numbers, TEXTS, known or {}, directory)


def test_killed_it_goes_on_with_the_numbers_that_are_done(tmp_path):
    dying, out = Pretended(tmp_path, dies_at=20), tmp_path / "curve"
    with pytest.raises(KeyboardInterrupt):
        said(dying, out, [1, 5, 20])
    assert dying.asked == [(True, 20), (False, 1), (False, 5)]  # one search for all numbers
    again = Pretended(tmp_path)
    found = said(again, out, [1, 5, 20])
    assert again.asked == [(True, 20), (False, 20)]
    assert found == {n: [(f"{n} of {text}", -float(n)) for text in TEXTS] for n in (1, 5, 20)}
    assert sorted(path.name for path in out.iterdir()) == ["1.json", "20.json", "5.json"]
    third = Pretended(tmp_path)
    assert said(third, out, [1, 5, 20]) == found and third.asked == []


def test_what_is_known_is_not_asked_again(tmp_path):
    pipeline = Pretended(tmp_path)
    known = {3: [("a", -1.0), ("b", -2.0)]}
    assert said(pipeline, tmp_path / "curve", [3], known) == known and pipeline.asked == []


@pytest.mark.parametrize("change", ["parameters", "index", "settings", "questions", "damaged", "cut"])
def test_answers_of_anything_else_are_not_taken(tmp_path, change):
    pipeline, out = Pretended(tmp_path), tmp_path / "curve"
    key = docs_curve.identity(pipeline, AnswerConfig(n_docs=20), TEXTS)
    said(pipeline, out, [20])
    file, settings = out / "20.json", {}
    assert docs_curve.read(file, key)
    if change == "parameters":
        (tmp_path / "params/manifest.json").write_text("others")
    elif change == "index":
        pipeline.snapshot.hash = "other"
    elif change == "settings":
        settings = {"num_beams": 2}
    elif change == "questions":
        other = docs_curve.identity(pipeline, AnswerConfig(n_docs=20), TEXTS[:1])
        assert docs_curve.read(file, other) is None
        return
    elif change == "damaged":
        file.write_text(file.read_text().replace("20 of who?", "21 of who?"))
    else:
        file.write_text(file.read_text()[:40])
    pipeline.asked.clear()
    said(pipeline, out, [20], **settings)
    assert pipeline.asked == [(True, 20), (False, 20)]


def test_numbers_that_cannot_be(tmp_path):
    pipeline = Pretended(tmp_path)
    for cfg, numbers, message in (
        (AnswerConfig(), [0], "--n-docs-curve 0: the numbers of documents must be at least 1"),
        (AnswerConfig(), [1, 31], "n_docs=31, but the corpus has 30 passages"),
        (AnswerConfig(closed_book=True), [1], "leave out --closed-book"),
        (AnswerConfig(retrieval_only=True), [1], "leave out --closed-book, --retrieval-only"),
    ):
        with pytest.raises(InputError, match=message):
            docs_curve.check(pipeline, cfg, numbers)
    docs_curve.check(pipeline, AnswerConfig(closed_book=True), [])


def test_figures_of_every_number(tmp_path):
    rows = [
        {"question": text, "prediction": "x", "score": -1.0, "answers": [f"5 of {text}"], "gold": [], "retrieved": []}
        for text in TEXTS
    ]
    rows[1]["answers"] = ["x"]
    found = docs_curve.curve(Pretended(tmp_path), AnswerConfig(), [20, 5, 3, 5], rows, metrics.Judging(), tmp_path)
    assert [point["n_docs"] for point in found] == [3, 5, 20]
    assert [point["exact_match"] for point in found] == [0.5, 0.5, 0.0]  # 3 is the model's own: that of the rows
    assert (
        found[2]["f1"] == pytest.approx(1 / 3)
        and found[0]["exact_match_low"] == 0
        and found[0]["exact_match_high"] == 1
    )
    assert set(found[0]) == {
        "n_docs",
        *(f"{name}{end}" for name in ("exact_match", "f1") for end in ("", "_low", "_high")),
    }


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["sequence", "token"])
@pytest.mark.parametrize("kind", ["exact", "bm25"])
def test_the_same_answers_as_with_a_search_of_their_own(tiny_data, tiny_run, tmp_path, kind, variant):
    opened = Pipeline.from_run(tiny_run, None, SearchConfig(kind=kind))
    rag = dataclasses.replace(opened.loaded.rag, config=dataclasses.replace(opened.loaded.rag.config, variant=variant))
    location = dataclasses.replace(opened.location, loaded=dataclasses.replace(opened.loaded, rag=rag))
    opened = dataclasses.replace(opened, location=location)
    texts = [q.question for q in formats.read_questions(tiny_data / "world/train.jsonl")[:11]]
    cfg = opened.answer_config(batch=8, n_retrieved=9)
    found = docs_curve.answers_by_docs(opened, cfg, [1, 2, 5], texts, {}, tmp_path)
    for n_docs in (1, 2, 5):
        own = opened.answer(texts, dataclasses.replace(cfg, n_docs=n_docs))
        assert [text for text, _ in found[n_docs]] == [one.text for one in own]
        np.testing.assert_allclose([score for _, score in found[n_docs]], [one.score for one in own], atol=2e-4)
    jax.clear_caches()


@pytest.mark.slow
def test_the_command_line_draws_it_all(tiny_data, tiny_run, tmp_path, capsys):
    """With pictures; after a kill between two numbers, it resumes."""
    words = ["evaluate", tiny_run, "--out", tmp_path, "--limit", 8, "--batch", 8, "--n-docs-curve", "1,2,3", "--json"]
    assert tiny.rag_jax(*words) == 0
    report = json.loads(capsys.readouterr().out)
    points = report["curves"]["n_docs"]
    assert [point["n_docs"] for point in points] == [1, 2, 3]
    assert points[2]["exact_match"] == report["exact_match"] and points[2]["f1"] == pytest.approx(report["f1"])
    made = {path.name for path in tmp_path.iterdir()}
    assert made >= {"recall.png", "n_docs.png", "curves.png", "report.md", "report.html", "report.json"}
    (tmp_path / "n_docs_curve/2.json").unlink()
    assert tiny.rag_jax(*words) == 0
    captured = capsys.readouterr()
    assert "1 documents (1 of 3 numbers): done before" in captured.err
    assert "answers with 2 documents (2 of 3 numbers)\n" in captured.err
    assert json.loads(captured.out)["curves"] == report["curves"]
