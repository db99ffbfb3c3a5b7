"""RAG-Sequence with a decoder-only reader, Qwen2 of 1.5 or 7 billion parameters, over the Wikipedia of DPR.

The commands are in the docstring of configs/nq_rag_sequence.py, with --generator Qwen/Qwen2-1.5B in `rag-jax convert`
and models/rag-nq-lm for models/rag-nq:

    rag-jax train --config configs/nq_lm.py --run runs/nq_lm           # configs/nq_lm.py:7b for the larger

AdamW's moments are bfloat16, and the five passages are read one at a time. The token table has four bytes a token,
since the vocabulary is larger than 65,536. `rag-jax compile --layers 1` for 1.5 billion on v5e:16x16, 256 questions,
fsdp=8, reports: at most 6.6 of 16 GiB a chip; 0.53 s a step at best, bound by memory traffic, and 0.37 s on the links,
since the weights are gathered for each document. 5,000 steps, some 15 epochs, take at least 45 minutes.
"""

from ml_collections import ConfigDict
from nq_rag_sequence import nq_config, optimizer  # the file beside this one

SHAPES = {
    "1.5b": {"width": 1536, "heads": 12, "groups": 2, "hidden": 8960, "vocab_size": 151_936, "tied": True},
    "7b": {"width": 3584, "heads": 28, "groups": 4, "hidden": 18_944, "vocab_size": 152_064, "tied": False},
}
QWEN2 = {
    "layers": 28, "positions": 2048, "dropout": 0.0, "attention_dropout": 0.0, "eps": 1e-6, "activation": "silu",
    "gated": True, "norm_kind": "rms", "position_kind": "rotary", "rope_theta": 1e6, "out_bias": False,
    "mlp_bias": False, "bos_id": 151_643, "pad_id": 151_643, "eos_id": 151_643,
}  # fmt: skip


def get_config(size: str = "1.5b") -> ConfigDict:
    """size: `1.5b` or `7b` parameters."""
    if size not in SHAPES:
        raise ValueError(f"{size!r} is no size; there are {', '.join(SHAPES)}")
    c = nq_config("sequence", {"kind": "lm", **QWEN2, **SHAPES[size]})
    c.init = "models/rag-nq-lm"
    stage = c.stages[0]
    stage.doc_chunk, stage.label_smoothing = 1, 0.0
    stage.optimizer = optimizer({"question_encoder": 1.0, "generator": 1.0}, learning_rate=1e-5, moments="bfloat16")
    return c
