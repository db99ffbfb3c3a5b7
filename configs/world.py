"""The quickstart: everything learned from scratch on the built-in world (`rag-jax world`), on two CPU cores.

    rag-jax train --config configs/world.py --run runs/world

Stages: the retriever is warmed up on gold passages, first with in-batch negatives, then with hard negatives from its
own index; the generator learns to read windows around the answer that grow to the whole passage; then both are trained
jointly through the marginal likelihood, on retrieved passages and without retrieval labels. `configs/world.py:token`
trains RAG-Token. The paths data/world and data/world-corpus can be changed with --set.
"""

from ml_collections import ConfigDict

WIDTH = 128


def adam(learning_rate: float, schedule: str = "cosine", final: float = 0.0, **groups: float) -> ConfigDict:
    """Adam with these learning-rate factors of parameter groups; groups that are not named are frozen."""
    config = ConfigDict({"learning_rate": learning_rate, "schedule": schedule, "final": final, "warmup_steps": 20})
    config.b2, config.clip_norm = 0.98, 1.0
    config.groups = dict(groups)
    return config


def get_config(variant: str = "sequence") -> ConfigDict:
    """variant: `sequence` (RAG-Sequence) or `token` (RAG-Token)."""
    c = ConfigDict()
    c.corpus, c.train, c.dev = "data/world-corpus", "data/world/train.jsonl", "data/world/dev.jsonl"
    c.seed, c.target_length = 0, 10
    c.log_every, c.checkpoint_every, c.evaluate_every, c.evaluate_questions = 25, 400, 0, 200

    c.model = ConfigDict()
    c.model.variant, c.model.n_docs, c.model.tie_encoders = variant, 4, True
    c.model.source_length, c.model.question_length = 164, 28
    shape = {"width": WIDTH, "heads": 4, "dropout": 0.0, "norm": "pre", "init": "copy", "vocab_size": 0}
    c.model.encoder = ConfigDict({**shape, "hidden": 2 * WIDTH, "layers": 1, "positions": 160, "pooling": "mean"})
    c.model.encoder.dropout = 0.1
    c.model.generator = ConfigDict({**shape, "hidden": 2 * WIDTH, "encoder_layers": 2, "decoder_layers": 2})
    c.model.generator.positions, c.model.generator.logit_scale = 192, WIDTH**-0.5

    def stage(name: str, steps: int, batch: int, optimizer: ConfigDict, **values: object) -> ConfigDict:
        config = ConfigDict({"name": name, "steps": steps, "batch": batch, **values})
        config.optimizer = optimizer
        return config

    read = {"objective": "rag", "documents": "gold"}
    find = {"objective": "contrastive"}
    c.stages = (
        stage("retriever", 160, 48, adam(3e-3, question_encoder=1.0), **find),
        stage("retriever_hard", 160, 24, adam(1e-3, question_encoder=1.0), hard_negatives=1, refresh="40", **find),
        stage("read_24", 400, 16, adam(2e-3, "constant", generator=1.0), window=24, source_length=56, **read),
        stage("read_64", 1500, 16, adam(1.9e-3, final=0.35, generator=1.0), window=64, source_length=96, **read),
        stage("read", 1400, 16, adam(6.5e-4, final=0.1, generator=1.0), **read),
        stage("joint", 50, 12, adam(3e-4, question_encoder=0.3, generator=1.0), n_docs=3),
    )
    return c
