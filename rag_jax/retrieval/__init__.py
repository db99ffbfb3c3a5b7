"""From a question's vector or words to the best passages.

In graph: `mips` searches rows that are sharded over a mesh, exactly, and joins what `mips_one_device` finds on each.
On the host: `scann_index` (approximate), `bm25` (words), `hybrid` (both), and `search`, the one interface to them all.
"""
