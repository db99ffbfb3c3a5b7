"""Weak scaling of a training step (fixed work for each device): bytes of its collectives and step time.

    python scripts/scaling.py                         # 1, 2, 4 and 8 fake CPU devices, the batch over `data`
    python scripts/scaling.py --mesh fsdp             # parameters sharded as well

One process for each number of devices compiles the step of a small RAG-Token model (four questions a device, three
passages each, an index of 4,096 rows) and runs it. Fake devices share the cores, so their step time does not measure
speed; the collectives of the compiled program do not depend on that. `bytes` is the size of the collectives' results on
a device, `sent` the bytes that each device sends for them in a ring, which approaches twice the bytes of an all-reduce
as devices are added.
"""

import argparse
import json
import os
import subprocess
import sys

COUNTS = (1, 2, 4, 8)


def measure(devices: int, axis: str, steps: int) -> dict[str, object]:
    """Compiles and times the step in this process, which must have that many devices on the mesh axis `axis`."""
    import statistics
    import time

    import jax
    import jax.numpy as jnp

    from rag_jax.aot import hlo, stage_programs
    from rag_jax.models.bart import BartConfig
    from rag_jax.models.bert import BertConfig
    from rag_jax.rag import Rag, RagConfig
    from rag_jax.retrieval.config import SearchConfig
    from rag_jax.system import sharding
    from rag_jax.training.config import TrainConfig, make_stage
    from rag_jax.training.optimizer import OptimizerConfig

    shape = {"vocab_size": 1024, "width": 64, "heads": 4, "hidden": 128}
    encoder = BertConfig(**shape, layers=2, positions=64)
    generator = BartConfig(**shape, encoder_layers=2, decoder_layers=2, positions=128)
    model = RagConfig("token", encoder, generator, n_docs=3, source_length=96, question_length=32)
    optimizer = OptimizerConfig(groups={"question_encoder": 1.0, "generator": 1.0})
    stage = make_stage("joint", batch=4 * devices, n_docs=3, optimizer=optimizer)
    mesh = {axis: devices}
    cfg = TrainConfig(
        corpus="", train="", dev="", stages=(stage,), model=model, search=SearchConfig(), mesh=mesh, target_length=16
    )
    size = stage_programs.Sizes(4096, 64, 64, "uint16", "uint16", (0,))
    program = stage_programs.step(cfg, stage, Rag(model), size, sharding.make_mesh(mesh))
    compiled = program.jitted.lower(*program.arguments).compile()

    def zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.key(0), leaf.sharding)
        return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)

    state, *rest = jax.tree.map(zeros, program.arguments)
    seconds = []
    for _ in range(steps + 2):
        begun = time.perf_counter()
        state, _, metrics = compiled(state, *rest)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - begun)
    found = hlo.by_kind(hlo.collectives(compiled.as_text(), devices))
    return {"devices": devices, "step_ms": 1e3 * statistics.median(seconds[2:]), "collectives": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", choices=("data", "fsdp"), default="data", help="axis that the devices lie on")
    parser.add_argument("--steps", type=int, default=10, help="timed steps (default: 10)")
    parser.add_argument("--devices", type=int, help=argparse.SUPPRESS)  # in this process
    parser.add_argument("--json", action="store_true", help="one JSON line a number of devices")
    args = parser.parse_args()
    if args.devices:
        print(json.dumps(measure(args.devices, args.mesh, args.steps)))
        return
    for devices in COUNTS:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": "64", "XLA_FLAGS": flags}
        command = [sys.executable, __file__, "--devices", str(devices), "--mesh", args.mesh, "--steps", str(args.steps)]
        out = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        if args.json:
            print(out.strip(), flush=True)
            continue
        row = json.loads(out)
        print(f"{devices} devices, {row['step_ms']:.1f} ms a step", flush=True)
        for kind, x in row["collectives"].items():
            print(
                f"  {kind:<20}{x['count']:>6,.0f} times{x['bytes']:>14,.0f} bytes{x['sent']:>14,.0f} sent", flush=True
            )


if __name__ == "__main__":
    main()
