"""The files of an evaluation: each is whole, and they never mix two evaluations."""

import json

import pages
import pytest

from rag_jax.errors import InputError
from rag_jax.evaluation import compare
from rag_jax.evaluation.report import evaluation_plots, write_report
from rag_jax.metrics import Judging


def found(run, rows, **report):
    usual = {
        "n": len(rows), "exact_match": 0.5, "seconds": 1.0, "variant": "token", "run": str(run),
        "questions": "test.jsonl", "where": "", "corpus": "data/corpus", "index": "runs/a/index", "index_step": 1000,
        "n_docs": 2, "seed": 0, "n_retrieved": 100, "search": {"kind": "exact", "dtype": "int8"}, "labels": [],
        "match": "string", **write_report.DEFAULTS, "num_beams": 4,
    }  # fmt: skip
    return write_report.EvaluationResults(
        run, pages.Corpus(), rows, usual | report, Judging(), "rag-jax evaluate runs/a --limit 2"
    )


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr(evaluation_plots, "draw", lambda report, out: [])


def test_the_files_say_what_was_found(tmp_path):
    rows = [
        *[pages.row(i) for i in range(5)],
        pages.row(5, prediction="wrong|one", read=["gone", "p1"]),
        pages.row(6, prediction="of half a pair \ud800", question="\ud83d?"),
    ]
    write_report.write(tmp_path, found(tmp_path, rows))
    assert {path.name for path in tmp_path.iterdir()} == {
        "predictions.jsonl",
        "report.json",
        "report.md",
        "report.html",
    }
    lines = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    for part in (
        "RAG-Token", "test.jsonl (7)", "step 1,000, search: exact, int8", "num\\_beams=4", "```bash\nrag-jax evaluate",
        "| Exact match | 50.0 |", "**wrong\\|one**, wrong (wanted: Velor)",
        "| 1 (gold) | 0.750 | 0.125 | **Velor** The",
    ):  # fmt: skip
        assert part in page, part
    assert page.count(", right (wanted: Velor)") == 3  # some answers are right and some wrong
    assert "Seed" not in page
    assert compare.read(tmp_path).rows.keys() == {row["id"] for row in rows}


def test_a_long_answer_is_shown_beside_its_target(tmp_path):
    rows = [pages.row(0, answers=[], target="a long text", prediction="a text")]
    write_report.write(tmp_path, found(tmp_path, rows))
    assert "**a text** (wanted: a long text)" in (tmp_path / "report.md").read_text(encoding="utf-8")


FILES = ["predictions.jsonl", "report.html", "report.md", "report.json"]


@pytest.mark.parametrize("dies", FILES)
@pytest.mark.parametrize("step", ["replace", "rename"])  # while they are written, and while they go to their places
def test_killed_while_writing_nothing_is_half_written_or_of_two_evaluations(tmp_path, monkeypatch, dies, step):
    write_report.write(tmp_path, found(tmp_path, [pages.row(0), pages.row(1)], exact_match=0.25))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    whole = getattr(type(tmp_path), step)

    def dying(path, target):
        if target.name == dies:
            raise KeyboardInterrupt
        return whole(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), step, dying)
        with pytest.raises(KeyboardInterrupt):
            write_report.write(tmp_path, found(tmp_path, [pages.row(2)]))
    if step == "replace":
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    else:
        assert not (tmp_path / "report.json").exists()
        with pytest.raises(InputError, match="not an evaluation"):
            compare.read(tmp_path)
    write_report.write(tmp_path, found(tmp_path, [pages.row(2)]))
    assert [json.loads(line)["id"] for line in (tmp_path / "predictions.jsonl").read_text().splitlines()] == ["q2"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "predictions.jsonl",
        "report.json",
        "report.md",
        "report.html",
    }
    assert "q0" not in (tmp_path / "report.html").read_text() and len(compare.read(tmp_path).rows) == 1


def test_training_curves_only_where_there_is_a_log(tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    out.mkdir()
    (out / "curves.png").write_bytes(b"of another run")
    assert write_report.training(run, out) == [] and not list(out.iterdir())
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    (picture,) = write_report.training(run, out)
    assert (out / picture.file).stat().st_size > 5_000
