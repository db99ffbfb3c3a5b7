"""`rag-jax compile`: its figures against sums by hand, and programs compiled for fake devices and for TPUs."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from rag_jax import __main__ as cli
from rag_jax.aot import child_process, compile, hardware, layer_extrapolation, memory, stage_programs
from rag_jax.cli import compile as compile_cli
from rag_jax.corpus.directory import Corpus
from rag_jax.errors import InputError
from rag_jax.index import device_index
from rag_jax.models.bart import BartConfig
from rag_jax.models.bert import BertConfig
from rag_jax.rag import RagConfig
from rag_jax.retrieval.config import SearchConfig
from rag_jax.runs import directory as runs
from rag_jax.runs.index_location import location_of
from rag_jax.system import sharding
from rag_jax.training import config, session, setup, train_step
from rag_jax.training.config import TrainConfig, make_stage
from rag_jax.training.optimizer import OptimizerConfig

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"vocab_size": 64, "width": 16, "heads": 2, "hidden": 32}
MODEL = RagConfig(
    "token", BertConfig(**SHAPE, layers=1, positions=16),
    BartConfig(**SHAPE, encoder_layers=1, decoder_layers=1, positions=32),
    n_docs=2, source_length=24, question_length=8,
)  # fmt: skip
JOINT = make_stage("joint", batch=8, n_docs=2, optimizer=OptimizerConfig(groups={"generator": 1.0}))
SIZE = stage_programs.Sizes(100, 16, 12, "uint16", "uint16", (0,))


def tiny_config(**changes: object) -> TrainConfig:
    return dataclasses.replace(
        TrainConfig(corpus="none", train="", dev="", stages=(JOINT,), model=MODEL, mesh={"fsdp": -1}, target_length=6),
        **changes,
    )


def report(cfg: TrainConfig, where: str = "cpu:8", name: str = "joint") -> memory.ProgramNeeds:
    place = hardware.topology(where)
    mesh, compiles = compile.mesh_of(cfg, place)
    rag = stage_programs.sizes(cfg, SIZE.passages, 16, 12)[0]
    program = stage_programs.every(cfg, rag, SIZE, mesh, [name], 64, 5)[name]
    made = memory.compiled(program, place, mesh, 0.0, None) if compiles else memory.counted(program, place, mesh)
    compile.roofline(made, place)
    return made


def test_memory_of_arguments_by_hand() -> None:
    """On 8 devices: 13 of 104 rows each, parameters of width 16 halved, and Adam's two moments of the generator."""
    memory = report(tiny_config(), "h100:8").memory
    assert memory["index"] == 13 * (16 * 4 + 4) + 16 * 4  # sharded rows and steps; drift_E whole on each device
    assert memory["token table"] == 13 * (16 + 12 + 2) * 2
    assert memory["batch"] == 1 * (8 + 1 + 8 + 1 + 6 + 1) * 4 + 8
    params = jax.eval_shape(lambda: stage_programs.Rag(MODEL).init(jax.random.key(0)))
    sizes = {
        side: [(x.names, x.value.size) for x in jax.tree.leaves(tree, is_leaf=boxed)] for side, tree in params.items()
    }
    share = {side: sum(n * 4 // (8 if "embed" in names else 1) for names, n in found) for side, found in sizes.items()}
    assert memory["parameters"] == sum(share.values())
    assert memory["optimiser"] == 2 * share["generator"] + 4 + 4 + 4  # the step's, Adam's and the schedule's counts


def boxed(x: object) -> bool:
    return hasattr(x, "names")


@pytest.mark.slow
def test_a_compiled_step_has_the_same_arguments_and_work() -> None:
    cfg = tiny_config()
    there, away = report(cfg), report(cfg, "h100:8")
    for name in ("parameters", "optimiser", "index"):
        assert there.memory[name] == pytest.approx(away.memory[name], rel=0.02), "but for what the step does not use"
    assert there.flops == away.flops and there.compiled and not away.compiled
    assert there.fits is None and away.fits
    assert there.collectives["all-reduce"]["count"] > 0 and there.traffic > there.memory["parameters"]
    assert away.step_seconds == pytest.approx(away.flops["float32"] / (989e12 / 2), rel=0.5)


def test_counts_of_search_and_encode() -> None:
    cfg = tiny_config(search=SearchConfig(dtype="bfloat16"))
    found, made = report(cfg, "h100:8", "search"), report(cfg, "h100:8", "encode")
    assert found.flops["bfloat16"] >= 2 * 64 * 100 * 16 / 8 and found.questions == 64
    assert (made.passages, made.tokens) == (104, 104 * 16)
    assert made.flops["float32"] >= 2 * 16 * 13 * (4 * 16 * 16 + 2 * 16 * 32)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["joint", "retriever", "read", "denoise"])
def test_arguments_are_those_of_training(tiny_data: Path, stage: str) -> None:
    """They have the shapes, types and shardings of training's first batch, index, tables and state, for every stage."""
    cfg = config.load(f"{Path(__file__).parent / 'tiny.py'}:{tiny_data}", ['mesh={"data": 2, "fsdp": 4}'])
    number = [s.name for s in cfg.stages].index(stage)
    corpus, mesh = Corpus.open(cfg.corpus), sharding.make_mesh(cfg.mesh)
    loaded, data = runs.load(cfg.model, corpus, mesh), setup.prepare(cfg, corpus)
    params = session.init_params(loaded, 0, "")
    state = train_step.first_state(loaded.rag, cfg.stages[number], mesh, params, 0)
    upkeep = session.upkeep_of(cfg, location_of(loaded, cfg.search), data, None, number, None)
    upkeep.index = device_index.blank(mesh, loaded.table_rows(), loaded.rag.config.encoder.output_width)
    fed = upkeep.feed(params, setup.batches(cfg.stages[number], cfg, data, number)[0])
    rag, size = stage_programs.sizes(cfg, 0, 0, 0)
    program = stage_programs.step(cfg, cfg.stages[number], rag, size, mesh)
    assert rag == loaded.rag and size.passages == len(corpus)
    given = (state, fed.batch, fed.table if cfg.stages[number].objective.searches else None, fed.passages)
    for ours, theirs in zip(program.arguments[:-1], given, strict=True):
        flat, shape = jax.tree_util.tree_flatten_with_path(theirs)
        assert jax.tree.structure(ours) == shape
        for mine, (path, array) in zip(jax.tree.leaves(ours), flat, strict=True):
            where = jax.tree_util.keystr(path)
            if "gold" not in where:  # the real batch is as wide as its longest question
                assert (mine.shape, mine.dtype) == (array.shape, array.dtype), where
            assert mine.sharding.is_equivalent_to(array.sharding, array.ndim), where


def command(capsys: pytest.CaptureFixture, *words: object) -> tuple[int, str, str]:
    status = cli.main(["compile", *map(str, words)])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_command_line(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config_file = f"{Path(__file__).parent / 'tiny.py'}:{tiny_data}"
    words = ("--config", config_file, "--topology", "cpu:8", "--stage", "search", "--hlo", tmp_path / "hlo")
    status, out, _ = command(capsys, *words, "--json")
    result = json.loads(out)
    (found,) = result["programs"]
    assert status == 0 and found["compiled"] and found["fits"] is None and result["mesh"]["data"] == 8
    assert found["collectives"] and (tmp_path / "hlo" / "search.txt").read_text().startswith("HloModule")
    status, out, err = command(capsys, *words[:3], "a100:16", "--stage", "search")
    assert status == 0 and "counted from shapes" in out and "fits" in out and "questions/s" in out
    assert "nothing is compiled" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--topology", "v5e:16"), "write v5e:16x16"),
        (("--topology", "v9:4x4"), "also v4, v5e"),
        (("--topology", "h100:8"), "--passages 21015300"),
        (("--topology", "h100:3", "--passages", "9"), "--set stages.joint.batch=66"),
        (("--topology", "h100:8", "--passages", "9", "--stage", "jiont"), "joint, search, encode"),
        (("--topology", "h100:8", "--passages", "9", "--k", "0"), "--k 0: at least 1"),
        (("--topology", "h100:8", "--passages", "9", "--set", "model.generator.vocab_size=0"), "vocab_size=30522"),
    ],
)
def test_user_errors(words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture) -> None:
    status, out, err = command(capsys, "--config", ROOT / "configs/nq_rag_token.py", *words)
    assert status == 2 and out == "" and says in err


def test_a_bfloat16_model_is_counted_for_gpus_without_cudnn() -> None:
    """Its attention would be cuDNN's there, which cannot be traced where it is not installed."""
    cfg = tiny_config()
    parts = {name: dataclasses.replace(getattr(cfg.model, name), dtype="bfloat16") for name in ("encoder", "generator")}
    made = report(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **parts)), "h100:8", "encode")
    assert made.flops["bfloat16"] > 0


@pytest.mark.parametrize("where", ["v5e:4x8", "v5p:2x2x4", "tpu7x:2x2x2", "h100:8"])
def test_meshes_of_devices_that_are_not_there(where: str) -> None:
    place = hardware.topology(where)
    mesh = compile.stand_ins(tiny_config(mesh={"data": -1, "fsdp": 4}), place)
    assert dict(mesh.shape) == {"data": place.devices // 4, "fsdp": 4, "tensor": 1}
    assert {(d.id, d.platform) for d in mesh.devices.flat} == {(i, place.kind) for i in range(place.devices)}


def test_without_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    mesh, compiles = compile.mesh_of(tiny_config(), hardware.topology("v5e:16x16"))
    assert mesh.size == 256 and not compiles


@pytest.mark.slow
def test_few_layers_tell_of_many() -> None:
    """Three to five layers, extrapolated from programs of two and three, against the whole program."""
    bert, bart = dataclasses.replace(MODEL.encoder, layers=3), MODEL.generator
    bart = dataclasses.replace(bart, encoder_layers=5, decoder_layers=4)
    cfg = tiny_config(model=dataclasses.replace(MODEL, encoder=bert, generator=bart))
    place = hardware.topology("cpu:8")
    mesh, _ = compile.mesh_of(cfg, place)
    wanted = compile.CompileOptions(passages=100, encoder_length=16, generator_length=12, k=5, layers=2)
    program = stage_programs.every(cfg, *compile.sized(cfg, wanted), mesh, ["joint"], wanted.batch, wanted.k)["joint"]
    line = compile.few_layers(cfg, program, place, mesh, wanted)
    whole = memory.compiled(program, place, mesh, 0.0, None)
    assert line.flops == whole.flops and line.layers == 2 and line.name == "joint"
    for name in ("parameters", "optimiser", "index", "token table"):
        assert line.memory[name] == whole.memory[name]
    assert line.total == pytest.approx(whole.total, rel=0.05)
    assert line.traffic == pytest.approx(whole.traffic, rel=0.12)  # layers are fused with their neighbours
    assert line.collectives.keys() == whole.collectives.keys()
    for kind, row in whole.collectives.items():
        assert line.collectives[kind]["sent"] == pytest.approx(row["sent"], rel=0.05), kind


def test_which_layers_a_program_has() -> None:
    cfg = tiny_config()
    model = dataclasses.replace(MODEL, encoder=dataclasses.replace(MODEL.encoder, layers=12))
    cfg = dataclasses.replace(cfg, model=model)
    assert layer_extrapolation.depths(cfg, "search") == {} and layer_extrapolation.depths(cfg, "encode") == {
        ("encoder", "layers"): 12
    }
    assert len(layer_extrapolation.depths(cfg, "joint")) == 3
    base, more = layer_extrapolation.shallow(cfg, "joint", 2)  # the generator has one layer of each kind
    assert (base[0].model.encoder.layers, more[0].model.encoder.layers) == (2, 3) and (base[1], more[1]) == (0, 10)
    assert base[0].model.generator == cfg.model.generator


def test_the_line() -> None:
    values = [{"a": 1.0, "b": {"x": 1.0}}, {"a": 3.0, "b": {"x": 1.0}, "c": 1.0}, {"a": 1.5, "b": {"x": 2.0, "y": 1.0}}]
    with_all = {"a": 1.0 + 4 * 2.0 + 2 * 0.5, "b": {"x": 3.0, "y": 2.0}}
    assert (
        layer_extrapolation.line([{k: v for k, v in value.items() if k != "c"} for value in values], [0, 4, 2])
        == with_all
    )
    assert layer_extrapolation.line([None, 1.0], [0, 3]) is None and layer_extrapolation.line([2.0, 3.0], [0, 3]) == 5.0


def test_what_libtpu_says_of_a_program_that_is_too_large() -> None:
    """The message is that of libtpu 0.0.42."""
    made = memory.ProgramNeeds(
        "joint", False, {"index": 2.0**30, "activations and the like": 5.0}, 0.0, 16.0 * 2**30, {}
    )
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (22.80G) exceeds "
        "available HBM (15.75G)."
    )
    memory.too_large(made, message)
    assert made.fits is False and made.limit == 15.75 * 2**30
    assert made.memory == {"index": 2.0**30, "activations and temporaries": pytest.approx(21.8 * 2**30)}
    with pytest.raises(RuntimeError, match="joint: INTERNAL"):
        memory.too_large(made, "INTERNAL: something else")


def test_topologies() -> None:
    assert hardware.topology("v5p:4x4x4").chips == 64 and hardware.topology("tpu7x:4x4x4").devices == 128
    assert hardware.topology("cpu:8").chip is None
    chip = hardware.topology("v5e:16x16").chip
    assert chip is not None and chip.rate("bfloat16") == chip.rate("float32") == 6 * chip.rate("float32 highest")
    with pytest.raises(InputError, match="three sides"):
        hardware.topology("v5p:4")


def test_padding_of_tiles() -> None:
    """A uint16 table of 160 columns is stored in tiles of (8, 128), so it takes 256 columns."""
    layout = type("Layout", (), {"major_to_minor": (0, 1), "tiling": ((8, 128), (2, 1))})
    mesh = sharding.make_mesh({"data": 8})
    leaf = stage_programs.array(mesh, (8 * 1003, 160), "uint16", "rows")
    assert memory.shape_bytes(leaf) == 1003 * 160 * 2
    assert memory.padded_bytes(leaf, layout) == 1008 * 256 * 2
    assert memory.padded_bytes(leaf, None) == 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x4", "v4:2x2x4", "v6e:4x4", "tpu7x:2x2x2"])
def test_compiled_for_a_tpu(topology: str, tmp_path: Path) -> None:
    """A search over a million rows, in its own process: memory follows from the shapes, and no index rows are sent."""
    words = ["compile", "--json", "--config", str(ROOT / "configs/nq_rag_token.py"), "--topology", topology]
    words += ["--passages", "1000000", "--stage", "search"]
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    out = subprocess.run(
        [sys.executable, "-m", "rag_jax", *words], capture_output=True, text=True, env=kept, check=True
    )
    result = json.loads(out.stdout)
    (found,) = result["programs"]
    rows = -(-1_000_000 // result["devices"])
    assert found["memory_bytes"]["index"] == pytest.approx(rows * 768 * 2, rel=0.01)
    assert found["fits"] and found["compiled"]
    sent = sum(row["sent"] for row in found["collectives"].values())
    assert 0 < sent < 10e6 and np.isfinite(found["step_seconds"])


def test_peaks_by_the_names_that_jax_has_for_devices():
    assert hardware.peak("NVIDIA H100 80GB HBM3", "bfloat16") == hardware.peak("NVIDIA H200", "bfloat16") == 989e12
    assert hardware.peak("TPU v5 lite", "bfloat16") == 197e12 and hardware.peak("TPU v5p", "bfloat16") == 459e12
    assert hardware.peak("cpu", "float32") is None


def fake_child(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> memory.ProgramNeeds:
    """`child_process.needs` where the other process is a shell script, for a program of 3 bytes."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(child_process.sys, "executable", str(program))
    monkeypatch.setattr(child_process.metadata, "version", lambda name: {"libtpu": "0.0.42.1"}[name])
    needs = memory.ProgramNeeds("joint", False, {"index": 3.0}, 3.0, 16.0, {})
    return child_process.needs(["compile"], "joint", lambda: needs)


def test_a_crash_of_the_compiler_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fake_child(tmp_path, monkeypatch, "echo 'a hundred frames' >&2; kill -SEGV $$")
    assert found.crashed and found.fits is None and found.total == 3.0 and not found.compiled
    assert found.said == (
        "THE COMPILER CRASHED on joint (Segmentation fault, libtpu 0.0.42.1); libtpu 0.0.43.2 compiles it: pip install "
        "libtpu==0.0.43.2"
    )
    with pytest.raises(InputError, match="no such program"):
        fake_child(tmp_path, monkeypatch, "echo 'rag-jax: --stage x: no such program' >&2; exit 2")
    with pytest.raises(RuntimeError, match="INTERNAL: something"):
        fake_child(tmp_path, monkeypatch, "echo 'INTERNAL: something' >&2; exit 1")


def test_needs_from_another_process(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The file that a child process writes holds its report."""
    config_file = f"{Path(__file__).parent / 'tiny.py'}:{tiny_data}"
    out = tmp_path / "needs.json"
    words = ("--config", config_file, "--topology", "cpu:8", "--stage", "search", "--needs", out, "--json")
    status, printed, _ = command(capsys, *words)
    (program,) = json.loads(printed)["programs"]
    assert status == 0 and memory.ProgramNeeds.from_dict(json.loads(out.read_text())).as_dict() == program
    assert program["largest"] and program["busiest"]


def test_the_child_has_all_options() -> None:
    """Options of the command are those of the child, but for what concerns the parent."""
    words = [
        "c.py",
        "--topology",
        "v5e:2x2",
        "--set",
        "a=1",
        "--set",
        "b=2",
        "--hlo",
        "h",
        "--effort",
        "-1",
        "--k",
        "3",
    ]
    _, args = cli.parse("compile", ["--config", *words])
    _, child = cli.parse("compile", compile_cli.words(args)[1:])
    assert child == args
    args.layers, args.batch, args.passages, args.encoder_length, args.generator_length = 1, 2, 3, 4, 5
    assert cli.parse("compile", compile_cli.words(args)[1:])[1] == args


@pytest.mark.parametrize(
    "options",
    [
        {"n_docs": 2, "normaliser": "corpus"},
        {"n_docs": 2, "n_retrieved": 4, "normaliser": "corpus", "refresh": "rolling:8"},
        {"objective": "contrastive", "hard_negatives": 1},
        {"objective": "inverse_cloze"},
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_are_float32_products_on_tpus(options: dict, dtype: str) -> None:
    """A TPU rounds operands of float32 products to bfloat16 by default; scores say that it must not.

    The matmuls of a bfloat16 model are bfloat16, so every float32 product is one of scores.
    """
    sides = {side: dataclasses.replace(getattr(MODEL, side), dtype="bfloat16") for side in ("encoder", "generator")}
    model = dataclasses.replace(MODEL, **sides)
    groups = ("question_encoder", "context_encoder", *(["generator"] if "n_docs" in options else []))
    stage = make_stage("joint", batch=8, optimizer=OptimizerConfig(groups=dict.fromkeys(groups, 1.0)), **options)
    cfg = tiny_config(stages=(stage,), model=model, search=SearchConfig(dtype=dtype))
    flops = report(cfg, "h100:8").flops
    assert flops["bfloat16"] > flops["float32 highest"] > 0 and "float32" not in flops
    if "n_docs" in options:
        found = report(cfg, "h100:8", "search").flops
        assert sum(found.values()) > 0 and found.keys() <= {"float32 highest", "bfloat16"}
