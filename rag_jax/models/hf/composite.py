"""The config.json of a whole RAG model (transformers' RagConfig), apart from the configs of its parts within."""

from collections.abc import Mapping
from typing import Any

from rag_jax.models.hf.generation import LEGACY
from rag_jax.models.hf.settings import COMMON, Table, fates, idle, into, only

RETRIEVER = idle("of transformers' retriever; passages come from rag-jax corpus and rag-jax index")

DEFAULTS = {"n_docs": 5, "max_combined_length": 300}
RAG: Table = COMMON | LEGACY | fates({
    "architectures": into("variant"),
    "question_encoder": into("model.encoder"),
    "generator": into("model.generator"),
    "n_docs": into("n_docs"),
    "max_combined_length": into("source_length"),
    "title_sep": only(" / ", why="what stands between title and text"),
    "doc_sep": only(" // ", why="what stands between passage and question"),
    "prefix": only("", " ", why="no text stands before the passage here"),
    "vocab_size": into("model.generator.vocab_size"),
    "is_encoder_decoder": only(True, why="a generator reads with its encoder"),
    "retrieval_vector_size": into("model.encoder.projection"),
    "retrieval_batch_size dataset dataset_split dataset_revision index_name index_path passages_path use_dummy_dataset":
        RETRIEVER,
    "label_smoothing": idle("of training; say it of a stage: stages.NAME.label_smoothing"),
    "exclude_bos_score reduce_loss do_marginalize output_retrieved": idle("what transformers' forward returns"),
    "do_deduplication": only(True, why="the same answer from two passages is one"),
    "tie_word_embeddings": idle("the generator's own configuration says it"),
})  # fmt: skip


def over(whole: Mapping[str, Any], generator: Mapping[str, Any]) -> dict[str, Any]:
    """The generator's config, updated with the composite's keys of generation that are not null."""
    return {**generator, **{key: whole[key] for key in LEGACY if whole.get(key) is not None}}


def describe(
    model: Any, original: Mapping[str, Any], parts: Mapping[str, Any], tokens: Mapping[str, Any]
) -> dict[str, Any]:
    """The config.json of a RAG model: `original`, with only the settings replaced that have changed since.

    model: its RagConfig here. original: the config.json that it came with; {} for none.
    parts: the configs of question_encoder and generator. tokens: the special tokens, as `describe_tokens` gives them.
    """
    own = {"n_docs": model.n_docs, "max_combined_length": model.source_length}
    if not original:
        whole = (
            {key: value for key, value in tokens.items() if value is not None}
            | own
            | {
                "vocab_size": parts["generator"].get("vocab_size"),
                "retrieval_vector_size": model.encoder.output_width,
                "title_sep": " / ",
                "doc_sep": " // ",
                "is_encoder_decoder": True,
            }
        )
        return {**parts, **whole, "model_type": "rag"}
    differ = {key: value for key, value in own.items() if value != original.get(key, DEFAULTS[key])}
    said = {key: parts["generator"].get(key) for key in tokens if original.get(key) is not None}
    inner = {key: _named_as_before(part, original[key]) for key, part in parts.items()}
    return {**original, **inner, **said, **differ}


def _named_as_before(part: Mapping[str, Any], original: Mapping[str, Any]) -> dict[str, Any]:
    """A part's config with `architectures` as in the original composite, where it is often null."""
    kept = {key: original[key] for key in ("architectures",) if key in original}
    return {key: value for key, value in part.items() if key != "architectures"} | kept
