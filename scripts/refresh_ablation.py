"""How stale may the index be? A small version of REALM's ablation (Guu et al. 2020, table 2: a 30 times staler index).

    python scripts/refresh_ablation.py --reader runs/quickstart --out runs/refresh_ablation

As in retrieval_gradient.py, the generator of a trained run is held fixed and a weak retriever learns through the
marginal likelihood alone. The index is rebuilt every INTERVAL steps, every 3, 10 and 30 times INTERVAL, or never after
the start; or it is refreshed in a rolling way, a part of the passages in every step, with as many embeddings computed
in all. Everything else is equal. Prints recall@1 and exact match on the test questions, writes OUT/report.json and
OUT/refresh.png. When it was killed, start it again: it resumes.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from retrieval_gradient import recall_at_1, with_reader

from rag_jax.evaluation import evaluate
from rag_jax.system import logs
from rag_jax.training import config as train_config
from rag_jax.training import train
from rag_jax.training.config import make_stage
from rag_jax.training.optimizer import OptimizerConfig

TIMES = (1, 3, 10, 30)


def schedules(interval: int) -> dict[str, str]:
    """Name of each run -> its setting `refresh`."""
    synchronous = {f"every {times * interval}": str(times * interval) for times in TIMES}
    rolling = {f"rolling {times * interval}": f"rolling:{times * interval}" for times in TIMES}
    return {**synchronous, "never": "", **rolling}


def measured(run: Path, questions: Path, limit: int) -> dict[str, Any]:
    """Figures of a finished run: on the test questions with a fresh index, and means over its training log."""
    report = evaluate.evaluate(run, run / "test", evaluate.EvaluateOptions(questions, limit=limit))
    rows = logs.read_rows(run / logs.METRICS_FILE)
    found = {name: float(np.mean([row[name] for row in rows])) for name in ("row_age", "score_gap", "recall_at_1")}
    return {
        "recall_at_1": recall_at_1(run, questions),
        "exact_match": report["exact_match"],
        "exact_match_interval": [report["exact_match_low"], report["exact_match_high"]],
        "in_training": found,
        "questions": report["n"],
    }


def plot(results: dict[str, Any], interval: int, before: float, out: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    steps = [times * interval for times in TIMES]
    for axis, name, title in (
        (axes[0], "recall_at_1", "recall@1, test questions"),
        (axes[1], "exact_match", "exact match, test questions"),
    ):
        for kind, marker in (("every", "o"), ("rolling", "s")):
            axis.plot(steps, [results[f"{kind} {n}"][name] for n in steps], marker=marker, label=f"{kind} n steps")
        axis.axhline(results["never"][name], color="grey", linestyle="--", label="never")
        axis.set(xscale="log", xlabel="steps n in which every passage is embedded once", title=title)
        axis.set_xticks(steps, [str(n) for n in steps])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].axhline(before, color="grey", linestyle=":", label="before training")
    axes[0].legend()
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", type=Path, required=True, help="run of configs/world.py whose generator can read")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--interval", type=int, default=8)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--weak-steps", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--limit", type=int, default=0, help="only the first test questions, for exact match")
    args = parser.parse_args()

    base = dataclasses.replace(train_config.read_run(args.reader), evaluate_every=0, checkpoint_every=100, log_every=25)
    questions = Path(base.train).with_name("test.jsonl")
    adam = OptimizerConfig(learning_rate=args.learning_rate, b2=0.98, warmup_steps=5, groups={"question_encoder": 1.0})
    weak = make_stage("weak", objective="contrastive", steps=args.weak_steps, batch=32, optimizer=adam)
    train.train(dataclasses.replace(base, stages=(weak,)), args.out / "weak")
    with_reader(base, args.reader, args.out / "weak", args.out / "start")
    before = recall_at_1(args.out / "weak", questions)
    results: dict[str, Any] = {}
    for name, refresh in schedules(args.interval).items():
        stage = make_stage("joint", steps=args.steps, batch=12, n_docs=4, refresh=refresh, optimizer=adam)
        run = args.out / name.replace(" ", "_")
        train.train(dataclasses.replace(base, stages=(stage,), init=str(args.out / "start")), run)
        results[name] = measured(run, questions, args.limit)
        r = results[name]
        line = f"recall@1 {before:.3f} -> {r['recall_at_1']:.3f}, exact match {r['exact_match']:.3f}"
        print(f"{name:<12} {line}, age of rows {r['in_training']['row_age']:.1f} steps", flush=True)
    report = {"before": before, **vars(args), "results": results}
    (args.out / "report.json").write_text(json.dumps(report, indent=2, default=str) + "\n")
    plot(results, args.interval, before, args.out / "refresh.png")


if __name__ == "__main__":
    main()
