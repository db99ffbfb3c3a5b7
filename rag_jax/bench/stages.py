"""Benchmark of the training steps of a configuration, against the machine's rate of matmuls.

The limit is measured in the same run: the best rate of a matmul among a few sizes, in the type of the model. The work
is counted from the shapes in the program (every matmul of forward and backward pass). Work that is done is that of the
real step; work that the model needs is that of the same step with nothing recomputed to save memory.
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from rag_jax.aot.operation_count import matmul_flops
from rag_jax.bench.machine_limits import machine, matmul_limit, peak_memory, spread, timed
from rag_jax.corpus.directory import Corpus
from rag_jax.data import batching
from rag_jax.runs import directory as runs
from rag_jax.runs.index_location import location_of
from rag_jax.system import sharding
from rag_jax.system.logs import Progress
from rag_jax.training import session, setup
from rag_jax.training.config import TrainConfig
from rag_jax.training.stage import StageConfig, StepSetting
from rag_jax.training.stage_index import Upkeep
from rag_jax.training.train_step import TrainState, first_state, jit_step, make_step

WARMUP = 3  # steps before those that count


class Measured:
    """Times and work of the measured steps, without warm-up.

    compile_seconds: of all programs together.
    step_seconds, wait_seconds: per step, in all and waiting for its batch.
    tokens: per step.
    flops: per step, as it is, and with nothing recomputed to save memory.
    """

    def __init__(self) -> None:
        self.compile_seconds = 0.0
        self.step_seconds: list[float] = []
        self.wait_seconds: list[float] = []
        self.tokens: list[float] = []
        self.flops: list[list[float]] = []

    def add(self, begun: float, ready: float, tokens: float, flops: list[float]) -> None:
        """Adds a step that ends now; it began at `begun` and had its batch at `ready`, both in seconds."""
        self.wait_seconds.append(ready - begun)
        self.step_seconds.append(time.perf_counter() - begun)
        self.tokens.append(tokens)
        self.flops.append(flops)


def bench_stage(cfg: TrainConfig, stage: StageConfig, steps: int) -> dict[str, Any]:
    """Measures one stage's real step on its real batches: compile time, host work, step time, fraction of the limit."""
    corpus = Corpus.open(cfg.corpus)
    mesh = sharding.make_mesh(cfg.mesh or None)
    setup.check(cfg, corpus, mesh)
    data = setup.prepare(cfg, corpus)
    loaded = runs.load(cfg.model, corpus, mesh, cfg.search.in_graph)
    params = session.init_params(loaded, cfg.seed, cfg.init)
    state = first_state(loaded.rag, stage, mesh, params, 0)
    number = cfg.stages.index(stage)
    location = location_of(loaded, cfg.search)
    upkeep = session.upkeep_of(cfg, location, data, session.make_refresher(location), number, None)
    batches = setup.batches(stage, cfg, data, number)
    upkeep.before(params, 0, 0, batches[0])
    prepare_seconds: list[float] = []
    for i in range(steps):  # the host's work alone, in this thread; in training it runs ahead in another
        prepare_seconds += timed(lambda i=i: upkeep.feed(state.params, batches[i]), 1)
    measured = measure(stage, upkeep, state, batches, jax.random.key(cfg.seed), steps)
    part = loaded.rag.config.generator or loaded.rag.config.encoder
    limit = matmul_limit(dtype=part.dtype) * loaded.mesh.size
    step_seconds, wait_seconds = measured.step_seconds, measured.wait_seconds
    median = statistics.median(step_seconds)
    needed, done = np.asarray(measured.flops, float).T[::-1]
    return {
        "stage": stage.name,
        **machine(),
        "mesh": dict(loaded.mesh.shape),
        "batch": stage.batch,
        "steps": steps,
        "compile_seconds": round(measured.compile_seconds, 2),
        "step": spread(step_seconds),
        "host_wait": spread(wait_seconds),
        "host_share": sum(wait_seconds) / sum(step_seconds),
        "host_work_share": statistics.median(prepare_seconds) / median,
        "tokens_per_second": round(rate(measured.tokens, step_seconds)),
        "questions_per_second": stage.batch / median,
        "model_flops": float(needed.mean()),
        "hardware_flops": float(done.mean()),
        "flops_per_second": rate(needed, step_seconds),
        "matmul_limit_flops_per_second": limit,
        "fraction_of_limit": rate(needed, step_seconds) / limit,
        **peak_memory(),
    }


def measure(
    stage: StageConfig, upkeep: Upkeep, state: TrainState, batches: Any, key: jax.Array, steps: int
) -> Measured:
    """Runs WARMUP steps, then measures `steps` more; compiling for batches of new widths is not part of their times."""
    jitted = jit_step(upkeep.setting, 0, state, upkeep.feed(state.params, batches[0]).table)
    programs: dict[tuple[int, ...], Any] = {}  # compiled steps, by the widths of their batches
    work: dict[tuple[int, ...], list[float]] = {}
    iterator = batching.iterate(batches, 0)
    measured = Measured()
    with Progress(steps + WARMUP, f"bench {stage.name}", "step") as progress:
        for i in range(steps + WARMUP):
            begun = time.perf_counter()
            fed = upkeep.feed(state.params, drawn := next(iterator))
            ready = time.perf_counter()
            if (widths := batching.widths_of(drawn)) not in programs:
                work[widths] = [
                    matmul_flops(jax.make_jaxpr(make_step(setting, 0))(state, *fed, key).jaxpr)
                    for setting in (upkeep.setting, without_savings(upkeep.setting))
                ]
                compiling = time.perf_counter()
                programs[widths] = jitted.lower(state, *fed, key).compile()
                measured.compile_seconds += time.perf_counter() - compiling
                begun += time.perf_counter() - ready  # as if the step had begun later by the time of compiling
                ready = time.perf_counter()
            state, index, metrics = programs[widths](state, *fed, key)
            upkeep.after(index)
            jax.block_until_ready(state)
            if i >= WARMUP:
                measured.add(begun, ready, float(metrics["tokens"]), work[widths])
            progress.update(1)
    return measured


def rate(amounts: Sequence[float], seconds: Sequence[float]) -> float:
    """Median over the steps of amount per second; step by step, since steps of different buckets differ in both."""
    return float(np.median(np.asarray(amounts) / np.asarray(seconds)))


def without_savings(setting: StepSetting) -> StepSetting:
    """Setting of the same step without accumulation, chunks and rematerialisation, which save memory.

    Only the logits may still be computed again in the gradient.
    """

    def kept(part: Any) -> Any:
        return part and dataclasses.replace(part, remat="none")

    model, stage = setting.rag.config, setting.stage
    model = dataclasses.replace(model, encoder=kept(model.encoder), generator=kept(model.generator))
    return setting._replace(
        rag=dataclasses.replace(setting.rag, config=model),
        stage=stage.changed(accumulate=1, objective=stage.objective.unchunked()),
    )


def report(cfg: TrainConfig, stages: Sequence[StageConfig], steps: int) -> dict[str, Any]:
    """`bench_stage` of each, with a table as `text`."""
    results = [bench_stage(cfg, stage, steps) for stage in stages]
    lines = ["stage        step (median)   host waits   host works   tokens/s   GFLOP/s   of the matmul limit"]
    for r in results:
        rates = f"{r['tokens_per_second']:>10,} {r['flops_per_second'] / 1e9:>9.1f} {r['fraction_of_limit']:>15.0%}"
        host = f"{r['host_share']:>11.1%} {r['host_work_share']:>12.1%}"
        lines.append(f"{r['stage']:<12} {r['step']['median_ms']:>10.1f} ms {host} {rates}")
    return {"text": "\n".join(lines), "stages": results}
