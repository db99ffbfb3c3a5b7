"""RAG's marginal likelihood of answers (Lewis et al. 2020, section 2), given retrieved passages, a gold passage or no
passage, and auxiliary losses of the retriever.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from rag_jax import losses
from rag_jax.errors import InputError
from rag_jax.rag import Params, shift_left
from rag_jax.retrieve import contexts, is_gold
from rag_jax.runs.config import RunConfig
from rag_jax.system.configuration import at_least
from rag_jax.training import optimizer
from rag_jax.training.data import QuestionNeeds
from rag_jax.training.objectives.contrastive import question_shapes
from rag_jax.training.retrieve_fresh import Retrieval, retrieve
from rag_jax.training.stage import (
    Computed,
    LossInput,
    Metrics,
    Objective,
    StageConfig,
    StepSetting,
    check_source_length,
)

RETRIEVES, READS = "objective='rag' with documents='retrieved'", "objective='rag' with documents='gold'"


@dataclass(frozen=True)
class MarginalLikelihood(Objective):
    """-log p(y|x), summed over the tokens of an answer, mean over questions.

    documents: the passages that the generator reads: `retrieved` from the index, the question's first `gold` passage,
      or `none`, the question alone.
    n_docs: passages read per question, K; 0: model.n_docs.
    n_retrieved: passages found per question, which are re-embedded and ranked again to choose the n_docs that are read;
      0: the n_docs that the search finds are read.
    normaliser: p(z|x) is a softmax over the passages read (`retrieved`) or over the whole `corpus`.
    prior_gradient: False stops the gradient of the likelihood to the retriever, but not that of retriever_losses.
    retriever_losses: weights of losses that are added, by their names in losses.RETRIEVER_LOSSES or rag_jax.fit.
    source_length: tokens of the generator's input at most; 0: model.source_length.
    window: with documents="gold", read only a window of at most this many tokens around the answer; 0: the whole
      passage.
    label_smoothing: share of the probability of the targets that is spread over the vocabulary.
    hf_compat: the likelihood as transformers computes it, see losses.sequence_joint.
    doc_chunk: passages that the generator reads at a time, to save memory, a divisor of n_docs; 0: all.
    logit_chunk: vocabulary entries whose logits are in memory at a time; the backward pass computes them again. 0: keep
      all logits, 4 bytes each of batch * n_docs * target length * vocabulary, for a quarter less work in the output
      layer.
    """

    kind: ClassVar[str] = "rag"
    has_targets: ClassVar[bool] = True
    READ_BY: ClassVar[dict[str, str]] = {
        **dict.fromkeys(
            ("n_docs", "n_retrieved", "normaliser", "hf_compat", "prior_gradient", "doc_chunk", "retriever_losses"),
            RETRIEVES,
        ),
        "window": READS,
    }

    documents: Literal["retrieved", "gold", "none"] = "retrieved"
    n_docs: int = 0
    n_retrieved: int = 0
    normaliser: Literal["retrieved", "corpus"] = "retrieved"
    prior_gradient: bool = True
    retriever_losses: Mapping[str, float] = field(default_factory=dict)
    source_length: int = 0
    window: int = 0
    label_smoothing: float = 0.0
    hf_compat: bool = False
    doc_chunk: int = 0
    logit_chunk: int = 2048

    @property
    def retrieves(self) -> bool:
        """Whether the generator reads retrieved passages."""
        return self.documents == "retrieved"

    @property
    def embeds_fresh(self) -> bool:  # type: ignore[override]
        return self.retrieves

    @property
    def groups(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset(optimizer.GROUPS) if self.retrieves else frozenset({"generator"})

    @property
    def searches(self) -> bool:
        return self.retrieves

    @property
    def n_ranked(self) -> int:
        return self.n_docs

    def searched(self) -> dict[str, int]:
        return {"n_docs": self.n_docs, "n_retrieved": self.n_retrieved} if self.retrieves else {}

    def loss_names(self) -> tuple[str, ...]:
        return tuple(self.retriever_losses)

    def needs(self) -> QuestionNeeds:
        return QuestionNeeds(gold=self.documents == "gold", window=self.window)

    @property
    def embeds_exactly(self) -> bool:
        return self.n_retrieved != 0

    @property
    def said(self) -> str:
        return f"objective={self.kind!r} and documents={self.documents!r}"

    def unchunked(self) -> "MarginalLikelihood":
        return dataclasses.replace(self, doc_chunk=0)

    def resolved(self, run: RunConfig) -> "MarginalLikelihood":
        return self if self.n_docs or not self.retrieves else dataclasses.replace(self, n_docs=run.model.n_docs)

    def unread(self) -> dict[str, str]:
        words = {name: place for name, place in self.READ_BY.items() if place == READS and self.documents != "gold"}
        words |= {name: place for name, place in self.READ_BY.items() if place == RETRIEVES and not self.retrieves}
        return {name: place for name, place in words.items() if (name, getattr(self, name)) != ("n_docs", 1)}

    def check(self, stage: StageConfig, run: RunConfig, where: str) -> None:
        if self.retrieves:
            at_least(1, where + "n_docs", self.n_docs)
        for name in ("window", "n_retrieved", "source_length", "doc_chunk", "logit_chunk"):
            at_least(0, where + name, getattr(self, name))
        if self.doc_chunk and self.n_docs % self.doc_chunk:
            raise InputError(f"{where}n_docs={self.n_docs} is not a multiple of doc_chunk={self.doc_chunk}")
        if self.n_retrieved and self.n_retrieved <= self.n_docs:
            raise InputError(f"{where}n_retrieved={self.n_retrieved} must be more than n_docs={self.n_docs}, or 0")
        if not run.search.in_graph and self.normaliser == "corpus":
            raise InputError(f"{where}normaliser='corpus' needs the index in graph: search.kind='exact'")
        self._check_lengths(run, where)

    def _check_lengths(self, run: RunConfig, where: str) -> None:
        check_source_length(self.source_length, run, where)
        length, generator = self.source_length or run.model.source_length, run.model.generator
        try:
            if generator is not None:
                generator.check_length(length + run.target_length)
        except ValueError as error:
            raise InputError(f"{where}{error}") from error
        if self.window + run.model.tail_length >= length:
            raise InputError(
                f"{where}source_length={length} has no room for a window of {self.window} tokens beside questions of "
                f"{run.model.tail_length} and a first token"
            )

    def batch_shapes(self, B: int, run: RunConfig, passage_length: int, prefix: int) -> dict[str, tuple[int, ...]]:
        return question_shapes(B, run) | ({"window": (B, 2)} if self.window else {})

    def tokens(self, B: int, run: RunConfig, passage_length: int) -> int:
        length = self.source_length or run.model.source_length
        return B * (self.n_docs if self.retrieves else 1) * (length + run.target_length - 1)

    def loss(self, s: StepSetting, params: Params, given: LossInput) -> Computed:
        question_key, passage_key, generator_key = jax.random.split(given.key, 3)
        batch, passages = given.batch, given.passages
        found, log_z_B = None, None
        if self.documents != "retrieved":
            rows_BK = batch["documents"] if "documents" in batch else batch["gold"][:, :1]
            scores_BK = jnp.zeros(rows_BK.shape, jnp.float32)
            if self.documents == "none":  # any row, with an empty window of it: `contexts` joins passages only
                rows_BK = jnp.zeros_like(rows_BK)
                batch = batch | {"window": jnp.zeros((len(rows_BK), 2), jnp.int32)}
        else:
            keys = question_key, passage_key
            how = Retrieval(self.n_docs, self.n_retrieved, self.normaliser)
            found = retrieve(s, how, params, given, keys)
            rows_BK, scores_BK, log_z_B = found.rows_BK, found.scores_BK, found.log_z_B
        ids_BKL, mask_BKL = contexts(s, passages, rows_BK, batch, self.source_length, self.window)
        labels_BT = batch["labels"]
        if self.hf_compat and len(s.rag.config.reader.opening(s.prefix_ids)) > 1:
            labels_BT = labels_BT[:, 1:]  # transformers' RAG does not put the start token before the labels
        # the unstopped scores_BK is used again below: retriever_losses keep their gradient
        prior = (scores_BK, log_z_B) if self.prior_gradient else jax.lax.stop_gradient((scores_BK, log_z_B))
        read = s.rag.likelihood(
            params,
            ids_BKL,
            mask_BKL,
            prior[0],
            labels_BT,
            self.hf_compat,
            self.label_smoothing,
            generator_key,
            log_normaliser_B=prior[1],
            doc_chunk=self.doc_chunk,
            logit_chunk=self.logit_chunk,
        )
        counted = shift_left(labels_BT, s.rag.config.reader)[1].sum()
        tokens = mask_BKL.sum() + counted * rows_BK.shape[1]
        value, metrics = read.nll_B.mean(), {"nll_per_token": read.nll_B.sum() / counted, "tokens": tokens}
        if found is None:
            return Computed(value, metrics)
        metrics |= found.metrics | retrieval_metrics(found.numbers_BK, scores_BK, read.posterior_BK, batch["gold"])
        for name, weight in self.retriever_losses.items():
            loss = s.retriever_losses[name](scores_BK, read.token_logp_BKT, read.mask_BT).mean()
            value, metrics[name] = value + weight * loss, loss
        return Computed(value, metrics, found.fresh)


def retrieval_metrics(rows_BK: jax.Array, scores_BK: jax.Array, posterior_BK: jax.Array, gold_BG: jax.Array) -> Metrics:
    """Scalar metrics of retrieval that show a collapse of the retriever early.

    prior_entropy: mean entropy of p(z|x), in nats.
    unique_documents: share of distinct passages among those found for the batch.
    posterior_prior_gap: mean KL(p(z|x,y) || p(z|x)), in nats.
    recall_at_1, recall_at_K: share of questions with a known gold passage that have one among the first 1, K.

    A row of -1 was not found and counts nowhere. A metric is NaN where there is nothing to measure.
    """
    prior_BK = losses.prior_logp(scores_BK)
    there_BK = rows_BK >= 0
    found_B = there_BK.any(-1)
    known_B = (gold_BG >= 0).any(-1)
    hit_BK = is_gold(rows_BK, gold_BG)
    ordered = jnp.sort(rows_BK.reshape(-1))
    best_B = hit_BK[jnp.arange(len(hit_BK)), scores_BK.argmax(-1)]
    different = (ordered[:1] >= 0).sum() + ((ordered[1:] != ordered[:-1]) & (ordered[1:] >= 0)).sum()
    return {
        "prior_entropy": -(jnp.exp(prior_BK) * prior_BK).sum(-1).mean(where=found_B),
        "unique_documents": different / there_BK.sum(),
        "posterior_prior_gap": (jnp.exp(posterior_BK) * (posterior_BK - prior_BK)).sum(-1).mean(where=found_B),
        "recall_at_1": (best_B & known_B).sum() / known_B.sum(),
        f"recall_at_{rows_BK.shape[1]}": (hit_BK.any(-1) & known_B).sum() / known_B.sum(),
    }
