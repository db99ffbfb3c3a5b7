"""A world, a corpus, a configuration and a run that are small enough to train in seconds."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from rag_jax import __main__ as cli
from rag_jax.corpus.directory import Corpus
from rag_jax.models.bert import BertConfig
from rag_jax.rag import Rag, RagConfig
from rag_jax.runs import checkpoint
from rag_jax.runs import directory as runs

ENTITIES = 40
STEPS = 110  # of the whole run


def stage(name: str, steps: int, **values) -> ConfigDict:
    groups = values.pop("groups")
    config = ConfigDict({"name": name, "steps": steps, "batch": 8, **values})
    config.optimizer = ConfigDict({"learning_rate": 3e-3, "schedule": "constant", "b2": 0.98, "groups": groups})
    return config


def get_config(data: str) -> ConfigDict:
    """The configuration of a tiny run; data: a directory made by `make_data`."""
    c = ConfigDict()
    c.corpus, c.train, c.dev = f"{data}/corpus", f"{data}/world/train.jsonl", f"{data}/world/dev.jsonl"
    c.seed, c.target_length, c.log_every, c.checkpoint_every = 0, 12, 5, 10
    c.evaluate_every, c.evaluate_questions = 60, 8
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
        stage("joint", 20, n_docs=3, refresh="4", groups={**encoder, **generator}),
    )
    return c


def rag_jax(*words: object) -> int:
    """Runs the command line in this process; its exit status."""
    return cli.main([str(word) for word in words])


def make_data(out: Path) -> Path:
    """Makes a world, the same world edited, and a corpus of each with the same tokenizers."""
    for name, options in (("world", []), ("edited", ["--edit"])):
        assert rag_jax("world", "--out", out / name, "--entities", ENTITIES, "--workers", 1, *options) == 0
    train = ["--train-tokenizer", "--encoder-vocab", 400, "--generator-vocab", 600]
    lengths = ["--encoder-length", 96, "--generator-length", 128]
    assert rag_jax("corpus", out / "world/passages.jsonl", "--out", out / "corpus", *train, *lengths) == 0
    same = ["--tokenizers-from", out / "corpus"]
    assert rag_jax("corpus", out / "edited/passages.jsonl", "--out", out / "edited-corpus", *same) == 0
    return out


def untrained_run(corpus_dir: Path, out: Path, seed: int = 0, **encoder: Any) -> Path:
    """Writes a run with a randomly initialised encoder, for tests that need some embeddings."""
    corpus = Corpus.open(corpus_dir)
    shape = {"width": 32, "layers": 1, "heads": 2, "hidden": 64, "positions": 96, "pooling": "mean", **encoder}
    model = RagConfig(encoder=BertConfig(vocab_size=corpus.encoder_tokenizer.vocab_size, **shape), generator=None)
    model = dataclasses.replace(model, tie_encoders=True)
    out.mkdir(parents=True)
    runs.write_empty_run(out, model, runs.identity(corpus))
    shutil.copytree(corpus.directory / "tokenizers", out / "tokenizers")
    params = nn.unbox(Rag(model).init(jax.random.key(seed)))
    checkpoint.save_params(out / "params", jax.tree.map(lambda x: x + 0.05, params).items())
    return out


def environment() -> dict[str, str]:
    """The environment of a separate process with one device."""
    return os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")}


def start(*words: object) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "rag_jax", *map(str, words)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def train(data: Path, run: Path, *words: object) -> dict[str, Any]:
    """Trains in a process of its own; the printed result, and as "stderr" what it said on the way."""
    process = start("train", "--json", "--config", f"{__file__}:{data}", "--run", run, *words)
    out, said = process.communicate()
    assert process.returncode == 0, said
    return {**json.loads(out), "stderr": said}
