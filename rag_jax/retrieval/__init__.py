"""From a question's vector or words to the best passages.

In graph: `mips` searches rows that are sharded over a mesh, exactly, and merges the candidates of `mips_one_device`.
On the host: `scann_index` (approximate), `bm25` (words), `hybrid` (both), and `search`, the one interface to them all.
"""
