"""RAG-Sequence with T5 1.1 XL (2.8 billion parameters) as the reader, over DPR's Wikipedia.

The commands are in the docstring of configs/nq_rag_sequence.py, with --generator google/t5-v1_1-xl in `rag-jax convert`
and models/rag-nq-t5 for models/rag-nq:

    rag-jax train --config configs/nq_t5_xl.py --run runs/nq_t5_xl

The optimizer is Adafactor, with which T5 was fine-tuned (Raffel et al. 2020, section 3.1.2), at a tenth of its rate,
1e-4: it keeps no moments. The batch is accumulated over two micro-batches, and every layer is recomputed in the
backward pass.

`rag-jax compile --layers 1` with --topology v5e:16x16, --set stages.joint.batch=512, --set mesh.data=-1, --set
mesh.fsdp=8 and --passages 21015300 reports: at most 11.1 of 16 GiB a chip, 0.29 s a step at best, bound by memory
traffic; 2,500 steps, some 15 epochs, take at least 12 minutes.
"""

from ml_collections import ConfigDict
from nq_rag_sequence import nq_config, optimizer  # the file beside this one

XL = {"width": 2048, "head_width": 64, "heads": 32, "hidden": 5120, "encoder_layers": 24, "decoder_layers": 24}


def get_config() -> ConfigDict:
    c = nq_config("sequence", {"kind": "t5", **XL})
    c.init = "models/rag-nq-t5"
    stage = c.stages[0]
    stage.accumulate = 2
    stage.optimizer = optimizer(
        {"question_encoder": 1.0, "generator": 1.0}, kind="adafactor", learning_rate=1e-4, weight_decay=0.0
    )
    return c
