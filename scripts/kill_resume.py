"""Is a run that was killed and resumed equal to an uninterrupted one, bit for bit? Prints where it is not.

    python scripts/kill_resume.py --out runs/kill_resume

Trains a small run without interruption; then the same run again, killed with SIGKILL at random moments (before and
during compilation, between steps, while a checkpoint is written, before the results are) and resumed each time.
Compares parameters, index and every logged value except times; writes OUT/report.json; the exit status is 1 where
anything differs. Takes about three minutes on two cores. Compiled programs are cached in OUT/compiled for all starts;
--compile compiles in every start instead, which takes much longer.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rag_jax.index import snapshot as snapshots
from rag_jax.pretrained import load
from rag_jax.system import logs

TIMES = ("step_seconds", "tokens_per_second", "host_share")


def get_config(data: str) -> ConfigDict:
    """A run with every kind of stage, dropout and index refresh; data: a directory by `prepare`."""
    c = ConfigDict({"corpus": f"{data}/corpus", "train": f"{data}/world/train.jsonl", "dev": f"{data}/world/dev.jsonl"})
    c.target_length, c.log_every, c.checkpoint_every = 16, 5, 10
    shape = {"width": 32, "heads": 2, "hidden": 64, "norm": "pre", "init": "copy", "vocab_size": 0, "dropout": 0.1}
    c.model = ConfigDict({"n_docs": 3, "tie_encoders": True, "source_length": 176, "question_length": 32})
    c.model.encoder = ConfigDict({**shape, "layers": 1, "positions": 160, "pooling": "mean"})
    c.model.generator = ConfigDict({**shape, "encoder_layers": 1, "decoder_layers": 1, "positions": 192})

    def stage(name: str, groups: dict[str, float], **values: Any) -> ConfigDict:
        optimizer = {"learning_rate": 1e-3, "groups": groups}
        return ConfigDict({"name": name, "batch": 8, "steps": 50, "optimizer": optimizer, **values})

    encoder, generator = {"question_encoder": 1.0}, {"generator": 1.0}
    c.stages = (
        stage("retriever", encoder, objective="contrastive"),
        stage("denoise", generator, objective="denoise", source_length=96),
        stage("read", generator, documents="gold", window=32, source_length=96),
        stage("joint", {**encoder, **generator}, n_docs=3, refresh="7"),
    )
    return c


class Trial:
    """Starts the commands of one experiment; compile_anew: each start compiles, else all share a cache of programs."""

    def __init__(self, out: Path, steps: int, compile_anew: bool) -> None:
        self.out, self.environment = out, {"JAX_PLATFORMS": "cpu", **os.environ}
        if not compile_anew:
            self.environment |= {"JAX_COMPILATION_CACHE_DIR": str(out / "compiled")}
            self.environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        names = ("retriever", "denoise", "read", "joint")
        self.settings = [word for name in names for word in ("--set", f"stages.{name}.steps={steps // 4}")]

    def start(self, *words: object) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "rag_jax", *map(str, words)]
        with (self.out / "log.txt").open("ab") as log:
            return subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)

    def train(self, run: Path) -> "subprocess.Popen[bytes]":
        return self.start("train", "--config", f"{__file__}:{self.out}", "--run", run, *self.settings)

    def finish(self, process: "subprocess.Popen[bytes]") -> None:
        if process.wait():
            sys.exit(f"the command failed; see {self.out / 'log.txt'}")

    def prepare(self) -> None:
        """Makes the data of `get_config`."""
        world = self.out / "world"
        self.finish(self.start("world", "--out", world, "--entities", 60, "--workers", 1))
        sizes = ["--train-tokenizer", "--encoder-vocab", 500, "--generator-vocab", 800]
        self.finish(self.start("corpus", world / "passages.jsonl", "--out", self.out / "corpus", *sizes))


def last_step(run: Path) -> int:
    """The last step in the run's metrics, 0 where there is none."""
    rows = logs.read_rows(run / logs.METRICS_FILE) if (run / logs.METRICS_FILE).exists() else []
    return rows[-1]["step"] if rows else 0


def kill_once(trial: Trial, run: Path, kind: str, step: int, rng: random.Random) -> None:
    """Starts the run and kills it at a moment of its kind.

    kind: "early" (after a random time up to 6 s), "step" (after `step` is logged), "saving" (while a checkpoint after
    it is written).
    """
    begun, process = time.monotonic(), trial.train(run)
    early, metrics = rng.uniform(0.2, 6.0), run / logs.METRICS_FILE
    written = metrics.stat().st_mtime_ns if metrics.exists() else 0

    def now() -> bool:
        if kind == "early":
            return time.monotonic() - begun > early
        if not metrics.exists() or metrics.stat().st_mtime_ns == written or last_step(run) < step:
            return False
        return kind == "step" or any("tmp" in path.name for path in (run / "checkpoints").glob("*"))

    while process.poll() is None and not now():
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.02 if kind == "saving" else 0.5))
    missed = process.poll() is not None
    process.kill()
    process.wait()
    said = "had ended by itself" if missed else f"killed after {time.monotonic() - begun:5.1f} s"
    print(f"  {kind:<7} step {last_step(run):3}: {said}", flush=True)


def compare(a: Path, b: Path) -> dict[str, bool]:
    """Whether parameters, index and metrics of two runs are equal, bit for bit."""
    import jax

    params = [jax.device_get(load.from_pretrained(run)[1]) for run in (a, b)]
    equal = jax.tree.map(lambda x, y: x.dtype == y.dtype and x.tobytes() == y.tobytes(), *params)
    embeddings = [np.asarray(snapshots.open_snapshot(run / "index").embeddings_NE).tobytes() for run in (a, b)]
    rows = [logs.read_rows(run / logs.METRICS_FILE) for run in (a, b)]
    values = [[{name: row[name] for name in row if name not in TIMES} for row in found] for found in rows]
    return {
        "parameters": all(jax.tree.leaves(equal)),
        "index": embeddings[0] == embeddings[1],
        "metrics": values[0] == values[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for everything; must not exist")
    parser.add_argument("--steps", type=int, default=200, help="training steps, a fourth in each stage")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=None, help="of the moments (default: another each time)")
    parser.add_argument("--compile", action="store_true", help="compile in every start")
    args = parser.parse_args()
    if args.out.exists():
        sys.exit(f"{args.out} exists; remove it, or name another --out")
    args.out.mkdir(parents=True)
    seed = random.randrange(10**6) if args.seed is None else args.seed
    rng, begun, trial = random.Random(seed), time.monotonic(), Trial(args.out.absolute(), args.steps, args.compile)
    whole, killed = trial.out / "uninterrupted", trial.out / "killed"
    trial.prepare()
    print("uninterrupted run", flush=True)
    trial.finish(trial.train(whole))
    print(f"the same, killed {args.kills} times (seed {seed})", flush=True)
    steps = sorted(rng.sample(range(1, args.steps), args.kills))
    kinds = ["early", "saving", *rng.choices(("early", "step", "step", "saving"), k=args.kills)][: args.kills]
    for kind, step in zip(kinds, steps, strict=True):
        kill_once(trial, killed, kind, step, rng)
    trial.finish(trial.train(killed))
    same = compare(whole, killed)
    report = {"seed": seed, "kills": args.kills, "steps": args.steps, "bit_identical": same}
    report["seconds"] = round(time.monotonic() - begun, 1)
    (trial.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    for name, equal in same.items():
        print(f"{name:<11} {'bit-identical' if equal else 'DIFFERENT'}")
    sys.exit(0 if all(same.values()) else 1)


if __name__ == "__main__":
    main()
