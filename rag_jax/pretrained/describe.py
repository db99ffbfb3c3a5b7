"""config.json and generation_config.json of a model: what came with it, and over that what has changed since."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rag_jax.models.decoder_only import LmConfig
from rag_jax.models.hf import generation, naming
from rag_jax.models.hf.naming import Family
from rag_jax.models.hf.sentence import Layout
from rag_jax.models.protocols import EncoderConfig, GeneratorConfig
from rag_jax.models.special_tokens import SpecialTokens
from rag_jax.pretrained.hub import CONFIG
from rag_jax.rag import RagConfig


def describe_part(
    kind: str,
    family: Family,
    config: Any,
    original: dict[str, Any],
    beside: dict[str, Any] | None = None,
    read: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """config.json of one part: `original`, where the part came from one, and over it only what is no longer as that
    says. beside: the generation_config.json that came with it. read: what was read, if not the original alone.
    """
    model_type, now = {"dpr_context": "dpr"}.get(kind, kind), family.describe(config)
    named = {"model_type": model_type, "architectures": [family.architecture]}
    if not original or original.get("model_type", model_type) != model_type:
        return now | named
    was = first_form(family, config, read or original, beside)
    differ = {key: value for key, value in now.items() if value != was.get(key)}
    return original | differ | named


def first_form(family: Family, config: Any, original: dict[str, Any], beside: dict[str, Any] | None) -> dict[str, Any]:
    """What `family.describe` said of the part as it came. Tokens that a tokenizer gave are no change."""
    names = {entry.theirs for entry in family.entries(config)}
    first = family.adapt(family.config(generation.tokens(original, beside), CONFIG), names)
    if isinstance(config, SpecialTokens) and config.tokens_from == "tokenizer":
        first = dataclasses.replace(
            first, **{f.name: getattr(config, f.name) for f in dataclasses.fields(SpecialTokens)}
        )
    return family.describe(first)


def describe_generation(
    config: GeneratorConfig,
    family: Family,
    original: dict[str, Any],
    beside: dict[str, Any] | None,
    answering: Mapping[str, Any],
) -> dict[str, Any]:
    """generation_config.json: the one that came, and over it only what is no longer as it was; {} for no file."""
    decoder_only, now = isinstance(config, LmConfig), naming.describe_tokens(config)
    given = beside if beside is not None else original
    differ = generation.changed(given, answering, decoder_only)
    if original:
        was = first_form(family, config, original, beside)
        said = family.describe(config)
        differ |= {key: now[key] for key in now if key in said and said[key] != was.get(key)}
    if beside is None and differ:  # as there is a file now, it alone is read
        beside = generation.of_config(original) if original else {k: v for k, v in now.items() if v is not None}
    return (beside or {}) | differ


def encoder_kind(config: EncoderConfig, side: str, original: dict[str, Any]) -> str:
    """The row of models.hf that writes an encoder. Of a BERT: bert where it came from one, or pools otherwise than DPR:
    the first token's vector, as it comes.
    """
    if config.kind != "bert":
        return config.kind
    if original.get("model_type") == "bert" or config.pooling != "cls" or config.vector_norm:
        return "bert"
    return "dpr" if side == "question_encoder" else "dpr_context"


def layout_of(model: RagConfig, side: str) -> Layout:
    """What sentence-transformers' files say of an encoder of the model; of two with one set of files, both."""
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
