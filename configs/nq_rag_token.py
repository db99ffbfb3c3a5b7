"""RAG-Token on Natural Questions over the Wikipedia of DPR, 21,015,300 passages searched in the training step.

As configs/nq_rag_sequence.py, whose docstring has the commands (convert with --variant token), with the other
marginalisation:

    rag-jax train --config configs/nq_rag_token.py --run runs/nq_rag_token
    rag-jax evaluate runs/nq_rag_token --decoding configs/decoding.py:paper_token

Before any chip is paid for:

    rag-jax compile --config configs/nq_rag_token.py --topology v5e:16x16 --passages 21015300 \\
        --set stages.joint.batch=256

Counted from shapes (--no-compile): 0.37 GiB a chip (index 0.12, token table 0.05, parameters and moments 0.03,
activations 0.17) and what is gathered; 2.5 TFLOP of products, 12.9 ms at the peak rate. Compiled (--effort -1; ten
minutes of a core) it fits the 15.75 GiB; no activations, index or token table are gathered; 53 GB of memory traffic and
9.7 GB sent by each chip, 64 and 48 ms: 5,000 steps (12 epochs) take five minutes at the least. Half of what is sent is
due to cutting a width of 1,024 over 256 chips: shards of four columns, which XLA gathers by sums. For more than some 16
chips, cut less: --set mesh.data=-1 --set mesh.fsdp=8.
"""

from ml_collections import ConfigDict
from nq_rag_sequence import nq_config  # the file beside this one


def get_config() -> ConfigDict:
    return nq_config("token", {"kind": "bart"})
