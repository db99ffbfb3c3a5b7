"""Questions on disk become batches of arrays.

`readers` reads the formats of the field into passages and questions, `synthetic` generates a fictional world;
`tokenizers`, `joining` and `examples` turn texts into ids once; `batching` chooses, shuffles, mixes and batches them,
and resumes exactly. Passages on disk are in `corpus`.
"""
