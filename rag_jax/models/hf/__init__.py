"""Hugging Face checkpoints and the models here: for every family one table of names, read in both directions.

A family says how `config.json` becomes a configuration here and back, which tensor is which parameter, which names are
copies of another tensor (tied), and which may be left out. Nothing here reads or writes files.
"""

from rag_jax.models.hf import bart, bert, lm, t5
from rag_jax.models.hf.naming import Family

# by model_type, as config.json has it; dpr_context is the other half of dpr
ENCODERS: dict[str, Family] = bert.FAMILIES
GENERATORS: dict[str, Family] = {**bart.FAMILIES, **lm.FAMILIES, **t5.FAMILIES}
