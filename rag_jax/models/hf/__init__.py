"""Hugging Face checkpoints and the models here: for every family one table of names, read in both directions.

A family says how `config.json` becomes a configuration here and back, which tensor is which parameter, which names are
copies of another tensor (tied), which may be left out, and what becomes of every key of config.json. Nothing here reads
or writes files.
"""

from rag_jax.models.hf import bart, bert, composite, decoder_only, generation, sentence, t5, tokenizer
from rag_jax.models.hf.naming import Family
from rag_jax.models.hf.settings import Table

# by model_type, as config.json has it; dpr_context is the other half of dpr
ENCODERS: dict[str, Family] = bert.FAMILIES
GENERATORS: dict[str, Family] = {**bart.FAMILIES, **decoder_only.FAMILIES, **t5.FAMILIES}

# what becomes of the keys of each kind of file, by the name that docs/settings.md gives it
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
