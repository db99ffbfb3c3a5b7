"""Natural Questions with their gold passages as corpus, everything learned from scratch on two CPU cores.

    rag-jax corpus NQ_GOLD/passages.jsonl --out data/nq_gold-corpus --train-tokenizer \\
        --encoder-vocab 8192 --generator-vocab 8192 --encoder-length 160 --generator-length 160
    DATA="--set train=NQ_GOLD/train.jsonl --set dev=NQ_GOLD/dev.jsonl"
    rag-jax train --config configs/nq_gold.py --run runs/nq_gold $DATA
    rag-jax evaluate runs/nq_gold --batch 64

RAG-Sequence and RAG-Token from the same starting point:

    rag-jax train --config configs/nq_gold.py --run runs/nq_gold-base $DATA \\
        --stage retriever --stage read_32 --stage read_96 --stage read
    rag-jax train --config configs/nq_gold.py:token --run runs/nq_gold-token $DATA \\
        --stage joint --init runs/nq_gold-base

The stages are those of configs/squad.py.

Measured (two CPU cores busy with other work; 14 minutes for the base, 5 for each joint stage), dev, 1,339 questions:
recall@1/5/20 49.1/72.8/83.6 (RAG-Sequence), 49.1/73.0/84.2 (RAG-Token), BM25 61.5/83.9/91.5; exact match 10.7 and 9.5,
F1 14.7 and 15.0, closed book 0.3 and 2.4.
"""

from ml_collections import ConfigDict
from squad import text_config  # the file beside this one


def get_config(variant: str = "sequence") -> ConfigDict:
    """variant: `sequence` (RAG-Sequence) or `token` (RAG-Token)."""
    c = text_config("nq_gold", variant)
    c.stages[-1].refresh = ""  # embedding 11,696 passages takes longer than 30 steps
    return c
