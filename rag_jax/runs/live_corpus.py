"""A corpus that changes while a program runs: which version is the newest, and that one in place of the one in use.

Rows keep their numbers from version to version, so most of every table stays. Tables of the same size share the shards
without a new row, and no program is compiled again; nothing that is in use is changed.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

from rag_jax.corpus.directory import Corpus
from rag_jax.errors import InputError
from rag_jax.rag import Passages
from rag_jax.runs import directory as runs
from rag_jax.runs.directory import Loaded
from rag_jax.system import files, sharding
from rag_jax.system.logs import info


class Versions:
    """Looks whether a path, usually a symbolic link, leads to another version of a corpus than before."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._seen: tuple[Path, int, int] | None = None

    def look(self, corpus: Corpus) -> Corpus | None:
        """The corpus that the path leads to, every file opened, if it is an update of this one; None where it is this
        one. A line in the log says why another one is not taken, once.
        """
        mark = self._mark()
        if mark is None or mark == self._seen:
            return None
        self._seen = mark
        try:
            found = open_version(self.path)
            if found.hash == corpus.hash:
                return None
            check_update(corpus, found)
        except InputError as error:
            info(f"{error}; the corpus {corpus.directory} ({corpus.hash[:16]}) stays in use")
            return None
        if self._mark() != mark:  # replaced between two files
            self._seen = None
            return None
        return found

    def _mark(self) -> tuple[Path, int, int] | None:
        """What changes with the version; None where nothing is there, as between the renames of two directories."""
        directory = self.path.resolve()
        try:
            about = os.stat(directory / files.MANIFEST)
        except OSError:
            return None
        return directory, about.st_ino, about.st_mtime_ns


def open_version(path: str | Path) -> Corpus:
    """The corpus that a path leads to now, under its own name, every file opened: it may be replaced."""
    corpus = Corpus.open(Path(path).resolve())
    try:
        corpus.hold()
    except OSError as error:
        raise InputError(f"{path}: unreadable ({error}); it must be replaced as a whole, by a rename") from error
    return corpus


def check_update(old: Corpus, new: Corpus) -> None:
    """InputError with both hashes where the new corpus was not made of the old one by updates."""
    if not new.is_update_of(old.hash, len(old)):
        raise InputError(
            f"{new.directory}: the corpus with hash {new.hash[:16]} is no update of {old.hash[:16]}; make it with: "
            f"rag-jax corpus --update {old.directory} --out DIR"
        )


def position(corpus: Corpus) -> dict[str, Any]:
    """Which version this is, for a checkpoint."""
    return {"directory": str(corpus.directory), "hash": corpus.hash, "n_passages": len(corpus)}


def reopen(position: dict[str, Any], path: str | Path) -> Corpus:
    """The version that a checkpoint names; where that is gone, the one at `path`, which must be an update of it.

    InputError with both hashes where it is not.
    """
    try:
        corpus = open_version(position["directory"])
    except InputError:
        corpus = open_version(path)
    if corpus.hash == position["hash"]:
        return corpus
    corpus = open_version(path)
    if not corpus.is_update_of(position["hash"], position["n_passages"]):
        raise InputError(
            f"{position['directory']}: the checkpoint is of the corpus with hash {position['hash'][:16]}, which is no "
            f"longer there, and {path}, {corpus.hash[:16]}, is no update of it; put one of the two back"
        )
    return corpus


def updated(loaded: Loaded, corpus: Corpus) -> Loaded:
    """The same model with another corpus of the same tokenizers."""
    runs.check_length(loaded.rag, corpus)
    corpus = runs.answered(loaded.rag.config, corpus)
    new = dataclasses.replace(loaded, corpus=corpus, passages=None)
    old = loaded.passages
    if old is None:
        return new
    first, tables = corpus.shared_rows(loaded.corpus), runs.token_columns(corpus)
    if first and new.table_rows() == len(old.encoder_length_N):
        made = [sharding.with_rows(was, first, table[first:]) for was, (table, _) in zip(old, tables, strict=True)]
        return dataclasses.replace(new, passages=Passages(*made))
    return dataclasses.replace(new, passages=runs.token_tables(new))
