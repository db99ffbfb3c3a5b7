"""The machine below the model: devices and processes, files and signals, logs and memory.

`sharding` has the mesh and the one table from logical axis names to mesh axes; `distributed` and `preemption` the
processes of a pod, how they meet and how they end; `files` writes whole files and directories or nothing, and
`block_checksums` notices damage; `logs` speaks to people and to programs. Nothing here knows of models, questions or
passages.
"""
