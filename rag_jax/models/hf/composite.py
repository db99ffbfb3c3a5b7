"""The config.json of a RAG composite (RagConfig of transformers), without those of its parts."""

from rag_jax.models.hf.generation import GENERATION, legacy
from rag_jax.models.hf.settings import COMMON, Table, fates, idle, into, only

RETRIEVER = idle("of transformers' retriever; passages come from rag-jax corpus and rag-jax index")

RAG: Table = COMMON | legacy(GENERATION) | fates({
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
