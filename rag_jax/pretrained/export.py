"""`save_pretrained`: writes a model as directories that transformers and sentence-transformers load."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from rag_jax.data import tokenizers
from rag_jax.errors import InputError
from rag_jax.models.bert import BertConfig
from rag_jax.models.decoder_only import LmConfig
from rag_jax.models.hf import ENCODERS, GENERATORS, composite, naming, sentence
from rag_jax.models.hf.sentence import Layout
from rag_jax.models.protocols import GeneratorConfig
from rag_jax.pretrained.as_run import SENTENCE, TOKENIZER_SETTINGS
from rag_jax.pretrained.describe import describe_generation, describe_part, encoder_kind, layout_of
from rag_jax.pretrained.encoder_files import BY_ARCHITECTURE
from rag_jax.pretrained.hub import CONFIG, EXPORTED, GENERATION, write_json
from rag_jax.pretrained.parts import ARCHITECTURES, SIDES
from rag_jax.pretrained.pieces import Piece, family_name, write_pieces
from rag_jax.pretrained.source import TOKENIZERS
from rag_jax.pretrained.tensor_files import SHARD_BYTES
from rag_jax.pretrained.weights import LazyParams
from rag_jax.rag import Params, Rag
from rag_jax.system import files

KIND, VERSION = EXPORTED, 1


def save_pretrained(
    path: str | Path,
    rag: Rag,
    params: Params | LazyParams,
    *,
    part: str | None = None,
    tokenizers_from: str | Path | None = None,
    original: dict[str, dict[str, Any]] | None = None,
    context_inside: bool = False,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    answering: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a directory that transformers loads: RagSequenceForGeneration or RagTokenForGeneration, or a single part.

    params: a tree, or the lazy one of `open_pretrained`, of which each tensor is read when it is written.
    part: question_encoder, context_encoder or generator; None for the whole model (for the question encoder, where
        there is no generator).
    tokenizers_from: a directory with the tokenizers `encoder` and `generator`, such as a run's.
    original: file name -> content of the configuration files that the model came with (see `as_run.provenance`); their
        settings that have no counterpart here are kept.
    context_inside: write the context encoder into the checkpoint, not into a folder of its own.
    shard_bytes: the largest number of bytes of weights in one file.
    overwrite: replace an earlier export at `path`.
    answering: the section of the run's configuration, for generation_config.json.
    InputError for a model that has no class in transformers.
    """
    if part is not None and part not in SIDES:
        raise InputError(f"part {part!r} is not one of {', '.join(SIDES)}")
    if not isinstance(params, LazyParams):
        trees = params
        params = LazyParams(trees, lambda side: iter(flatten_dict(trees[side], sep="/").items()))
    original = original or {}
    config, beside = original.get(CONFIG, {}), original.get(GENERATION)
    answering = answering or {}
    out = Path(path)
    with files.new_directory(out, KIND, overwrite=overwrite) as temporary:
        if part is None and rag.config.generator is not None:
            write_rag(temporary, rag, params, config, beside, answering, context_inside, shard_bytes)
            roles = dict(TOKENIZERS)
        elif part == "generator":
            first = config.get("generator", {})
            first = composite.over(config, first) if config.get("model_type") == "rag" else first
            write_generator(temporary, rag.config.reader, params, first, beside, answering, shard_bytes)
            roles = {"generator": ""}
        else:
            side = part or "question_encoder"
            if side == "context_encoder" and not rag.config.context_encoder:
                raise InputError("this model has no context encoder")
            theirs = config.get(side) or config.get("question_encoder", {})
            files_beside = original.get(SENTENCE, {}).get(side) or original.get(SENTENCE, {}).get("question_encoder")
            write_encoder(temporary, rag, params, side, theirs, shard_bytes, files_beside)
            roles = {"encoder": ""}
        if tokenizers_from is not None:
            for role, folder in roles.items():
                tokenizers.load(Path(tokenizers_from) / role).save(temporary / folder)
                for name, content in original.get(TOKENIZER_SETTINGS, {}).get(role, {}).items():
                    write_json(temporary / folder / name, content)
        files.write_manifest(temporary, KIND, VERSION, {})
    return out


def write_rag(
    out: Path,
    rag: Rag,
    params: LazyParams,
    original: dict[str, Any],
    beside: dict[str, Any] | None,
    answering: Mapping[str, Any],
    context_inside: bool,
    shard_bytes: int,
) -> None:
    """Writes a directory for RagSequenceForGeneration or RagTokenForGeneration.

    original: config.json that the model came with. beside: generation_config.json that it came with, or None.
    The context encoder goes into its own folder, for DPRContextEncoder, or inside the checkpoint (`context_inside`).
    """
    model, generator = rag.config, rag.config.reader
    parts: dict[str, Any] = {key: original.get(key) or {} for key in ("question_encoder", "generator")}
    kind = parts["generator"].get("model_type") or family_name(generator)
    if isinstance(generator, LmConfig):
        raise InputError(
            "Hugging Face's RAG takes encoder-decoder generators only; write this one with --part generator"
        )
    if encoder_kind(model.encoder, "question_encoder", {}) != "dpr":
        raise InputError(
            "Hugging Face's RAG has DPR encoders only (pooling='cls', vector_norm=0), and this model pools otherwise; "
            "write its parts with --part question_encoder, --part context_encoder and --part generator"
        )
    pieces = [
        Piece("question_encoder", ENCODERS["dpr"], model.encoder, "rag.question_encoder."),
        Piece("generator", GENERATORS[kind], generator, "rag.generator."),
    ]
    if context_inside:
        if "context_encoder" not in params.places:
            raise InputError("this model has no context encoder of its own to write inside")
        pieces.insert(1, Piece("context_encoder", ENCODERS["dpr_context"], model.encoder, "rag.ctx_encoder."))
    came = original if original.get("model_type") == "rag" else {}
    first = composite.over(came, parts["generator"]) if came else parts["generator"]
    described = {
        "question_encoder": describe_part("dpr", ENCODERS["dpr"], model.encoder, parts["question_encoder"]),
        "generator": describe_part(kind, GENERATORS[kind], generator, parts["generator"], beside, first),
    }
    whole = composite.describe(model, came, described, naming.describe_tokens(generator))
    whole["architectures"] = [name for name, variant in ARCHITECTURES.items() if variant == model.variant]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / CONFIG, whole)
    if said := describe_generation(generator, GENERATORS[kind], first, beside, answering):
        write_json(out / GENERATION, said)
    write_pieces(out, pieces, params, shard_bytes)
    if model.context_encoder and not context_inside:
        write_encoder(
            out / "context_encoder", rag, params, "context_encoder", original.get("context_encoder") or {}, shard_bytes
        )


def write_generator(
    out: Path,
    config: GeneratorConfig,
    params: LazyParams,
    original: dict[str, Any],
    beside: dict[str, Any] | None,
    answering: Mapping[str, Any],
    shard_bytes: int,
) -> None:
    """Writes a directory for the generator's own class; beside: the generation_config.json that it came with."""
    kind = original.get("model_type") or family_name(config)
    family = GENERATORS[kind]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / CONFIG, describe_part(kind, family, config, original, beside))
    if said := describe_generation(config, family, original, beside, answering):
        write_json(out / GENERATION, said)
    write_pieces(out, [Piece("generator", family, config)], params, shard_bytes)


def write_encoder(
    out: Path,
    rag: Rag,
    params: LazyParams,
    side: str,
    original: dict[str, Any],
    shard_bytes: int,
    beside: dict[str, Any] | None = None,
) -> None:
    """Writes a directory for DPRQuestionEncoder, DPRContextEncoder, BertModel or sentence-transformers.

    original: the config.json that the encoder came with. beside: its files of sentence-transformers, path -> content.
    """
    model, config = rag.config, rag.config.encoder
    # here both encoders have one configuration, with the question encoder's dropout; its own file keeps its own dropout
    if side == "context_encoder" and not model.tie_encoders:
        theirs = {"dropout": "hidden_dropout_prob", "attention_dropout": "attention_probs_dropout_prob"}
        config = dataclasses.replace(
            config, **{ours: original.get(key, getattr(config, ours)) for ours, key in theirs.items()}
        )
    kind = encoder_kind(config, side, original)
    family = ENCODERS[kind]
    described = describe_part(kind, family, config, original)
    names = original.get("architectures") or []
    if config.pooling == "mean" and names and set(names) <= set(BY_ARCHITECTURE) and kind == "bert":
        described["architectures"] = names  # Contriever has no modules.json: readers know its pooling by this name
    out.mkdir(parents=True, exist_ok=True)
    layout = layout_of(model, side)
    plain = Layout(pooling="cls", length=layout.length)
    if isinstance(config, BertConfig) and kind == "bert" and (beside or layout != plain):
        if config.projection:
            raise InputError("an encoder with a projection and pooling='mean' has no form at Hugging Face")
        for path, content in sentence.write_layout(layout, config.width, beside or {}).items():
            (out / path).parent.mkdir(exist_ok=True)
            write_json(out / path, content)
    elif layout != plain:
        raise InputError("DPR has no place for a prefix before its questions and passages; this encoder has one")
    write_json(out / CONFIG, described)
    own = "question_encoder" if model.tie_encoders else side
    write_pieces(out, [Piece(own, family, config)], params, shard_bytes)
