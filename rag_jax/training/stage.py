"""A stage of training: the fields that all stages share, and the interface of objectives.

An objective is a file of `training/objectives`: a frozen dataclass whose fields are its options, with its loss and
methods that say what it needs of batches, search and model. The training step, the data pipeline, the index and
`rag-jax compile` call these methods and never compare names of objectives.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np

from rag_jax import losses
from rag_jax.errors import InputError
from rag_jax.index import refresh_schedule
from rag_jax.index.device_index import Index
from rag_jax.losses import RetrieverLoss
from rag_jax.rag import Params, Rag, TokenTables
from rag_jax.retrieval.config import SearchConfig
from rag_jax.retrieve import Batch
from rag_jax.runs.config import RunConfig
from rag_jax.system.configuration import plain
from rag_jax.training import optimizer
from rag_jax.training.data import Data, QuestionNeeds
from rag_jax.training.optimizer import OptimizerConfig

Metrics = dict[str, jax.Array]


class Fresh(NamedTuple):
    """Index rows [X] with their present embeddings [X, E], computed without dropout, for `write_back`."""

    rows: jax.Array
    embeddings: jax.Array


class Computed(NamedTuple):
    """Result of an objective's loss.

    value: the loss, a scalar mean over the batch.
    metrics: scalars by name; `tokens`, the number of tokens read and written, must be among them.
    fresh: index rows that were re-embedded on the way, None for none.
    """

    value: jax.Array
    metrics: Metrics
    fresh: Fresh | None = None


@dataclass(frozen=True)
class LossInput:
    """Arguments of an objective's loss besides the parameters.

    batch: arrays of the batch, see `Objective.batch_shapes`.
    index: the index, if the stage searches in graph; only the rows of the batch's passages, if the search is on the
      host; None without a search.
    passages: token tables of the corpus or, with a search on the host, of the batch's passages.
    key: random key of this step (and micro-batch).
    now: int32 scalar, updates of the run before this one.
    trains_passages: whether the encoder that embeds passages is trained in this stage.
    """

    batch: Batch
    index: Index
    passages: TokenTables
    key: jax.Array
    now: jax.Array
    trains_passages: bool


@dataclass(frozen=True)
class Objective:
    """Base class of what a stage minimises; the fields of a subclass are its options in the stage."""

    kind: ClassVar[str]  # its name in configurations
    asks: ClassVar[bool] = True  # trains on questions; False: on batches made of the corpus alone
    has_targets: ClassVar[bool] = False  # batches may be bucketed by the length of targets
    embeds_fresh: ClassVar[bool] = False  # its loss may return fresh rows of the index
    # True: the step sums gradients of `accumulate` micro-batches; False: the loss sees the whole batch and splits it
    # itself, as one whose examples are compared with each other must
    in_parts: ClassVar[bool] = True
    groups: ClassVar[frozenset[str]] = frozenset(optimizer.GROUPS)  # parameter groups that its loss depends on
    READ_BY: ClassVar[dict[str, str]] = {}  # option -> the only stages that read it, in words for messages

    def searched(self) -> dict[str, int]:
        """Passages to search for a question, by the option that sets the number; empty: the stage never searches."""
        return {}

    @property
    def searches(self) -> bool:
        """Whether the step searches the index."""
        return any(self.searched().values())

    @property
    def n_found(self) -> int:
        """Number of passages a search has to find for each question."""
        return max(self.searched().values(), default=0)

    @property
    def n_ranked(self) -> int:
        """Number of found passages that are used: the k of recall@k when the drift of the index is measured."""
        return self.n_found

    @property
    def rows_per_question(self) -> int:
        """Passages for each question in the tables that a step gets when the search is on the host."""
        return max(1, self.n_found)

    def documents_shape(self, B: int) -> tuple[int, ...]:
        """Shape of `documents` in a batch of B questions whose passages were found on the host."""
        return B, self.rows_per_question

    def loss_names(self) -> tuple[str, ...]:
        """Names of the retriever losses that it adds, keys of StepSetting.retriever_losses."""
        return ()

    def needs(self) -> QuestionNeeds:
        """Requirements on the questions, see `training.data.usable_pairs`."""
        return QuestionNeeds()

    @property
    def embeds_exactly(self) -> bool:
        """Whether its fresh rows are embedded without dropout even if the encoder has dropout."""
        return False

    @property
    def said(self) -> str:
        """Name for messages: its kind, and the options that decide which parameter groups it trains."""
        return f"objective={self.kind!r}"

    def unchunked(self) -> "Objective":
        """A copy without options that compute in chunks to save memory."""
        return self

    def resolved(self, run: RunConfig) -> "Objective":
        """The objective with options that the stage left at 0 filled in from the run's model."""
        return self

    def check(self, stage: "StageConfig", run: RunConfig, where: str) -> None:
        """InputError, beginning with `where`, for options that contradict each other or would fail only in training."""

    def unread(self) -> dict[str, str]:
        """Options that have no effect given the values of the others, each with the stages that read it, in words."""
        return {}

    def corpus_batches(
        self, stage: "StageConfig", run: RunConfig, data: Data, seed: int, own: np.ndarray | None
    ) -> grain.MapDataset:
        """Endless batches made of the corpus, for an objective without questions (`asks` False).

        own: rows of each batch that this process makes, None for all.
        """
        raise NotImplementedError(f"objective {self.kind!r} asks no questions and makes no batches of the corpus")

    def batch_shapes(self, B: int, run: RunConfig, passage_length: int, prefix: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the arrays of a batch of B, all int32.

        passage_length: width of the corpus' encoder token table.
        prefix: number of special tokens at the start of the generator's input.
        """
        raise NotImplementedError(f"objective {self.kind!r} does not say what its batches are")

    def tokens(self, B: int, run: RunConfig, passage_length: int) -> int:
        """Tokens read and written in a batch of B without padding, not counting passages that are re-embedded."""
        raise NotImplementedError(f"objective {self.kind!r} does not count its tokens")

    def rows_on_host(
        self, arrays: dict[str, np.ndarray], found_BK: np.ndarray | None, mesh: jax.sharding.Mesh
    ) -> np.ndarray:
        """Corpus rows whose passages the step needs, for this process's part of a batch, with a search on the host.

        arrays: this process's rows of the batch; entries that the step must not get may be removed.
        found_BK: rows that the search found, -1 where it found fewer; None in a stage that does not search.
        """
        if found_BK is not None:
            return found_BK
        return arrays["gold"][:, :1] if "gold" in arrays else np.zeros((len(arrays["labels"]), 0), np.int32)

    def loss(self, s: "StepSetting", params: Params, given: LossInput) -> Computed:
        """The loss of a batch, with metrics; a pure function of the parameters and `given`, traced by jit."""
        raise NotImplementedError(f"objective {self.kind!r} has no loss")

    def shares(self, s: "StepSetting", batch: Batch, count: int) -> jax.Array:
        """Weights [count] of the losses of `count` micro-batches in the loss of their batch; they sum to 1."""
        return jnp.full(count, 1 / count)


@dataclass(frozen=True)
class StageConfig:
    """One stage of training.

    name: shown in logs; unique in the run.
    objective: what is minimised, with its options (training/objectives). A configuration gives its name here, and its
      options as keys of the stage.
    steps: updates.
    batch: questions per update, over all devices; pairs of question and answer with answers="every", passages where
      the objective has no questions.
    accumulate: micro-batches that a batch is processed in, one after another; the update is that of the batch, but for
      dropout.
    questions: train on only this many questions of each input, its first ones; 0: all.
    buckets: widths for questions, in tokens, ascending. A batch has only questions of one bucket and is padded to its
      width; questions longer than the last width are padded to model.question_length. (): one width for all.
    target_buckets: widths for targets, likewise; longer ones are padded to target_length.
    refresh: when the index is rebuilt (index/refresh_schedule.py); "": only at the start of the stage.
    write_back: store the passage embeddings that a step computes for its loss in the index.
    drift_every: steps between measurements of the overlap of the index with fresh embeddings; 0: none.
    optimizer: see training/optimizer.py.
    """

    name: str
    objective: Objective
    steps: int = 1000
    batch: int = 16
    accumulate: int = 1
    questions: int = 0
    buckets: tuple[int, ...] = ()
    target_buckets: tuple[int, ...] = ()
    refresh: str = ""
    write_back: bool = False
    drift_every: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def to_values(self) -> dict[str, Any]:
        """Plain values as a configuration has them: the options of the objective beside the fields of the stage."""
        common = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "objective"}
        options = {f.name: plain(getattr(self.objective, f.name)) for f in dataclasses.fields(self.objective)}
        return {"name": common.pop("name"), "objective": self.objective.kind, **options, **common}

    def changed(self, **values: Any) -> "StageConfig":
        """A copy with other values of its fields or of its objective's options."""
        mine = {f.name for f in dataclasses.fields(self)}
        options = {name: value for name, value in values.items() if name not in mine}
        objective = dataclasses.replace(values.pop("objective", self.objective), **options)
        return dataclasses.replace(self, objective=objective, **{k: v for k, v in values.items() if k in mine})


class StepSetting(NamedTuple):
    """Static arguments of a training step, which its compiled program depends on.

    n_passages: rows that are searched: those of the corpus or, for a live corpus, all rows of the tables.
    prefix_ids: special tokens at the start of the generator's input.
    epoch: steps in an epoch of the stage's questions, for `refresh` in epochs.
    retriever_losses: by the names that a stage may use.
    """

    rag: Rag
    stage: StageConfig
    mesh: jax.sharding.Mesh
    n_passages: int
    prefix_ids: tuple[int, ...]
    search: SearchConfig = SearchConfig()
    epoch: int = 1
    retriever_losses: Mapping[str, RetrieverLoss] = losses.RETRIEVER_LOSSES

    @property
    def when(self) -> refresh_schedule.Schedule:
        """The stage's refresh schedule, with epochs as steps."""
        return refresh_schedule.parse(self.stage.refresh, self.epoch)


def check_source_length(source_length: int, run: RunConfig, where: str) -> None:
    """InputError where the generator has fewer positions than source_length tokens; 0: model.source_length."""
    length, generator = source_length or run.model.source_length, run.model.generator
    if generator is not None and length > generator.positions:
        raise InputError(f"{where}source_length={length} is more than the {generator.positions} positions")


def micro(x: jax.Array, count: int) -> jax.Array:
    """Splits a batch into micro-batches: [B, ...] -> [count, B / count, ...], row i into micro-batch i % count."""
    # strided, so that each device's contiguous rows spread evenly over all micro-batches and none of them moves
    return x.reshape(len(x) // count, count, *x.shape[1:]).swapaxes(0, 1)
