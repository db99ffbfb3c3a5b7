"""Peak memory of a training step of BERT-base and BART-base with K = 5 on a CPU, for each way to save memory.

    python scripts/memory_figures.py [--load base] [--questions 4] [--only NAME ...]

Each setting runs in a process of its own. `step` is the peak of resident memory during two steps minus the memory
before them (parameters, optimiser, index, tables); `temporary` is XLA's own figure for its program's temporaries.
"""

import argparse
import dataclasses
import gc
import json
import subprocess
import sys
from pathlib import Path

SAVED = {
    "logits in chunks": {},
    "remat dots": {"remat": "dots"},
    "remat full": {"remat": "full"},
    "1 document at a time": {"doc_chunk": 1},
    "accumulate 4": {"accumulate": 4},
    "remat full, accumulate 4": {"remat": "full", "accumulate": 4},
    "remat full, accumulate 4, adafactor": {"remat": "full", "accumulate": 4, "optimizer": "adafactor"},
}
SETTINGS = {
    "nothing": {"logit_chunk": 0},
    **{name: {"logit_chunk": 2048, **changes} for name, changes in SAVED.items()},
}


def resident(name: str) -> int:
    """Resident memory of this process in bytes; name: VmRSS (now) or VmHWM (the peak since `forget`)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def forget() -> None:
    """Resets the peak of resident memory (VmHWM) to the present value."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(load_name: str, changes: dict) -> dict[str, float]:
    from rag_jax.bench import synthetic_load, train
    from rag_jax.system import sharding

    load = dataclasses.replace(synthetic_load.LOADS[load_name], **changes)
    synthetic_load.check(load)
    mesh = sharding.make_mesh()
    ours, batch = train.prepare(load, mesh), synthetic_load.batch(load, mesh, 0)
    state = train.first_state(ours)
    ours = ours._replace(params={})  # the state has a copy
    program, said = train.compiled_step(ours, state, batch)
    step = train.stepper(ours, program, state, [batch])
    del state
    gc.collect()
    forget()
    before = resident("VmRSS")
    losses = [step(0), step(0)]
    step_bytes = resident("VmHWM") - before
    return {"before": before, "step": step_bytes, "temporary": said["temporary_bytes"], "loss": losses[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", default="base")
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--source", type=int, default=256)
    parser.add_argument("--target", type=int, default=32)
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), choices=tuple(SETTINGS))
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one setting, in the process that is measured
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.load, json.loads(args.measure))))
        return
    shape = {"questions": args.questions, "source": args.source, "target": args.target, "passages": 4096}
    print(f"{'':<38}{'before':>10}{'step':>10}{'temporary':>12}")
    for name in args.only:
        changes = json.dumps(shape | SETTINGS[name])
        command = [sys.executable, __file__, "--load", args.load, "--measure", changes]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        figures = f"{found['before'] / 1e9:>7.2f} GB{found['step'] / 1e9:>7.2f} GB{found['temporary'] / 1e9:>9.2f} GB"
        print(f"{name:<38}{figures}", flush=True)


if __name__ == "__main__":
    main()
