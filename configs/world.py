"""The quickstart: everything learned from scratch on the built-in world (`rag-jax world`), on two CPU cores.

    rag-jax train --config configs/world.py --run runs/world

Stages: the retriever is warmed up on gold passages; the generator learns to read, from windows of a passage around
the answer that grow to the whole passage (without this curriculum it does not learn which name belongs to the
question, see CONTRIBUTING.md); then both are trained together through the marginal likelihood, on retrieved passages
and no labels. `configs/world.py:token` trains RAG-Token. Paths: data/world and data/world-corpus, changed with --set.
"""

from ml_collections import ConfigDict

WIDTH = 128


def adam(learning_rate: float, schedule: str = "linear", warmup: int = 50, **groups: float) -> ConfigDict:
    """Adam for the named groups; the others are frozen."""
    config = ConfigDict()
    config.learning_rate, config.schedule, config.warmup_steps = learning_rate, schedule, warmup
    config.b2, config.clip_norm = 0.98, 1.0
    config.groups = dict(groups)
    return config


def get_config(variant: str = "sequence") -> ConfigDict:
    """`sequence` or `token`."""
    c = ConfigDict()
    c.corpus, c.train, c.dev = "data/world-corpus", "data/world/train.jsonl", "data/world/dev.jsonl"
    c.seed, c.target_length = 0, 12
    c.log_every, c.checkpoint_every, c.evaluate_every, c.evaluate_questions = 25, 400, 0, 200

    c.model = ConfigDict()
    c.model.variant, c.model.n_docs, c.model.tie_encoders = variant, 4, True
    c.model.source_length, c.model.question_length = 208, 32
    shape = {
        "width": WIDTH,
        "heads": 4,
        "hidden": 4 * WIDTH,
        "dropout": 0.0,
        "norm": "pre",
        "init": "copy",
        "vocab_size": 0,
    }
    c.model.encoder = ConfigDict({**shape, "layers": 2, "positions": 160, "pooling": "mean"})
    c.model.generator = ConfigDict(
        {**shape, "encoder_layers": 2, "decoder_layers": 2, "positions": 256, "logit_scale": WIDTH**-0.5}
    )

    def read(name: str, window: int, length: int, steps: int, schedule: str) -> ConfigDict:
        stage = ConfigDict({"name": name, "objective": "rag", "documents": "gold", "window": window})
        stage.source_length, stage.steps, stage.batch = length, steps, 32
        stage.optimizer = adam(1e-3, schedule, generator=1.0)
        return stage

    retriever = ConfigDict({"name": "retriever", "objective": "contrastive", "steps": 300, "batch": 64})
    retriever.optimizer = adam(1e-3, question_encoder=1.0)
    joint = ConfigDict(
        {"name": "joint", "objective": "rag", "steps": 200, "batch": 16, "n_docs": 4, "refresh_every": 100}
    )
    joint.optimizer = adam(3e-4, question_encoder=0.3, generator=1.0)
    c.stages = (
        retriever,
        read("read_24", 24, 64, 500, "constant"),
        read("read_64", 64, 104, 800, "constant"),
        read("read", 0, 208, 800, "linear"),
        joint,
    )
    return c
