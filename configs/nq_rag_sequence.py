"""RAG-Sequence on Natural Questions over DPR's Wikipedia (Lewis et al. 2020): BERT-base and BART-large; the 21,015,300
passages are searched inside the training step.

    rag-jax convert --question-encoder facebook/dpr-question_encoder-single-nq-base \\
        --context-encoder facebook/dpr-ctx_encoder-single-nq-base --generator facebook/bart-large \\
        --variant sequence --out models/rag-nq
    T=models/rag-nq/tokenizers
    rag-jax corpus psgs_w100.tsv.gz --out data/wiki-corpus \\
        --encoder-tokenizer $T/encoder --generator-tokenizer $T/generator
    rag-jax encode models/rag-nq --corpus data/wiki-corpus --out models/rag-nq/embeddings --dtype bfloat16
    rag-jax index models/rag-nq/embeddings --out indexes/wiki
    rag-jax train --config configs/nq_rag_sequence.py --run runs/nq_rag_sequence
    rag-jax evaluate runs/nq_rag_sequence --decoding configs/decoding.py:paper_sequence

psgs_w100.tsv.gz is DPR's; data/nq/*.jsonl has one question with its answers on each line. The hyper-parameters are
those of transformers' recipe: batches of 64 (question, answer) pairs, AdamW at 3e-5 with 500 steps of warm-up, falling
to 0, weight decay 0.001, clipping at 0.1, dropout and label smoothing 0.1, questions of 128 tokens, answers of 25,
joined inputs of 300. The context encoder and the index are frozen. Questions and answers are batched by length
(`buckets`), so that few batches have these full widths: with passages of 160 tokens and questions of up to 16, joined
inputs have 192.

The batch must be a multiple of the number of devices on `data` and `fsdp`. For 256 chips: --set stages.joint.batch=256
--set mesh.data=-1 --set mesh.fsdp=8. `rag-jax compile --layers 1` with these and --topology v5e:16x16 --passages
21015300 --effort -1 reports: at most 4.0 of 16 GiB a chip, 43 ms a step at best, bound by memory traffic.
"""

from ml_collections import ConfigDict


def optimizer(groups: dict[str, float], **values: object) -> ConfigDict:
    """The optimizer of transformers' recipe; groups: learning-rate factors; values: fields to change."""
    recipe = {"learning_rate": 3e-5, "warmup_steps": 500, "weight_decay": 1e-3, "clip_norm": 0.1}
    return ConfigDict({**recipe, "groups": groups, **values})


def nq_config(variant: str, generator: dict[str, object], batch: int = 64) -> ConfigDict:
    """Joint training of question encoder and generator, some 15 epochs; generator: its settings."""
    c = ConfigDict()
    c.corpus, c.train, c.dev = "data/wiki-corpus", "data/nq/train.jsonl", "data/nq/dev.jsonl"
    c.init, c.index = "models/rag-nq", "indexes/wiki"
    c.seed, c.target_length, c.answers = 0, 25, "every"
    c.log_every, c.checkpoint_every, c.evaluate_every, c.evaluate_questions = 50, 500, 500, 512
    c.mesh = ConfigDict({"fsdp": -1})
    c.search = ConfigDict({"dtype": "bfloat16"})

    c.model = ConfigDict({"variant": variant, "n_docs": 5, "source_length": 300, "question_length": 128})
    c.model.encoder = ConfigDict({"dtype": "bfloat16", "remat": "full"})
    c.model.generator = ConfigDict({"dtype": "bfloat16", "remat": "full", **generator})

    stage = ConfigDict({"name": "joint", "steps": 20_000, "batch": batch, "n_docs": 5, "label_smoothing": 0.1})
    stage.buckets, stage.target_buckets = (16, 32), (8,)
    stage.optimizer = optimizer({"question_encoder": 1.0, "generator": 1.0})
    c.stages = (stage,)
    return c


def get_config() -> ConfigDict:
    return nq_config("sequence", {"kind": "bart"})
