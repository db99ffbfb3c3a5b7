"""The end of the quickstart: prints a few test questions, or writes report.json and report.md from its three
evaluations.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rag_jax.corpus.directory import Corpus
from rag_jax.evaluation.report import markdown, write_report
from rag_jax.system import logs
from rag_jax.training import config as train_config


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def questions(run: Path, count: int) -> list[str]:
    """The first test question of each of `count` relations."""
    rows = [json.loads(line) for line in (run / "data/world/test.jsonl").read_text().splitlines()]
    by_relation = {row["relation"]: row["question"] for row in reversed(rows)}
    return list(by_relation.values())[:count]


def examples(run: Path, count: int) -> list[dict[str, Any]]:
    """The first predictions, with the texts of the passages that were read."""
    corpus = Corpus.open(read(run / "unseen/report.json")["corpus"])
    lines = (run / "unseen/predictions.jsonl").read_text().splitlines()[:count]
    return [write_report.example(corpus, json.loads(line)) for line in lines]


def stages(run: Path) -> list[dict[str, Any]]:
    """Name, steps and training seconds of every stage, from the run's metrics."""
    trained, rows = train_config.read_run(run), logs.read_rows(run / logs.METRICS_FILE)
    found, start = [], 0
    for stage in trained.stages:
        mine = [row for row in rows if row["stage"] == stage.name]
        steps = [row["step"] for row in mine]
        counts = [b - a for a, b in zip([start, *steps], steps, strict=False)]
        seconds = sum(count * row["step_seconds"] for count, row in zip(counts, mine, strict=True))
        found.append({"name": stage.name, "steps": stage.steps, "seconds": round(seconds, 1)})
        start += stage.steps
    return found


def write(run: Path, seconds: float) -> dict[str, Any]:
    unseen, closed, swapped = (read(run / name / "report.json") for name in ("unseen", "closed_book", "hot_swap"))
    merged = {
        "title": "rag_jax quickstart",
        "config": "configs/world.py",
        "seed": train_config.read_run(run).seed,
        "exact_match_unseen": unseen["exact_match"],
        "exact_match_unseen_low": unseen["exact_match_low"],
        "exact_match_unseen_high": unseen["exact_match_high"],
        **{name: value for name, value in unseen.items() if name.startswith(("recall", "answer_recall", "f1", "n"))},
        "closed_book_exact_match": closed["exact_match"],
        "hot_swap_exact_match": swapped["exact_match"],
        "hot_swap_n": swapped["n"],
        "seconds": seconds,
        "stages": stages(run),
        "commands": ["scripts/quickstart.sh"],
    }
    write_report.write_json(run / "report.json", merged)
    markdown.write(run, merged, examples(run, 5), write_report.training(run, run))
    return merged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("questions", "write"))
    parser.add_argument("run", type=Path)
    parser.add_argument("--seconds", type=float, default=0.0)
    args = parser.parse_args()
    if args.what == "questions":
        print("\n".join(questions(args.run, 3)))
        return
    merged = write(args.run, args.seconds)
    for name in ("exact_match_unseen", "recall_at_1", "closed_book_exact_match", "hot_swap_exact_match", "seconds"):
        print(f"{name:<26} {merged[name]:g}")


if __name__ == "__main__":
    main()
