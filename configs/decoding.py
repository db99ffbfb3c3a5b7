"""Presets of decoding for `rag-jax evaluate` and `rag-jax ask`: the settings of the paper's evaluation, and others.

    rag-jax evaluate RUN --decoding configs/decoding.py:paper_sequence
    rag-jax ask --run RUN --decoding configs/decoding.py:paper_generation --set num_beams=8 "Who ...?"

- paper_token, paper_sequence: open-domain questions (Lewis et al. 2020, appendix A): greedy; 15 documents for
  RAG-Token, 50 for RAG-Sequence, thorough.
- paper_generation: MS MARCO and Jeopardy questions: 10 documents, 4 beams, fast decoding for RAG-Sequence.
- transformers: the defaults of Hugging Face's RAG: 5 documents, greedy, thorough.
- beams (the default): 5 documents, 4 beams, thorough.

A preset may set any field of rag_jax.inference.config.AnswerConfig. Asking for more documents than the corpus has is an
error. 50 documents at once need about 6 GB a question with BART-large in bfloat16; doc_chunk decodes fewer at a time.
"""

from ml_collections import ConfigDict

PRESETS = {
    "paper_token": {"n_docs": 15, "num_beams": 1},
    "paper_sequence": {"n_docs": 50, "num_beams": 1, "mode": "thorough", "doc_chunk": 10},
    "paper_generation": {"n_docs": 10, "num_beams": 4, "mode": "fast"},
    "transformers": {"n_docs": 5, "num_beams": 1, "mode": "thorough"},
    "beams": {"n_docs": 5, "num_beams": 4, "mode": "thorough"},
}


def get_config(name: str = "beams") -> ConfigDict:
    if name not in PRESETS:
        raise ValueError(f"{name!r} is no preset; there are {', '.join(PRESETS)}")
    return ConfigDict(PRESETS[name])
