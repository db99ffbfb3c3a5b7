"""The claims of docs/extending.md: an extension is one new file, here this one, and at most a row elsewhere."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import rag_jax
from rag_jax import losses, rag, retrieve
from rag_jax.data.readers import formats
from rag_jax.data.readers.formats import Format
from rag_jax.data.readers.rows import Passage, Row
from rag_jax.errors import InputError
from rag_jax.index import refresh_schedule
from rag_jax.index.refresh_schedule import Schedule
from rag_jax.models.bart import Bart, BartConfig
from rag_jax.models.bert import Bert, BertConfig
from rag_jax.system import configuration
from rag_jax.training import config
from rag_jax.training.data import QuestionNeeds
from rag_jax.training.objectives.contrastive import question_shapes
from rag_jax.training.optimizer import OptimizerConfig
from rag_jax.training.stage import Computed, Objective, StageConfig


@pytest.fixture(scope="module")
def texts():
    """Passages and questions in memory, and the configuration of a small model for them."""
    names = [f"Town {i}" for i in range(24)]
    passages = [
        {"id": f"p{i}", "title": name, "text": f"{name} lies on river {i % 7}."} for i, name in enumerate(names)
    ]
    questions = [
        {"id": f"q{i}", "question": f"On what does {name} lie?", "answers": [f"river {i % 7}"],
         "positive_passage_ids": [f"p{i}"]}
        for i, name in enumerate(names)
    ]  # fmt: skip
    lengths = {"encoder_length": 32, "generator_length": 32, "train_tokenizer": (300, 300)}
    return rag_jax.Texts(passages, questions[:16], questions[16:], lengths)


def values(stages, **changes):
    """A configuration as nested values, without data."""
    found = configuration.plain(tiny.get_config("nowhere"))
    found |= {"corpus": "", "train": "", "dev": "", "stages": stages, "log_every": 2, "checkpoint_every": 2}
    return found | {"evaluate_every": 0} | changes


def stage(name, steps=2, **options):
    groups = options.pop("groups")
    return {"name": name, "steps": steps, "batch": 8, **options, "optimizer": {"groups": dict.fromkeys(groups, 1.0)}}


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# --- a retriever loss: nothing but this function ----------------------------------------------------------------------


def uniform_prior(scores_BK, token_logp_BKT, mask_BT):
    """KL from the uniform distribution to the prior: keeps a retriever from being sure too early."""
    return -losses.prior_logp(scores_BK).mean(-1) - np.log(scores_BK.shape[1])


def test_a_retriever_loss(texts, tmp_path):
    moments = []

    def hook(moment):
        moments.append(moment)
        return {"mine/parameters": sum(x.size for x in jax.tree.leaves(moment.params))}

    weights = {"uniform": 0.5, "emdr2": 1.0, "pdist": 1.0}
    joint = stage("joint", n_docs=3, groups=("question_encoder",), prior_gradient=False, retriever_losses=weights)
    given = values([joint])
    result = rag_jax.fit(given, tmp_path / "run", data=texts, losses={"uniform": uniform_prior}, hooks=[hook, print])
    (row,) = rows_of(tmp_path / "run")
    assert row["gradient_norm"] > 0  # from the retriever losses alone: the likelihood's stops before
    assert (
        min(row["uniform"], row["emdr2"], row["pdist"]) > 0
        and row["mine/parameters"] > 1000
        and row["step"] == result.steps == 2
    )
    assert [(moment.step, moment.stage) for moment in moments] == [(2, "joint")]
    assert result.pipeline().ask("On what does Town 3 lie?").passages[0].id.startswith("p")
    again = rag_jax.fit(given, tmp_path / "run", data=texts, losses={"uniform": uniform_prior})
    assert again.steps == 2 and len(rows_of(tmp_path / "run")) == 1  # nothing is left to do
    with pytest.raises(InputError, match="retriever_losses: 'uniform' is not one of 'emdr2', 'pdist'"):
        rag_jax.fit(given, tmp_path / "other", data=texts)
    with pytest.raises(InputError, match="holds other texts"):
        rag_jax.fit(given, tmp_path / "run", data=replace(texts, questions=texts.questions[:9]))


@pytest.mark.parametrize("name", list(losses.RETRIEVER_LOSSES))
def test_gradients_of_retriever_losses(name):
    """With respect to the scores: p_R - r with r_k ~ p_R(k) p(y|z_k) for EMDR2, p_R - p_T for PDist; zero for the
    generator, and for passages that were not found.
    """
    rng = np.random.default_rng(0)
    scores_BK = rng.normal(size=(3, 4))
    scores_BK[2, 2:] = losses.ABSENT
    logp_BKT, mask_BT = -rng.random((3, 4, 5)), np.arange(5) < np.array([[5], [3], [1]])
    total = lambda s, t: losses.RETRIEVER_LOSSES[name](s, t, jnp.asarray(mask_BT)).sum()  # noqa: E731
    to_scores, to_logp = jax.grad(total, (0, 1))(jnp.asarray(scores_BK), jnp.asarray(logp_BKT))
    prior = np.exp(scores_BK - scores_BK.max(1, keepdims=True))
    prior /= prior.sum(1, keepdims=True)
    logp_BK = (logp_BKT * mask_BT[:, None]).sum(-1)
    weight = prior * np.exp(logp_BK) if name == "emdr2" else (prior > 0) * np.exp(logp_BK / mask_BT.sum(1)[:, None])
    np.testing.assert_allclose(to_scores, prior - weight / weight.sum(1, keepdims=True), atol=1e-6)
    assert not np.any(to_logp)


# --- an objective: this class; in configurations a row of OBJECTIVES --------------------------------------------------


@dataclass(frozen=True)
class Distance(Objective):
    """An objective: the squared distance between the vectors of a question and its gold passage."""

    kind: ClassVar[str] = "distance"
    groups: ClassVar[frozenset[str]] = frozenset({"question_encoder", "context_encoder"})

    scale: float = 1.0

    def needs(self):
        return QuestionNeeds(gold=True)

    def batch_shapes(self, B, run, passage_length, prefix):
        return question_shapes(B, run)

    def tokens(self, B, run, passage_length):
        return B * (run.model.question_length + passage_length)

    def loss(self, s, params, given):
        question_key, passage_key = jax.random.split(given.key)
        q_BE = retrieve.embed_questions(s, params, given.batch, question_key)
        rows_B = given.batch["gold"][:, 0]
        d_BE = retrieve.embed_rows(s, params, given.passages, rows_B, passage_key)
        value = self.scale * jnp.square(q_BE - d_BE).sum(-1).mean()
        return Computed(value, {"tokens": given.batch["question_length"].sum()})


def test_an_objective(texts, tmp_path, monkeypatch):
    near = stage("near", steps=4, groups=("question_encoder",))
    cfg = config.from_plain(values([near | {"objective": "contrastive"}]))
    adam = OptimizerConfig(learning_rate=3e-3, schedule="constant", groups={"question_encoder": 1.0})
    cfg = replace(cfg, stages=(StageConfig("near", Distance(2.0), steps=4, batch=8, optimizer=adam),))
    rag_jax.fit(cfg, tmp_path / "run", data=texts)
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [2, 4] and rows[1]["loss"] < rows[0]["loss"]
    assert rag_jax.fit(cfg, tmp_path / "run", data=texts).steps == 4  # its own configuration is read again
    monkeypatch.setitem(config.OBJECTIVES, "distance", Distance)
    named = config.from_plain(values([near | {"objective": "distance", "scale": 2.0}]))
    assert named.stages[0].objective == Distance(2.0)
    with pytest.raises(InputError, match="stage near: hard_negatives=1 is only for objective='contrastive'"):
        config.from_plain(values([near | {"objective": "distance", "hard_negatives": 1}]))


# --- a generator: a configuration, a module and a row of GENERATORS ---------------------------------------------------


@dataclass(frozen=True)
class LoudConfig(BartConfig):
    """BART with logits that are twice as large."""

    kind: Literal["loud"] = "loud"  # type: ignore[assignment]


class Loud(Bart):
    def head(self):
        kernel_VD, bias_V = super().head()
        return 2 * kernel_VD, bias_V

    def logits(self, x_BTD):
        return 2 * super().logits(x_BTD)


@dataclass(frozen=True)
class LongConfig(BertConfig):
    """BERT with vectors that are twice as long."""

    kind: Literal["long"] = "long"  # type: ignore[assignment]


class Long(Bert):
    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)


def test_a_generator_and_an_encoder(texts, tmp_path, monkeypatch):
    monkeypatch.setitem(rag.GENERATORS, "loud", rag.ModelFamily(LoudConfig, Loud))
    monkeypatch.setitem(rag.ENCODERS, "long", rag.ModelFamily(LongConfig, Long))
    read = stage("read", groups=("generator",), documents="gold")
    given = values([read])
    given["model"]["generator"] |= {"kind": "loud"}
    given["model"]["encoder"] |= {"kind": "long"}
    result = rag_jax.fit(given, tmp_path / "run", data=texts)
    opened = result.pipeline()
    model = opened.loaded.rag
    assert isinstance(model.config.generator, LoudConfig) and isinstance(model.generator, Loud)
    assert isinstance(model.config.encoder, LongConfig) and isinstance(model.encoder, Long)
    assert opened.ask("On what does Town 3 lie?", n_docs=2, num_beams=2).passages
    given["model"]["generator"] |= {"kind": "quiet"}
    with pytest.raises(InputError, match=r"model\.generator\.kind: 'quiet' is not one of 'bart', 't5', 'lm', 'loud'"):
        rag_jax.fit(given, tmp_path / "other", data=texts)
    given["model"] |= {"encoder": given["model"]["encoder"] | {"kind": "short"}, "generator": None}
    with pytest.raises(InputError, match=r"model\.encoder\.kind: 'short' is not one of 'bert', 'long'"):
        rag_jax.fit(given, tmp_path / "other", data=texts)


# --- a reader of a file format: a function and a row of FORMATS -------------------------------------------------------


def semicolons(source, on_bad) -> Iterator[Row]:
    for number, line in enumerate(source.path.read_text(encoding="utf-8").splitlines(), 1):
        yield Row(number, number, dict(zip(("id", "title", "text"), line.split(";"), strict=True)))


def test_a_reader(tmp_path, monkeypatch):
    read = Format("id;title;text", semicolons, passages=lambda fields, at: [Passage(**fields, document=fields["id"])])
    monkeypatch.setitem(formats.FORMATS, "semicolons", read)
    (tmp_path / "a.txt").write_text("1;Rome;Rome lies on the Tiber.\n2;Bonn;Bonn lies on the Rhine.\n")
    found = list(formats.read_passages([f"semicolons:{tmp_path / 'a.txt'}"]))
    assert [(p.id, p.title) for p in found] == [("1", "Rome"), ("2", "Bonn")]


# --- a refresh schedule: a function and a row of SCHEDULES ------------------------------------------------------------


@dataclass(frozen=True)
class Doubling(Schedule):
    """A schedule that refreshes at steps first, 2 first, 4 first, ...: often while the encoder changes fast."""

    first: int = 1

    def due(self, into):
        return into >= self.first and into % self.first == 0 and (into // self.first).bit_count() == 1


def test_a_refresh_schedule(texts, tmp_path, monkeypatch):
    row = lambda rest, lag, epoch, text: Doubling(first=refresh_schedule.count(rest, epoch, text))  # noqa: E731
    monkeypatch.setitem(refresh_schedule.SCHEDULES, "doubling", row)
    assert [step for step in range(20) if refresh_schedule.parse("doubling:2").due(step)] == [2, 4, 8, 16]
    joint = stage("joint", steps=6, n_docs=3, groups=("question_encoder", "generator"), refresh="doubling:2")
    rag_jax.fit(values([joint], log_every=1, checkpoint_every=6), tmp_path / "run", data=texts)
    assert [row["index_age"] for row in rows_of(tmp_path / "run")] == [0, 1, 0, 1, 0, 1]
