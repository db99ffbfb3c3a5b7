"""DPR on Natural Questions (Karpukhin et al. 2020): two BERT-base encoders, in-batch negatives and BM25's.

    rag-jax convert --question-encoder google-bert/bert-base-uncased --context-encoder google-bert/bert-base-uncased \\
        --out models/bert2
    T=models/bert2/tokenizers/encoder
    rag-jax corpus psgs_w100.tsv.gz --out data/wiki-corpus-bert --encoder-tokenizer $T --generator-tokenizer $T
    rag-jax train --config configs/dpr_nq.py --run runs/dpr_nq
    rag-jax evaluate runs/dpr_nq --retrieval-only

data/nq/biencoder-nq-*.json are DPR's own training files: for every question its positive passages, and hard negatives
that BM25 found. As in the paper: batches of 128 questions, each with one of its hard negatives, 40 epochs over the
58,880 questions with a positive passage, Adam at 2e-5 with linear warm-up and decay, dropout 0.1. Passages have 160
tokens here, 256 in the paper. No index is needed. A further stage with hard_negatives=1 and negatives="retrieved" would
use the negatives that its own index finds (as ANCE does).

The batch must be a multiple of the number of devices on `data` and `fsdp`: --set stages.dpr.batch=256 for 256 chips.
`rag-jax compile --layers 1` with that, --topology v5e:16x16, --set mesh.data=-1, --set mesh.fsdp=8 and --passages
21015300 reports: at most 1.3 of 16 GiB a chip, 6.2 ms a step at best, bound by the links; 9,200 steps take at least a
minute.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.corpus = "data/wiki-corpus-bert"
    c.train, c.dev = (f"dpr:data/nq/biencoder-nq-{split}.json" for split in ("train", "dev"))
    c.init = "models/bert2"
    c.seed, c.log_every, c.checkpoint_every, c.evaluate_every = 0, 50, 500, 0
    c.search = ConfigDict({"dtype": "bfloat16"})
    c.model = ConfigDict({"question_length": 64, "generator": None})
    c.model.encoder = ConfigDict({"dtype": "bfloat16", "dropout": 0.1})

    stage = ConfigDict({"name": "dpr", "objective": "contrastive", "steps": 18_400, "batch": 128})
    stage.hard_negatives, stage.negatives, stage.buckets = 1, "given", (16, 32)
    stage.optimizer = ConfigDict({"learning_rate": 2e-5, "warmup_steps": 1_237, "clip_norm": 2.0})
    stage.optimizer.groups = {"question_encoder": 1.0, "context_encoder": 1.0}
    c.stages = (stage,)
    return c
