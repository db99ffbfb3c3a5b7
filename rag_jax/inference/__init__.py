"""Answers to questions, with the passages they came from.

`pipeline` joins question encoder, search, generator and decoding into one jitted program; `rag_jax.Pipeline` and all
commands that answer use it. `config` has the settings of answering. `encode_corpus` embeds passages with the encoder of
a run, and `build_index` makes the index that is searched.
"""
