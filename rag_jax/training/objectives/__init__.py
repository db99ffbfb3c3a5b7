"""The objectives that a stage can minimise: one file each, and a row in OBJECTIVES.

An objective is a frozen dataclass (`training.stage.Objective`): its fields are options of the stage, its methods say
what it needs of batches and search, and compute its loss. `rag` is the paper's; `contrastive` and `inverse_cloze`
train the encoders alone, `denoise` the generator alone. docs/extending.md shows how to add one.
"""

from rag_jax.training.objectives.contrastive import Contrastive
from rag_jax.training.objectives.denoise import Denoise
from rag_jax.training.objectives.inverse_cloze import InverseCloze
from rag_jax.training.objectives.rag import MarginalLikelihood
from rag_jax.training.stage import Objective

OBJECTIVES: dict[str, type[Objective]] = {
    objective.kind: objective for objective in (Contrastive, InverseCloze, Denoise, MarginalLikelihood)
}
