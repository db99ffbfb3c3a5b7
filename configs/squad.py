"""SQuAD v1.1's development articles as open-domain question answering, learned from scratch on two CPU cores.

    rag-jax corpus SQUAD/passages.jsonl --out data/squad-corpus --train-tokenizer \\
        --encoder-vocab 8192 --generator-vocab 8192 --encoder-length 256 --generator-length 256
    DATA="--set train=SQUAD/train.jsonl --set dev=SQUAD/dev.jsonl"
    rag-jax train --config configs/squad.py --run runs/squad $DATA
    rag-jax evaluate runs/squad --batch 64

RAG-Sequence and RAG-Token from the same starting point:

    rag-jax train --config configs/squad.py --run runs/squad-base $DATA \\
        --stage retriever --stage read_32 --stage read_96 --stage read
    rag-jax train --config configs/squad.py:token --run runs/squad-token $DATA --stage joint --init runs/squad-base

SQUAD is a directory with passages.jsonl, train.jsonl and dev.jsonl. The stages train the retriever on gold passages,
starting from the corpus' document frequencies (init="lexical"); the generator on windows around the answer that grow to
whole passages; and both jointly through the marginal likelihood, without retrieval labels. The generator has no
dropout: with it, it does not learn to copy from the passage in this time.

Measured (two CPU cores busy with other work; 12 minutes for the base, 4 for each joint stage), dev, 728 questions:
recall@1/5/20 54.1/76.6/86.5 (RAG-Sequence), 54.1/76.0/84.6 (RAG-Token), BM25 76.6/94.0/97.3; exact match 2.2 and 2.2,
F1 4.6 and 5.3, closed book 0.0 and 2.2. The limit is the data: 8,315 questions are too few to learn to read English
from scratch; the reader memorises them (0.95 nats a token on them) and copies spans that do not answer new ones.
"""

from ml_collections import ConfigDict

WIDTH = 128


def adam(learning_rate: float, schedule: str = "cosine", warmup: int = 50, **groups: float) -> ConfigDict:
    """Adam with these learning-rate factors of parameter groups; groups that are not named are frozen."""
    config = ConfigDict({"learning_rate": learning_rate, "schedule": schedule, "warmup_steps": warmup})
    config.b2, config.clip_norm = 0.98, 1.0
    config.groups = dict(groups)
    return config


def text_config(name: str, variant: str) -> ConfigDict:
    """The stages retriever, reading and joint training, for a corpus of some thousand passages."""
    c = ConfigDict()
    c.corpus, c.train, c.dev = f"data/{name}-corpus", f"data/{name}/train.jsonl", f"data/{name}/dev.jsonl"
    c.seed, c.target_length = 0, 16
    c.log_every, c.checkpoint_every, c.evaluate_every, c.evaluate_questions = 50, 500, 0, 200

    c.model = ConfigDict()
    c.model.variant, c.model.n_docs, c.model.tie_encoders = variant, 5, True
    c.model.source_length, c.model.question_length = 240, 40
    shape = {"width": WIDTH, "heads": 4, "norm": "pre", "init": "copy", "vocab_size": 0}
    c.model.encoder = ConfigDict(
        {**shape, "width": 512, "heads": 8, "hidden": 512, "layers": 1, "positions": 256, "dropout": 0.1}
    )
    c.model.encoder.init, c.model.encoder.pooling, c.model.encoder.vector_norm = "lexical", "mean", 5.0
    c.model.generator = ConfigDict(
        {**shape, "hidden": 2 * WIDTH, "encoder_layers": 2, "decoder_layers": 2, "positions": 320, "dropout": 0.0}
    )
    c.model.generator.logit_scale = WIDTH**-0.5

    def stage(name: str, steps: int, batch: int, optimizer: ConfigDict, **values: object) -> ConfigDict:
        config = ConfigDict({"name": name, "steps": steps, "batch": batch, **values})
        config.optimizer = optimizer
        return config

    read = {"objective": "rag", "documents": "gold"}
    c.stages = (
        stage("retriever", 150, 32, adam(3e-4, question_encoder=1.0), objective="contrastive"),
        stage("read_32", 1500, 16, adam(1.5e-3, "constant", generator=1.0), window=32, source_length=76, **read),
        stage("read_96", 1200, 16, adam(1.5e-3, generator=1.0), window=96, source_length=140, **read),
        stage("read", 300, 16, adam(6e-4, generator=1.0), **read),
        stage("joint", 60, 8, adam(5e-4, question_encoder=0.2, generator=1.0), refresh="30"),
    )
    return c


def get_config(variant: str = "sequence") -> ConfigDict:
    """variant: `sequence` (RAG-Sequence) or `token` (RAG-Token)."""
    return text_config("squad", variant)
