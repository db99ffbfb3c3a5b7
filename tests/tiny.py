"""A world, a corpus, a configuration and a run so small that training takes seconds, for the tests of training."""

from pathlib import Path

from ml_collections import ConfigDict

from rag_jax import __main__ as cli

ENTITIES = 40
STEPS = 100  # of the whole run


def stage(name: str, steps: int, **values) -> ConfigDict:
    groups = values.pop("groups")
    config = ConfigDict({"name": name, "steps": steps, "batch": 8, **values})
    config.optimizer = ConfigDict({"learning_rate": 3e-3, "schedule": "constant", "b2": 0.98, "groups": groups})
    return config


def get_config(data: str) -> ConfigDict:
    """`data` is a directory made by `make_data`."""
    c = ConfigDict()
    c.corpus, c.train, c.dev = f"{data}/corpus", f"{data}/world/train.jsonl", f"{data}/world/dev.jsonl"
    c.seed, c.target_length, c.log_every, c.checkpoint_every = 0, 12, 5, 10
    shape = {"width": 32, "heads": 2, "hidden": 64, "norm": "pre", "init": "copy", "vocab_size": 0, "dropout": 0.1}
    c.model = ConfigDict({"n_docs": 3, "tie_encoders": True, "source_length": 144, "question_length": 32})
    c.model.encoder = ConfigDict({**shape, "layers": 1, "positions": 96, "pooling": "mean"})
    c.model.generator = ConfigDict(
        {**shape, "encoder_layers": 1, "decoder_layers": 1, "positions": 160, "logit_scale": 32**-0.5}
    )
    encoder, generator = {"question_encoder": 1.0}, {"generator": 1.0}
    c.stages = (
        stage("retriever", 60, objective="contrastive", groups=encoder),
        stage("read", 20, documents="gold", window=16, source_length=64, groups=generator),
        stage("denoise", 10, objective="denoise", source_length=64, groups=generator),
        stage("joint", 10, n_docs=3, refresh_every=4, groups={**encoder, **generator}),
    )
    return c


def rag_jax(*words: object) -> int:
    """The command line in this process; its exit status."""
    return cli.main([str(word) for word in words])


def make_data(out: Path) -> Path:
    """world, the same edited, and a corpus of each with one pair of tokenizers."""
    for name, options in (("world", []), ("edited", ["--edit"])):
        assert rag_jax("world", "--out", out / name, "--entities", ENTITIES, "--workers", 1, *options) == 0
    train = ["--train-tokenizer", "--encoder-vocab", 400, "--generator-vocab", 600]
    lengths = ["--encoder-length", 96, "--generator-length", 128]
    assert rag_jax("corpus", out / "world/passages.jsonl", "--out", out / "corpus", *train, *lengths) == 0
    same = ["--tokenizers-from", out / "corpus"]
    assert rag_jax("corpus", out / "edited/passages.jsonl", "--out", out / "edited-corpus", *same) == 0
    return out
