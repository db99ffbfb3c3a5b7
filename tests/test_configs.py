"""The shipped configurations: each loads, is consistent, and its steps can be traced at full size."""

import json
from pathlib import Path

import jax
import pytest

from rag_jax.aot import stage_programs
from rag_jax.system import configuration, sharding
from rag_jax.training import config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NAMES = {
    "dpr_nq.py", "minilm.py", "nq_gold.py", "nq_lm.py", "nq_lm.py:7b", "nq_rag_sequence.py", "nq_rag_token.py",
    "nq_t5_xl.py", "squad.py", "squad.py:token", "world.py", "world.py:token",
    *(f"tasks.py:{name}" for name in (
        "squad", "nq_gold", "multihop", "xquad_zh", "xquad_ar", "xquad_ru", "jeopardy", "squad_qg", "pubmedqa_long",
        "clapnq", "medquad", "cmu_dog", "pubmedqa", "climate_fever", "fever_symmetric", "ir_cacm",
    )),
}  # fmt: skip
LARGE = {
    "dpr_nq.py": 0.22, "nq_rag_sequence.py": 0.62, "nq_rag_token.py": 0.62, "nq_t5_xl.py": 3.07, "nq_lm.py": 1.76,
    "nq_lm.py:7b": 7.83,
}  # fmt: skip  # billions of parameters


def load(name: str, **vocabulary: int) -> config.TrainConfig:
    cfg = config.load(str(CONFIGS / name))
    words = [f"model.{side}.vocab_size={n}" for side, n in vocabulary.items()]
    return config.load(str(CONFIGS / name), words) if words else cfg


def test_every_configuration_is_named_here() -> None:
    there = {path.name for path in CONFIGS.glob("*.py")} - {"decoding.py"}
    assert there == {name.partition(":")[0] for name in NAMES}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_loads_and_contradicts_nothing(name: str) -> None:
    cfg = load(name)
    config.check(cfg)
    assert configuration.build(config.TrainConfig, json.loads(json.dumps(configuration.plain(cfg)))) == cfg


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LARGE))
def test_steps_can_be_traced(name: str) -> None:
    """Every step on eight devices, without making an array; its state has the shapes that it was given."""
    cfg = load(name)
    mesh = sharding.make_mesh(dict(cfg.mesh) or None)
    rag, size = stage_programs.sizes(cfg, 21_015_300, 160, 160)
    for stage in cfg.stages:
        program = stage_programs.step(cfg, stage, rag, size, mesh)
        state, index, metrics = jax.eval_shape(program.call, *program.arguments)
        parameters = sum(x.size for x in jax.tree.leaves(state.params))
        assert parameters / 1e9 == pytest.approx(LARGE[name], abs=0.01)
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (state, program.arguments[0]))
        assert shapes[0] == shapes[1] and index is None
        assert metrics["loss"].shape == ()
        cut = [x for x in jax.tree.leaves(program.arguments[0].params) if x.size > 10**6]
        if "fsdp" in cfg.mesh:  # no large array is replicated
            assert all(x.sharding.shard_shape(x.shape) != x.shape for x in cut)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ir_cacm", "squad_qg", "climate_fever"])
def test_steps_of_tasks_can_be_traced(name: str) -> None:
    """Steps of a retriever alone, of a generator without passages, and of all stages of a classifier."""
    sides = ("encoder",) if name == "ir_cacm" else ("encoder", "generator")
    cfg = load(f"tasks.py:{name}", **dict.fromkeys(sides, 8192))
    rag, size = stage_programs.sizes(cfg, 5_000, 96, 96)
    for stage in cfg.stages:
        program = stage_programs.step(cfg, stage, rag, size, sharding.make_mesh())
        state, _, metrics = jax.eval_shape(program.call, *program.arguments)
        assert jax.tree.map(lambda x: x.shape, state) == jax.tree.map(lambda x: x.shape, program.arguments[0])
        assert metrics["loss"].shape == () and program.tokens > 0
