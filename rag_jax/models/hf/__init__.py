"""Names and settings of Hugging Face checkpoints: for every model family one table, used to read and to write.

An `HfFamily` converts `config.json` to our configuration and back, says which tensor is which parameter, which tensors
are copies of another (tied) or not needed, and which fate each key of config.json has. Nothing here reads or writes
files.
"""

from rag_jax.models.hf import bart, bert, composite, decoder_only, generation, sentence, t5, tokenizer
from rag_jax.models.hf.naming import HfFamily
from rag_jax.models.hf.settings import Table

# by model_type of config.json; dpr is DPR's question encoder, dpr_context its context encoder
ENCODERS: dict[str, HfFamily] = bert.FAMILIES
GENERATORS: dict[str, HfFamily] = {**bart.FAMILIES, **decoder_only.FAMILIES, **t5.FAMILIES}

# the fates of the keys of each kind of file, by its name in docs/settings.md
SETTINGS: dict[str, Table] = {
    **{f"config.json of {name}": family.settings for name, family in (ENCODERS | GENERATORS).items()},
    "config.json of rag": composite.RAG,
    "rope_parameters": decoder_only.ROPE,
    "generation_config.json": generation.GENERATION,
    "generation_config.json of a decoder-only model": generation.GENERATION_LM,
    **sentence.TABLES,
    "tokenizer_config.json of encoders": tokenizer.TOKENIZER,
    "tokenizer_config.json of generators": tokenizer.READER,
}
