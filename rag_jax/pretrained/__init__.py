"""Released checkpoints in and out, without torch.

`load` reads a Hugging Face directory or a run, `convert` makes a run of the former, `save` writes what transformers
and sentence-transformers load; `tensor_files` reads and writes tensors one at a time, `encoder_files` the settings that
lie beside an encoder. The names of tensors and settings are in `models/hf`.
"""
