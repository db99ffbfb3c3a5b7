"""Hugging Face checkpoints, read and written without torch.

Reading: `load` has `from_pretrained`; `hub` finds a directory, `parts` opens each model in it, `combine` makes one RAG
model of them (`source`), `weights` puts their tensors on the devices. `convert` and `as_run` write all that as a run.
Writing: `export` has `save_pretrained`, whose directories transformers loads; `describe` writes config.json and
`pieces` the weights.
Both: `tensor_files` reads and writes one tensor at a time, `encoder_files` handles the settings beside an encoder's
weights. The names of tensors and settings are in `models/hf`.
"""
