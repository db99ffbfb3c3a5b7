"""The files of sentence-transformers beside a BERT."""

from rag_jax.models.hf.settings import Table, fates, idle, into, only

OTHER_POOLING = "vectors are pooled as cls or mean"

POOLING: Table = fates({
    "word_embedding_dimension": idle("the width of the encoder says it"),
    "pooling_mode_cls_token pooling_mode_mean_tokens": into("pooling"),
    "pooling_mode_max_tokens pooling_mode_mean_sqrt_len_tokens pooling_mode_weightedmean_tokens "
    "pooling_mode_lasttoken": only(False, why=OTHER_POOLING),
    "include_prompt": only(True, why="the mean is over all tokens"),
})  # fmt: skip

TABLES: dict[str, Table] = {"1_Pooling/config.json": POOLING}
