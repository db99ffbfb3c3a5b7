"""Checkpoints of everything a run needs to go on: parameters, optimiser, data position, index. The only file that
imports Orbax.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from rag_jax import files
from rag_jax.errors import InputError

Tree = Any
KIND, VERSION = "parameters", 2
AT_ONCE = 10**8  # bytes of parameters that are read together


class Checkpoints:
    """Numbered checkpoints in a directory; the newest `keep` stay. A save is atomic: killed, it leaves the one
    before.
    """

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self.directory = directory.resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, arrays: Tree, position: dict[str, Any]) -> None:
        """Write arrays (a pytree) and a JSON-able position as checkpoint `step`; an existing one of that step is
        kept.
        """
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step, args=ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), position=ocp.args.JsonSave(position))
        )
        self._manager.wait_until_finished()

    def position(self, step: int) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(position=ocp.args.JsonRestore()))["position"]

    def restore(self, step: int, like: Tree) -> Tree:
        """The arrays of a checkpoint, in the shapes, types and shardings of `like` (arrays or ShapeDtypeStructs)."""
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(target)))
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise InputError(
                f"{self.directory}/{step}: does not fit the configuration ({error}); train into a new run directory, "
                "or restore the configuration that the run was started with"
            ) from error
        return restored["arrays"]

    def close(self) -> None:
        self._manager.close()


def save_params(directory: Path, parts: Iterable[tuple[str, Tree]]) -> None:
    """Parameters alone, for evaluation and sharing; whole or not at all, in place of an older copy.

    `parts`, such as `params.items()`, are taken and written one after another: a generator that makes each when it is
    asked for never holds them all.
    """
    described: dict[str, list] = {}
    with files.new_directory(directory.resolve(), KIND, overwrite=True) as temporary:
        (temporary / "arrays").mkdir()
        for name, tree in parts:
            with _checkpointer(tree) as checkpointer:
                checkpointer.save(temporary / "arrays" / name, args=ocp.args.PyTreeSave(tree))
            described |= shapes({name: tree})
            del tree
        files.write_manifest(temporary, KIND, VERSION, {"shapes": described})


def _checkpointer(tree: Tree) -> ocp.Checkpointer:
    """One that copies only some arrays at a time on their way; by itself it would copy all of them first."""
    sizes = [math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)]
    at_once = max(1.01 * max(sizes), sum(sizes) / 8) / 1e9
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=at_once, restore_concurrent_gb=at_once)
    return ocp.Checkpointer(handler)


def shapes(params: Tree) -> dict[str, list]:
    """[shape, type] of every array, by its path."""
    return {jax.tree_util.keystr(k): [list(v.shape), str(v.dtype)] for k, v in jax.tree.leaves_with_path(params)}


def check_params(directory: Path, like: Tree | None = None) -> None:
    """InputError where the directory does not hold whole parameters, or not in the shapes of `like`."""
    if not directory.exists():
        raise InputError(f"{directory}: no parameters here; finish rag-jax train first, or name another run directory")
    saved = files.read_manifest(directory, KIND, VERSION)["shapes"]
    wanted = saved if like is None else shapes(like)
    for name in sorted(set(saved) | set(wanted)):
        if saved.get(name) != wanted.get(name):
            raise InputError(
                f"{directory}: parameter {name} is {saved.get(name)} there, the model has {wanted.get(name)}"
            )


def load_params(directory: Path, like: Tree) -> Tree:
    """Parameters written by `save_params`, checked against the shapes of `like`."""
    check_params(directory, like)
    return {name: unflatten_dict(dict(read_part(directory, name, tree)), sep="/") for name, tree in like.items()}


def read_part(directory: Path, name: str, like: Tree) -> Iterator[tuple[str, jax.Array]]:
    """(path with slashes, array) of one part, in the shapes, types and shardings of `like`; see `check_params`.

    Some arrays are read at a time: whoever lets go of them never holds the part, and what Orbax needs on the way is
    small, too.
    """
    for group in _groups(flatten_dict(like, sep="/")):
        arrays = flatten_dict(_restore(directory.resolve() / "arrays" / name, unflatten_dict(group, sep="/")), sep="/")
        for path in group:
            yield path, arrays.pop(path)


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
        return checkpointer.restore(directory, args=wanted)


def tree_hash(params: Tree) -> str:
    """sha256 over names, shapes and bytes: which encoder made an index."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)}{array.shape}{array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()
