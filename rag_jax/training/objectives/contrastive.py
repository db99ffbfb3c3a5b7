"""In-batch contrastive training of the two encoders (DPR, Karpukhin et al. 2020), with hard negatives (ANCE, Xiong et
al. 2021).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rag_jax import losses
from rag_jax.errors import InputError
from rag_jax.rag import Params
from rag_jax.retrieve import embed_questions, embed_rows, find, is_gold
from rag_jax.runs.config import RunConfig
from rag_jax.system import sharding
from rag_jax.system.configuration import at_least
from rag_jax.training.data import QuestionNeeds
from rag_jax.training.stage import Computed, LossInput, Objective, StageConfig, StepSetting, micro


@dataclass(frozen=True)
class Contrastive(Objective):
    """DPR's loss: the first gold passage of each question against all passages of the batch.

    hard_negatives: additional negative passages per question.
    negatives: where hard negatives come from: the index (`retrieved`), or `given` with the question: its
      hard_negative_passage_ids and, where they are too few, its negative_passage_ids.
    """

    kind: ClassVar[str] = "contrastive"
    in_parts: ClassVar[bool] = False
    groups: ClassVar[frozenset[str]] = frozenset({"question_encoder", "context_encoder"})

    hard_negatives: int = 0
    negatives: Literal["retrieved", "given"] = "retrieved"

    def searched(self) -> dict[str, int]:
        return {"hard_negatives": self.hard_negatives} if self.negatives == "retrieved" else {}

    @property
    def rows_per_question(self) -> int:
        return 1 + self.hard_negatives

    def documents_shape(self, B: int) -> tuple[int, ...]:
        return (B * self.rows_per_question,)

    def needs(self) -> QuestionNeeds:
        return QuestionNeeds(gold=True, negatives=self.hard_negatives if self.negatives == "given" else 0)

    def check(self, stage: StageConfig, run: RunConfig, where: str) -> None:
        at_least(0, where + "hard_negatives", self.hard_negatives)
        if self.negatives == "given" and not self.hard_negatives:
            raise InputError(f"{where}negatives='given' needs hard_negatives: how many a question")

    def batch_shapes(self, B: int, run: RunConfig, passage_length: int, prefix: int) -> dict[str, tuple[int, ...]]:
        shapes = question_shapes(B, run)
        given = self.negatives == "given" and run.search.in_graph
        return shapes | ({"negatives": (B, self.hard_negatives)} if given else {})

    def tokens(self, B: int, run: RunConfig, passage_length: int) -> int:
        return B * (run.model.question_length + (1 + self.hard_negatives) * passage_length)

    def rows_on_host(
        self, arrays: dict[str, np.ndarray], found_BK: np.ndarray | None, mesh: jax.sharding.Mesh
    ) -> np.ndarray:
        hard = arrays.pop("negatives", found_BK)
        found = (arrays["gold"][:, 0],) if hard is None else (arrays["gold"][:, 0], hard)
        all_rows = sharding.fetched(sharding.shard_batch(mesh, found))  # the gold ones of all questions come first
        rows = np.concatenate([part.reshape(-1) for part in all_rows])
        return rows[sharding.own_rows(mesh, len(rows))]

    def loss(self, s: StepSetting, params: Params, given: LossInput) -> Computed:
        return contrastive_loss(s, params, given, self.hard_negatives)


def contrastive_loss(s: StepSetting, params: Params, given: LossInput, hard_negatives: int = 0) -> Computed:
    """Contrastive loss of each question against the first gold passages of all questions of the (global) batch.

    With `hard_negatives`, also against the passages that the index now ranks highest for each question (ANCE, Xiong et
    al. 2021, section 4), or against those given in the batch. All questions share all negatives; a gold passage of the
    question is left out of its own, and so are rows of -1. A batch with `passage_ids` brings its own passages (inverse
    cloze). With `accumulate`, one micro-batch is embedded at a time; the loss is the same.
    """
    question_key, passage_key = jax.random.split(given.key)
    batch, index, passages = given.batch, given.index, given.passages

    def questions(key: jax.Array, ids: jax.Array, length: jax.Array) -> jax.Array:
        return embed_questions(s, params, {"question_ids": ids, "question_length": length}, key)

    turns = s.stage.accumulate
    q_BE = in_turns(questions, turns, question_key, batch["question_ids"], batch["question_length"])
    B = len(q_BE)
    if "passage_ids" in batch:
        own = {"encoder_ids_NL": batch["passage_ids"], "encoder_length_N": batch["passage_length"]}
        passages, rows_P, numbers_P = passages._replace(**own), jnp.arange(B), batch["gold"][:, 0]
    elif "documents" in batch:
        rows_P, numbers_P = batch["documents"], batch["document_rows"]
    else:
        numbers_P = batch["gold"][:, 0]
        if hard_negatives:
            hard = batch["negatives"] if "negatives" in batch else find(s, q_BE, index, hard_negatives)[1]
            numbers_P = jnp.concatenate([numbers_P, hard.reshape(-1)])
        rows_P = jnp.maximum(numbers_P, 0)
    d_PE = in_turns(lambda key, rows: embed_rows(s, params, passages, rows, key), turns, passage_key, rows_P)
    also_right_BP = is_gold(jnp.broadcast_to(numbers_P[None], (B, len(rows_P))), batch["gold"])
    there_P = numbers_P >= 0
    loss_B = losses.in_batch_contrastive(q_BE, d_PE, jnp.eye(B, len(rows_P), dtype=bool), also_right_BP | ~there_P)
    scores_BP = losses.inner_products("be,pe->bp", q_BE, d_PE)
    right_B = also_right_BP[jnp.arange(B), jnp.where(there_P, scores_BP, -jnp.inf).argmax(-1)]
    read_P = jnp.where(there_P, passages.encoder_length_N[rows_P].astype(jnp.int32), 0)
    tokens = batch["question_length"].sum() + read_P.sum()
    return Computed(loss_B.mean(), {"in_batch_accuracy": right_B.mean(), "tokens": tokens})


def question_shapes(B: int, run: RunConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of a batch of B questions with one gold passage each (`batching.question_batches`)."""
    Q = run.model.question_length
    return {
        "tail_ids": (B, min(Q, run.model.tail_length)),
        "tail_length": (B,),
        "labels": (B, run.target_length),
        "question_ids": (B, Q),
        "question_length": (B,),
        "gold": (B, 1),
    }


def in_turns(embed: Callable[..., jax.Array], count: int, key: jax.Array, *arrays: jax.Array) -> jax.Array:
    """embed(key, *arrays) [B, E], computed in `count` micro-batches one after another, as GradCache (Gao et al. 2021).

    The loss sees the embeddings of all rows, but the activations of only one micro-batch are in memory: the backward
    pass computes them again.
    """
    if count == 1:
        return embed(key, *arrays)
    part = jax.checkpoint(lambda given: embed(*given), prevent_cse=False)  # within a scan nothing can be merged
    found_CXE = jax.lax.map(part, (jax.random.split(key, count), *(micro(x, count) for x in arrays)))
    return found_CXE.swapaxes(0, 1).reshape(-1, found_CXE.shape[-1])
