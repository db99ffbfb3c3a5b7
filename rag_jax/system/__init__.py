"""The machine below the model: devices and processes, files and signals, logs and memory.

`sharding` has the mesh and the one table from logical axis names to mesh axes; `distributed` and `preemption` connect
the processes of a pod and end them; `files` writes files and directories atomically, and `block_checksums` detects
damage; `logs` writes progress for people and metrics for programs. Nothing here knows of models, questions or passages.
"""
