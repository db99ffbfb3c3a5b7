"""Does the gradient to the retriever help? Joint training without retrieval labels, with and without that gradient.

    python scripts/retrieval_gradient.py --reader runs/quickstart --out runs/retrieval_gradient

Takes the generator of a trained run (configs/world.py), holds it fixed, gives it a weak retriever (a few contrastive
steps from random weights), and trains the marginal likelihood on questions and answers alone: RAG-Sequence and
RAG-Token, each once as usual and once with the gradient through the prior p(z|x) stopped. Prints recall@1 of the gold
passage on the test questions before and after, and writes OUT/report.json. When it was killed, start it again: it
resumes.
"""

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rag_jax.data import batching
from rag_jax.data.readers import formats
from rag_jax.inference.pipeline import Pipeline
from rag_jax.ops.masks import length_mask
from rag_jax.retrieval import mips
from rag_jax.runs import checkpoint
from rag_jax.runs import directory as runs
from rag_jax.system import sharding
from rag_jax.training import config, train
from rag_jax.training import config as train_config
from rag_jax.training.config import make_stage
from rag_jax.training.optimizer import OptimizerConfig


def recall_at_1(run: Path, questions: Path) -> float:
    """Share of the questions whose first retrieved passage is a gold one."""
    opened = Pipeline.from_run(run)
    corpus = opened.loaded.corpus
    asked = formats.read_questions(questions)
    tables = batching.encode_questions(
        [q.question for q in asked],
        corpus.encoder_tokenizer,
        corpus.generator_tokenizer,
        opened.loaded.rag.config.question_length,
    )
    ids, length = jnp.asarray(tables["question_ids"]), jnp.asarray(tables["question_length"])
    embed = jax.jit(opened.loaded.rag.embed_questions)
    q_NE = embed(opened.params, ids, length_mask(length, ids.shape[1]))
    _, rows = mips.search(q_NE, opened.index.embeddings_NE, 1, mesh=opened.loaded.mesh, n_valid=len(corpus))
    found = [
        corpus[int(row)].id in q.positive_passage_ids for row, q in zip(np.asarray(rows)[:, 0], asked, strict=True)
    ]
    return float(np.mean(found))


def with_reader(base: config.TrainConfig, reader: Path, weak: Path, out: Path) -> None:
    """Writes a run directory to start from: the encoder of the run `weak`, the generator of the run `reader`."""
    if (out / "params").is_dir():
        return
    opened = Pipeline.from_run(weak)
    mesh = sharding.make_mesh(base.mesh or None)
    generator = runs.read_params(reader, opened.loaded.rag, mesh)["generator"]
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(weak / runs.IDENTITY, out / runs.IDENTITY)
    checkpoint.save_params(out / "params", {**opened.params, "generator": generator}.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", type=Path, required=True, help="run of configs/world.py whose generator can read")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--questions", type=Path, help="test questions (default: test.jsonl beside the training questions)"
    )
    parser.add_argument("--weak-steps", type=int, default=24)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()

    base = train_config.read_run(args.reader)
    questions = args.questions or Path(base.train).with_name("test.jsonl")
    adam = OptimizerConfig(learning_rate=1.5e-3, b2=0.98, warmup_steps=5, groups={"question_encoder": 1.0})
    weak = make_stage("weak", objective="contrastive", steps=args.weak_steps, batch=32, optimizer=adam)
    train.train(dataclasses.replace(base, stages=(weak,)), args.out / "weak")
    with_reader(base, args.reader, args.out / "weak", args.out / "start")
    result: dict[str, Any] = {"before": recall_at_1(args.out / "weak", questions), "steps": args.steps}
    for variant in ("sequence", "token"):
        for gradient in (True, False):
            joint = make_stage(
                "joint",
                steps=args.steps,
                batch=16,
                n_docs=6,
                refresh="20",
                prior_gradient=gradient,
                optimizer=adam,
            )
            model = dataclasses.replace(base.model, variant=variant)
            name = f"{variant}{'' if gradient else '-stopped'}"
            start = str(args.out / "start")
            train.train(dataclasses.replace(base, model=model, stages=(joint,), init=start), args.out / name)
            result[name] = recall_at_1(args.out / name, questions)
            print(f"{name}: recall@1 {result['before']:.3f} -> {result[name]:.3f}", flush=True)
    (args.out / "report.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
