"""Does a run of several processes give the results of one? Does it survive a killed process, a preempted machine, and a
damaged checkpoint?

    python scripts/many_processes.py --out runs/many_processes
    python scripts/many_processes.py --out runs/many_processes --only killed

same     1, 2 and 4 processes with 8 fake CPU devices in all, on four meshes: the same losses (relative error at most
         1e-5) and the same evaluation, with the search in graph, index refresh, and dropout
killed   one of 4 processes is killed with SIGKILL: the others end within a minute and say why; 2 processes resume from
         the checkpoint, and the losses are those of the undisturbed run
sigterm  10 times at random moments: no step is lost or repeated, and all values are equal bit for bit
damaged  a flipped bit, a truncated file, an empty directory: the checkpoint is named and set aside, and the run resumes
         from the one before

Prints a table, writes OUT/report.json, and ends with status 1 if any check fails. All of it takes about half an hour on
two cores.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import launch_local
from ml_collections import ConfigDict

from rag_jax.system import logs

STEPS = {"retriever": 20, "joint": 30}
TIMES = ("step_seconds", "tokens_per_second", "host_share")
MESHES = ("8x1x1", "1x8x1", "2x4x1", "2x2x2")
Row = dict[str, Any]


def get_config(data: str) -> ConfigDict:
    """Two stages: in-batch contrastive, then joint training with search in graph; data: a directory by `prepare`."""
    c = ConfigDict({"corpus": f"{data}/corpus", "train": f"{data}/world/train.jsonl", "dev": f"{data}/world/dev.jsonl"})
    c.target_length, c.log_every, c.checkpoint_every, c.keep_checkpoints = 12, 1, 5, 3
    c.evaluate_every, c.evaluate_questions = 50, 16
    c.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1})
    shape = {"width": 32, "heads": 8, "hidden": 64, "norm": "pre", "init": "copy", "dropout": 0.1}
    c.model = ConfigDict({"n_docs": 3, "tie_encoders": True, "source_length": 144, "question_length": 32})
    c.model.encoder = ConfigDict({**shape, "layers": 1, "positions": 96, "pooling": "mean", "vocab_size": 400})
    c.model.generator = ConfigDict({**shape, "encoder_layers": 1, "decoder_layers": 1, "positions": 160})
    c.model.generator.vocab_size, c.model.generator.logit_scale = 600, 32**-0.5
    encoder, generator = {"question_encoder": 1.0}, {"generator": 1.0}

    def stage(name: str, groups: dict[str, float], **values: Any) -> ConfigDict:
        optimizer = {"learning_rate": 1e-4, "schedule": "constant", "groups": groups}
        return ConfigDict({"name": name, "batch": 8, "steps": STEPS[name], "optimizer": optimizer, **values})

    c.stages = (
        stage("retriever", encoder, objective="contrastive"),
        stage("joint", {**encoder, **generator}, n_docs=3, refresh="7"),
    )
    return c


class Started:
    """The running processes of a command; threads collect what each prints, so that no pipe fills up."""

    def __init__(self, processes: "list[subprocess.Popen[str]]") -> None:
        self.processes, self._said = processes, ["" for _ in processes]
        self._threads = [threading.Thread(target=self._read, args=(i,)) for i in range(len(processes))]
        for thread in self._threads:
            thread.start()

    def _read(self, i: int) -> None:
        self._said[i] = self.processes[i].communicate()[1]

    @property
    def running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def end(self) -> list[str]:
        """Waits for all processes; returns the standard error of each."""
        launch_local.wait(self.processes)
        for thread in self._threads:
            thread.join()
        return self._said

    def finish(self, name: str) -> list[str]:
        """Waits for all processes; a status other than 0 ends the script. Returns the standard error of each."""
        said = self.end()
        if any(process.returncode for process in self.processes):
            sys.exit(f"{name} failed:\n" + "\n".join(text[-2000:] for text in said))
        return said


class Trial:
    """Runs of one configuration in one directory, which share their compiled programs."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(out / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",  # small programs compile several times faster
        }

    def prepare(self) -> None:
        """Makes the data of `get_config`."""
        if (self.out / "corpus").exists():
            return
        lengths = ["--encoder-length", "96", "--generator-length", "128", "--overwrite"]
        sizes = ["--train-tokenizer", "--encoder-vocab", "400", "--generator-vocab", "600", *lengths]
        world = ["world", "--out", f"{self.out}/world", "--entities", "40", "--workers", "1"]
        corpus = ["corpus", f"{self.out}/world/passages.jsonl", "--out", f"{self.out}/corpus", *sizes]
        shutil.rmtree(self.out / "world", ignore_errors=True)
        for words in (world, corpus):
            subprocess.run([sys.executable, "-m", "rag_jax", *words], check=True, capture_output=True)

    def start(self, name: str, mesh: str, processes: int, devices: int) -> "Started":
        shape = json.dumps(dict(zip(("data", "fsdp", "tensor"), map(int, mesh.split("x")), strict=True)))
        words = ["train", "--config", f"{__file__}:{self.out}", "--run", str(self.out / name), "--set", f"mesh={shape}"]
        return Started(launch_local.start(words, launch_local.environments(processes, devices, 0, self.environment)))

    def rows(self, name: str) -> list[Row]:
        path = self.out / name / logs.METRICS_FILE
        return logs.read_rows(path) if path.exists() else []

    def last(self, name: str) -> int:
        rows = self.rows(name)
        return rows[-1]["step"] if rows else 0

    def whole(self, name: str, mesh: str, processes: int, devices: int) -> list[Row]:
        """The metrics of an undisturbed run, which is run only if it has not finished before."""
        if self.last(name) < sum(STEPS.values()):
            self.start(name, mesh, processes, devices).finish(name)
        return self.rows(name)


def difference(rows: list[Row], others: list[Row]) -> float:
    """The largest relative difference of the losses; infinite where the steps are not the same."""
    if [row["step"] for row in rows] != [row["step"] for row in others]:
        return float("inf")
    return max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(rows, others, strict=True))


def evaluation(rows: list[Row]) -> Row:
    return {name: value for row in rows for name, value in row.items() if name.startswith("eval/")}


def untimed(rows: list[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def same(trial: Trial, rng: random.Random) -> Iterator[Row]:
    """Part `same`: a row for each mesh and number of processes, compared with one process on the first mesh."""
    first = trial.whole("8x1x1-1", "8x1x1", 1, 8)
    for mesh in MESHES:
        for processes in (1, 2, 4):
            rows = trial.whole(f"{mesh}-{processes}", mesh, processes, 8)
            off, equal = difference(rows, first), evaluation(rows) == evaluation(first)
            yield {
                "mesh": mesh,
                "processes": processes,
                "steps": len(rows),
                "difference": off,
                "same_evaluation": equal,
                "ok": off <= 1e-5 and equal,
            }


def killed(trial: Trial, rng: random.Random) -> Iterator[Row]:
    """Part `killed`: one of 4 processes is killed at a random step; 2 processes resume the run."""
    name, mesh, victim, step = "killed", "2x4x1", rng.randrange(4), rng.randrange(8, 45)
    undisturbed = trial.whole("2x4x1-4", mesh, 4, 8)
    shutil.rmtree(trial.out / name, ignore_errors=True)
    started = trial.start(name, mesh, 4, 8)
    while trial.last(name) < step and started.running:
        time.sleep(0.02)
    started.processes[victim].kill()
    begun = time.monotonic()
    said = started.end()
    statuses, seconds = [process.returncode for process in started.processes], time.monotonic() - begun
    lines = [[line for line in text.splitlines() if "goes on from step" in line] for text in said]
    clear = all(lines[i] for i in range(4) if i != victim)
    print("\n".join(line[-1] for line in lines if line))
    restart = trial.whole(name, mesh, 2, 8)
    off = difference(restart, undisturbed)
    ended = seconds < 60 and all(statuses)
    yield {
        "killed": victim,
        "at_step": step,
        "others_ended_after": round(seconds, 1),
        "statuses": statuses,
        "said_why": clear,
        "difference": off,
        "ok": ended and clear and off <= 1e-5,
    }


def sigterm(trial: Trial, rng: random.Random) -> Iterator[Row]:
    """Part `sigterm`: SIGTERM at random moments, 10 times with one process, then 3 times with two."""
    for processes, times in ((1, 10), (2, 3)):
        mesh = f"{processes}x1x1"
        undisturbed, name = trial.whole(f"whole-{processes}", mesh, processes, processes), f"sigterm-{processes}"
        shutil.rmtree(trial.out / name, ignore_errors=True)
        stops: list[int] = []
        lost = 0  # starts that did not resume from the step after which the one before had stopped
        for number in range(times):
            before, latest = trial.last(name), sum(STEPS.values()) * (number + 1) // times
            target = rng.randrange(before, max(latest, before + 1))
            started = trial.start(name, mesh, processes, processes)
            while started.running and trial.last(name) <= target:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.3))
            started.processes[rng.randrange(processes)].send_signal(signal.SIGTERM)
            said = started.finish("SIGTERM")[0]
            lost += bool(stops) and f"going on from step {stops[-1]}\n" not in said
            told = re.search(r"stopped after step (\d+) of", said)
            stops.append(int(told[1]) if told else trial.last(name))
        rows = trial.whole(name, mesh, processes, processes)
        equal = untimed(rows) == untimed(undisturbed)
        yield {
            "processes": processes,
            "stopped_after": stops,
            "steps": len(rows),
            "steps_lost": lost,
            "bit_identical": equal,
            "ok": equal and not lost,
        }


def flip(checkpoint: Path) -> None:
    file = largest(checkpoint)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1 << 4
    file.write_bytes(content)


def cut(checkpoint: Path) -> None:
    file = largest(checkpoint)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def largest(checkpoint: Path) -> Path:
    files = [path for path in (checkpoint / "arrays").rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def damaged(trial: Trial, rng: random.Random) -> Iterator[Row]:
    """Part `damaged`: damages the newest checkpoint of a finished run, and removes its index so that it must resume."""
    undisturbed = trial.whole("whole-1", "1x1x1", 1, 1)
    last = sum(STEPS.values())
    for how in (flip, cut, empty):
        name = f"damaged-{how.__name__}"
        shutil.rmtree(trial.out / name, ignore_errors=True)
        shutil.copytree(trial.out / "whole-1", trial.out / name)
        shutil.rmtree(trial.out / name / "index")
        how(trial.out / name / "checkpoints" / str(last))
        said = trial.start(name, "1x1x1", 1, 1).finish(name)[0]
        warnings = [line for line in said.splitlines() if "is not whole" in line]
        print("\n".join(warnings), flush=True)
        named = len(warnings) == 1 and f"checkpoints/{last} " in warnings[0]
        resumed = f"going on from step {last - 5}" in said
        equal = untimed(trial.rows(name)) == untimed(undisturbed)
        yield {
            "damage": how.__name__,
            "named": named,
            "went_on_from_the_one_before": resumed,
            "bit_identical": equal,
            "ok": named and resumed and equal,
        }


PARTS = {"same": same, "killed": killed, "sigterm": sigterm, "damaged": damaged}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for everything; what is there is used again")
    parser.add_argument("--only", choices=list(PARTS), action="append", help="this part (may be repeated)")
    parser.add_argument("--seed", type=int, default=None, help="of the moments (default: another each time)")
    args = parser.parse_args()
    seed = random.randrange(10**6) if args.seed is None else args.seed
    trial, rng = Trial(args.out.absolute()), random.Random(seed)
    trial.out.mkdir(parents=True, exist_ok=True)
    trial.prepare()
    report: dict[str, Any] = {"seed": seed}
    for name in args.only or PARTS:
        begun = time.monotonic()
        report[name] = []
        for row in PARTS[name](trial, rng):
            report[name].append(row)
            print(f"{name:<8} " + "  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        report[f"{name}_seconds"] = round(time.monotonic() - begun)
    (trial.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(0 if all(row["ok"] for name in PARTS for row in report.get(name, [])) else 1)


if __name__ == "__main__":
    main()
