"""Trains a small model on texts of one's own from Python, then asks it two questions.

    python own_data.py                    # about a minute on a laptop's CPU
    python own_data.py --steps 1000       # better answers
    python own_data.py --run runs/towns   # keeps the run; the same command resumes one that was interrupted

The texts are made up in `make_texts`, so that this file runs anywhere. To train on your own, make its lists of your
passages and questions: they are dictionaries, like the lines of a JSONL file.
"""

import argparse
import random
import tempfile
from typing import Any

import rag_jax

SYLLABLES = ("bar", "den", "fol", "gri", "kel", "lun", "mo", "ras", "ti", "vo")


def make_texts(towns: int = 300) -> rag_jax.Texts:
    """A passage about each of some invented towns, and two questions; every tenth town is kept out of training."""
    draw = random.Random(0)

    def name(*endings: str) -> str:
        return "".join(draw.choices(SYLLABLES, k=2)).title() + draw.choice(endings)

    passages, train, dev = [], [], []
    for i in range(towns):
        town, river, founder = f"{name('ville', 'burg', 'ford')} {i}", name("a", "o", "e"), name("son", "sen", "ez")
        text = f"{town} lies on the river {river}. It was founded by {founder}."
        passages.append({"id": f"p{i}", "title": town, "text": text})
        for question, answer in (f"On which river does {town} lie?", river), (f"Who founded {town}?", founder):
            row = {"question": question, "answers": [answer], "positive_passage_ids": [f"p{i}"]}
            (train if i % 10 else dev).append(row)
    # both lengths are in tokens; the two tokenizers, of 600 tokens each, are trained on the passages
    corpus = {"encoder_length": 48, "generator_length": 48, "train_tokenizer": (600, 600)}
    return rag_jax.Texts(passages, train, dev, corpus)


def make_config(steps: int = 400) -> dict[str, Any]:
    """A small model and its three stages: learn to find passages, learn to read them, then train both together."""
    width = 64
    shape = {"width": width, "heads": 4, "hidden": 2 * width, "norm": "pre", "vocab_size": 0, "dropout": 0.0}
    encoder = {**shape, "layers": 1, "positions": 64, "pooling": "mean", "init": "lexical"}
    generator = {**shape, "encoder_layers": 1, "decoder_layers": 1, "positions": 96, "init": "copy"}
    generator["logit_scale"] = width**-0.5  # `copy` draws token embeddings of unit scale
    model = {"n_docs": 3, "tie_encoders": True, "source_length": 80, "question_length": 32}

    def stage(name: str, share: float, groups: dict[str, float], **options: Any) -> dict[str, Any]:
        # a group of parameters has its own multiple of the learning rate; one that is not named is not trained
        adam = {"learning_rate": 2e-3, "schedule": "cosine", "b2": 0.98, "groups": groups}
        return {"name": name, "steps": max(1, round(share * steps)), "batch": 16, "optimizer": adam, **options}

    # the last stage learns slowly, and rebuilds the index every 20 steps, because the encoder changes
    both = {"question_encoder": 0.05, "generator": 0.3}
    stages = [
        stage("find", 0.2, {"question_encoder": 1.0}, objective="contrastive"),
        stage("read", 0.7, {"generator": 1.0}, objective="rag", documents="gold"),
        stage("together", 0.1, both, objective="rag", refresh="20"),
    ]
    model |= {"encoder": encoder, "generator": generator}
    return {"model": model, "stages": stages, "target_length": 12, "log_every": 10, "checkpoint_every": 100}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of all stages together (default: %(default)s)")
    parser.add_argument("--run", help="run directory (default: a temporary one)")
    args = parser.parse_args()
    texts = make_texts()
    with tempfile.TemporaryDirectory() as folder:
        result = rag_jax.fit(make_config(args.steps), args.run or f"{folder}/run", data=texts)
        pipeline = result.pipeline()
        print(f"{result.steps} steps in {result.seconds:.0f} s; the last loss is {result.last['loss']:.2f}")
        for row in texts.dev[:4:2]:
            answer = pipeline.ask(row["question"])
            print(f"\n{row['question']}\n{answer.text}   (right: {row['answers'][0]})")
            for passage in answer.passages:
                print(f"  prior {passage.prior:.2f}  posterior {passage.posterior:.2f}  {passage.text}")


if __name__ == "__main__":
    main()
