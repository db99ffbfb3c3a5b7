"""Released checkpoints in and out, without torch.

Reading: `load` has `from_pretrained`; `hub` finds a directory, `parts` opens each model in it, `combine` makes one RAG
model of them (`source`), `weights` puts their tensors on the devices. `convert` writes it all as a run, with `as_run`.
Writing: `export` has `save_pretrained`, what transformers loads; `describe` makes config.json and `pieces` the weights.
Both: `tensor_files` takes tensors one at a time, `encoder_files` the settings beside an encoder. The names of tensors
and settings are in `models/hf`.
"""
