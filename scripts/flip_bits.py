"""Is a single flipped bit in any file detected by the code that reads it?

    python scripts/flip_bits.py --data DIR --run RUN --flips 150

DIR holds `corpus`, `world/test.jsonl` (rag-jax world, rag-jax corpus) and RUN is a run trained on it; flips are made in
copies of both. Every flip is judged in this process:

    detected   an InputError, or a checkpoint that is set aside, names the damage
    harmless   the reader gives exactly the values that it gave before
    SILENT     wrong: other values without an error
    TRACEBACK  wrong: an exception that is not meant for users

Ends with status 1 if any flip is silent or a traceback.
"""

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "64")

import jax
import numpy as np

from rag_jax.corpus.directory import Corpus
from rag_jax.data import example_cache, tokenizers
from rag_jax.errors import InputError
from rag_jax.index import encode_job
from rag_jax.index import snapshot as snapshots
from rag_jax.pretrained import as_run, load
from rag_jax.pretrained.export import save_pretrained
from rag_jax.pretrained.hub import find
from rag_jax.pretrained.parts import generator_part
from rag_jax.runs import checkpoint
from rag_jax.runs import directory as runs
from rag_jax.system import files, logs, sharding


class Kind(NamedTuple):
    """Files of one kind, and a function that reads them as a command does and returns a digest of all values."""

    files: list[Path]
    read: Callable[[], str]


def digest(*values: Any) -> str:
    """A hash of values: of arrays by their bytes, of others by their repr."""
    found = hashlib.sha256()
    for value in values:
        array = isinstance(value, np.ndarray | jax.Array)
        found.update(np.ascontiguousarray(value).tobytes() if array else repr(value).encode())
    return found.hexdigest()


def read_corpus(directory: Path) -> str:
    """Digest of a corpus: tables, passages, ids and tokenizers, which training, search, ask and evaluate read."""
    corpus = Corpus.open(directory)
    tables = (corpus.encoder_ids, corpus.encoder_length, corpus.generator_ids, corpus.generator_length)
    passages = [corpus[row] for row in range(len(corpus))]
    rows = corpus.rows([passage.id for passage in passages], missing=-1)
    made = [(t.hash, t.pad_id, t.bos_id, t.eos_id) for t in (corpus.encoder_tokenizer, corpus.generator_tokenizer)]
    return digest(*[table[:] for table in tables], passages, rows, made, corpus.live_N, corpus.hash)


def read_index(directory: Path) -> str:
    snapshot = snapshots.open_snapshot(directory)
    return digest(snapshot.embeddings_NE[:], snapshot.manifest, snapshot.hash)


def read_job(directory: Path, corpus: Path, out: Path) -> str:
    """Digest of the index made from an encode job, after reading the job's headers as `rag-jax encode` does."""
    list(encode_job.finished(directory, encode_job.read_job(directory)))
    made = snapshots.from_job(directory, Corpus.open(corpus), out, overwrite=True)
    return digest(made.embeddings_NE[:], made.manifest)


def read_params(run: Path) -> str:
    _, params = load.from_pretrained(run, mesh=sharding.make_mesh(devices=jax.devices()[:1]))
    return digest(*jax.tree.leaves(params), runs.read_identity(run), as_run.provenance(run))


def read_checkpoints(run: Path) -> str:
    keeper = checkpoint.Checkpoints(run / "checkpoints")
    found: list[Any] = []
    for step in checkpoint.numbers(keeper.directory):
        keeper.verify(step)
        found.append(keeper.position(step))
    return digest(found)


def read_examples(run: Path) -> str:
    files.read_verified(run / "examples", example_cache.KIND, example_cache.VERSION)
    return ""


def read_export(directory: Path) -> str:
    """Digest of an export: tensors, configuration and tokenizer, as `rag-jax convert --generator` reads them."""
    part = generator_part(find(directory))
    tensors = [part.tensors.read(name) for name in sorted(part.tensors.shapes)]
    return digest(*tensors, part.config, sorted(part.tensors.shapes), tokenizers.load(directory).hash)


def below(directory: Path, *patterns: str) -> list[Path]:
    return sorted({path for pattern in patterns for path in directory.rglob(pattern) if path.is_file()})


def kinds(work: Path) -> dict[str, Kind]:
    """Name -> kind of files below `work`, each with its reader."""
    corpus, run = work / "corpus", work / "run"
    tables = below(corpus, "encoder_*.npy", "generator_*.npy")
    manifests = [corpus / files.MANIFEST, run / "index" / files.MANIFEST, run / "params" / files.MANIFEST]
    manifests += [run / files.MANIFEST, work / "job" / encode_job.JOB, work / "export" / files.MANIFEST]
    everything: dict[str, Callable[[], str]] = {
        "corpus": lambda: read_corpus(corpus),
        "index": lambda: read_index(run / "index"),
        "params": lambda: read_params(run),
        "job": lambda: read_job(work / "job", corpus, work / "made"),
        "export": lambda: read_export(work / "export"),
    }
    return {
        "token tables": Kind(tables, everything["corpus"]),
        "corpus files": Kind(
            [p for p in below(corpus, "*") if p not in tables and p.name != files.MANIFEST], everything["corpus"]
        ),
        "index rows": Kind(below(run / "index", "*.safetensors"), everything["index"]),
        "final parameters": Kind(below(run / "params" / "arrays", "*"), everything["params"]),
        "checkpoints": Kind(below(run / "checkpoints", "*"), lambda: read_checkpoints(run)),
        "job shards": Kind(below(work / "job", "*.safetensors"), everything["job"]),
        "manifests": Kind(manifests, lambda: digest([read() for read in everything.values()])),
        "exports": Kind(
            [p for p in below(work / "export", "*") if p.name != files.MANIFEST], everything["export"]
        ),
        "run's configuration": Kind(
            [run / runs.CONFIG, run / runs.IDENTITY, *below(run / "tokenizers", "*.json")], everything["params"]
        ),
        "tokenised questions": Kind(below(run / "examples", "*.npy"), lambda: read_examples(run)),
    }  # fmt: skip


def flip(path: Path, rng: np.random.Generator) -> None:
    """Flips one bit of the file, drawn uniformly."""
    content = bytearray(path.read_bytes())
    bit = int(rng.integers(8 * len(content)))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def judge(kind: Kind, path: Path, rng: np.random.Generator, before: str) -> tuple[str, str]:
    """Flips one bit and reads: (outcome, message); the file is restored. before: the digest of the whole files."""
    whole = path.read_bytes()
    flip(path, rng)
    try:
        return ("harmless", "") if kind.read() == before else ("SILENT", "")
    except (InputError, checkpoint.Damaged) as error:
        return "detected", str(error)
    except Exception as error:
        return "TRACEBACK", f"{type(error).__name__}: {error}"
    finally:
        path.write_bytes(whole)


def prepare(data: Path, run: Path, work: Path) -> None:
    """Copies corpus and run to `work`, and makes an encode job and an export there."""
    shutil.copytree(data / "corpus", work / "corpus")
    shutil.copytree(run, work / "run", ignore=shutil.ignore_patterns("tensorboard"))
    make_job(run, work)
    rag, params = load.open_pretrained(run)
    save_pretrained(work / "export", rag, params, part="generator", tokenizers_from=run / "tokenizers")


def make_job(run: Path, work: Path) -> None:
    """Makes an encode job from the embeddings of the run's index, without computing them."""
    opened = snapshots.open_snapshot(run / "index")
    found = opened.manifest
    job = encode_job.Job(
        run=str(run), corpus=str(work / "corpus"), corpus_hash=found.corpus_hash, encoder_hash=found.encoder_hash,
        tokenizer_hash=found.tokenizer_hash, step=found.step, n_passages=found.n_passages, width=found.width,
        dtype="float32", shard_rows=-(-found.n_passages // 3), batch=16,
    )  # fmt: skip
    encode_job.begin(work / "job", job)
    encode_job.make(work / "job", job, lambda first, last, done: np.asarray(opened.embeddings_NE[first:last]))


def experiment(data: Path, run: Path, flips: int, seed: int = 0) -> dict[str, Counter[str]]:
    """Counts of outcomes by kind of file; flips are divided evenly among kinds, and among the files of one by size."""
    rng, table = np.random.default_rng(seed), {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(data, run, work)
        found = kinds(work)
        for number, (name, kind) in enumerate(found.items()):
            before, table[name] = kind.read(), Counter[str]()
            for _ in range(flips // len(found) + (number < flips % len(found))):
                sizes = np.array([path.stat().st_size for path in kind.files], float)
                path = kind.files[int(rng.choice(len(sizes), p=sizes / sizes.sum()))]
                outcome, said = judge(kind, path, rng, before)
                table[name][outcome] += 1
                if outcome in ("SILENT", "TRACEBACK"):
                    print(f"{outcome} {name}: {path.relative_to(work)}: {said}", file=sys.stderr)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--flips", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logs.silence()
    table = experiment(args.data, args.run, args.flips, args.seed)
    outcomes = ("detected", "harmless", "SILENT", "TRACEBACK")
    print("| files | " + " | ".join(outcomes) + " |\n|---|" + "---|" * len(outcomes))
    for name, counts in [*table.items(), ("all", sum(table.values(), Counter()))]:
        print(f"| {name} | " + " | ".join(str(counts[one]) for one in outcomes) + " |")
    return int(any(counts["SILENT"] or counts["TRACEBACK"] for counts in table.values()))


if __name__ == "__main__":
    sys.exit(main())
