"""Checkpoints of everything a run needs to resume: parameters, optimiser, data position, index.

The only file that imports Orbax.
"""

import contextlib
import hashlib
import logging
import math
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from rag_jax.errors import InputError
from rag_jax.runs import array_checksums
from rag_jax.system import distributed, files, sharding

# a save waits for the one before, which is intended: no warning of Orbax about it
logging.getLogger("absl").addFilter(lambda record: "Waiting for previous save" not in record.getMessage())


def _without_closed_loops(before: Any) -> Any:
    """`before`, an excepthook, without the "Event loop is closed" errors of tensorstore's threads.

    They report to an event loop that has already ended when one of several arrays could not be read; that error itself
    is raised anyway.
    """

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not (kind is RuntimeError and str(error) == "Event loop is closed"):
            before(kind, error, trace)

    return hook


sys.excepthook = _without_closed_loops(sys.excepthook)

Tree = Any
KIND, VERSION, OLDEST = "parameters", 3, 2  # version 2 has no checksums of arrays
AGAIN = "restore the directory, or write the parameters again (rag-jax train, or convert)"
POSITION_VERSION = 2
AT_ONCE = 10**8  # bytes of parameters that are read together


class Damaged(Exception):
    """Raised for a checkpoint that is incomplete or altered; the message says what is wrong with it."""


class Checkpoints:
    """Numbered checkpoints in a directory; the `keep` newest are kept, and the `keep_best` with the largest `metric`.

    A save runs beside training and is atomic: if it is killed, the checkpoint before remains. Every array has a
    checksum, so that flipped bits are noticed. Several processes must call the same methods in the same order.
    """

    def __init__(self, directory: Path, keep: int = 2, keep_best: int = 0, metric: str = "") -> None:
        self.directory, self.metric = directory.resolve(), metric
        newest = preservation.LatestN(keep)
        best = preservation.BestN(get_metric_fn=_value, n=keep_best, keep_checkpoints_without_metrics=False)
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation.AnyPreservationPolicy([newest, best]),
            best_fn=_value if keep_best else None,
        )
        self._manager: ocp.CheckpointManager | None = None  # made at the first save: making it reads the directory

    def steps(self) -> list[int]:
        """Steps of all checkpoints, damaged or not, newest first."""
        return distributed.from_first(numbers(self.directory))

    def latest(self) -> int | None:
        """Step of the newest checkpoint whose position can be read; its arrays may still be damaged; None for none."""
        for step in self.steps():
            try:
                self.position(step)
            except Damaged:
                continue
            return step
        return None

    def newest(self) -> int | None:
        """`latest`, after waiting for the save in progress."""
        self.wait()
        return self.latest()

    def save(
        self, step: int, arrays: Tree, position: dict[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Saves arrays (a pytree) and a JSON-able position as checkpoint `step`, unless there is one of that step.

        It returns when the arrays may change, and writes in the background; an error of the save before is raised here.
        metrics: of an evaluation at this step; InputError where `metric`, which ranks checkpoints, is not among them.
        """
        if self._manager is None:
            self._manager = ocp.CheckpointManager(self.directory, options=self._options)
        if step in self._manager.all_steps():
            return
        best = None
        if metrics and self._options.best_fn is not None:
            if self.metric not in metrics:
                raise InputError(f"best_metric={self.metric!r} is not measured; there are {', '.join(metrics)}")
            best = {"value": metrics[self.metric]}
        fields = {**position, "format_version": POSITION_VERSION, "shapes": shapes(arrays)}
        fields["checksums"] = array_checksums.of_tree(arrays)
        sealed = {**fields, "hash": files.canonical_sha256(fields)}
        items = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), position=ocp.args.JsonSave(sealed))
        with self._swept():
            self._manager.save(step, args=items, metrics=best)

    def position(self, step: int) -> dict[str, Any]:
        """The position that was saved, with shapes and checksums of the arrays; Damaged where it cannot be read."""
        directory = self.directory / str(step) / "position"
        try:
            found = ocp.JsonCheckpointHandler().restore(directory)
        except Exception as error:  # Orbax raises many kinds
            raise Damaged(f"its position is unreadable ({error})") from error
        version = found.get("format_version") if isinstance(found, dict) else None
        if isinstance(found, dict) and "hash" not in found:
            raise InputError(
                f"{self.directory}/{step}: format version {version}, this program reads {POSITION_VERSION}; train into "
                "a new run directory, or go on with the version of the program that the run was started with"
            )
        if not isinstance(found, dict) or found.pop("hash") != files.canonical_sha256(found):
            raise Damaged("its position was altered after it was written")
        return found

    def restore(self, step: int, like: Tree) -> Tree:
        """The arrays of a checkpoint, with the shardings of `like`, a pytree of arrays or ShapeDtypeStructs.

        Damaged where they cannot be read or were altered, in any process; InputError where shapes or types differ from
        those of `like`.
        """
        saved, wanted = self.position(step), shapes(like)
        for name in sorted(set(saved["shapes"]) | set(wanted)):
            if saved["shapes"].get(name) != wanted.get(name):
                raise InputError(
                    f"{self.directory}/{step}: does not fit the configuration ({name} is {saved['shapes'].get(name)} "
                    f"there, {wanted.get(name)} now); train into a new run directory, or restore the configuration "
                    "that the run was started with"
                )
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        arrays, wrong = None, ""
        try:  # without the manager, which would wait for a process that failed
            directory = self.directory / str(step) / "arrays"
            arrays = ocp.StandardCheckpointHandler().restore(directory, args=ocp.args.StandardRestore(target))
        except Exception as error:  # Orbax raises this very class for a file that was cut short
            wrong = f"its arrays are unreadable ({' '.join(str(error).split())[:200]})"
        if not distributed.everywhere(not wrong):
            raise Damaged(wrong or "its arrays are unreadable in another process")
        sums = array_checksums.of_tree(arrays)
        changed = [name for name, value in saved["checksums"].items() if sums[name] != value]
        if changed:
            raise Damaged(f"{len(changed)} of its {len(sums)} arrays were altered after they were saved: {changed[0]}")
        return arrays

    def verify(self, step: int) -> None:
        """Reads a whole checkpoint into memory; Damaged where it is not what was saved."""
        saved, directory = self.position(step), self.directory / str(step) / "arrays"
        try:
            handler = ocp.PyTreeCheckpointHandler()
            on_host = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), dict(handler.metadata(directory).tree)
            )
            arrays = handler.restore(directory, args=ocp.args.PyTreeRestore(restore_args=on_host))
        except Exception as error:  # as in `restore`
            raise Damaged(f"its arrays are unreadable ({' '.join(str(error).split())[:200]})") from error
        # Orbax returns its own names of arrays, so only the sorted checksums can be compared
        found = sorted(array_checksums.of_tree(jax.tree.map(np.asarray, arrays)).values())
        if found != sorted(saved["checksums"].values()):
            raise Damaged("some of its arrays were altered after they were saved")

    def set_aside(self, step: int) -> Path:
        """Renames a damaged checkpoint, so that its step can be saved again; returns the new path."""
        old, new = self.directory / str(step), self.directory / f"{step}.damaged"
        if distributed.first():
            if new.exists():
                shutil.rmtree(new)
            old.rename(new)
        distributed.barrier(f"set aside {step}")
        return new

    def wait(self) -> None:
        """Waits until everything saved is on disk."""
        if self._manager is not None:
            with self._swept():
                self._manager.wait_until_finished()

    def close(self) -> None:
        if self._manager is not None:
            with self._swept():
                self._manager.close()

    @contextlib.contextmanager
    def _swept(self) -> Iterator[None]:
        """Removes the half-written files of a save that fails inside, as they may be what fills the disk."""
        try:
            yield
        except Exception:
            if distributed.first():
                for half in self.directory.glob("*.orbax-checkpoint-tmp*"):
                    files.remove_tree(half)
            raise


def numbers(directory: Path) -> list[int]:
    """Steps of the checkpoints in a directory, newest first."""
    there = directory.iterdir() if directory.is_dir() else ()
    return sorted((int(path.name) for path in there if path.name.isdigit() and path.is_dir()), reverse=True)


def _value(metrics: dict[str, float]) -> float:
    return metrics["value"]


def save_params(directory: Path, parts: Iterable[tuple[str, Tree]]) -> None:
    """Writes parameters alone, for evaluation and sharing, in place of an older copy; whole or not at all.

    parts: (name, pytree), such as `params.items()`, written one after another: a generator that makes each of them when
    it is asked for never holds all of them in memory.
    """
    described: dict[str, list] = {}
    sums: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        temporary, out = Path(), directory.resolve()
        if distributed.first():
            temporary = stack.enter_context(files.new_directory(out, KIND, overwrite=True))
            (temporary / "arrays").mkdir()
        temporary = out.with_name(distributed.from_first(temporary.name))
        for name, tree in parts:
            with _checkpointer(tree) as checkpointer:
                checkpointer.save(temporary / "arrays" / name, args=ocp.args.PyTreeSave(tree))
            described |= shapes({name: tree})
            sums |= array_checksums.of_tree({name: tree})
            del tree
        if distributed.first():
            files.write_manifest(temporary, KIND, VERSION, {"shapes": described, "checksums": sums})
    distributed.barrier("parameters saved")


def _checkpointer(tree: Tree) -> ocp.Checkpointer:
    """An Orbax checkpointer that copies few arrays at once; by default it would copy all of them before it writes."""
    sizes = [math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)]
    at_once = max(1.01 * max(sizes), sum(sizes) / 8) / 1e9
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=at_once, restore_concurrent_gb=at_once)
    return ocp.Checkpointer(handler)


def shapes(params: Tree) -> dict[str, list]:
    """[shape, type] of every array, by its path in the tree."""
    return {jax.tree_util.keystr(k): [list(v.shape), str(v.dtype)] for k, v in jax.tree.leaves_with_path(params)}


def check_params(directory: Path, like: Tree | None = None) -> dict[str, Any]:
    """The manifest of saved parameters; InputError where they are incomplete or have other shapes than `like`."""
    if not directory.exists():
        raise InputError(f"{directory}: no parameters here; finish rag-jax train first, or name another run directory")
    manifest = files.read_manifest(directory, KIND, VERSION, OLDEST)
    with files.described(directory / files.MANIFEST, AGAIN):
        saved = dict(manifest["shapes"].items())
    wanted = saved if like is None else shapes(like)
    for name in sorted(set(saved) | set(wanted)):
        if saved.get(name) != wanted.get(name):
            raise InputError(
                f"{directory}: parameter {name} is {saved.get(name)} there, the model has {wanted.get(name)}"
            )
    return manifest


def load_params(directory: Path, like: Tree) -> Tree:
    """Parameters written by `save_params`, with the shardings of `like`; InputError where shapes or content differ."""
    check_params(directory, like)
    return {name: unflatten_dict(dict(read_part(directory, name, tree)), sep="/") for name, tree in like.items()}


def read_part(directory: Path, name: str, like: Tree) -> Iterator[tuple[str, jax.Array]]:
    """(path with slashes, array) of one part, with the shapes, types and shardings of `like`; see `check_params`.

    Groups of arrays are read one after another: a caller that drops each array never holds the whole part, and Orbax
    needs little memory besides. InputError for arrays that are not those that were saved.
    """
    manifest = files.read_manifest(directory, KIND, VERSION, OLDEST)
    for group in _groups(flatten_dict(like, sep="/")):
        with files.described(directory / files.MANIFEST, AGAIN):
            stored = {path: _as_stored(manifest, name, path, leaf) for path, leaf in group.items()}
        arrays = flatten_dict(_restore(directory.resolve() / "arrays" / name, unflatten_dict(stored, sep="/")), sep="/")
        _verify(directory, manifest, {_key(name, path): array for path, array in arrays.items()})
        for path, leaf in group.items():
            yield path, arrays.pop(path).astype(leaf.dtype)


def _key(name: str, path: str) -> str:
    """The name of an array in the manifest."""
    return jax.tree_util.keystr(tuple(jax.tree_util.DictKey(part) for part in (name, *path.split("/"))))


def _as_stored(manifest: Mapping[str, Any], name: str, path: str, leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and type with which an array was saved, with the sharding of `leaf`, whose type may be another."""
    shape, dtype = manifest["shapes"][_key(name, path)]
    return jax.ShapeDtypeStruct(tuple(shape), jax.numpy.dtype(dtype), sharding=getattr(leaf, "sharding", None))


def _verify(directory: Path, manifest: Mapping[str, Any], arrays: Mapping[str, jax.Array]) -> None:
    """InputError where arrays differ from those that were saved."""
    known = manifest.get("checksums")
    if known is None:  # of an older format
        return
    with files.described(directory / files.MANIFEST, AGAIN):
        changed = [name for name, array in arrays.items() if array_checksums.of_array(array) != known[name]]
    if changed:
        raise InputError(f"{directory}: damaged: {changed[0]} is not what was saved; {AGAIN}")


def _groups(leaves: dict[str, Any]) -> Iterator[dict[str, Any]]:
    group: dict[str, Any] = {}
    size = 0
    for path, leaf in leaves.items():
        group[path] = leaf
        size += math.prod(leaf.shape) * leaf.dtype.itemsize
        if size >= AT_ONCE:
            yield group
            group, size = {}, 0
    if group:
        yield group


def _restore(directory: Path, like: Tree) -> Tree:
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with _checkpointer(target) as checkpointer:
        arguments = ocp.checkpoint_utils.construct_restore_args(target)
        wanted = ocp.args.PyTreeRestore(item=target, restore_args=arguments, partial_restore=True)
        try:
            return checkpointer.restore(directory, args=wanted)
        except Exception as error:  # Orbax raises this very class for a file that was cut short
            said = " ".join(str(error).split())[:200]
            raise InputError(f"{directory}: damaged: its arrays are unreadable ({said}); {AGAIN}") from error


def leaf_is_here(leaf: Any) -> bool:
    """Whether this process can read all of an array."""
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated


def tree_hash(params: Tree) -> str:
    """sha256 over names, shapes, types and bytes of parameters; it identifies the encoder that made an index."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(params):
        array = np.asarray(leaf if leaf_is_here(leaf) else sharding.fetched(leaf))
        digest.update(f"{jax.tree_util.keystr(path)}{array.shape}{array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()
