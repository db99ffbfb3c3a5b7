"""Synthetic loads of `rag-jax bench train`: a model, a corpus, an index and questions, all random and of fixed shape.

No data and no corpus are needed. All sequences have their full length, so that there is no padding.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import numpy as np

from rag_jax.errors import InputError
from rag_jax.index.device_index import Index
from rag_jax.models.bart import BartConfig
from rag_jax.models.bert import BertConfig
from rag_jax.models.decoder_only import LmConfig
from rag_jax.models.layers import Remat
from rag_jax.models.protocols import GeneratorConfig
from rag_jax.rag import Rag, RagConfig, TokenTables
from rag_jax.system import sharding
from rag_jax.training import optimizer
from rag_jax.training.objectives.rag import MarginalLikelihood
from rag_jax.training.optimizer import OptimizerConfig
from rag_jax.training.stage import StageConfig, StepSetting

DTYPES = ("float32", "bfloat16")
PREFIX = (0,)  # bos, before every joined input


@dataclass(frozen=True)
class StepLoad:
    """Sizes of a step's inputs and of the model.

    The question encoder is a BERT; the context encoder is frozen and not part of the model, as in the paper.

    questions: B.
    docs: K, out of `passages` in the index.
    source: L, tokens of a joined input.
    target: T, tokens of a target.
    question: tokens of a question.
    generator: `bart`, or `lm` for a decoder-only model like Llama, with `decoder_layers` layers.
    width, encoder_layers, decoder_layers, heads, hidden, vocabulary: of the generator.
    bert_width, bert_layers, bert_heads, bert_hidden, bert_vocabulary: of the question encoder.
    groups: of an `lm`, groups of heads that share keys and values; 0: every head has its own.
    dropout: of both models.
    attention_dropout: of the generator's attention weights; in the BERT it is `dropout`.
    remat: see models.layers.
    accumulate: parts of a batch whose gradients are summed.
    doc_chunk, logit_chunk: see `Rag.likelihood`; by default the logits are kept, as in transformers.
    moments: type of Adam's moments.
    """

    questions: int = 8
    docs: int = 5
    source: int = 128
    target: int = 24
    question: int = 32
    passages: int = 65536
    width: int = 128
    encoder_layers: int = 2
    decoder_layers: int = 2
    heads: int = 4
    hidden: int = 512
    vocabulary: int = 8192
    bert_width: int = 128
    bert_layers: int = 2
    bert_heads: int = 4
    bert_hidden: int = 512
    bert_vocabulary: int = 8192
    generator: Literal["bart", "lm"] = "bart"
    groups: int = 0
    variant: Literal["sequence", "token"] = "token"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    dtype: str = "float32"
    remat: Remat = "none"
    accumulate: int = 1
    doc_chunk: int = 0
    logit_chunk: int = 0
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    moments: Literal["float32", "bfloat16", "int8"] = "float32"


MEDIUM: dict[str, Any] = {
    "width": 256, "encoder_layers": 4, "decoder_layers": 4, "hidden": 1024, "vocabulary": 30522,
    "bert_width": 256, "bert_layers": 4, "bert_hidden": 1024, "bert_vocabulary": 30522,
}  # fmt: skip
BASE: dict[str, Any] = {
    "width": 768, "encoder_layers": 6, "decoder_layers": 6, "heads": 12, "hidden": 3072, "vocabulary": 50265,
    "bert_width": 768, "bert_layers": 12, "bert_heads": 12, "bert_hidden": 3072, "bert_vocabulary": 30522,
}  # fmt: skip
BART_LARGE: dict[str, Any] = {"width": 1024, "encoder_layers": 12, "decoder_layers": 12, "heads": 16, "hidden": 4096}
SMOLLM2_135M: dict[str, Any] = {
    "generator": "lm", "width": 576, "encoder_layers": 0, "decoder_layers": 30, "heads": 9, "groups": 3, "hidden": 1536,
    "vocabulary": 49152, "dropout": 0.0, "bert_width": 64, "bert_layers": 1, "bert_hidden": 64, "bert_vocabulary": 1000,
}  # fmt: skip
LOADS = {
    "small": StepLoad(),
    "medium": StepLoad(**MEDIUM),
    "base": StepLoad(questions=4, **BASE),
    "smollm2-135m": StepLoad(docs=1, source=208, target=16, question=48, logit_chunk=2048, **SMOLLM2_135M),
    "bert-base-bart-large": StepLoad(questions=16, source=256, target=32, dtype="bfloat16", **(BASE | BART_LARGE)),
}


def check(load: StepLoad) -> None:
    """InputError for shapes that do not fit together."""
    for name, width, heads in (("", load.width, load.heads), ("bert-", load.bert_width, load.bert_heads)):
        if width % heads:
            raise InputError(f"--{name}width {width} --{name}heads {heads}: the width must be a multiple of the heads")
    if load.dtype not in DTYPES or not 0 <= load.dropout < 1 or not 0 <= load.attention_dropout < 1:
        raise InputError(f"--dtype must be {' or '.join(DTYPES)}, and a dropout at least 0 and below 1")
    if load.question + len(PREFIX) >= load.source:
        raise InputError(f"--source {load.source} leaves no room for a passage before a question of {load.question}")
    for field in dataclasses.fields(StepLoad):
        if (words := get_args(field.type)) and getattr(load, field.name) not in words:
            raise InputError(f"--{field.name} {getattr(load, field.name)}: one of {', '.join(words)}")
    if load.groups and (load.generator != "lm" or load.heads % load.groups):
        raise InputError(f"--groups {load.groups}: of a decoder-only model, and a divisor of --heads {load.heads}")
    if bool(load.encoder_layers) != (load.generator == "bart"):
        raise InputError(f"--encoder-layers {load.encoder_layers}: a bart has some, an lm 0")
    optimizer.check(stage(load).optimizer)
    if load.questions % load.accumulate or (load.doc_chunk and load.docs % load.doc_chunk):
        raise InputError("--questions must be a multiple of --accumulate, and --docs of --doc-chunk")
    if load.docs > load.passages or load.target < 3:
        raise InputError(f"--docs {load.docs} of --passages {load.passages}, --target {load.target} (at least 3)")


def model(load: StepLoad) -> Rag:
    """The model of a load."""
    bert = BertConfig(
        vocab_size=load.bert_vocabulary, width=load.bert_width, layers=load.bert_layers, heads=load.bert_heads,
        hidden=load.bert_hidden, positions=max(512, load.question), dropout=load.dropout, dtype=load.dtype,
        remat=load.remat,
    )  # fmt: skip
    return Rag(
        RagConfig(
            load.variant, bert, GENERATORS[load.generator](load), context_encoder=False, n_docs=load.docs,
            source_length=load.source, question_length=load.question,
        )
    )  # fmt: skip


def bart(load: StepLoad) -> BartConfig:
    return BartConfig(
        vocab_size=load.vocabulary, width=load.width, encoder_layers=load.encoder_layers,
        decoder_layers=load.decoder_layers, heads=load.heads, hidden=load.hidden,
        positions=max(512, load.source, load.target), dropout=load.dropout, attention_dropout=load.attention_dropout,
        dtype=load.dtype, remat=load.remat,
    )  # fmt: skip


def lm(load: StepLoad) -> LmConfig:
    """A decoder-only generator like Llama (Touvron et al. 2023): RMSNorm, gated SiLU, rotary positions, no biases.

    The output layer is the token embedding.
    """
    return LmConfig(
        vocab_size=load.vocabulary, width=load.width, layers=load.decoder_layers, heads=load.heads, groups=load.groups,
        hidden=load.hidden, positions=max(512, load.source + load.target), dropout=load.dropout,
        attention_dropout=load.attention_dropout, activation="silu", gated=True, norm_kind="rms",
        position_kind="rotary", qkv_bias=False, out_bias=False, mlp_bias=False, bos_id=0, pad_id=1, eos_id=2,
        dtype=load.dtype, remat=load.remat,
    )  # fmt: skip


GENERATORS: dict[str, Callable[[StepLoad], GeneratorConfig]] = {"bart": bart, "lm": lm}


def stage(load: StepLoad) -> StageConfig:
    """A stage of joint training of question encoder and generator, with clipped gradients."""
    changes = OptimizerConfig(
        learning_rate=3e-5, schedule="constant", weight_decay=0.01, groups={"question_encoder": 1.0, "generator": 1.0},
        kind=load.optimizer, moments=load.moments,
    )  # fmt: skip
    likelihood = MarginalLikelihood(n_docs=load.docs, doc_chunk=load.doc_chunk, logit_chunk=load.logit_chunk)
    return StageConfig("bench", likelihood, batch=load.questions, accumulate=load.accumulate, optimizer=changes)


def setting(load: StepLoad, mesh: jax.sharding.Mesh) -> StepSetting:
    return StepSetting(model(load), stage(load), mesh, load.passages, PREFIX)


def batch(load: StepLoad, mesh: jax.sharding.Mesh, seed: int) -> dict[str, jax.Array]:
    """A batch on the mesh: questions for encoder and generator, and targets `<s> y </s>`; no gold passages."""
    rng, B = np.random.default_rng(seed), load.questions

    def ids(length: int, vocabulary: int) -> np.ndarray:
        return rng.integers(3, vocabulary, (B, length)).astype(np.int32)

    labels_BT = ids(load.target, load.vocabulary)
    labels_BT[:, 0], labels_BT[:, -1] = 0, 2
    full_B = np.full(B, load.question, np.int32)
    arrays = {
        "question_ids": ids(load.question, load.bert_vocabulary), "question_length": full_B,
        "tail_ids": ids(load.question, load.vocabulary), "tail_length": full_B,
        "labels": labels_BT, "gold": np.full((B, 1), -1, np.int32),
    }  # fmt: skip
    return sharding.shard_batch(mesh, arrays)


def corpus(load: StepLoad, mesh: jax.sharding.Mesh, seed: int = 0) -> tuple[Index, TokenTables]:
    """The index and the token table, on the mesh; inner products with the index's rows are about 1.

    The encoder's passages have one token, since no context encoder runs.
    """
    rng, N = np.random.default_rng(seed), load.passages
    rows_NE = rng.normal(0, load.bert_width**-0.5, (N, load.bert_width)).astype(np.float32)
    ids_NL = rng.integers(3, load.vocabulary, (N, load.source)).astype(np.uint16)
    full_N = np.full(N, load.source, np.uint16)
    tables = (np.ones((N, 1), np.uint16), np.ones(N, np.uint16), ids_NL, full_N)
    index = Index(sharding.shard_rows(mesh, rows_NE, 0), sharding.shard_rows(mesh, np.zeros(N, np.int32), 0))
    return index, TokenTables(*(sharding.shard_rows(mesh, table, 1) for table in tables))


def model_flops(load: StepLoad) -> dict[str, float]:
    """Floating-point operations of the matmuls of one step, by part of the model; 2 per multiply-add.

    They are three times those of the forward pass, which the gradients take twice more; the search counts once. What
    is recomputed to save memory is not counted.
    """
    c = load
    sources, targets, D = c.questions * c.docs * c.source, c.questions * c.docs * c.target, c.width
    asked, E = c.questions * c.question, c.bert_width

    def layer(width: int, hidden: int, seen: int) -> float:
        """Operations of one token in self-attention, over `seen` tokens, and feed-forward."""
        return 2.0 * (4 * width * width + 2 * width * hidden + 2 * seen * width)

    cross = targets * 2.0 * (2 * D * D + 2 * c.source * D) + sources * 2.0 * 2 * D * D
    decoder = c.decoder_layers * (targets * layer(D, c.hidden, c.target) + cross)
    if c.generator == "lm":
        own = 2 * D * D * (c.groups or c.heads) / c.heads  # parameters of a layer's keys and values
        kept = own + 2 * D * D + 3 * D * c.hidden  # ... and of all its kernels
        prefix, answer = 2 * kept + 4.0 * c.source * D, 2 * kept + 4.0 * (c.source + c.target) * D
        # of the prefix in the last layer, only keys and values are read
        decoder = sources * ((c.decoder_layers - 1) * prefix + 2 * own) + c.decoder_layers * targets * answer
    return {
        "question_encoder": 3 * asked * c.bert_layers * layer(E, c.bert_hidden, c.question),
        "generator_encoder": 3 * sources * c.encoder_layers * layer(D, c.hidden, c.source),
        "generator_decoder": 3 * decoder,
        "vocabulary": 3 * targets * 2.0 * D * c.vocabulary,
        "search": c.questions * 2.0 * c.passages * E,
    }


def tokens(load: StepLoad) -> int:
    """Tokens that the generator processes in a step: B * K sources and targets, without the last target token."""
    return load.questions * load.docs * (load.source + load.target - 1)


def describe(load: StepLoad) -> str:
    """One readable line about a load."""
    c = load
    return (
        f"RAG-{c.variant.capitalize()} B={c.questions} K={c.docs} L={c.source} T={c.target} N={c.passages:,}; BERT "
        f"D={c.bert_width} layers={c.bert_layers} V={c.bert_vocabulary}, {c.generator.upper()} D={c.width} "
        f"layers={c.encoder_layers}+{c.decoder_layers} V={c.vocabulary}, {c.dtype}, dropout {c.dropout}"
    )
