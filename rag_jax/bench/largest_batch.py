"""The largest batch of questions whose training step fits in the device's memory, for us and for the rival.

Each trial is a process of its own, since memory that a failed trial leaves allocated would count against the next; the
process that starts the trials never uses the device.
"""

import dataclasses
import importlib.util
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rag_jax.bench import synthetic_load, torch_rival, train
from rag_jax.bench.machine_limits import largest, machine
from rag_jax.bench.synthetic_load import StepLoad
from rag_jax.bench.torch_rival import TorchBatch
from rag_jax.errors import InputError
from rag_jax.system import logs, sharding

SIDES = ("ours", "transformers")
# for our trials jax may take nearly all of the device's memory; for the rival's it leaves all of it to torch
ENVIRONMENT = {"ours": {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}, "transformers": {"JAX_PLATFORMS": "cpu"}}


def try_ours(load: StepLoad, shape: dict[str, int]) -> dict[str, Any]:
    """Runs two of our steps on a mesh of this shape; InputError where there is no accelerator."""
    if jax.default_backend() == "cpu":
        raise InputError("--largest asks for an accelerator: without one a machine does not say when memory is short")
    mesh = sharding.make_mesh(shape or None)
    ours, batch = train.prepare(load, mesh), synthetic_load.batch(load, mesh, 0)
    state = train.first_state(ours)
    step = train.stepper(ours, train.compiled_step(ours, state, batch)[0], state, [batch])
    step(0), step(0)
    return machine()


def try_theirs(load: StepLoad, device: str) -> dict[str, Any]:
    """Runs two steps of the rival on random documents; InputError where torch sees no GPU."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("torch sees no GPU, so there is no largest batch of transformers to find; give --alone")
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    batch = {name: np.asarray(x) for name, x in synthetic_load.batch(load, mesh, 0).items()}
    rng, shape = np.random.default_rng(0), (load.questions, load.docs)
    contexts_BKL = rng.integers(3, load.vocabulary, (*shape, load.source))
    documents_BKE = rng.normal(0, load.bert_width**-0.5, (*shape, load.bert_width)).astype(np.float32)
    with tempfile.TemporaryDirectory() as directory:
        ours = train.prepare(dataclasses.replace(load, passages=load.docs), mesh)
        module = torch_rival.model(ours.setting.rag, ours.params, Path(directory) / "model", device)
    step = torch_rival.stepper(module, load)
    given = TorchBatch(batch["question_ids"], contexts_BKL, documents_BKE, batch["labels"])
    step(given), step(given)
    return {}


def ran_out(error: Exception) -> bool:
    """Whether an error of jax or torch says that the device's memory was exhausted."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return "RESOURCE_EXHAUSTED" in str(error)
    return type(error).__name__ == "OutOfMemoryError"  # torch's


def trial(side: str, load: StepLoad, shape: dict[str, int]) -> tuple[bool, dict[str, Any]]:
    """Whether the load fits, and for our side a description of the machine."""
    try:
        return True, try_ours(load, shape) if side == "ours" else try_theirs(load, "cuda")
    except Exception as error:
        if not ran_out(error):
            raise
        return False, {}


def in_process(side: str, load: StepLoad, shape: dict[str, int]) -> tuple[bool, dict[str, Any]]:
    """Runs `trial` in a new process that ends with it; its exceptions are raised here."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT[side])
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(trial, side, load, shape).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def search(load: StepLoad, side: str, shape: dict[str, int]) -> tuple[int, dict[str, Any]]:
    """The largest batch of one side, a multiple of load.accumulate, and the description of the machine."""
    machine_info: dict[str, Any] = {}

    def fits(parts: int) -> bool:
        changed = dataclasses.replace(load, questions=parts * load.accumulate)
        fit, known = in_process(side, changed, shape)
        machine_info.update(known)
        logs.info(f"{side}: {changed.questions} questions {'fit' if fit else 'do not fit'}")
        return fit

    return largest(fits) * load.accumulate, machine_info


def report(load: StepLoad, shape: dict[str, int], alone: bool) -> dict[str, Any]:
    """The largest batches of a load on a mesh of this shape, also as `text`; alone: ours only."""
    synthetic_load.check(load)
    sides = SIDES if not alone and importlib.util.find_spec("torch") is not None else SIDES[:1]
    most: dict[str, int] = {}
    known: dict[str, Any] = {}
    for side in sides:
        most[side], one = search(load, side, shape)
        known |= one
    lines = [f"{side}: at most {n} questions at once" for side, n in most.items()]
    text = "\n".join([synthetic_load.describe(load), *lines])
    return {"text": text, **known, "load": dataclasses.asdict(load), "largest": most}
