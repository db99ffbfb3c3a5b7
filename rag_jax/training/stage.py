"""A stage of training: what is common to all stages, and what an objective has to say for the rest to work with it.

An objective is a file of `training/objectives`: a frozen dataclass whose fields are its options, with its loss and what
it needs of batches, search and model. The training step, the data, the index and `rag-jax compile` ask it, and compare
no names.
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
from rag_jax.rag import Params, Passages, Rag
from rag_jax.retrieval.config import SearchConfig
from rag_jax.retrieve import Batch
from rag_jax.runs.config import RunConfig
from rag_jax.system.configuration import plain
from rag_jax.training import optimizer
from rag_jax.training.data import Data, QuestionNeeds
from rag_jax.training.optimizer import OptimizerConfig

Metrics = dict[str, jax.Array]


class Fresh(NamedTuple):
    """Rows [X] of the index and what they are now [X, E], embedded without dropout: for `write_back`."""

    rows: jax.Array
    embeddings: jax.Array


class Computed(NamedTuple):
    """What a loss gives: its value, the mean over the batch; metrics, scalars, `tokens` among them; fresh rows or
    None.
    """

    value: jax.Array
    metrics: Metrics
    fresh: Fresh | None = None


@dataclass(frozen=True)
class LossInput:
    """What a loss reads besides the parameters.

    index: where the stage searches in graph; rows that its passages have, where it searches on the host; else None.
    passages: the token tables. key: of this step. now: the step of the run.
    trains_passages: the parameters that embed passages are among those that train.
    """

    batch: Batch
    index: Index
    passages: Passages
    key: jax.Array
    now: jax.Array
    trains_passages: bool


@dataclass(frozen=True)
class Objective:
    """What a stage minimises. Fields of a subclass are its options; what it does not override is as stated here."""

    kind: ClassVar[str]  # its name in configurations
    asks: ClassVar[bool] = True  # has questions; else it is made of the corpus alone
    has_targets: ClassVar[bool] = False  # batches may be bucketed by the length of targets
    embeds_fresh: ClassVar[bool] = False  # its loss may give fresh rows of the index
    in_parts: ClassVar[bool] = True  # `accumulate` sums gradients of parts; else the loss itself goes through the parts
    groups: ClassVar[frozenset[str]] = frozenset(optimizer.GROUPS)  # of parameters, that its loss depends on
    READ_BY: ClassVar[dict[str, str]] = {}  # option -> the words for those stages alone that read it

    def searched(self) -> dict[str, int]:
        """How many passages a question are looked for, by the option that says so; empty: the stage never searches."""
        return {}

    @property
    def searches(self) -> bool:
        """Whether the step searches the index."""
        return any(self.searched().values())

    @property
    def n_found(self) -> int:
        """Passages a question that a search has to find."""
        return max(self.searched().values(), default=0)

    @property
    def n_ranked(self) -> int:
        """Passages a question that matter of those found: the k of the drift's recall@k."""
        return self.n_found

    @property
    def rows_per_question(self) -> int:
        """Passages a question in the tables of a step whose search is on the host."""
        return max(1, self.n_found)

    def documents_shape(self, B: int) -> tuple[int, ...]:
        """Of `documents` in a batch of B questions whose passages were found on the host."""
        return B, self.rows_per_question

    def loss_names(self) -> tuple[str, ...]:
        """Retriever losses that it adds, names of Setting.retriever_losses."""
        return ()

    def needs(self) -> QuestionNeeds:
        """What a question must bring to be trained on."""
        return QuestionNeeds()

    @property
    def embeds_exactly(self) -> bool:
        """Whether its fresh rows are embedded without dropout, whatever the encoder's is."""
        return False

    @property
    def said(self) -> str:
        """How messages name it: its kind, and the options that decide which parameters it reaches."""
        return f"objective={self.kind!r}"

    def unchunked(self) -> "Objective":
        """The same, with nothing computed in chunks to save memory."""
        return self

    def resolved(self, run: RunConfig) -> "Objective":
        """With the values of the model where the stage leaves them open."""
        return self

    def check(self, stage: "StageConfig", run: RunConfig, where: str) -> None:
        """InputError, which begins with `where`, for options that contradict each other or would fail late."""

    def unread(self) -> dict[str, str]:
        """Options that nothing reads with the others as they are, and the words for what reads them."""
        return {}

    def corpus_batches(
        self, stage: "StageConfig", run: RunConfig, data: Data, seed: int, own: np.ndarray | None
    ) -> grain.MapDataset:
        """Batches of an objective that has no questions; own: the rows of each that this process makes, None for
        all.
        """
        raise NotImplementedError(f"objective {self.kind!r} asks no questions and makes no batches of the corpus")

    def batch_shapes(self, B: int, run: RunConfig, passage_length: int, prefix: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the arrays of a batch, all int32. passage_length: of the corpus, in the encoder's tokens; prefix:
        special tokens that the generator's input begins with.
        """
        raise NotImplementedError(f"objective {self.kind!r} does not say what its batches are")

    def tokens(self, B: int, run: RunConfig, passage_length: int) -> int:
        """Of one batch, read and written, if none were padding; those of re-embedded passages do not count."""
        raise NotImplementedError(f"objective {self.kind!r} does not count its tokens")

    def rows_on_host(
        self, arrays: dict[str, np.ndarray], found_BK: np.ndarray | None, mesh: jax.sharding.Mesh
    ) -> np.ndarray:
        """Rows of the corpus that the step is to have, of this process's part of a batch. found_BK: those that the
        search found, -1 where it found fewer, None where the stage does not search.
        """
        if found_BK is not None:
            return found_BK
        return arrays["gold"][:, :1] if "gold" in arrays else np.zeros((len(arrays["labels"]), 0), np.int32)

    def loss(self, s: "Setting", params: Params, given: LossInput) -> Computed:
        """What is minimised, and what is said of it."""
        raise NotImplementedError(f"objective {self.kind!r} has no loss")

    def shares(self, s: "Setting", batch: Batch, count: int) -> jax.Array:
        """How much of the loss of a batch is each of its `count` parts [count]; they sum to 1."""
        return jnp.full(count, 1 / count)


@dataclass(frozen=True)
class StageConfig:
    """One stage of training.

    objective: what is minimised, with its options (training/objectives); in a configuration its name, and its options
      beside the fields here.
    steps, batch: so many updates, on so many questions each (pairs, or passages, where the objective has no questions).
    accumulate: the batch goes through the model in so many parts, one after another; the update is the same.
    questions: train on this many of the questions of each input only, 0 for all.
    buckets, target_buckets: widths in tokens, ascending. A batch has questions (targets) of one bucket alone and is as
      wide as that; what is longer than the last one is as wide as model.question_length (target_length).
    refresh: when the index is rebuilt, see index/refresh_schedule.py ("" for only at the stage's start).
    write_back: what a step embeds anyway goes into the index.
    drift_every: steps between measurements of how far the index has drifted, 0 for none.
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
        """As a configuration has it: the options of the objective beside the fields of the stage."""
        common = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "objective"}
        options = {f.name: plain(getattr(self.objective, f.name)) for f in dataclasses.fields(self.objective)}
        return {"name": common.pop("name"), "objective": self.objective.kind, **options, **common}

    def changed(self, **values: Any) -> "StageConfig":
        """The stage with other values of its fields, or of its objective's options."""
        mine = {f.name for f in dataclasses.fields(self)}
        options = {name: value for name, value in values.items() if name not in mine}
        objective = dataclasses.replace(values.pop("objective", self.objective), **options)
        return dataclasses.replace(self, objective=objective, **{k: v for k, v in values.items() if k in mine})


class Setting(NamedTuple):
    """What a training step closes over: static things and special ids.

    n_passages: rows that are searched: those of the corpus or, where it is live, all of the tables.
    epoch: steps in which all of the stage's questions come, for the words of `refresh`.
    retriever_losses: those that a stage may name.
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
        """When the stage rebuilds the index."""
        return refresh_schedule.parse(self.stage.refresh, self.epoch)


def check_source_length(source_length: int, run: RunConfig, where: str) -> None:
    """InputError where the generator has fewer positions than its input tokens; 0: the model's."""
    length, generator = source_length or run.model.source_length, run.model.generator
    if generator is not None and length > generator.positions:
        raise InputError(f"{where}source_length={length} is more than the {generator.positions} positions")


def micro(x: jax.Array, count: int) -> jax.Array:
    """[B, ...] -> [count, B / count, ...]: rows that lie on one device go evenly into all micro-batches."""
    return x.reshape(len(x) // count, count, *x.shape[1:]).swapaxes(0, 1)
