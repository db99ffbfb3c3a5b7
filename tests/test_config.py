"""Configuration files to frozen dataclasses: misspelt, mistyped or contradictory settings raise with their path."""

import dataclasses
import json
import re

import pytest
import tiny
from conftest import ROOT

from rag_jax.errors import InputError
from rag_jax.inference import config as answer_config
from rag_jax.inference.pipeline import AnswerConfig
from rag_jax.models.bart import BartConfig
from rag_jax.models.decoder_only import LmConfig
from rag_jax.models.t5 import T5Config
from rag_jax.rag import RagConfig
from rag_jax.retrieval import config as search_config
from rag_jax.runs import config as run_config
from rag_jax.system import configuration
from rag_jax.training import config
from rag_jax.training.config import TrainConfig
from rag_jax.training.objectives import OBJECTIVES
from rag_jax.training.stage import StageConfig

TINY = f"{ROOT}/tests/tiny.py:data"
SHIPPED = sorted(file for file in (ROOT / "configs").glob("*.py") if file.stem != "decoding")
OF_BOTH = [file for file in SHIPPED if file.stem in ("world", "squad", "nq_gold")]
VARIANTS = [f"{file}{argument}" for file in OF_BOTH for argument in ("", ":sequence", ":token")]


def minimal():
    return {"corpus": "c", "train": "t", "dev": "d", "stages": [{"name": "a"}]}


@pytest.fixture
def base():
    return config.load(TINY)


def write(tmp_path, body):
    file = tmp_path / "some.py"
    file.write_text("from ml_collections import ConfigDict\n" + body)
    return str(file)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", VARIANTS)
def test_shipped_configurations_load_and_hold_together(path):
    cfg = config.load(path)
    config.check(cfg)
    assert cfg.model.variant == ("token" if path.endswith(":token") else "sequence")


def test_there_are_shipped_configurations():
    assert {"world", "squad", "nq_gold", "minilm"} <= {file.stem for file in SHIPPED}


def test_shipped_ways_of_answering_are_those_of_the_answers():
    directory = ROOT / "configs"
    presets = {}
    for name in ("", ":paper_token", ":paper_sequence", ":paper_generation", ":transformers"):
        presets[name] = configuration.build(AnswerConfig, configuration.evaluated(f"{directory}/decoding.py{name}"))
    assert presets[""].num_beams == 4 and presets[":transformers"].n_docs == 5
    # Lewis et al. 2020, appendix A
    assert (presets[":paper_token"].n_docs, presets[":paper_sequence"].n_docs) == (15, 50)
    assert presets[":paper_sequence"].num_beams == 1 and presets[":paper_sequence"].mode == "thorough"
    generation = presets[":paper_generation"]
    assert (generation.n_docs, generation.num_beams, generation.mode) == (10, 4, "fast")
    with pytest.raises(InputError, match="no preset"):
        configuration.evaluated(f"{directory}/decoding.py:beans")


def test_values_arrive_in_their_dataclasses(base):
    assert isinstance(base, TrainConfig) and base.corpus == "data/corpus"
    assert [stage.name for stage in base.stages] == ["retriever", "read", "denoise", "joint"]
    assert all(isinstance(stage, StageConfig) for stage in base.stages)
    joint = base.stages[3]
    assert joint.objective.kind == "rag" and joint.objective.documents == "retrieved" and joint.refresh == "4"
    assert joint.optimizer.groups == {"question_encoder": 1.0, "generator": 1.0} and joint.optimizer.b2 == 0.98
    assert base.model.encoder.pooling == "mean" and base.model.generator.logit_scale == 32**-0.5
    assert base.keep_checkpoints == TrainConfig.keep_checkpoints  # not in the file: the default
    config.check(base)


def test_everything_is_frozen(base):
    for part in (base, base.model, base.model.encoder, base.stages[0], base.stages[0].optimizer):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, dataclasses.fields(part)[0].name, None)
    assert isinstance(base.stages, tuple)


def test_saved_and_read_is_the_same(base, tmp_path):
    run_config.save(base, tmp_path / "config.json")
    assert config.read(tmp_path / "config.json") == base


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (None, "no such configuration file"),
        ("config = 3\n", "defines get_config"),
        ("def get_config():\n  return ConfigDict({'corpus': 'a', 'train': 'b', 'dev': 'c'})\n", "missing key 'stages'"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, body, message):
    file = str(tmp_path / "none.py") if body is None else write(tmp_path, body)
    with pytest.raises(InputError, match=message):
        config.load(file)


def test_run_directories_that_are_none(tmp_path):
    with pytest.raises(InputError, match="must be in a run directory"):
        config.read(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: not JSON"):
        config.read(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config\.json: not a JSON object"):
        config.read(tmp_path / "config.json")


# --- overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("seed=7", "seed", 7),
        ("corpus=other=corpus", "corpus", "other=corpus"),
        ("train=2024.jsonl", "train", "2024.jsonl"),
        ("evaluate_every=10", "evaluate_every", 10),  # not in the file
        ("mesh={'data': 2}".replace("'", '"'), "mesh", {"data": 2}),
        ("mesh.fsdp=4", "mesh", {"fsdp": 4}),
        ("model.encoder.dropout=0", "model.encoder.dropout", 0.0),
        ("model.encoder.dtype=bfloat16", "model.encoder.dtype", "bfloat16"),
        ("stages.joint.steps=3", "stages.3.steps", 3),
        ("stages.joint.prior_gradient=false", "stages.3.prior_gradient", False),
        ("stages.read.optimizer.learning_rate=1", "stages.1.optimizer.learning_rate", 1.0),
        ("stages.read.optimizer.clip_norm=0.5", "stages.1.optimizer.clip_norm", 0.5),
        ("stages.joint.optimizer.groups.generator=0.1", "stages.3.optimizer.groups.generator", 0.1),
    ],
)
def test_override(base, assignment, path, value):
    found = configuration.plain(config.load(TINY, [assignment]))
    expected = configuration.plain(base)
    node, wanted = found, expected
    *parents, last = path.split(".")
    for name in parents:
        node, wanted = (x[int(name) if isinstance(x, list) else name] for x in (node, wanted))
    assert node[last] == value and type(node[last]) is type(value)
    assert wanted.get(last) != value
    wanted[last] = value
    assert found == expected  # and nothing else has changed


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seed", "--set seed: expected key=value"),
        ("sede=1", "config: unknown key 'sede'; known keys: corpus"),
        ("model.encodr.width=8", "config.model: unknown key 'encodr'; known keys: variant"),
        ("model.encoder.widht=8", "config.model.encoder: unknown key 'widht'"),
        ("stages.jiont.steps=1", "no stage 'jiont'; stages: retriever, read, denoise, joint"),
        ("stages.joint.step=1", "config.stages[3]: unknown key 'step'"),
        ("stages.joint=1", "--set stages.joint: stages holds no keys"),
        ("seed.low=1", "--set seed.low: seed holds no keys, it is 0"),
        ("seed.low.high=1", "--set seed.low.high: nothing stands under 'low', since above it is 0"),
        ("seed=1.5", "--set seed=1.5: "),
        ("seed=seven", "--set seed=seven: "),
        ("evaluate_every=1.5", "--set evaluate_every=1.5: "),
        ("evaluate_every=true", "config.evaluate_every: expected int, got True"),
        ("live=1", "config.live: expected bool, got 1"),
        ("answers=all", "config.answers: 'all' is not one of 'first', 'sample', 'every'"),
        ('stages.joint.buckets=["8"]', "config.stages[3].buckets[0]: expected int, got '8'"),
        ("init=[3]", "config.init: expected str, got [3]"),
        ("answering.num_beems=2", "config.answering: unknown key 'num_beems'; known keys: n_docs"),
        ("answering.num_beams=two", "config.answering.num_beams: expected int, got 'two'"),
        ('answering.allowed_answers="yes"', "config.answering.allowed_answers: expected a list, got 'yes'"),
        ("task.reads=title", "config.task.reads: 'title' is not one of 'question', 'answer', 'passage'"),
        ("model.variant=tokn", "config.model.variant: 'tokn' is not one of 'sequence', 'token'"),
        ("model.generator.dropout=low", "--set model.generator.dropout=low: "),
        ("model.generator.embedding_scale=low", "config.model.generator.embedding_scale: expected float, got 'low'"),
        ("stages.read.optimizer.groups=1", "--set stages.read.optimizer.groups=1: "),
        ("stages.read.optimizer.groups.generator=fast", "--set stages.read.optimizer.groups.generator=fast: "),
        ('mesh={"data":"all"}', "config.mesh.data: expected int, got 'all'"),
        ("mesh=8", "config.mesh: expected names and values, got 8"),
        ("stages.read.objective=[1]", "config.stages[1].objective: [1] is not one of 'contrastive'"),
        ("stages=3", "--set stages=3: "),
    ],
)
def test_overrides_that_cannot_be(assignment, message):
    with pytest.raises(InputError, match=re.escape(message)):
        config.load(TINY, [assignment])


def test_a_list_of_stages_and_a_section_must_be_that(tmp_path):
    body = "def get_config():\n  return ConfigDict({'corpus': 'a', 'train': 'b', 'dev': 'c', 'stages': "
    for stages, message in (
        ("'joint'", "config.stages: expected a list, got 'joint'"),
        ("(3,)", "config.stages[0]: expected keys and values (name, objective"),
        ("({'steps': 3},)", "config.stages[0]: missing key 'name'"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            config.load(write(tmp_path, f"{body}{stages}}})\n"))


# --- contradictions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["checkpoint_every=7"], "checkpoint_every=7 must be a multiple of log_every=5"),
        (["evaluate_every=7"], "evaluate_every=7 must be a multiple of log_every=5"),
        (["log_every=0"], "log_every=0 must be at least 1"),
        (["keep_checkpoints=0"], "keep_checkpoints=0 must be at least 1"),
        (["keep_best=-1"], "keep_best=-1 must be at least 0"),
        (["keep_best=1", "evaluate_every=0"], "keep_best=1 needs evaluate_every: eval/exact_match is measured there"),
        (["train="], "train='' names no questions, which stage retriever needs: --set train=FILE"),
        (["task.reads=answer"], "task.reads='answer' with task.writes='target': what is read would be written"),
        (["task.match=mlqa_fr"], "match 'mlqa_fr'; there are: string, regex, mlqa_en"),
        (["stages.read.documents=none"], "stage read: window=16 is only for objective='rag' with documents='gold'"),
        (
            ["stages.retriever.objective=inverse_cloze", "stages.retriever.hard_negatives=1"],
            "hard_negatives=1 is only for objective='contrastive'",
        ),
        (["target_length=2"], "target_length=2 must be at least 3"),
        (["target_length=161"], "target_length=161 is more than the 160 positions"),
        (["model.source_length=161"], "model.source_length=161 is more than the 160 positions"),
        (["model.question_length=97"], "model.question_length=97 is more than the 96 positions"),
        (["stages.read.name=joint"], "stages need different names: retriever, joint, denoise, joint"),
        (["stages.read.steps=0"], "stage read: steps=0 must be at least 1"),
        (["stages.read.batch=0"], "stage read: batch=0 must be at least 1"),
        (["stages.joint.n_docs=-1"], "stage joint: n_docs=-1 must be at least 1"),
        (["stages.joint.refresh=-1"], "stage joint: refresh='-1': expected steps (250, epoch"),
        (["stages.joint.n_retrieved=3"], "stage joint: n_retrieved=3 must be more than n_docs=3, or 0"),
        (["stages.joint.drift_every=-1"], "stage joint: drift_every=-1 must be at least 0"),
        (["stages.joint.write_back=true"], "stage joint: write_back=True has nothing exact to write"),
        (
            ["stages.joint.optimizer.groups.question_encoder=0.0"],
            "does not train question_encoder: nothing would change",
        ),
        (["stages.read.n_retrieved=8"], "stage read: n_retrieved=8 is only for objective='rag' with documents='retr"),
        (["stages.joint.refresh=rolling:4", "search.kind=bm25"], "refresh='rolling:4' needs the index in graph"),
        (["stages.joint.normaliser=corpus", "search.kind=scann"], "normaliser='corpus' needs the index in graph"),
        (["stages.joint.n_retrieved=8", "stages.joint.write_back=true", "search.kind=hybrid"], "write_back=True needs"),
        (["search.fusion.weight=2.0"], "weight lies in 0..1"),
        (["search.scann.leaves=-1"], "numbers are 0 or more"),
        (["stages.joint.window=8"], "stage joint: window=8 is only for objective='rag' with documents='gold'"),
        (["stages.retriever.window=8"], "stage retriever: window=8 is only for"),
        (["stages.read.refresh=8"], "stage read: refresh='8' is only for stages that search"),
        (["stages.retriever.refresh=8"], "stage retriever: refresh='8' is only for stages that search"),
        (["stages.joint.hard_negatives=1"], "stage joint: hard_negatives=1 is only for objective='contrastive'"),
        (["stages.denoise.questions=8"], "stage denoise: questions=8 is only for"),
        (["stages.denoise.buckets=[8]"], "stage denoise: buckets=(8,) is only for objectives that have questions"),
        (
            ["stages.joint.buckets=[16,8]"],
            "stage joint: buckets=16, 8 must be ascending numbers from 1 to below model.q",
        ),
        (
            ["stages.joint.buckets=[8,32]"],
            "stage joint: buckets=8, 32 must be ascending numbers from 1 to below model.q",
        ),
        (
            ["stages.joint.target_buckets=[0]"],
            "stage joint: target_buckets=0 must be ascending numbers from 1 to below t",
        ),
        (["stages.retriever.target_buckets=[8]"], "stage retriever: target_buckets=(8,) is only for objective='rag'"),
        (["stages.retriever.negatives=given"], "stage retriever: negatives='given' needs hard_negatives"),
        (["train=0.5*a + b"], "train: 'b' has no weight; write 0.5*b"),
        (["stages.read.source_length=161"], "stage read: source_length=161 is more than the 160 positions"),
        (["stages.read.window=32"], "stage read: source_length=64 has no room for a window of 32 tokens"),
        (["stages.joint.source_length=32"], "stage joint: source_length=32 has no room for a window of 0 tokens"),
        (["stages.joint.optimizer.warmup_steps=20"], "stage joint: optimizer: warmup_steps=20 must be fewer than"),
        (["stages.joint.optimizer.groups.reader=1.0"], "unknown parameter groups ['reader']"),
        (["stages.read.optimizer.groups.generator=0.0"], "stage read: optimizer.groups trains nothing"),
        (
            ["stages.read.optimizer.groups.question_encoder=1.0"],
            "stage read: optimizer.groups trains generator, question_encoder; with objective='rag' and "
            "documents='gold' it may name generator",
        ),
        (["stages.retriever.optimizer.groups.generator=1.0"], "it may name context_encoder, question_encoder"),
        (["stages.denoise.optimizer.groups.question_encoder=1.0"], "it may name generator"),
    ],
)
def test_contradictions(assignments, message):
    with pytest.raises(InputError, match=re.escape(message)):
        config.check(config.load(TINY, assignments))


# a value of every field that is not the default
OTHER = {
    "documents": "gold", "n_docs": 4, "hard_negatives": 1, "negatives": "given", "source_length": 100, "window": 8,
    "refresh": "8", "n_retrieved": 9, "write_back": True, "drift_every": 5, "normaliser": "corpus",
    "label_smoothing": 0.1, "hf_compat": True, "prior_gradient": False, "questions": 8, "buckets": (8,),
    "target_buckets": (8,), "doc_chunk": 1, "logit_chunk": 0, "retriever_losses": {"emdr2": 1.0},
}  # fmt: skip
KINDS = {
    "contrastive": {"hard_negatives", "negatives", "questions", "buckets"},
    "inverse_cloze": set(),
    "denoise": {"source_length", "label_smoothing", "logit_chunk"},
    "rag, gold": {
        *("documents", "source_length", "window", "label_smoothing", "questions", "buckets", "target_buckets"),
        "logit_chunk",
    },
    "rag, none": {"source_length", "label_smoothing", "questions", "buckets", "target_buckets", "logit_chunk"},
    "rag, retrieved": set(OTHER) - {"documents", "hard_negatives", "negatives", "window"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_a_stage_is_read_or_refused(kind):
    """A field that a kind of stage does not read is an error when it is set; none is ignored silently."""
    of_objectives = {f.name for objective in OBJECTIVES.values() for f in dataclasses.fields(objective)}
    every_stage = {"name", "objective", "steps", "batch", "accumulate", "optimizer"}
    assert {f.name for f in dataclasses.fields(StageConfig)} | of_objectives == {*OTHER, *every_stage}
    objective, _, documents = kind.partition(", ")
    base = {"objective": objective} | ({"documents": documents} if documents else {})
    config.check_unread(config.make_stage("one", **base), "")
    for name, value in OTHER.items():
        if name == "documents" and objective == "rag":
            continue
        if name in KINDS[kind]:
            config.check_unread(config.make_stage("one", **base, **{name: value}), "stage one: ")
        else:
            with pytest.raises(InputError, match=f"stage one: {name}=.* is only for "):
                config.check_unread(config.make_stage("one", **base, **{name: value}), "stage one: ")
    if objective == "rag":
        config.check_unread(config.make_stage("one", **base, n_docs=1), "")


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"kind": "bm25", "dtype": "int8"}, "search.dtype='int8' is only for search.kind='exact'; it is kind='bm25'"),
        ({"kind": "scann", "recall_target": 0.9}, "search.recall_target=0.9 is only for search.kind='exact'"),
        ({"dense": "scann"}, "search.dense='scann' is only for search.kind='hybrid'"),
        ({"kind": "bm25", "dense": "scann"}, "is only for search.kind='hybrid'; it is kind='bm25'"),
        ({"kind": "hybrid", "dense": "scann", "scann": {"leaves": 5}, "bm25": {"k1": 2.0}}, ""),
    ],
)
def test_what_another_search_would_read_is_refused(search, message):
    made = configuration.build(search_config.SearchConfig, search)
    assert {f.name for f in dataclasses.fields(made)} == {"kind", *search_config.SEARCHED_BY, "scann", "bm25", "fusion"}
    if not message:
        search_config.check_search_config(made)
    else:
        with pytest.raises(InputError, match=re.escape(message)):
            search_config.check_search_config(made)


def test_what_belongs_together_passes():
    config.check(config.load(TINY, ["stages.retriever.hard_negatives=2", "stages.retriever.refresh=5"]))


def test_how_a_run_answers_follows_from_the_model_then_the_caller_then_its_configuration(tmp_path):
    cfg = config.load(TINY, ["answering.num_beams=3", 'answering.allowed_answers=["yes","no"]', "answering.batch=4"])
    found = answer_config.answering(cfg, batch=64, n_retrieved=20)
    assert (found.n_docs, found.max_length) == (cfg.model.n_docs, cfg.target_length)
    assert (found.num_beams, found.allowed_answers, found.batch) == (3, ("yes", "no"), 4)
    assert found.n_retrieved == 20 and answer_config.answering(cfg).n_retrieved == 100
    run_config.save(cfg, tmp_path / "config.json")
    assert answer_config.answering(config.read(tmp_path / "config.json")) == answer_config.answering(cfg)
    json_of_a_run = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(json_of_a_run | {"answering": {"beams": 1}}))
    with pytest.raises(InputError, match=r"config\.answering: unknown key 'beams'"):
        config.read(tmp_path / "config.json")


def test_a_retriever_may_train_on_the_corpus_alone():
    stage = {"name": "a", "objective": "inverse_cloze", "optimizer": {"groups": {"question_encoder": 1.0}}}
    values = minimal() | {"train": "", "model": {"generator": None, "tie_encoders": True}, "stages": [stage]}
    cfg = configuration.build(config.TrainConfig, values)
    config.check(cfg)
    assert not cfg.stages[0].objective.searches and cfg.stages[0].objective.groups == {
        "question_encoder",
        "context_encoder",
    }
    wrong = stage | {"optimizer": {"groups": {"generator": 1.0}}}
    with pytest.raises(InputError, match="it may name context_encoder, question_encoder"):
        config.check(configuration.build(config.TrainConfig, values | {"stages": [wrong]}))


def test_no_stages(base):
    with pytest.raises(InputError, match="there are none"):
        config.check(dataclasses.replace(base, stages=()))


def test_tiny_says_how_many_steps_it_has(base):
    assert sum(stage.steps for stage in base.stages) == tiny.STEPS
    assert json.loads(json.dumps(configuration.plain(base)))["stages"][0]["name"] == "retriever"


def test_what_the_model_leaves_open_is_that_of_the_start(tmp_path):
    """`init` names a run: its model is the default of every section; a generator of another kind replaces it whole."""
    start = configuration.build(
        config.TrainConfig, minimal() | {"model": {"n_docs": 7, "encoder": {"width": 24, "heads": 3}}}
    )
    run_config.save(start, tmp_path / "config.json")
    file = tmp_path / "other.py"
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(kind):\n"
        f"    c = ConfigDict({minimal()!r})\n"
        "    c.model = ConfigDict({'encoder': {'dropout': 0.5}, 'generator': {'kind': kind, 'width': 48}})\n"
        "    return c\n"
    )
    made = config.load(f"{file}:bart", [f"init={tmp_path}"]).model
    assert (made.n_docs, made.encoder.width, made.encoder.heads, made.encoder.dropout) == (7, 24, 3, 0.5)
    assert made.generator == dataclasses.replace(start.model.generator, width=48)
    other = config.load(f"{file}:t5", [f"init={tmp_path}"]).model
    assert other.generator == T5Config(width=48) and other.encoder == made.encoder
    assert config.load(f"{file}:bart").model.n_docs == RagConfig().n_docs


def test_the_kind_of_generator_decides_its_configuration():
    for kind, made in (("bart", BartConfig), ("t5", T5Config), ("lm", LmConfig)):
        values = minimal() | {"model": {"generator": {"kind": kind, "vocab_size": 9}}}
        generator = configuration.build(config.TrainConfig, values).model.generator
        assert generator == made(vocab_size=9)
        assert configuration.build(
            config.TrainConfig, configuration.plain(configuration.build(config.TrainConfig, values))
        ).model.generator == made(vocab_size=9)
    assert configuration.build(config.TrainConfig, minimal() | {"model": {"generator": None}}).model.generator is None
    with pytest.raises(InputError, match=r"model.generator.kind: 'rnn' is not one of 'bart', 't5', 'lm'"):
        configuration.build(config.TrainConfig, minimal() | {"model": {"generator": {"kind": "rnn"}}})
    with pytest.raises(InputError, match=r"generator: unknown key 'encoder_layer'"):
        configuration.build(
            config.TrainConfig, minimal() | {"model": {"generator": {"kind": "t5", "encoder_layer": 2}}}
        )


def test_a_retriever_alone_is_only_contrasted():
    stage = {"name": "a", "objective": "rag", "optimizer": {"groups": {"question_encoder": 1.0}}}
    cfg = configuration.build(config.TrainConfig, minimal() | {"model": {"generator": None}, "stages": [stage]})
    with pytest.raises(InputError, match="needs a generator"):
        config.check(cfg)
    cfg = configuration.build(
        config.TrainConfig, minimal() | {"model": {"generator": None}, "stages": [stage | {"objective": "contrastive"}]}
    )
    config.check(cfg)


def test_stages_of_runs_that_named_no_number_of_documents():
    """Older runs had a default of 5 in every stage; a stage that retrieves keeps what it was trained with."""
    contrastive = {"name": "a", "objective": "contrastive", "documents": "retrieved", "n_docs": 5}
    gold = {"name": "b", "objective": "rag", "documents": "gold", "n_docs": 1}
    joint = {"name": "c", "objective": "rag", "documents": "retrieved", "n_docs": 5}
    found = config.renewed({"stages": [contrastive, gold, joint]})["stages"]
    assert [stage["n_docs"] for stage in found] == [0, 1, 5]
