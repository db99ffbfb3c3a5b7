"""The embeddings of a corpus: how they are computed, stored, searched and refreshed.

`encode` embeds passages, `encode_job` does so for a whole corpus in `shards` that survive a kill, `snapshot` binds them
to a corpus and an encoder. While training, `device_index` (rows on the devices) or `host_index` (ScaNN, BM25) is
searched; `refresh` has the ways to rebuild an index, `refresh_schedule` says when.
"""
