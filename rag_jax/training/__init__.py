"""Training, from a configuration to checkpoints.

`train` is the loop, top to bottom; `config` the stages it goes through; `setup` and `session` what stands ready
before the first step and between steps; `train_step` is the jitted step; `stage_index` keeps the index of a stage
fresh; `objectives/` has a file for each loss, after `stage`; `from_python` is `rag_jax.fit`; `data`, `optimizer`,
`diverged` and `profile` are what their names say.
"""
