"""Conversion at full size: random weights in the form of facebook/rag-token-nq (BERT-base and BART-large, 712 tensors).

    python scripts/convert_full_size.py --out DIR     # needs about 8 GB of disk, 3 GB of memory, no torch

Writes the Hugging Face directory, converts it, exports it again, and runs one forward pass (B=1, K=2, L=64, T=8), each
in a process of its own; prints the time and the peak memory of each, beside the size of the checkpoint.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

FORWARD = """
import sys, time, numpy as np, jax, rag_jax
model, params = rag_jax.from_pretrained(sys.argv[1])
rng = np.random.default_rng(0)
ids, mask = rng.integers(3, 50000, (1, 2, 64)), np.ones((1, 2, 64), bool)
begun = time.perf_counter()
nll = jax.jit(model.nll)(params, ids, mask, np.zeros((1, 2), "f4"), rng.integers(3, 50000, (1, 8)))
print("nll", float(nll[0]), "forward with compilation", round(time.perf_counter() - begun, 1), "s")
assert np.isfinite(nll).all()
"""


def tensors() -> tuple[dict[str, tuple[tuple[int, ...], str]], Iterator[tuple[str, np.ndarray]]]:
    """Shapes by name, and an iterator over (name, tensor), of a RAG checkpoint with tied copies, like released ones."""
    import flax.linen as nn
    import jax
    from flax.traverse_util import flatten_dict

    from rag_jax.models.bart import BartConfig
    from rag_jax.models.bert import BertConfig
    from rag_jax.models.hf import ENCODERS, GENERATORS, naming
    from rag_jax.rag import Rag, RagConfig

    rag = Rag(RagConfig("token", context_encoder=False))
    ours = flatten_dict(nn.unbox(jax.eval_shape(rag.init, jax.random.key(0))), sep="/")
    planned = []  # (name and those of its copies, shape, mean)
    for side, family, config in (
        ("question_encoder", ENCODERS["dpr"], BertConfig()),
        ("generator", GENERATORS["bart"], BartConfig()),
    ):
        copies = family.copies(config).items()
        for entry in family.entries(config):
            names = [entry.theirs, *(name for name, source in copies if source == entry.theirs)]
            shape = naming.their_shape(entry, [ours[f"{side}/{path}"].shape for path in entry.ours])
            mean = 1.0 if entry.ours[0].endswith("scale") else 0.0
            planned.append(([f"rag.{side}.{name}" for name in names], shape, mean))

    def made() -> Iterator[tuple[str, np.ndarray]]:
        rng = np.random.default_rng(0)
        for names, shape, mean in planned:
            tensor = rng.standard_normal(shape, np.float32) * 0.02 + np.float32(mean)
            for name in names:
                yield name, tensor

    return {name: (shape, "float32") for names, shape, _ in planned for name in names}, made()


def make(out: Path) -> None:
    """Writes the Hugging Face directory."""
    from rag_jax.models.bart import BartConfig
    from rag_jax.models.bert import BertConfig
    from rag_jax.models.hf import ENCODERS, GENERATORS
    from rag_jax.pretrained.tensor_files import write_tensors

    out.mkdir(parents=True)
    encoder = ENCODERS["dpr"].describe(BertConfig()) | {"model_type": "dpr"}
    generator = GENERATORS["bart"].describe(BartConfig(start_id=2)) | {"model_type": "bart"}
    config = {"model_type": "rag", "architectures": ["RagTokenForGeneration"]}
    text = json.dumps(config | {"question_encoder": encoder, "generator": generator})
    (out / "config.json").write_text(text)
    shapes, made = tensors()
    write_tensors(out, shapes, made)
    print(f"{len(shapes)} tensors")


def measured(name: str, command: list[str], size: int) -> None:
    """Runs the command and prints its time, its peak memory, and the ratio of that to `size`, a checkpoint's bytes."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    out, _ = process.communicate()
    if process.returncode:
        sys.exit(f"{name} failed")
    seconds, peak = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"{name}: {seconds:.1f} s, peak memory {peak / 1e9:.2f} GB, {peak / size:.2f} of the checkpoint", flush=True)
    if name == "forward":
        print("  " + out.strip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=("make",), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        make(args.out / "hf")
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    here, out = [sys.executable, __file__], args.out
    if not (out / "hf").exists():
        subprocess.run([*here, "--only", "make", "--out", str(out)], check=True)
    size = sum(file.stat().st_size for file in (out / "hf").glob("*.safetensors"))
    unique = size - 3 * 50265 * 1024 * 4
    print(f"checkpoint: {size / 1e9:.2f} GB, {unique / 1e9:.2f} GB without the tied copies; ratios are to the latter")
    cli = [sys.executable, "-m", "rag_jax"]
    for name, command in (
        ("convert", [*cli, "convert", str(out / "hf"), "--out", str(out / "ours"), "--overwrite"]),
        ("export", [*cli, "export", str(out / "ours"), "--out", str(out / "back"), "--overwrite"]),
        ("forward", [sys.executable, "-c", FORWARD, str(out / "ours")]),
    ):
        subprocess.run([*here, "measure", name, str(unique), *command], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:  # in a process of its own, whose children's peak memory is that of one command
        measured(sys.argv[2], sys.argv[4:], int(sys.argv[3]))
    else:
        main()
