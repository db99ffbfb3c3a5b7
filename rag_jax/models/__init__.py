"""The networks: a file a family, built of `layers`, pure functions of parameters and arrays.

An encoder (`bert`) turns token ids into one vector; a generator (`bart`, `t5`, `decoder_only`) reads a context and
scores or continues an answer. `protocols` lists what a family must have; `special_tokens` says what answers begin and
end with; `init_copying` and `init_lexical` are starting points for training from scratch. `hf` has their names and
settings in Hugging Face's files, both ways.
"""
