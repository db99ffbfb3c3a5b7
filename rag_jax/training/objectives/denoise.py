"""BART's pre-training by text infilling (Lewis et al. 2019, section 2.2) on passages of the corpus."""

from dataclasses import dataclass
from typing import Any, ClassVar

import grain
import jax
import jax.numpy as jnp
import numpy as np

from rag_jax.data import batching
from rag_jax.rag import Params, join, shift_left
from rag_jax.retrieve import Batch
from rag_jax.runs.config import RunConfig
from rag_jax.system.configuration import at_least
from rag_jax.training.data import Data
from rag_jax.training.stage import Computed, LossInput, Objective, StageConfig, StepSetting, check_source_length, micro


@dataclass(frozen=True)
class Denoise(Objective):
    """-log p(passage | passage with masked spans) of the generator, mean over tokens.

    source_length: tokens of the generator's input and of its target at most; 0: model.source_length.
    label_smoothing: share of the probability of the targets that is spread over the vocabulary.
    logit_chunk: vocabulary entries whose logits are in memory at a time; the backward pass computes them again. 0: keep
      all logits, 4 bytes each of batch * length * vocabulary, for a quarter less work in the output layer.
    """

    kind: ClassVar[str] = "denoise"
    asks: ClassVar[bool] = False
    groups: ClassVar[frozenset[str]] = frozenset({"generator"})

    source_length: int = 0
    label_smoothing: float = 0.0
    logit_chunk: int = 2048

    def length(self, run: RunConfig) -> int:
        """Tokens of the generator's input, and of its target, with special tokens."""
        return self.source_length or run.model.source_length

    def check(self, stage: StageConfig, run: RunConfig, where: str) -> None:
        for name in ("source_length", "logit_chunk"):
            at_least(0, where + name, getattr(self, name))
        check_source_length(self.source_length, run, where)

    def corpus_batches(
        self, stage: StageConfig, run: RunConfig, data: Data, seed: int, own: np.ndarray | None
    ) -> grain.MapDataset:
        return batching.denoise_batches(data.corpus, batch=stage.batch, seed=seed, length=self.length(run), own=own)

    def batch_shapes(self, B: int, run: RunConfig, passage_length: int, prefix: int) -> dict[str, tuple[int, ...]]:
        length = self.length(run)
        return {"tail_ids": (B, length - prefix), "tail_length": (B,), "labels": (B, length)}

    def tokens(self, B: int, run: RunConfig, passage_length: int) -> int:
        return 2 * B * self.length(run)

    def loss(self, s: StepSetting, params: Params, given: LossInput) -> Computed:
        empty = jnp.zeros((len(given.batch["labels"]), 1), jnp.int32)
        ids, mask = join(
            s.prefix_ids,
            empty,
            empty[:, 0],
            given.batch["tail_ids"],
            given.batch["tail_length"],
            given.batch["tail_ids"].shape[1] + len(s.prefix_ids),
            s.rag.config.reader.pad_id,
        )
        one = jnp.zeros((len(ids), 1), jnp.float32)  # the score of the only passage there is
        how: dict[str, Any] = {
            "label_smoothing": self.label_smoothing,
            "dropout": given.key,
            "logit_chunk": self.logit_chunk,
        }
        nll_B = s.rag.nll(params, ids[:, None], mask[:, None], one, given.batch["labels"], **how)
        counted = shift_left(given.batch["labels"], s.rag.config.reader)[1].sum()
        nll = nll_B.sum() / counted
        return Computed(nll, {"nll_per_token": nll, "tokens": mask.sum() + counted})

    def shares(self, s: StepSetting, batch: Batch, count: int) -> jax.Array:
        """Each micro-batch's share of the target tokens, as the loss is a mean over these."""
        counted = shift_left(batch["labels"], s.rag.config.reader)[1].sum(-1)
        tokens_C = micro(counted, count).sum(-1)
        return tokens_C / tokens_C.sum()
