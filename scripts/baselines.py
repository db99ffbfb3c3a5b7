"""The table of baselines of a task: the generator without passages, with BM25, with a frozen and with a learned
retriever (RAG-Sequence and RAG-Token), and with the gold passage given.

    pip install -e '.[bm25,metrics]'
    python scripts/baselines.py shared/data pubmedqa climate_fever --out runs/tables

DATA/SET holds the data sets that configs/tasks.py names. OUT/TASK gets the corpus, the runs, an evaluation of each, and
table.md and table.json: 95% intervals, and p values of a paired comparison with the frozen retriever. When it was
killed, start it again: it resumes. --budget 0.1 takes a tenth of the steps.

    start         the model before any training; its retriever is the frozen one
    reader        start, then the stages of reading: the generators of all rows start from here
    closed_book   reader, then the steps of the joint stage without passages
    bm25, frozen  reader, then the joint stage for the generator alone, on the results of BM25 or the frozen retriever
    retriever     reader, then the stages that train the retriever on gold passages
    sequence      retriever, then the joint stage; the row `oracle` gives it the gold passage (n_docs=1)
    token         as sequence, with RAG-Token

A task without a generator has three rows: BM25, the frozen retriever, and the retriever after all stages.
"""

import argparse
import collections
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rag_jax import __main__ as cli
from rag_jax.corpus.directory import Corpus
from rag_jax.data.readers import formats
from rag_jax.evaluation import compare, evaluate
from rag_jax.runs import checkpoint
from rag_jax.runs import config as run_config
from rag_jax.runs import directory as runs
from rag_jax.system import logs, malloc, sharding
from rag_jax.training import config, session, train
from rag_jax.training.config import StageConfig, TrainConfig

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FROZEN = "frozen"


class Row(NamedTuple):
    """A row of the table.

    title: shown in the table.
    run: the run that is evaluated.
    answering: fields of AnswerConfig.
    search: kind of search, "" for the run's own.
    """

    title: str
    run: str
    answering: dict[str, Any]
    search: str = ""


ROWS = {
    "closed_book": Row("closed book", "closed_book", {"closed_book": True}),
    "bm25": Row("BM25 + generator", "bm25", {}),
    FROZEN: Row("frozen retriever", "frozen", {}),
    "sequence": Row("learned retriever, RAG-Sequence", "sequence", {}),
    "token": Row("learned retriever, RAG-Token", "token", {}),
    "oracle": Row("right passage given, RAG-Sequence", "sequence", {"oracle": True, "n_docs": 1}),
}
RANKINGS = {
    "bm25": Row("BM25", "start", {}, "bm25"),
    FROZEN: Row("frozen retriever", "start", {}),
    "learned": Row("learned retriever", "learned", {}),
}


def scaled(stage: StageConfig, budget: float) -> StageConfig:
    """The stage with this share of its steps, but more than its warm-up."""
    return replace(stage, steps=max(stage.optimizer.warmup_steps + 1, round(budget * stage.steps)))


def generator_alone(stage: StageConfig, **changes: Any) -> StageConfig:
    """The stage with only the generator trained, and no index refresh; changes: further fields."""
    rate = stage.optimizer.groups["generator"]
    return stage.changed(refresh="", optimizer=replace(stage.optimizer, groups={"generator": rate}), **changes)


def trainings(cfg: TrainConfig, out: Path) -> dict[str, TrainConfig]:
    """Name of each run -> its configuration, in order: a run starts from the parameters of an earlier one."""
    if cfg.model.generator is None:
        return {"learned": replace(cfg, init=str(out / "start"), index=str(out / "start/index"))}
    *earlier, joint = cfg.stages
    reading = tuple(stage for stage in earlier if stage.objective.groups == {"generator"})
    finding = tuple(stage for stage in earlier if "generator" not in stage.objective.groups)
    reader = "reader" if reading else "start"
    retriever = "retriever" if finding else reader

    def made(init: str, stages: Sequence[StageConfig], **changes: Any) -> TrainConfig:
        return replace(cfg, init=str(out / init), index=str(out / init / "index"), stages=tuple(stages), **changes)

    alone, token = generator_alone(joint), replace(cfg.model, variant="token")
    return {
        **({"reader": made("start", reading)} if reading else {}),
        "closed_book": made(reader, [generator_alone(joint, documents="none", n_docs=0)]),
        "bm25": made(reader, [alone], search=replace(cfg.search, kind="bm25")),
        "frozen": made(reader, [alone]),
        **({"retriever": made(reader, finding)} if finding else {}),
        "sequence": made(retriever, [joint]),
        "token": made(retriever, [joint], model=token),
    }


def build_corpus(data: Path, passages: Sequence[str], tokens: int, out: Path) -> None:
    files = [str(file) for name in passages for file in sorted((data / name).glob("passages*.jsonl"))]
    sizes = ["--encoder-vocab", "8192", "--generator-vocab", "8192"]
    lengths = ["--encoder-length", str(tokens), "--generator-length", str(tokens), "--passage-words", "0"]
    if cli.main(["corpus", *files, "--out", str(out), "--train-tokenizer", *sizes, *lengths]):
        raise SystemExit(f"{out}: the corpus was not built")


def start(cfg: TrainConfig, out: Path) -> None:
    """Writes a run directory with the initial parameters and their index."""
    if (out / "index").is_dir():
        return
    corpus, mesh = Corpus.open(cfg.corpus), sharding.make_mesh()
    loaded = runs.load(cfg.model, corpus, mesh)
    params = session.init_params(loaded, cfg.seed, "")
    out.mkdir(parents=True, exist_ok=True)
    (out / runs.IDENTITY).write_text(json.dumps(runs.identity(corpus), indent=2) + "\n")
    shutil.copytree(corpus.directory / "tokenizers", out / "tokenizers", dirs_exist_ok=True)
    run_config.save(cfg, out / "config.json")
    checkpoint.save_params(out / "params", params.items())
    runs.write_index(loaded, params, 0, out / "index")


def answered(cfg: TrainConfig, row: Row, run: Path, out: Path, limit: int) -> dict[str, Any]:
    """The evaluation report of a row, from an earlier start where there is one."""
    if not (out / "report.json").is_file():
        search = replace(cfg.search, kind=row.search) if row.search else None
        wanted = evaluate.EvaluateOptions(
            configure=lambda how: replace(how, **row.answering), search=search, shown=0, limit=limit
        )
        evaluate.evaluate(run, out, wanted)
    return json.loads((out / "report.json").read_text())


def commonest(out: Path) -> tuple[str, float]:
    """The most frequent prediction and its share, which expose a reader that always gives one answer."""
    lines = (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    said = [json.loads(line)["prediction"] for line in lines]
    text, count = collections.Counter(said).most_common(1)[0]
    return text or "", count / len(said)


def majority(cfg: TrainConfig, limit: int = 0) -> float | None:
    """Accuracy of always predicting the most frequent training label; None where a task has no labels."""
    if not cfg.answering.get("allowed_answers"):
        return None
    label = collections.Counter(question.answers[0] for question in formats.read_questions(cfg.train)).most_common(1)
    asked = formats.read_questions(cfg.dev)[: limit or None]
    return sum(question.answers[0] == label[0][0] for question in asked) / len(asked)


def cell(figure: dict[str, float] | None) -> str:
    """A figure in percent, with its interval, and its p value where there is one."""
    if figure is None:
        return ""
    text = "{:.1f} ({:.1f} to {:.1f})".format(*(100 * figure[name] for name in ("value", "low", "high")))
    return f"{text}, p={figure['p']:.3f}" if "p" in figure else text


def table(result: dict[str, Any]) -> str:
    """The table of a task in Markdown."""
    names = [name for name in result["metrics"] if any(name in row["figures"] for row in result["rows"].values())]
    lines = [f"| {result['task']} | {' | '.join(names)} | commonest answer |", "|---" * (len(names) + 2) + "|"]
    for row in result["rows"].values():
        text, share = row["commonest"]
        said = f"{text[:24]!r} {100 * share:.0f}%" if text else ""
        lines.append("| " + " | ".join([row["title"], *(cell(row["figures"].get(n)) for n in names), said]) + " |")
    steps = ", ".join(f"{name} {n}" for name, n in result["steps"].items())
    about = "percent, 95% intervals, p beside the frozen retriever (paired bootstrap)"
    lines += ["", f"{result['n']} questions of {result['questions']}; {about}."]
    lines.append(f"Steps: {steps}; {result['seconds'] / 60:.0f} minutes of training.")
    if result["majority"] is not None:
        lines.append(f"Always the commonest label: accuracy {100 * result['majority']:.1f}.")
    return "\n".join(lines)


def one(data: Path, name: str, out: Path, budget: float, limit: int) -> dict[str, Any]:
    """Trains and evaluates everything for one task, and writes its table.

    budget: share of the steps of the configuration. limit: number of questions evaluated, 0 for all.
    """
    sys.path.insert(0, str(CONFIGS))
    from tasks import TASKS

    task, here = TASKS[name], out / name
    paths = {"corpus": here / "corpus", "dev": data / f"{task.dev}.jsonl", "train": data / f"{task.train}.jsonl"}
    cfg = config.load(f"{CONFIGS / 'tasks.py'}:{name}")
    paths = {key: str(path) for key, path in paths.items() if getattr(cfg, key)}
    cfg = replace(cfg, **paths, stages=tuple(scaled(stage, budget) for stage in cfg.stages))
    if not (here / "corpus").is_dir():
        build_corpus(data, task.passages, task.tokens, here / "corpus")
    start(cfg, here / "start")
    steps, seconds = {}, 0.0
    for run, settings in trainings(cfg, here).items():
        logs.info(f"{name}: {run}")
        steps[run] = sum(stage.steps for stage in settings.stages)
        seconds += train.train(settings, here / run)["training_seconds"]
    rows, reports = RANKINGS if cfg.model.generator is None else ROWS, {}
    for key, row in rows.items():
        logs.info(f"{name}: {row.title}")
        reports[key] = answered(cfg, row, here / row.run, here / "answers" / key, limit)
    figures = {}
    for key in rows:
        directories = [here / "answers" / FROZEN, here / "answers" / key]
        values = compare.compare(directories)["figures"].items()
        figures[key] = {metric: cells[0 if key == FROZEN else 1] for metric, cells in values}
    result = {
        "task": name,
        "questions": task.dev,
        "n": reports[FROZEN]["n"],
        "metrics": task.metrics,
        "steps": steps,
        "seconds": seconds,
        "majority": majority(cfg, limit),
        "rows": {
            key: {"title": row.title, "figures": figures[key], "commonest": commonest(here / "answers" / key)}
            for key, row in rows.items()
        },
    }
    (here / "table.json").write_text(json.dumps(result, indent=2) + "\n")
    (here / "table.md").write_text(table(result) + "\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the data sets")
    parser.add_argument("tasks", nargs="+", help="names of configs/tasks.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=1.0, help="share of the steps of the configuration")
    parser.add_argument("--limit", type=int, default=0, help="only so many of the questions, the first ones; 0: all")
    args = parser.parse_args()
    for name in args.tasks:
        print(table(one(args.data, name, args.out, args.budget, args.limit)), flush=True)


if __name__ == "__main__":
    malloc.keep(os.environ)  # as the commands do
    main()
