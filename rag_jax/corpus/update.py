"""Updates a corpus: a new directory that shares the files of the old one and adds a segment with the new passages.

A replaced passage is deleted and added again. Deleted rows stay in the tables, and every row keeps its number, so the
embeddings of the old corpus are the first rows of those of the new one.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rag_jax.corpus import build
from rag_jax.corpus.directory import DELETED, KIND, VERSION, Corpus
from rag_jax.data.joining import check_join
from rag_jax.data.readers.formats import InputFile, Located, Passage, expand
from rag_jax.errors import InputError
from rag_jax.system import files

MOST = 100  # updates on top of one build: each has files of its own to open


def update(
    base: str | Path,
    out: str | Path,
    *,
    add: Sequence[str | Path] = (),
    replace: Sequence[str | Path] = (),
    delete: Sequence[str] = (),
    overwrite: bool = False,
) -> Corpus:
    """Writes the corpus `out`, which is `base` with passages added, replaced and deleted, and opens it.

    base: a corpus directory; it is not changed.
    add: inputs as for `build`, with ids that `base` does not have.
    replace: inputs as for `build`, with ids that `base` has.
    delete: ids of passages, or of documents, all of whose pieces are deleted.
    InputError names an id for which that is not so.
    """
    _write(Corpus.open(base), out, add, replace, delete, overwrite)
    return Corpus.open(out)


def _write(
    base: Corpus,
    out: str | Path,
    add: Sequence[str | Path],
    replace: Sequence[str | Path],
    delete: Sequence[str],
    overwrite: bool,
) -> None:
    """Writes the directory of `update`."""
    if not add and not replace and not delete:
        raise InputError("nothing to do: pass --add, --replace or --delete")
    number = len(base.manifest["segments"])
    if number > MOST:
        raise InputError(
            f"{base.directory}: was updated {MOST} times already; build it anew with: "
            f"rag-jax corpus INPUT --out DIR --tokenizers-from {base.directory}"
        )
    dead = _deleted(base, delete)
    shared = {name: entry for name, entry in base.manifest["files"].items() if name != DELETED}
    with files.new_directory(out, KIND, overwrite) as directory:
        for name in shared:
            files.link(base.directory / name, directory / name)
        segment = {"directory": f"segments/{number:04d}" if add or replace else "", "n_passages": 0}
        found: dict[str, Any] = {"n_passages": 0, "n_cut": 0, "skipped": 0, "truncated": {}, "inputs": []}
        content: dict[str, str] = {}
        if add or replace:
            folder = directory / str(segment["directory"])
            folder.mkdir(parents=True)
            found = _write_segment(base, folder, add, replace, set(delete), dead)
            content = build.content_hashes(folder)
        if dead:
            np.save(directory / DELETED, np.array(sorted(dead), np.int64))
            content[DELETED] = files.file_sha256(directory / DELETED)
        segment |= {"n_passages": found["n_passages"]}
        segment["hash"] = files.canonical_sha256({"base": base.hash, **content})
        fields = _fields(base, segment, found, len(dead))
        files.write_manifest(directory, KIND, VERSION, fields, shared)


def _deleted(base: Corpus, delete: Sequence[str]) -> set[int]:
    """The deleted rows of the base and the rows of the ids to delete; InputError for an unknown id."""
    dead = set() if base.live_N is None else set(np.flatnonzero(~base.live_N).tolist())
    for passage_id in delete:
        rows = base.pieces(passage_id)
        if not rows:
            raise InputError(f"{base.directory}: passage {passage_id!r} is not in this corpus; take it from --delete")
        dead.update(rows)
    return dead


def _write_segment(
    base: Corpus,
    folder: Path,
    add: Sequence[str | Path],
    replace: Sequence[str | Path],
    deleted: set[str],
    dead: set[int],
) -> dict[str, Any]:
    """Writes the files of the new passages, and returns counts; adds the rows that they replace to `dead`."""
    sources = expand([*add, *replace])

    def check(batch: Sequence[Located], pieces: Sequence[Sequence[Passage]]) -> None:
        for located, cuts in zip(batch, pieces, strict=True):
            dead.update(_replaced(base, sources[located.source], located, cuts, deleted, len(add)))

    lengths = base.manifest["lengths"]
    options = build.BuildOptions(
        encoder_length=lengths["encoder"],
        generator_length=lengths["generator"],
        passage_words=base.manifest["passage_words"],
    )
    encoder, generator = base.encoder_tokenizer, base.generator_tokenizer
    counts = build.store(sources, folder, options, check)
    sample = islice(build.stored(folder), build.CHECK_SAMPLE)
    check_join(generator, [(passage.title, passage.text) for passage in sample])
    truncated = build.tokenise(folder, counts["n_passages"], encoder, generator, options)
    inputs = build.inputs_of(sources, counts["per_input"])
    return {**counts, "truncated": truncated, "inputs": inputs}


def _replaced(
    base: Corpus, source: InputFile, located: Located, cuts: Sequence[Passage], deleted: set[str], n_add: int
) -> list[int]:
    """Rows of the base that a new passage replaces; InputError where its id does not fit --add or --replace.

    n_add: inputs up to this number were given as --add, the others as --replace.
    """
    passage_id, place = located.passage.id, f"{source.path}:{located.line}"
    rows = base.pieces(passage_id)
    if passage_id in deleted:
        raise InputError(f"{place}: passage {passage_id!r} is in --delete, too; take it from there and use --replace")
    if source.input < n_add and rows:
        raise InputError(f"{place}: passage {passage_id!r} is in {base.directory} already; use --replace for it")
    if source.input >= n_add and not rows:
        raise InputError(f"{place}: passage {passage_id!r} is not in {base.directory}; use --add for it")
    if len(cuts) > 1:
        taken = base.rows([piece.id for piece in cuts], missing=-1)
        for piece, row in zip(cuts, taken.tolist(), strict=True):
            if row >= 0 and row not in rows:
                raise InputError(
                    f"{place}: is cut into passages, and {piece.id!r} is one of {base.directory} already; "
                    "give it another id"
                )
    return rows


def _fields(base: Corpus, segment: dict[str, Any], found: dict[str, Any], n_deleted: int) -> dict[str, Any]:
    """Fields of the new manifest: those of the base, with the counts and inputs of the new segment added."""
    old = {name: value for name, value in base.manifest.items() if name not in ("kind", "format_version", "files")}
    truncated = {role: count + found["truncated"].get(role, 0) for role, count in old["truncated"].items()}
    return {
        **old,
        **{name: old[name] + found[name] for name in ("n_passages", "n_cut", "skipped", "inputs")},
        "truncated": truncated,
        "hash": segment["hash"],
        "n_deleted": n_deleted,
        "segments": [*old["segments"], segment],
    }
