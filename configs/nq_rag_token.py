"""RAG-Token on Natural Questions over the Wikipedia of DPR, 21,015,300 passages searched in the training step.

As configs/nq_rag_sequence.py, whose docstring has the commands (convert with --variant token), with the other
marginalisation:

    rag-jax train --config configs/nq_rag_token.py --run runs/nq_rag_token
    rag-jax evaluate runs/nq_rag_token --decoding configs/decoding.py:paper_token

Before any chip is paid for:

    rag-jax compile --config configs/nq_rag_token.py --topology v5e:16x16 --passages 21015300 \\
        --set stages.joint.batch=256
"""

from ml_collections import ConfigDict
from nq_rag_sequence import nq_config  # the file beside this one


def get_config() -> ConfigDict:
    return nq_config("token", {"kind": "bart"})
