"""RAG-Token on Natural Questions over DPR's Wikipedia; the 21,015,300 passages are searched inside the training step.

It differs from configs/nq_rag_sequence.py, whose docstring has the commands (convert with --variant token), only in the
marginalisation:

    rag-jax train --config configs/nq_rag_token.py --run runs/nq_rag_token
    rag-jax evaluate runs/nq_rag_token --decoding configs/decoding.py:paper_token

To compile it before any chip is paid for (needs libtpu, but no TPU; four minutes):

    rag-jax compile --config configs/nq_rag_token.py --topology v5e:16x16 --passages 21015300 \\
        --set stages.joint.batch=256 --set mesh.data=-1 --set mesh.fsdp=8 --effort -1 --stage joint

It reports: 2.44 of 16 GiB a chip (parameters and optimiser 0.78, index 0.12, token table 0.03, temporaries 1.46); 54 ms
a step at best, bound by memory traffic. 5,000 such steps, as many questions as 20,000 steps of 64, take at least five
minutes, and in practice longer. On v5p:4x4x4 with batch=64 and fsdp=4: 4.49 of 95 GiB, 18.9 ms at best, 20,000 steps in
at least six minutes. The default fsdp=-1 runs on any number of chips, but on 256 its shards are four columns wide and
the links carry twice as much.
"""

from ml_collections import ConfigDict
from nq_rag_sequence import nq_config  # the file beside this one


def get_config() -> ConfigDict:
    return nq_config("token", {"kind": "bart"})
