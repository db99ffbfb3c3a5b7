"""Comparison of evaluations: differences and p values on the same questions, and which cannot be compared."""

import json
from pathlib import Path

import numpy as np
import pages
import pytest
import tiny

from rag_jax import metrics
from rag_jax.errors import InputError
from rag_jax.evaluation import compare

N = 200


def evaluation(directory: Path, right: np.ndarray, order: list[int] | None = None, **changes: object) -> Path:
    """Writes an evaluation with right and wrong answers as in `right`; changes: fields of the first question."""
    rows = []
    for i, one in enumerate(right):
        row = {"id": f"q{i}", "question": f"who {i}?", "answers": [f"name {i}"], "target": None, "label": None}
        row |= {"prediction": f"Name {i}" if one else "nobody", "score": -1.0, "unanswerable": False, "relevance": None}
        row |= {"gold": ["p0"], "gold_documents": [["p"]], "retrieved": ["p0" if one else "p1"]}
        rows.append(row | (changes if i == 0 else {}))
    directory.mkdir()
    rows = [rows[i] for i in order] if order else rows
    (directory / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "report.json").write_text(json.dumps({"labels": [], "match": "string", "n": len(rows)}))
    return directory


@pytest.fixture
def three(tmp_path: Path) -> tuple[list[Path], list[np.ndarray]]:
    """Evaluations A, a better B (questions in another order), and C, as good as A but on other questions."""
    draw = np.random.default_rng(0)
    a = np.arange(N) % 2 == 0
    b = a | (draw.random(N) < 0.25)
    c = draw.permutation(a)
    order = [int(i) for i in draw.permutation(N)]
    paths = [evaluation(tmp_path / "a", a), evaluation(tmp_path / "b", b, order), evaluation(tmp_path / "c", c)]
    return paths, [a, b, c]


def test_differences_of_the_same_questions(three: tuple[list[Path], list[np.ndarray]]) -> None:
    paths, right = three
    result = compare.compare(paths)
    assert result["runs"] == [str(path) for path in paths] and result["n"] == N
    assert set(result["figures"]) == {"exact_match", "f1", "recall_at_1", "r_precision"}
    for cells in (result["figures"]["exact_match"], result["figures"]["recall_at_1"]):
        assert [cell["value"] for cell in cells] == pytest.approx([one.mean() for one in right])
        assert "p" not in cells[0]
        for cell, other in zip(cells[1:], right[1:], strict=True):
            paired = other.astype(float) - right[0]
            assert cell["difference"] == pytest.approx(paired.mean())
            error = paired.std() / np.sqrt(N)  # paired by question: less than for two samples
            width = cell["difference_high"] - cell["difference_low"]
            assert width == pytest.approx(2 * 1.96 * error, rel=0.12)
        assert cells[1]["p"] < 0.002 and cells[2]["p"] > 0.05
        assert cells[1]["difference_low"] > 0 and cells[2]["difference_low"] < 0 < cells[2]["difference_high"]
    one, other = (compare.compare(paths, ["f1"], seed)["figures"]["f1"] for seed in (0, 1))
    assert one == result["figures"]["f1"] != other
    alike = compare.compare([paths[0], paths[0]])["figures"]["exact_match"][1]
    assert alike["difference"] == alike["difference_low"] == alike["difference_high"] == 0 and alike["p"] == 1


def test_values_and_intervals_are_those_of_evaluate(three: tuple[list[Path], list[np.ndarray]]) -> None:
    (path, other, _), _ = three
    rows = [json.loads(line) for line in (path / "predictions.jsonl").read_text().splitlines()]
    summary = metrics.summarize(rows, intervals=True)
    for name, (cell, _) in compare.compare([path, other])["figures"].items():
        assert (cell["value"], cell["low"], cell["high"]) == tuple(summary[name + end] for end in ("", "_low", "_high"))


def test_command(three: tuple[list[Path], list[np.ndarray]], capsys: pytest.CaptureFixture) -> None:
    (a, b, c), _ = three
    assert tiny.rag_jax("compare", a, b, c, "--metric", "exact_match", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed["figures"]) == ["exact_match"]
    assert tiny.rag_jax("compare", a, b, c, "--metric", "exact_match") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "text" not in printed and lines[0] == f"A  {a}" and "200 questions" in lines[3]
    assert lines[-2].split() == ["A", "B", "C", "B", "-", "A", "p", "C", "-", "A", "p"]
    better = printed["figures"]["exact_match"][1]
    assert f"{100 * better['difference']:+.1f} ({100 * better['difference_low']:+.1f} to" in lines[-1]
    assert lines[-1].startswith("exact_match  50.0 (")


def test_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    right = np.ones(6, bool)
    a = evaluation(tmp_path / "a", right)
    fewer = evaluation(tmp_path / "fewer", right[:4])
    asked = evaluation(tmp_path / "asked", right, question="who else?")
    gold = evaluation(tmp_path / "gold", right, gold=["p7"])
    cut = evaluation(tmp_path / "cut", right, level="document")
    judged = evaluation(tmp_path / "judged", right)
    (judged / "report.json").write_text('{"labels": ["yes"], "match": "string"}')
    old = evaluation(tmp_path / "old", right)
    (old / "report.json").write_text('{"n": 6}')
    broken = evaluation(tmp_path / "broken", right)
    with (broken / "predictions.jsonl").open("a") as file:
        file.write('{"id": "q9"}\n')
    silent = evaluation(tmp_path / "silent", right, prediction=None)
    for words, message in (
        ([a], "at least two evaluations"),
        ([a, fewer], "2 only in the first, 0 only in the second (q4, q5)"),
        ([fewer, a], "0 only in the first, 2 only in the second (q4, q5)"),
        ([a, asked], 'question q0 has another question, "who 0?" and "who else?"'),
        ([a, gold], 'question q0 has another gold, ["p0"] and ["p7"]'),
        ([a, cut], "the ranking of question q0 is judged by passage and by document"),
        ([a, judged], "judged otherwise"),
        ([a, old], "old: not an evaluation ('labels')"),
        ([a, tmp_path / "none"], "none: not an evaluation"),
        ([a, broken], "predictions.jsonl:7: not a prediction ('prediction')"),
        ([a, a, "--metric", "meteor"], "no metric 'meteor'"),
        ([a, silent, "--metric", "exact_match"], "no figure in common"),
    ):
        assert tiny.rag_jax("compare", *words) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(InputError, match="at least two"):
        compare.compare([])


def test_gold_passages_that_a_corpus_lacks_are_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = (evaluation(tmp_path / name, np.ones(6, bool)) for name in "ab")
    report = json.loads((b / "report.json").read_text())
    ids = {"named": 6, "missing": 2, "deleted": 0, "first_missing": ["p7", "p8"]}
    (b / "report.json").write_text(json.dumps({**report, "corpus": "data/other", "gold_ids": ids}))
    assert tiny.rag_jax("compare", a, b) == 0
    said = "2 of 6 gold ids are not in the corpus data/other ('p7', 'p8'); they count as not found"
    assert f"B: {said}" in capsys.readouterr().out.splitlines()
    assert compare.compare([a, b])["gold_ids"] == ["", said] and "gold_ids" not in compare.compare([a, a])


def test_pages_to_browse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """compare.html has all answers to a question side by side and the first run's passages; compare.md the table."""
    monkeypatch.setattr(compare.Corpus, "open", lambda directory: pages.Corpus())
    paths = []
    for name, answers in (("a|x", ["Velor", "no", "Velor"]), ("b", ["no", "Velor </script>", "Velor"])):
        rows = [pages.row(i, prediction=answer, score=-float(i)) for i, answer in enumerate(answers)]
        paths.append(tmp_path / name)
        paths[-1].mkdir()
        (paths[-1] / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (paths[-1] / "report.json").write_text(json.dumps({"labels": [], "match": "string", "corpus": "data/corpus"}))
    out = tmp_path / "out"
    assert tiny.rag_jax("compare", *paths, "--out", out, "--metric", "exact_match", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert {path.name for path in out.iterdir()} == {"compare.md", "compare.html"}
    page = (out / "compare.html").read_text().split('id="data">')[1].split("</script>")[0]
    found = json.loads(page)
    assert found["runs"] == [f"A: {paths[0]}", f"B: {paths[1]}"]
    assert [q["runs"] for q in found["questions"]] == [
        [["Velor", True, 0.0], ["no", False, 0.0]],
        [["no", False, -1.0], ["Velor </script>", False, -1.0]],
        [["Velor", True, -2.0], ["Velor", True, -2.0]],
    ]
    assert found["figures"] == compare.cells(result) and found["figures"][0] == ["", "A", "B", "B - A", "p"]
    lines = (out / "compare.md").read_text().splitlines()
    assert lines[0] == "# Comparison of runs" and "- A: " in lines[2] and "a\\|x" in lines[2]
    assert lines[-1].startswith("| exact\\_match | 66.7 (") and lines[-1].endswith(
        f"| {result['figures']['exact_match'][1]['p']:.3f} |"
    )
    rows = [{name: value for name, value in pages.row(0).items() if name != "read"}]
    (paths[0] / "predictions.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (paths[1] / "predictions.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert tiny.rag_jax("compare", *paths, "--out", out) == 2
    assert "do not say what was read; evaluate again" in capsys.readouterr().err
