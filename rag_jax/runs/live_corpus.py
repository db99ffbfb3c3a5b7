"""A live corpus, which changes while a program runs: finds its newest version, and loads it in place of the old one.

Rows keep their numbers from version to version, so most of every table stays. If the new tables have the same size,
shards without a new row are shared by both versions, and no program is compiled again. Arrays in use are never changed.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

from rag_jax.corpus.directory import Corpus
from rag_jax.errors import InputError
from rag_jax.rag import TokenTables
from rag_jax.runs import directory as runs
from rag_jax.runs.directory import Loaded
from rag_jax.system import files, sharding
from rag_jax.system.logs import info


class Versions:
    """Watches a path, usually a symbolic link, for another version of a corpus."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._seen: tuple[Path, int, int] | None = None

    def look(self, corpus: Corpus) -> Corpus | None:
        """The corpus that the path leads to now, if it is an update of `corpus`; None if it is the same or not usable.

        Every file of the new version is open. The log says once why a version is not used.
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
        if self._mark() != mark:  # replaced while its files were opened: look again next time
            self._seen = None
            return None
        return found

    def _mark(self) -> tuple[Path, int, int] | None:
        """A value that changes with the version; None if the path leads nowhere, as while a directory is replaced."""
        directory = self.path.resolve()
        try:
            about = os.stat(directory / files.MANIFEST)
        except OSError:
            return None
        return directory, about.st_ino, about.st_mtime_ns


def open_version(path: str | Path) -> Corpus:
    """Opens the corpus that a path leads to now, under its real path, and every file of it, as it may be replaced."""
    corpus = Corpus.open(Path(path).resolve())
    try:
        corpus.hold()
    except OSError as error:
        raise InputError(f"{path}: unreadable ({error}); it must be replaced as a whole, by a rename") from error
    return corpus


def check_update(old: Corpus, new: Corpus) -> None:
    """InputError with both hashes where the new corpus was not made from the old one by updates."""
    if not new.is_update_of(old.hash, len(old)):
        raise InputError(
            f"{new.directory}: the corpus with hash {new.hash[:16]} is no update of {old.hash[:16]}; make it with: "
            f"rag-jax corpus --update {old.directory} --out DIR"
        )


def position(corpus: Corpus) -> dict[str, Any]:
    """Path, hash and number of rows of a version, for a checkpoint."""
    return {"directory": str(corpus.directory), "hash": corpus.hash, "n_passages": len(corpus)}


def reopen(position: dict[str, Any], path: str | Path) -> Corpus:
    """Opens the version that a checkpoint names or, if that is gone, the one at `path`, which must be an update of it.

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
    """The model with an update of its corpus; InputError where passages are longer than the encoder can embed."""
    runs.check_length(loaded.rag, corpus)
    corpus = runs.answered(loaded.rag.config, corpus)
    new = dataclasses.replace(loaded, corpus=corpus, passages=None)
    old = loaded.passages
    if old is None:
        return new
    first, tables = corpus.shared_rows(loaded.corpus), runs.token_columns(corpus)
    if first and new.table_rows() == len(old.encoder_length_N):
        made = [sharding.with_rows(was, first, table[first:]) for was, (table, _) in zip(old, tables, strict=True)]
        return dataclasses.replace(new, passages=TokenTables(*made))
    return dataclasses.replace(new, passages=runs.token_tables(new))
