"""RAG-Token on Natural Questions over the Wikipedia of DPR, 21,015,300 passages searched in the training step.

As configs/nq_rag_sequence.py, whose docstring has the commands (convert with --variant token), with the other
marginalisation:

    rag-jax train --config configs/nq_rag_token.py --run runs/nq_rag_token
    rag-jax evaluate runs/nq_rag_token --decoding configs/decoding.py:paper_token

Before any chip is paid for:

    rag-jax compile --config configs/nq_rag_token.py --topology v5e:16x16 --passages 21015300 \\
        --set stages.joint.batch=256

That, with --no-compile: 0.37 GiB a chip without gathered weights (index 0.12, token table 0.05, parameters and moments
0.03, activations 0.17), 2.5 TFLOP a chip and step, of which the products alone take 12.9 ms at the peak rate. A step
of 0.1 s, an eighth of that rate, would make 5,000 steps (12 epochs of 107,000 pairs) in eight minutes.
"""

from ml_collections import ConfigDict
from nq_rag_sequence import nq_config  # the file beside this one


def get_config() -> ConfigDict:
    return nq_config("token", {"kind": "bart"})
