"""config.json and generation_config.json of an export: the files that the model came with, updated where it changed."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rag_jax.models.decoder_only import LmConfig
from rag_jax.models.hf import generation, naming
from rag_jax.models.hf.naming import HfFamily
from rag_jax.models.hf.sentence import Layout
from rag_jax.models.protocols import EncoderConfig, GeneratorConfig
from rag_jax.models.special_tokens import SpecialTokens
from rag_jax.pretrained.hub import CONFIG
from rag_jax.rag import RagConfig


def describe_part(
    kind: str,
    family: HfFamily,
    config: Any,
    original: dict[str, Any],
    beside: dict[str, Any] | None = None,
    read: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The config.json of one part: `original`, with only the settings replaced that have changed since.

    kind: the key of `family` in ENCODERS or GENERATORS.
    original: the config.json that the part came with; {} for one trained from scratch.
    beside: the generation_config.json that it came with.
    read: the config that was read in place of `original`, where a composite's settings took precedence.
    """
    model_type, now = {"dpr_context": "dpr"}.get(kind, kind), family.describe(config)
    named = {"model_type": model_type, "architectures": [family.architecture]}
    if not original or original.get("model_type", model_type) != model_type:
        return now | named
    was = first_form(family, config, read or original, beside)
    differ = {key: value for key, value in now.items() if value != was.get(key)}
    return original | differ | named


def first_form(
    family: HfFamily, config: Any, original: dict[str, Any], beside: dict[str, Any] | None
) -> dict[str, Any]:
    """`family.describe` of the part as it was when it came.

    Special tokens that were taken from a tokenizer since then do not count as a change.
    """
    names = {entry.theirs for entry in family.entries(config)}
    first = family.adapt(family.config(generation.tokens(original, beside), CONFIG), names)
    if isinstance(config, SpecialTokens) and config.tokens_from == "tokenizer":
        first = dataclasses.replace(
            first, **{f.name: getattr(config, f.name) for f in dataclasses.fields(SpecialTokens)}
        )
    return family.describe(first)


def describe_generation(
    config: GeneratorConfig,
    family: HfFamily,
    original: dict[str, Any],
    beside: dict[str, Any] | None,
    answering: Mapping[str, Any],
) -> dict[str, Any]:
    """The generation_config.json: the one that the model came with, with only the changed settings replaced.

    original: the config.json it came with. beside: the generation_config.json it came with, or None. answering: the
    section of the run's configuration. {} where no file is needed.
    """
    decoder_only, now = isinstance(config, LmConfig), naming.describe_tokens(config)
    given = beside if beside is not None else original
    differ = generation.changed(given, answering, decoder_only)
    if original:
        was = first_form(family, config, original, beside)
        said = family.describe(config)
        differ |= {key: now[key] for key in now if key in said and said[key] != was.get(key)}
    if beside is None and differ:  # transformers reads the file alone once there is one, so it must be complete
        beside = generation.of_config(original) if original else {k: v for k, v in now.items() if v is not None}
    return (beside or {}) | differ


def encoder_kind(config: EncoderConfig, side: str, original: dict[str, Any]) -> str:
    """The key in ENCODERS of the family with which an encoder is exported.

    A BERT is exported as DPR's encoder unless it came from a BERT, or its vector is not that of the first token,
    unscaled, which is DPR's pooling.
    """
    if config.kind != "bert":
        return config.kind
    if original.get("model_type") == "bert" or config.pooling != "cls" or config.vector_norm:
        return "bert"
    return "dpr" if side == "question_encoder" else "dpr_context"


def layout_of(model: RagConfig, side: str) -> Layout:
    """The settings of an encoder for sentence-transformers' files; with tied encoders, one set for both."""
    longest = model.question_length + len(model.query_prefix_ids)
    if side == "context_encoder" and not model.tie_encoders:
        longest = model.passage_length + len(model.passage_prefix_ids)
    return Layout(
        pooling=model.encoder.pooling,
        normalise=bool(model.encoder.vector_norm),
        length=longest,
        query_prefix=model.query_prefix,
        passage_prefix=model.passage_prefix,
        pool_prefix=model.pool_prefix,
    )
