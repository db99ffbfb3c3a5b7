"""Answers to questions, with the passages they came from.

`pipeline` joins question encoder, search, generator and decoding into one jitted program; it is `rag_jax.Pipeline`,
and what every command uses that answers. `config` says how answers are decoded. `encode_corpus` embeds passages with
the encoder of a run, and `build_index` makes the index that questions are searched in.
"""
