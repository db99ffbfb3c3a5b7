"""Measures memory and speed of building a corpus, whose memory must not grow with the number of passages.

    python scripts/corpus_memory.py --out runs/corpus_memory --passages 100000 1000000

Writes the passages of worlds of these sizes, builds a corpus of each in a process of its own (with tokenizers trained
on it) and prints one JSON line each: wall-clock and CPU seconds (machines are shared), peak memory, sizes of the files.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rag_jax.data.synthetic.world import World
from rag_jax.system.logs import Progress


def measured(command: list[str]) -> tuple[float, float, float]:
    """(seconds, CPU seconds, peak resident MB) of a rag-jax command."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "rag_jax", *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"rag-jax {' '.join(command)} failed")
    return time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def write_world(path: Path, passages: int) -> None:
    """Writes a world's passages alone, since its questions would take several times as long."""
    temporary = path.with_suffix(".tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("w", encoding="utf-8") as stream, Progress(passages, "world", unit="passages") as progress:
        for row in World(passages, seed=0).rows("passages"):
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            progress.update()
    temporary.rename(path)


def measure(folder: Path, passages: int, workers: int) -> dict[str, Any]:
    world, corpus = folder / f"world-{passages}.jsonl", folder / f"corpus-{passages}"
    if not world.exists():
        write_world(world, passages)
    options = ["--train-tokenizer", "--workers", str(workers), "--overwrite"]
    seconds, cpu_seconds, peak = measured(["corpus", str(world), "--out", str(corpus), *options])
    manifest = json.loads((corpus / "manifest.json").read_text())
    sizes = {name: round(about["bytes"] / 2**20, 1) for name, about in manifest["files"].items() if "/" not in name}
    rate = round(manifest["n_passages"] / seconds)
    figures = {"passages": manifest["n_passages"], "seconds": round(seconds, 1), "passages_per_second": rate}
    machine = {"cpu_seconds": round(cpu_seconds, 1), "cores": os.cpu_count(), "load": os.getloadavg()[1]}
    return figures | machine | {"peak_mb": round(peak), "file_mb": sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for worlds and corpora; remove it afterwards")
    parser.add_argument("--passages", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    for passages in args.passages:
        print(json.dumps(measure(args.out, passages, args.workers)), flush=True)


if __name__ == "__main__":
    main()
