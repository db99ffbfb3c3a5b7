"""Imports point one way: a module imports only what stands below it here."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "rag_jax"

# From the bottom up. A module may import those of the lines above its own, and, in a package, its neighbours; the
# packages and the first lines are held to less by ONLY. A new module needs a place here before it is merged.
LEVELS = [
    ["rag_jax"],  # the package itself: version, and names imported when asked for
    ["errors", "places", "disk", "paths", "plain_text", "program_cache"],
    ["blocks"],
    ["sharding"],
    ["products"],
    ["sums", "output_layer"],
    ["objectives", "decoding_rules", "metrics", "logs", "moments", "schedule"],
    ["checksums", "files", "lock", "distributed", "preemption", "counting", "hardware", "hlo", "heap", "answer_config"],
    ["decoding", "checkpoint", "optimizer", "plots", "plots_evaluation", "tensors"],
    ["models"],
    ["data"],
    ["retrieval"],
    ["generate"],
    ["rag"],
    ["refresh"],
    ["config", "report", "report_html"],
    ["steps", "hosted", "depth"],
    ["upkeep"],
    ["run"],
    ["programs"],
    ["encoder_files", "encode_corpus", "live"],
    ["pretrained"],
    ["saving"],
    ["reporting"],
    ["answer"],
    ["docs_curve", "predictions"],
    ["evaluate", "compare"],
    ["preparing"],
    ["diverged"],
    ["session"],
    ["train"],
    ["bench_limits", "bench_load"],
    ["bench_decode", "bench_encode", "bench_search", "bench_torch"],
    ["bench_train"],
    ["bench_largest"],
    ["aot", "ask", "bench", "build_index", "convert", "export", "verify"],
    ["__main__"],
]

# All that these may import of the package, besides `errors`; the longest matching name decides.
RETRIEVAL = [
    "retrieval",
    "blocks",
    "sharding",
    "logs",
    "files",
    "data.formats",
    "data.tokenizers",
    "data.cutting",
    "data.joining",
]
ONLY = {
    **{name: [] for level in LEVELS[2:7] for name in level},
    "products": ["sharding"],
    "sums": ["products", "sharding"],
    "output_layer": ["products", "sharding"],
    "objectives": ["output_layer"],
    "metrics": ["metrics"],
    "models": ["models", "places", "products", "sharding", "sums"],
    "moments": ["places"],
    "checksums": ["places"],
    "logs": ["plain_text"],
    "distributed": ["logs", "disk", "plain_text"],
    "files": ["blocks", "disk", "logs", "paths"],
    "data": ["data", "sharding", "logs", "files", "paths", "metrics.matching"],
    "retrieval": RETRIEVAL,
    "retrieval.inverse_cloze": [*RETRIEVAL, "data.pipeline"],
    "retrieval.encode": [*RETRIEVAL, "models.bert"],
    "tensors": [],
    "decoding": ["decoding_rules"],
    "optimizer": ["moments"],
    # imports commands by name, when they are called
    "__main__": ["heap", "disk", "paths", "plain_text", "program_cache"],
}

FORBIDDEN = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "tensorflow"}
ALONE = {
    "orbax": "checkpoint",
    "tensorboardX": "logs",
    "matplotlib": "plots, plots_evaluation",
    "torch": "tensors, bench_decode, bench_encode, bench_largest, bench_torch",
    "faiss": "bench_search",
}  # library: the modules that have it


def inside(name: str, parent: str) -> bool:
    return name == parent or name.startswith(parent + ".")


def module_name(path: Path) -> str:
    """`rag_jax/models/bert.py` is `models.bert`; the package itself is `rag_jax`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "rag_jax"


MODULES = {module_name(path): ast.parse(path.read_text(), path) for path in sorted(PACKAGE.rglob("*.py"))}


def imported(tree: ast.Module) -> Iterator[str]:
    """Full names of all imports in a module, in functions too; `from a import b` is a.b where that is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are written in full"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full.removeprefix("rag_jax.") in MODULES else node.module


def own(tree: ast.Module) -> set[str]:
    """Modules of the package that a module imports, without the `rag_jax.`."""
    return {name.removeprefix("rag_jax.") for name in imported(tree) if inside(name, "rag_jax")}


def level(name: str) -> int:
    for i, names in enumerate(LEVELS):
        if any(inside(name, parent) for parent in names):
            return i
    raise AssertionError(f"{name} has no place in LEVELS of {Path(__file__).name}")


@pytest.mark.parametrize("name", MODULES)
def test_direction(name: str) -> None:
    package = name.split(".")[0]
    for other in own(MODULES[name]) - {"errors", "rag_jax"}:
        assert inside(other, package) or level(other) < level(name), f"{name} must not import {other}"
        rules = [rule for rule in ONLY if inside(name, rule)]
        allowed = ONLY[max(rules, key=len)] if rules else None
        assert allowed is None or any(inside(other, parent) for parent in allowed), f"{name} must not import {other}"


@pytest.mark.parametrize("name", MODULES)
def test_libraries(name: str) -> None:
    libraries = {full.split(".")[0] for full in imported(MODULES[name])}
    assert not libraries & FORBIDDEN
    assert not {library for library in libraries & set(ALONE) if name not in ALONE[library].split(", ")}
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant) and node.value.value is False, f"line {node.value.lineno}"


def test_the_command_line_starts_without_jax() -> None:
    code = "import sys, rag_jax, rag_jax.__main__; assert not {'jax', 'numpy', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
