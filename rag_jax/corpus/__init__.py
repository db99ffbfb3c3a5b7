"""Passages on disk: their texts, and their token ids for encoder and generator.

`build` writes a corpus, `update` writes a changed one beside it that shares its files; `directory` opens either. A
corpus consists of segments (`segment`), each with a `passage_store`, an `id_table` and token tables, which
`verified_arrays` checks where they are first read. `inverse_cloze` derives questions from passages.
"""
