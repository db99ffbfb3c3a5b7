"""How fast questions and passages become batches, and which share of a training step waits for them.

    python scripts/pipeline_speed.py --out runs/pipeline_speed [--entities 10000] [--only NAME ...]
    python scripts/pipeline_speed.py --out DIR --corpus CORPUS --train FILE --passages FILE     # data of your own
    python scripts/pipeline_speed.py --out DIR --config configs/squad.py --stage read --only step

Without data, a world of --entities entities is made in OUT, with a corpus whose tokenizers are trained on it. Parts:

start     reading and tokenising the questions of a run, and the same from the cache that the run keeps; each in a
          process of its own, whose peak memory is printed
passages  a corpus rebuilt from its passages with the same tokenizers, and the two tokenizers alone
batches   batches of --batch questions, assembled in this thread: in one shape, in buckets of question lengths, and
          mixed from two inputs; beside them, where torch is installed, its DataLoader over the same questions with a
          collate function that tokenises and pads to the longest. The kinds take turns, round by round
step      `rag-jax bench train` of the stages of --config
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

QUESTION, TARGET = 64, 32  # tokens
PARTS = ("start", "passages", "batches", "step")


def rag_jax(*words: object) -> str:
    """Runs a command of rag-jax; returns its standard output."""
    command = [sys.executable, "-m", "rag_jax", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def prepare(args: argparse.Namespace) -> None:
    """Makes a world and its corpus where --corpus names none, and sets the arguments to them."""
    if args.corpus is None:
        world, args.corpus = args.out / f"world-{args.entities}", args.out / f"corpus-{args.entities}"
        args.train, args.passages = world / "train.jsonl", world / "passages.jsonl"
        if not args.corpus.exists():
            rag_jax("world", "--out", world, "--entities", args.entities)
            rag_jax("corpus", args.passages, "--out", args.corpus, "--train-tokenizer")


def config(args: argparse.Namespace, train: str = "") -> Any:
    """The configuration of a run over the questions; train: another input than --train."""
    from rag_jax.rag import RagConfig
    from rag_jax.training.config import TrainConfig, make_stage

    model = RagConfig(question_length=QUESTION)
    stage = make_stage("joint", batch=args.batch)
    return TrainConfig(
        corpus=str(args.corpus),
        train=train or str(args.train),
        dev="",
        stages=(stage,),
        model=model,
        target_length=TARGET,
    )


def peak_mb() -> float:
    """Peak resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def start(args: argparse.Namespace) -> dict[str, float]:
    """Measures the time until there are batches, and caches the tokenised questions for the next call.

    It needs a process of its own, for its peak memory.
    """
    from rag_jax.corpus.directory import Corpus
    from rag_jax.training import setup

    cfg, corpus, run = config(args), Corpus.open(args.corpus), args.out / "run"
    corpus.encoder_tokenizer, corpus.generator_tokenizer  # noqa: B018  # not part of what is measured
    before, begun, worked = peak_mb(), time.perf_counter(), time.process_time()
    data = setup.prepare(cfg, corpus, run)
    setup.batches(cfg.stages[0], cfg, data, 0)[0]
    seconds, work, peak = time.perf_counter() - begun, time.process_time() - worked, peak_mb()
    setup.keep(run, data)
    size = sum(path.stat().st_size for path in run.rglob("*.npy"))
    return {
        "questions": len(data.examples), "seconds": seconds, "work": work, "peak_mb": peak, "before_mb": before,
        "kept_mb": size / 2**20,
    }  # fmt: skip


def starts(args: argparse.Namespace) -> list[str]:
    shutil.rmtree(args.out / "run", ignore_errors=True)
    said = [word for name in ("corpus", "train", "out") for word in (f"--{name}", str(getattr(args, name)))]
    lines = ["start                        seconds   of processors   questions/s   peak memory (before)   on disk"]
    for name in ("questions read, tokenised", "from what the run keeps"):
        command = [sys.executable, __file__, *said, "--only", "measured-start"]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        rate = found["questions"] / found["seconds"]
        memory = f"{found['peak_mb']:,.0f} ({found['before_mb']:,.0f}) MB"
        times = f"{found['seconds']:>8.2f} {found['work']:>15.2f} {rate:>13,.0f}"
        lines.append(f"{name:<27} {times} {memory:>22} {found['kept_mb']:>6.0f} MB")
    return lines


def passages(args: argparse.Namespace) -> list[str]:
    from rag_jax.corpus.build import build
    from rag_jax.corpus.directory import Corpus
    from rag_jax.data.joining import passage_text

    corpus = Corpus.open(args.corpus)
    begun = time.perf_counter()
    build([args.passages], args.out / "again", tokenizers_from=args.corpus, overwrite=True)
    seconds = time.perf_counter() - begun
    some = [corpus[row] for row in range(min(len(corpus), 20_000))]
    begun = time.perf_counter()
    for first in range(0, len(some), 4096):
        texts = [passage_text(passage.title, passage.text) for passage in some[first : first + 4096]]
        for tokenizer in (corpus.encoder_tokenizer, corpus.generator_tokenizer):
            tokenizer.encode_batch(texts)
    alone = time.perf_counter() - begun
    return [
        "passages                     seconds    passages/s",
        f"read, tokenised, written    {seconds:>8.2f} {len(corpus) / seconds:>13,.0f}",
        f"two tokenizers alone        {alone:>8.2f} {len(some) / alone:>13,.0f}   (the first {len(some):,})",
    ]


def ours(args: argparse.Namespace) -> dict[str, Callable[[int], None]]:
    """Our ways to make batches by name: call(i) makes --batches batches, beginning with number i * --batches."""
    from rag_jax.corpus.directory import Corpus
    from rag_jax.data import batching
    from rag_jax.training import setup

    corpus = Corpus.open(args.corpus)
    data = setup.prepare(config(args), corpus)
    two = setup.prepare(config(args, f"3*{args.train} + 1*{args.dev or args.train.with_name('dev.jsonl')}"), corpus)
    lengths = np.maximum(data.examples.question.lengths(), data.examples.tail.lengths())
    widths = tuple(sorted({int(x) for x in np.quantile(lengths, (0.4, 0.8))} - {QUESTION}))

    def of(found: setup.Data, **changes: Any) -> Callable[[int], None]:
        units = batching.units_of(found.examples, np.arange(len(found.examples.label)), False)
        weights = tuple(found.weights.values())
        wanted = batching.BatchOptions(args.batch, 0, (QUESTION, TARGET), weights=weights, **changes)
        batches = batching.question_batches(found.examples, units, corpus, wanted)

        def make(i: int) -> None:
            for step in range(i * args.batches, (i + 1) * args.batches):
                batches[step]

        return make

    return {
        "one shape": of(data),
        f"buckets of {', '.join(map(str, widths))}, {QUESTION}": of(data, question_widths=widths),
        "two inputs mixed": of(two),
    }


def rivals(args: argparse.Namespace) -> dict[str, Callable[[int], None]]:
    """Torch's ways to make batches by name: call(i) takes the next --batches batches from a DataLoader."""
    try:
        from torch import from_numpy
        from torch.utils.data import DataLoader
    except ImportError:
        return {}
    from rag_jax.corpus.directory import Corpus
    from rag_jax.data.joining import join_tail
    from rag_jax.data.readers import formats
    from rag_jax.data.tokenizers import pad_rows, wrap

    corpus = Corpus.open(args.corpus)
    encoder, generator = corpus.encoder_tokenizer, corpus.generator_tokenizer
    pairs = [(q.question, q.answers[0]) for q in formats.read_questions(args.train) if q.answers]

    def collate(some: list[tuple[str, str]]) -> dict[str, Any]:
        texts, answers = [pair[0] for pair in some], [" " + pair[1] for pair in some]
        labels = [generator.label(ids, TARGET) for ids in generator.encode_batch(answers)]
        batch = {}
        for name, rows, pad_id in (
            ("question", wrap(encoder, encoder.encode_batch(texts), QUESTION), encoder.pad_id),
            ("tail", join_tail(generator, texts), generator.pad_id),
            ("label", labels, generator.pad_id),
        ):
            ids, lengths = pad_rows(rows, max(map(len, rows)), pad_id)
            batch |= {f"{name}_ids": from_numpy(ids), f"{name}_length": from_numpy(lengths)}
        return batch

    def of(workers: int) -> Callable[[int], None]:
        # forked workers: the tokenizers notice a fork and use one thread in each
        how: dict[str, Any] = {"multiprocessing_context": "fork", "persistent_workers": True} if workers else {}
        loader: Any = DataLoader(pairs, args.batch, True, collate_fn=collate, num_workers=workers, **how)  # type: ignore[arg-type]

        def endless() -> Iterator[Any]:
            while True:
                yield from loader

        batches = endless()

        def make(i: int) -> None:
            for _ in range(args.batches):
                next(batches)

        return make

    return {"torch, tokenising in its collate": of(0), "the same, 2 worker processes": of(2)}


def assembled(args: argparse.Namespace) -> list[str]:
    calls = {**ours(args), **rivals(args)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(args.rounds + 1):
        for name, call in calls.items():
            begun = time.perf_counter()
            call(i)
            times[name] += [time.perf_counter() - begun] if i else []
    first = statistics.median(next(iter(times.values())))
    lines = [f"batches of {args.batch:<4}                      batches/s   questions/s   ms a batch     times as long"]
    for name, seconds in times.items():
        median = statistics.median(seconds)
        rate = args.batches / median
        spread = f"{1000 * median / args.batches:.2f} ({1000 * min(seconds) / args.batches:.2f})"
        lines.append(f"{name:<36} {rate:>10,.0f} {rate * args.batch:>13,.0f} {spread:>14} {median / first:>14.1f}")
    return lines


def step(args: argparse.Namespace) -> list[str]:
    if not args.config:
        return ["step                         (needs --config)"]
    stages = [word for name in args.stage for word in ("--stage", name)]
    sets = [word for one in args.set for word in ("--set", one)]
    found = json.loads(rag_jax("bench", "train", "--config", args.config, *stages, *sets, "--json"))
    lines = ["step                         ms a step   waited for its batch   its batch alone, of a step"]
    for row in found["stages"]:
        waits, works = row["host_share"], row["host_work_share"]
        lines.append(f"{row['stage']:<27} {row['step']['median_ms']:>10.1f} {waits:>22.2%} {works:>28.2%}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for what is made; remove it afterwards")
    parser.add_argument("--entities", type=int, default=10_000, help="of the world that is made")
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--train", type=Path, help="questions, with --corpus")
    parser.add_argument("--dev", type=Path, help="more questions, to be mixed in (default: dev.jsonl beside --train)")
    parser.add_argument("--passages", type=Path, help="what the corpus was built from, for that part")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=50, help="in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--config", help="of the part `step`")
    parser.add_argument("--stage", action="append", default=[])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--only", nargs="+", choices=[*PARTS, "measured-start"], default=PARTS)
    args = parser.parse_args()
    if "measured-start" in args.only:
        print(json.dumps(start(args)))
        return
    if args.only != ["step"]:
        prepare(args)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for name, part in zip(PARTS, (starts, passages, assembled, step), strict=True):
        if name in args.only:
            print("\n" + "\n".join(part(args)), flush=True)


if __name__ == "__main__":
    main()
