"""scripts/baselines.py: the runs that a table needs, where each of them starts, and the table itself."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import baselines  # noqa: E402

from rag_jax.training import config  # noqa: E402


def planned(name: str) -> dict[str, config.TrainConfig]:
    return baselines.trainings(config.load(f"{ROOT}/configs/tasks.py:{name}"), Path("out"))


@pytest.mark.parametrize("name", ["squad", "squad_qg", "climate_fever"])
def test_every_run_is_whole_and_begins_with_one_before_it(name: str) -> None:
    runs, known = planned(name), {"start"}
    for run, cfg in runs.items():
        config.check(cfg)
        assert Path(cfg.init).parent == Path("out") and Path(cfg.init).name in known
        known.add(run)
    assert {row.run for row in baselines.ROWS.values()} <= known
    groups = {run: set(cfg.stages[-1].optimizer.groups) for run, cfg in runs.items()}
    for run in ("closed_book", "bm25", "frozen"):
        assert groups[run] == {"generator"} and runs[run].init == runs["frozen"].init
    assert groups["sequence"] == groups["token"] == {"question_encoder", "generator"}
    assert (runs["token"].model.variant, runs["sequence"].model.variant) == ("token", "sequence")
    assert runs["bm25"].search.kind == "bm25" and runs["frozen"].search.kind == "exact"
    assert runs["closed_book"].stages[-1].objective.documents == "none"
    assert len({runs[run].stages[-1].steps for run in ("closed_book", "bm25", "frozen", "sequence", "token")}) == 1


def test_a_ranking_has_no_generator() -> None:
    runs = planned("ir_cacm")
    config.check(runs["learned"])
    assert list(runs) == ["learned"] and runs["learned"].stages[0].objective.kind == "inverse_cloze"


def test_a_smaller_budget_is_fewer_steps() -> None:
    stage = config.load(f"{ROOT}/configs/tasks.py:squad").stages[1]
    assert baselines.scaled(stage, 0.5).steps == 750 and baselines.scaled(stage, 1.0) == stage
    assert baselines.scaled(stage, 0.001).steps == 51  # the warm-up, and one


def test_the_table() -> None:
    frozen = {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}}
    other = {"accuracy": {"value": 0.75, "low": 0.7, "high": 0.8, "p": 0.012, "difference": 0.25}}
    result = {
        "task": "x", "questions": "x/dev", "n": 4, "metrics": ("accuracy", "f1"), "steps": {"read": 3}, "seconds": 90,
        "majority": 0.25,
        "rows": {
            "frozen": {"title": "frozen retriever", "figures": frozen, "commonest": ("yes", 1.0)},
            "token": {"title": "learned", "figures": other, "commonest": ("", 0.5)},
        },
    }  # fmt: skip
    lines = baselines.table(result).splitlines()
    assert lines[:4] == [
        "| x | accuracy | commonest answer |",
        "|---|---|---|",
        "| frozen retriever | 50.0 (40.0 to 60.0) | 'yes' 100% |",
        "| learned | 75.0 (70.0 to 80.0), p=0.012 |  |",
    ]
    assert "accuracy 25.0" in lines[-1] and "read 3; 2 minutes" in lines[-2]


def test_what_is_said_most_often_and_the_commonest_label(tmp_path: Path) -> None:
    rows = [{"prediction": text} for text in ("no", "yes", "no", "maybe")]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert baselines.commonest(tmp_path) == ("no", 0.5)
    for name, labels in (("train", "aab"), ("dev", "abbb")):
        lines = [{"id": str(i), "question": "q", "answers": [label]} for i, label in enumerate(labels)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [f"{name}={tmp_path / name}.jsonl" for name in ("train", "dev")]
    assert baselines.majority(config.load(f"{ROOT}/configs/tasks.py:pubmedqa", words)) == 0.25
    assert baselines.majority(config.load(f"{ROOT}/configs/tasks.py:squad", words)) is None
