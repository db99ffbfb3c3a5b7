"""Is an encode job that was killed and resumed equal to an uninterrupted one, byte for byte? Prints where it is not.

    python scripts/kill_encode.py --out runs/kill_encode

Embeds a corpus without interruption; then again, killed with SIGKILL at random moments (before and during compilation,
between shards, while a shard is written) and resumed each time; then with two processes; then with two of which one is
killed, after which a single process finishes the job. Compares the files, and checks that no finished shard was written
twice. Writes OUT/report.json; the exit status is 1 where anything differs. Takes some minutes.
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax

from rag_jax.corpus.directory import Corpus
from rag_jax.models.bert import BertConfig
from rag_jax.rag import Rag, RagConfig
from rag_jax.runs import checkpoint
from rag_jax.runs import directory as runs

SHARD_ROWS = 400


class Trial:
    """Starts the commands of one experiment in one directory; all share a cache of compiled programs."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.environment = {
            "JAX_PLATFORMS": "cpu",
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(out / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def start(self, *words: object) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "rag_jax", *map(str, words)]
        with (self.out / "log.txt").open("ab") as log:
            return subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)

    def encode(self, job: Path, *words: object) -> "subprocess.Popen[bytes]":
        corpus = self.out / "corpus"
        return self.start(
            "encode", self.out / "run", "--corpus", corpus, "--out", job, "--shard-rows", SHARD_ROWS, *words
        )

    def pair(self, job: Path) -> "list[subprocess.Popen[bytes]]":
        """Starts one job as two connected processes."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meet = ["--coordinator", f"127.0.0.1:{free.getsockname()[1]}", "--processes", 2]
        return [self.encode(job, *meet, "--process", i) for i in range(2)]

    def finish(self, *processes: "subprocess.Popen[bytes]") -> None:
        statuses = [process.wait() for process in processes]
        if any(statuses):
            sys.exit(f"the command failed; see {self.out / 'log.txt'}")

    def prepare(self, entities: int) -> None:
        """Makes a corpus, and a run with a randomly initialised encoder."""
        world = self.out / "world"
        self.finish(self.start("world", "--out", world, "--entities", entities, "--workers", 1))
        sizes = ["--train-tokenizer", "--encoder-vocab", 1000, "--generator-vocab", 1000]
        self.finish(self.start("corpus", world / "passages.jsonl", "--out", self.out / "corpus", *sizes))
        corpus, run = Corpus.open(self.out / "corpus"), self.out / "run"
        encoder = BertConfig(
            corpus.encoder_tokenizer.vocab_size, width=256, layers=1, heads=4, hidden=256, positions=160
        )
        model = RagConfig(encoder=encoder, generator=None, tie_encoders=True)
        run.mkdir()
        runs.write_empty_run(run, model, runs.identity(corpus))
        for role in ("encoder", "generator"):
            getattr(corpus, f"{role}_tokenizer").save(run / "tokenizers" / role)
        checkpoint.save_params(run / "params", nn.unbox(Rag(model).init(jax.random.key(0))).items())


def finished(job: Path) -> dict[str, int]:
    """Name -> inode of the finished shards; a shard that is written again has another inode."""
    return {path.name: path.stat().st_ino for path in job.glob("rows-*")}


def half(job: Path) -> int:
    """Bytes of unfinished shards."""
    sizes = 0
    for path in job.glob(".rows-*.building"):
        try:
            sizes += path.stat().st_size
        except FileNotFoundError:  # it was just finished
            continue
    return sizes


def kill_once(trial: Trial, job: Path, kind: str, rng: random.Random) -> dict[str, int]:
    """Starts the job and kills it at a moment of its kind; returns counts for the report.

    kind: "early" (after a random time up to 6 s), "shard" (after another shard is finished), "writing" (while a later
    shard is written).
    """
    before = finished(job)
    begun, process = time.monotonic(), trial.encode(job)
    early = rng.uniform(0.2, 6.0)

    def now() -> bool:
        if kind == "early":
            return time.monotonic() - begun > early
        if kind == "shard":
            return len(finished(job)) > len(before)
        return half(job) > 0 and len(finished(job)) > len(before)

    while process.poll() is None and not now():
        time.sleep(0.0001 if kind == "writing" else 0.005)
    time.sleep(rng.uniform(0, 0.5 if kind == "shard" else 0.004))
    missed = process.poll() is not None
    process.kill()
    process.wait()
    left, made = half(job), finished(job)
    said = "had ended by itself" if missed else f"killed after {time.monotonic() - begun:5.1f} s"
    print(f"  {kind:<7} {said}; {len(made)} shards, {left:,} bytes of another one", flush=True)
    return {
        "killed": int(not missed),
        "half_written": int(left > 0),
        "lost": sum(made.get(name) != inode for name, inode in before.items()),
        "made": len(made) - len(before),
    }


def same(a: Path, b: Path) -> bool:
    """Whether two jobs hold the same files with the same bytes."""
    contents = [{path.name: path.read_bytes() for path in job.iterdir()} for job in (a, b)]
    return contents[0] == contents[1]


def two_processes(trial: Trial, whole: Path, rng: random.Random) -> dict[str, bool]:
    """Runs the job with two processes; and with two of which one is killed, after which a single one finishes it."""
    both, one = trial.out / "both", trial.out / "one_of_two"
    print("two processes", flush=True)
    trial.finish(*trial.pair(both))
    print("two processes, one of them killed; then one alone", flush=True)
    pair = trial.pair(one)
    while len(finished(one)) < 4 and any(process.poll() is None for process in pair):
        time.sleep(0.005)
    victim = rng.randrange(2)
    pair[victim].kill()
    time.sleep(1)
    for process in pair:
        process.kill()
        process.wait()
    before = finished(one)
    trial.finish(trial.encode(one))
    kept = before.items() <= finished(one).items()
    return {"two_processes": same(whole, both), "one_of_two_killed": same(whole, one) and kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for everything; must not exist")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=None, help="of the moments (default: another each time)")
    args = parser.parse_args()
    if args.out.exists():
        sys.exit(f"{args.out} exists; remove it, or name another --out")
    args.out.mkdir(parents=True)
    seed = random.randrange(10**6) if args.seed is None else args.seed
    rng, begun, trial = random.Random(seed), time.monotonic(), Trial(args.out.absolute())
    trial.prepare(SHARD_ROWS * 2 * (args.kills + 5))
    whole, killed = trial.out / "uninterrupted", trial.out / "killed"
    print("uninterrupted job", flush=True)
    trial.finish(trial.encode(whole))
    print(f"the same, killed {args.kills} times (seed {seed})", flush=True)
    kinds = ["early", "writing", *rng.choices(("early", "shard", "writing", "writing"), k=args.kills)][: args.kills]
    seen = [kill_once(trial, killed, kind, rng) for kind in kinds]
    before = finished(killed)
    trial.finish(trial.encode(killed))
    kept = before.items() <= finished(killed).items() and not any(found["lost"] for found in seen)
    checks = {"killed": same(whole, killed), "no_shard_made_twice": kept, **two_processes(trial, whole, rng)}
    counts = {name: sum(found[name] for found in seen) for name in ("killed", "half_written")}
    report = {"seed": seed, "kills": counts["killed"], "left_half_written": counts["half_written"]}
    report |= {"shards": len(finished(whole)), "checks": checks, "seconds": round(time.monotonic() - begun, 1)}
    (trial.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    for name, right in checks.items():
        print(f"{name:<20} {'yes' if right else 'NO'}")
    sys.exit(0 if all(checks.values()) else 1)


if __name__ == "__main__":
    main()
