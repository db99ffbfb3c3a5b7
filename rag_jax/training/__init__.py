"""Training, from a configuration to checkpoints.

`train` is the loop, to be read from top to bottom; `config` the configuration with its stages; `setup` prepares data
and run directory before the first step, `session` holds what the steps share and saves checkpoints; `train_step` is the
jitted step; `stage_index` refreshes the index of a stage; `stage` is the interface of objectives, `objectives/` has a
file for each of them; `retrieve_fresh` is retrieval with gradients; `from_python` is `rag_jax.fit`; `data`,
`optimizer`, `diverged` and `profile` are what their names say.
"""
