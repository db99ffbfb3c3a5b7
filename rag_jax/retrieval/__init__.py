"""From a question's vector or words to the best passages.

In graph: `mips` searches rows that are sharded over a mesh, exactly, with `mips_device` on each device. On the host:
`scann_index` (approximate), `bm25` (words), and `search`, the one interface to them all, hybrid included.
"""
