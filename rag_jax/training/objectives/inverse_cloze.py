"""The inverse cloze task (Lee et al. 2019, section 4): contrastive training with sentences of the corpus as
questions.
"""

from dataclasses import dataclass
from typing import ClassVar

import grain
import numpy as np

from rag_jax.corpus import inverse_cloze
from rag_jax.rag import Params
from rag_jax.runs.config import RunConfig
from rag_jax.training.data import Data
from rag_jax.training.objectives.contrastive import contrastive_loss
from rag_jax.training.stage import Computed, LossInput, Objective, StageConfig, StepSetting


@dataclass(frozen=True)
class InverseCloze(Objective):
    """Contrastive loss of each sentence against the passages that the sentences of the batch were taken from."""

    kind: ClassVar[str] = "inverse_cloze"
    asks: ClassVar[bool] = False
    in_parts: ClassVar[bool] = False
    groups: ClassVar[frozenset[str]] = frozenset({"question_encoder", "context_encoder"})

    def corpus_batches(
        self, stage: StageConfig, run: RunConfig, data: Data, seed: int, own: np.ndarray | None
    ) -> grain.MapDataset:
        return inverse_cloze.batches(data.corpus, stage.batch, seed, run.model.question_length, own)

    def batch_shapes(self, B: int, run: RunConfig, passage_length: int, prefix: int) -> dict[str, tuple[int, ...]]:
        Q = run.model.question_length
        shapes = {"passage_ids": (B, passage_length), "passage_length": (B,)}
        return shapes | {"question_ids": (B, Q), "question_length": (B,), "gold": (B, 1)}

    def tokens(self, B: int, run: RunConfig, passage_length: int) -> int:
        return B * (run.model.question_length + passage_length)

    def loss(self, s: StepSetting, params: Params, given: LossInput) -> Computed:
        return contrastive_loss(s, params, given)
