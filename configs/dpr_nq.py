"""DPR on Natural Questions (Karpukhin et al. 2020): two BERT-base encoders, in-batch negatives, then hard negatives.

    rag-jax convert --question-encoder google-bert/bert-base-uncased --context-encoder google-bert/bert-base-uncased \\
        --out models/bert2
    T=models/bert2/tokenizers/encoder
    rag-jax corpus psgs_w100.tsv.gz --out data/wiki-corpus-bert --encoder-tokenizer $T --generator-tokenizer $T
    rag-jax train --config configs/dpr_nq.py --run runs/dpr_nq
    rag-jax evaluate runs/dpr_nq --retrieval-only

data/nq/*.jsonl names the right passages of a question as positive_passage_ids. As in the paper: 128 questions, 40
epochs of the 58,880 with a passage, Adam at 2e-5 with linear warm-up and decay, dropout 0.1, passages of 256 tokens
there and of 160 here. Its hard negatives are BM25's; those of the second stage are what the index itself finds (as
ANCE), embedded with the encoder of the first.

The batch must be a multiple of the devices of `data` and `fsdp`: --set stages.in_batch.batch=256 for 256 chips.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.corpus, c.train, c.dev = "data/wiki-corpus-bert", "data/nq/train.jsonl", "data/nq/dev.jsonl"
    c.init = "models/bert2"
    c.seed, c.log_every, c.checkpoint_every, c.evaluate_every = 0, 50, 500, 0
    c.search = ConfigDict({"dtype": "bfloat16"})
    c.model = ConfigDict({"question_length": 64, "generator": None})
    c.model.encoder = ConfigDict({"dtype": "bfloat16", "dropout": 0.1})

    def stage(name: str, steps: int, warmup: int, **values: object) -> ConfigDict:
        config = ConfigDict({"name": name, "objective": "contrastive", "steps": steps, "batch": 128, **values})
        config.optimizer = ConfigDict({"learning_rate": 2e-5, "warmup_steps": warmup, "clip_norm": 2.0})
        config.optimizer.groups = {"question_encoder": 1.0, "context_encoder": 1.0}
        return config

    c.stages = (stage("in_batch", 18_400, 1_237), stage("hard", 4_600, 100, hard_negatives=1))
    return c
