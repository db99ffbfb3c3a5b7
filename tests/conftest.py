"""Fixtures for all tests: eight fake CPU devices, and the real data sets where they are present."""

import atexit
import contextlib
import fcntl
import fnmatch
import gc
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from repeats import QUICK

# Set before jax is imported, since the backend reads these once. Tests that start processes pass them on.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "64")  # threads of the CPU client: with fewer, collectives of two steps can deadlock
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # eight devices; small programs compile several times faster without the backend's optimisations
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    if tuple(map(int, metadata.version("jax").split(".")[:2])) < (0, 12):  # later versions refuse the flag
        flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
# Compiled programs are shared by all processes of this session: workers of xdist and every command that a test starts.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="rag-jax-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", "-1")  # without locks
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a look-up without a network takes minutes to fail

gc.set_threshold(200_000, 50, 50)  # tracing makes many objects, few of them garbage: a tenth of the time

hypothesis.settings.register_profile("tests", deadline=None)  # no test fails by time
hypothesis.settings.load_profile("tests")

ROOT = Path(__file__).resolve().parents[1]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Cases that tests/repeats.py does not name are slow; a pattern there that no case has is an error."""
    cases: dict[str, list[str]] = {}
    for item in items:
        test, _, case = item.nodeid.removeprefix("tests/").removesuffix("]").partition("[")
        if test in QUICK:
            cases.setdefault(test, []).append(case)
            if not any(fnmatch.fnmatchcase(case, pattern) for pattern in QUICK[test]):
                item.add_marker(pytest.mark.slow)
    for test, there in cases.items():
        unknown = [pattern for pattern in QUICK[test] if not fnmatch.filter(there, pattern)]
        if unknown and not any("[" in argument for argument in config.args):  # single cases were asked for
            raise pytest.UsageError(f"tests/repeats.py: {test} has no case {unknown[0]}")


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """`shared_data("squad")` is the path of a real data set beside the repository; the test is skipped without it."""

    def find(name: str) -> Path:
        path = ROOT.parent / "shared" / "data" / name
        if not path.exists():
            pytest.skip(f"needs real data: {path}")
        return path

    return find


@pytest.fixture(autouse=True)
def parity_needs_torch(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("parity"):
        pytest.importorskip("torch")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that matplotlib draws, collected when they are saved."""
    from matplotlib.figure import Figure

    saved = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **options: Any) -> None:
        saved.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


@contextlib.contextmanager
def shared_by_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory that all processes of this session share, while no other one has it."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    directory.mkdir(exist_ok=True)
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield directory


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Worlds and corpora of `tiny.make_data`; nobody writes to them."""
    import tiny

    with shared_by_workers(tmp_path_factory) as shared:
        if not (shared / "tiny").exists():
            tiny.make_data(shared / "building").rename(shared / "tiny")
    return shared / "tiny"


@pytest.fixture(scope="session")
def tiny_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of `tiny.get_config`, trained to its end, with the printed result beside it in result.json."""
    import tiny

    with shared_by_workers(tmp_path_factory):
        if not (tiny_data / "result.json").exists():
            result = tiny.train(tiny_data, tiny_data / "run")
            (tiny_data / "result.json").write_text(json.dumps(result))
    return tiny_data / "run"
