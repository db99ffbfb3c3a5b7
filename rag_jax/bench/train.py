"""The real training step on a synthetic load, beside transformers' RAG in PyTorch.

Our step is that of training: it encodes the questions, searches the whole random index, gathers, joins, reads and
updates. The rival is given the documents that ours found. Both start from the same weights, and their losses without
dropout are compared before anything is timed. Model FLOPs are those that any implementation must do, as
`synthetic_load.model_flops` counts them.
"""

import dataclasses
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rag_jax.aot import hardware
from rag_jax.aot.operation_count import matmul_flops
from rag_jax.bench import decode, synthetic_load, torch_rival
from rag_jax.bench.machine_limits import in_turn, machine, matmul_limit, peak_memory, resident_memory, spread
from rag_jax.bench.synthetic_load import StepLoad
from rag_jax.bench.torch_rival import TorchBatch
from rag_jax.index import device_index
from rag_jax.index.device_index import Index
from rag_jax.rag import Params, TokenTables
from rag_jax.retrieve import Batch, contexts
from rag_jax.runs import directory as runs
from rag_jax.system import sharding
from rag_jax.system.trace import Trace
from rag_jax.training import train_step
from rag_jax.training.retrieve_fresh import Retrieval, retrieve
from rag_jax.training.stage import LossInput, StepSetting
from rag_jax.training.train_step import TrainState

TRACED = 3  # steps in a profile
WARM = 4  # steps until a process has as much memory as it will keep


class Ours(NamedTuple):
    """Everything of our step, on the mesh."""

    setting: StepSetting
    params: Params
    rows: Index
    passages: TokenTables
    key: jax.Array


def prepare(load: StepLoad, mesh: jax.sharding.Mesh) -> Ours:
    setting = synthetic_load.setting(load, mesh)
    places = jax.tree.map(lambda x: x.sharding, runs.param_places(setting.rag, mesh))
    params = jax.jit(partial(decode.drawn, setting.rag), out_shardings=places)()
    return Ours(setting, params, *synthetic_load.corpus(load, mesh), jax.random.key(1))


def first_state(ours: Ours) -> TrainState:
    """The state before the first step; the parameters are a copy, as a step takes the memory of its state."""
    s = ours.setting
    return train_step.first_state(s.rag, s.stage, s.mesh, jax.tree.map(jnp.copy, ours.params), 0)


def compiled_step(ours: Ours, state: TrainState, batch: Batch) -> tuple[Any, dict[str, Any]]:
    """The program of the step, and what there is to say about it before it has run."""
    given = (state, batch, ours.rows, ours.passages, ours.key)
    traced = train_step.jit_step(ours.setting, 0, state).trace(*given)
    begun = time.perf_counter()
    compiled = traced.lower().compile()
    said = {"compile_seconds": round(time.perf_counter() - begun, 2)}
    memory = compiled.memory_analysis()
    if memory is not None:
        said["temporary_bytes"] = memory.temp_size_in_bytes
        said["xla_bytes"] = (
            memory.argument_size_in_bytes + memory.temp_size_in_bytes
            + memory.output_size_in_bytes - memory.alias_size_in_bytes
        )  # fmt: skip
    return compiled, {**said, "hardware_flops": matmul_flops(traced.jaxpr.jaxpr)}


def stepper(ours: Ours, compiled: Any, state: TrainState, batches: list[Batch]) -> Callable[[int], float]:
    """step(i) -> loss of batch i; it changes the state, and ends when the devices have."""
    held = [state]

    def step(i: int) -> float:
        held[0], _, metrics = compiled(held[0], batches[i], ours.rows, ours.passages, ours.key)
        jax.block_until_ready(held[0])
        return float(metrics["loss"])

    return step


def without_dropout(
    s: StepSetting, params: Params, batch: Batch, index: Index, passages: TokenTables
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The step's loss, a scalar, and what it read: contexts [B, K, L] and documents' embeddings [B, K, E]."""
    keys: Any = (None, None)
    objective: Any = s.stage.objective
    given = LossInput(batch, index, passages, jax.random.key(0), jnp.int32(0), trains_passages=False)
    found = retrieve(s, Retrieval(objective.n_docs), params, given, keys)
    ids_BKL, mask_BKL = contexts(s, passages, found.rows_BK, batch)
    nll_B = s.rag.nll(params, ids_BKL, mask_BKL, found.scores_BK, batch["labels"], logit_chunk=objective.logit_chunk)
    return nll_B.mean(), ids_BKL, device_index.stored(index, found.rows_BK)


def rival(load: StepLoad, ours: Ours, batches: list[Batch], directory: str) -> tuple[Callable[[int], float], dict]:
    """step(i) -> loss in torch from the same weights, and how the losses without dropout compare, in float32."""
    exact = dataclasses.replace(load, dtype="float32")
    setting = synthetic_load.setting(exact, ours.setting.mesh)
    plain = jax.jit(partial(without_dropout, setting))
    given, losses = [], []
    for batch in batches:
        value, ids_BKL, documents_BKE = plain(ours.params, batch, ours.rows, ours.passages)
        losses.append(float(value))
        arrays = batch["question_ids"], ids_BKL, documents_BKE, batch["labels"]
        given.append(TorchBatch(*(np.asarray(x) for x in arrays)))
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    module = torch_rival.model(ours.setting.rag, ours.params, Path(directory) / "model", device)
    theirs = torch_rival.plain_loss(module, given[0], exact)
    step = torch_rival.stepper(module, load)
    said = {"loss": losses[0], "their_loss": theirs, "loss_difference": abs(theirs - losses[0]) / abs(theirs)}
    return lambda i: step(given[i]), said


def rates(load: StepLoad, times: list[float], flops: float, limit: float) -> dict[str, Any]:
    """Step times of one side, with rates and the fraction of the limit."""
    median = statistics.median(times)
    return {
        "seconds": spread(times),
        "questions_per_second": load.questions / median,
        "tokens_per_second": synthetic_load.tokens(load) / median,
        "model_flops_per_second": flops / median,
        "fraction_of_limit": flops / median / limit,
    }


def bench(load: StepLoad, shape: dict[str, int], repeats: int, beside: bool, profile: str) -> dict[str, Any]:
    mesh = sharding.make_mesh(shape or None)
    ours = prepare(load, mesh)
    batches = [synthetic_load.batch(load, mesh, seed) for seed in range(repeats)]
    compiled, said = compiled_step(ours, state := first_state(ours), batches[0])
    said["peak_compiling_bytes"] = peak_memory()["peak_process_bytes"]
    if not beside:
        ours = ours._replace(params={})  # the state has its own
    ours_step = stepper(ours, compiled, state, batches)
    for i in range(WARM):
        ours_step(i % repeats)
    memory = {**peak_memory(), **resident_memory()}  # before the rival is in this process
    calls = {"ours": ours_step}
    with tempfile.TemporaryDirectory() as directory:
        if beside:
            calls["transformers"], compared = rival(load, ours, batches, directory)
        seconds, _ = in_turn(calls, repeats, "bench train")
    limit = matmul_limit(dtype=load.dtype) * mesh.size
    work = synthetic_load.model_flops(load)
    flops = sum(work.values())
    known = machine()
    result = {
        **known,
        "mesh": dict(mesh.shape),
        "load": dataclasses.asdict(load),
        **rates(load, seconds["ours"][1:], flops, limit),
        "matmul_limit_flops_per_second": limit,
        "model_flops": flops,
        "model_flops_by_part": work,
        **said,
        **memory,
    }
    if peak := hardware.peak(known["device"], load.dtype):
        result["fraction_of_datasheet"] = result["model_flops_per_second"] / peak / mesh.size
    if beside:
        their = rates(load, seconds["transformers"][1:], flops, limit)
        faster = statistics.median(seconds["transformers"][1:]) / statistics.median(seconds["ours"][1:])
        result |= {"transformers": their, "times_faster": faster, **compared}
    if profile:
        trace = Trace(Path(profile))
        trace.start()
        try:
            for i in range(TRACED):
                ours_step(i % repeats)
        finally:
            trace.stop()
        result["profile"] = profile
    return result


def table(r: dict[str, Any]) -> str:
    """For people."""
    memory = r.get("peak_device_bytes", r["peak_process_bytes"])
    resident = f", of the process now {r['resident_bytes'] / 1e9:.2f}" if "resident_bytes" in r else ""
    needed = f", XLA's own need {r['xla_bytes'] / 1e9:.2f}" if "xla_bytes" in r else ""
    lines = [
        f"{r['devices']} x {r['device']}, mesh {r['mesh']}, compiled in {r['compile_seconds']:.1f} s",
        f"peak memory {memory / 1e9:.2f} GB{resident}{needed}; {r['model_flops'] / 1e9:,.1f} GFLOP of model, "
        f"{r['hardware_flops'] / 1e9:,.1f} done",
        f"{'':<14}{'median':>11}{'min':>10}{'max':>10}{'questions/s':>13}{'tokens/s':>11}{'of the limit':>14}",
    ]
    for name, x in (("ours", r), ("transformers", r.get("transformers"))):
        if x is not None:
            s = x["seconds"]
            times = f"{s['median_ms']:>8,.0f} ms{s['min_ms']:>10,.0f}{s['max_ms']:>10,.0f}"
            rate = f"{x['questions_per_second']:>13.2f}{x['tokens_per_second']:>11,.0f}{x['fraction_of_limit']:>14.0%}"
            lines.append(f"{name:<14}{times}{rate}")
    if "times_faster" in r:
        lines.append(
            f"{r['times_faster']:.2f} times as fast; losses without dropout differ by {r['loss_difference']:.1e}"
        )
    return "\n".join(lines)


def report(load: StepLoad, shape: dict[str, int], repeats: int, alone: bool, profile: str) -> dict[str, Any]:
    """`bench` on a mesh of this shape, with a table as `text`; alone: without transformers, even if torch is there.

    profile: a directory for the trace of a few steps, or empty.
    """
    synthetic_load.check(load)
    if profile:
        Trace(Path(profile)).prepare()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # on a GPU torch needs memory, too
    # transformers' RAG takes no decoder-only generator
    beside = not alone and load.generator == "bart" and importlib.util.find_spec("torch") is not None
    result = bench(load, shape, repeats, beside, profile)
    return {"text": f"{synthetic_load.describe(load)}\n{table(result)}", **result}
