"""The networks: one file per family, built from `layers`; pure functions of parameters and arrays.

An encoder (`bert`) turns token ids into one vector; a generator (`bart`, `t5`, `decoder_only`) reads a context and
scores or continues an answer. `protocols` lists what a family must have. `special_tokens` says what answers begin and
end with. `init_copying` and `init_lexical` are starting points for training from scratch. `hf` maps names and settings
to those of Hugging Face's files, and back.
"""
