"""tokenizer_config.json."""

from rag_jax.models.hf.settings import Table, fates, idle

TOKENIZER: Table = fates({
    "tokenizer_class": idle("tokenizer.json is the tokenizer"),
})  # fmt: skip
