"""The corpus directory: passages in a random-access store, and the token table for encoder and generator.

manifest.json          counts, inputs and tokenizers with their hashes, lengths, segments; written last
passages.jsonl         {"id", "title", "text", "document"} a line; offsets.npy uint64 [N+1]
encoder_ids.npy        [N, Le] [CLS] title [SEP] text [SEP], padded; encoder_length.npy [N]
generator_ids.npy      [N, Lg] `title / text` without specials, padded; generator_length.npy [N]
id_hashes.npy, id_rows.npy   row of an id; tokenizers/encoder, tokenizers/generator
segments/0001/         the same files for the passages of an update; deleted.npy int64, rows that are no longer there

An update makes a new directory, which shares the files of the one before. Rows keep their numbers.
"""

import argparse
import copy
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from rag_jax.corpus.segment import AGAIN, Segment
from rag_jax.corpus.stacked_arrays import Part, stack
from rag_jax.corpus.verified_arrays import open_npy
from rag_jax.data import tokenizers
from rag_jax.data.joining import join, join_tail
from rag_jax.data.readers.formats import FORMATS, Passage, named
from rag_jax.data.tokenizers import Tokenizer, Wrapping
from rag_jax.errors import InputError
from rag_jax.system import files
from rag_jax.system.block_checksums import Entry

__all__ = ["DELETED", "KIND", "VERSION", "Corpus", "build", "configure", "join", "join_tail", "run", "update"]

KIND, VERSION, OLDEST = "corpus", 3, 2  # version 2 has no checksums by block
DELETED = "deleted.npy"


class Corpus:
    """An opened corpus directory. Nothing is read into memory but what is asked for.

    len, rows and iteration count deleted passages, too, so that embeddings stay where they are; `live_N` tells them
    apart, and no id leads to one. chain: (hash, number of rows) of the corpus as it was built and after each update.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory, self.manifest = directory, manifest
        self.hash: str = manifest["hash"]
        ends = np.cumsum([entry["n_passages"] for entry in manifest["segments"]]).tolist()
        self.chain = [(entry["hash"], end) for entry, end in zip(manifest["segments"], ends, strict=True)]
        self.segments = [
            Segment(directory / entry["directory"], end - entry["n_passages"], entry["n_passages"], self._files(entry))
            for entry, end in zip(manifest["segments"], ends, strict=True)
            if entry["n_passages"]
        ]
        # array-like, see stacked.Rows
        self.encoder_ids = self._table("encoder_ids.npy", manifest["dtype"]["encoder"], manifest["lengths"]["encoder"])
        self.encoder_length = self._table("encoder_length.npy", "<u2")
        self.generator_ids = self._table(
            "generator_ids.npy", manifest["dtype"]["generator"], manifest["lengths"]["generator"]
        )
        self.generator_length = self._table("generator_length.npy", "<u2")

    @classmethod
    def open(cls, directory: str | Path) -> Self:
        """Opens a finished corpus. InputError for anything else, and later, where something is read, for damage."""
        directory = Path(directory)
        manifest = files.read_manifest(directory, KIND, VERSION, OLDEST)
        with files.described(directory / files.MANIFEST, AGAIN):
            whole = cls(directory, manifest)
            n, ends = manifest["n_passages"], [0, *(end for _, end in whole.chain)]
            if not isinstance(whole.hash, str) or type(n) is not int or n != ends[-1] or not ends == sorted(ends):
                raise ValueError(f"hash {whole.hash!r}, {n!r} passages in segments up to {ends}")
            _ = manifest["tokenizers"]["encoder"]["hash"], manifest["tokenizers"]["generator"]["hash"]
            return whole

    def __len__(self) -> int:
        return self.manifest["n_passages"]

    def __getitem__(self, row: int) -> Passage:
        row = int(row)
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a corpus of {len(self)} passages")
        segment = self.segments[bisect_right(self.segments, row, key=lambda segment: segment.first) - 1]
        return segment.passage(row - segment.first)

    @cached_property
    def live_N(self) -> np.ndarray | None:
        """False for the rows that were deleted or replaced; None where there are none."""
        if not self.manifest["n_deleted"]:
            return None
        live_N = np.ones(len(self), bool)
        path = self.directory / DELETED
        rows = open_npy(path, self.manifest["files"].get(DELETED, {}), AGAIN, "<i8").whole()
        if len(rows) != self.manifest["n_deleted"] or rows.min() < 0 or rows.max() >= len(self):
            raise InputError(f"{path}: damaged: not {self.manifest['n_deleted']} rows of {len(self)}; {AGAIN}")
        live_N[rows] = False
        return live_N

    @property
    def n_live(self) -> int:
        """Passages that are there."""
        return len(self) - self.manifest["n_deleted"]

    @property
    def n_cut(self) -> int:
        """Documents that were cut into passages when they were read."""
        return self.manifest["n_cut"]

    def shared_rows(self, other: "Corpus") -> int:
        """How many first rows are the same in both, because they come from the same builds and updates."""
        known = set(other.chain)
        return max((rows for digest, rows in self.chain if (digest, rows) in known), default=0)

    def is_update_of(self, corpus_hash: str, rows: int) -> bool:
        """Whether this is the corpus with that hash and number of rows, or was made of it by updates."""
        return (corpus_hash, rows) in self.chain

    def hold(self) -> None:
        """Opens every file now: the corpus stays readable when another directory takes its place."""
        first_S = np.array([segment.first for segment in self.segments], np.int64)
        for table in (self.encoder_ids, self.encoder_length, self.generator_ids, self.generator_length):
            table[first_S]
        for segment in self.segments:
            segment.hold()
        _ = self.live_N, self.encoder_tokenizer, self.generator_tokenizer

    def row(self, passage_id: str) -> int:
        """Row of a passage id; InputError if there is none."""
        return int(self.rows([passage_id])[0])

    def rows(self, passage_ids: Sequence[str], missing: int | None = None) -> np.ndarray:
        """Rows [n] int64 of ids; an unknown one gives `missing`, or raises InputError where that is None."""
        rows = np.full(len(passage_ids), -1, np.int64)
        for position, row in self._candidates(passage_ids):
            if self._live(row) and self[row].id == passage_ids[position]:
                rows[position] = row
        unknown = np.flatnonzero(rows < 0)
        if len(unknown) and missing is None:
            passage_id = passage_ids[unknown[0]]
            cut = self.pieces(passage_id)
            why = f"was cut into {len(cut)} passages ({self[cut[0]].id} ...)" if cut else "is not in this corpus"
            raise InputError(f"{self.directory}: passage {passage_id!r} {why}")
        if missing is not None:
            rows[unknown] = missing
        return rows

    def pieces(self, passage_id: str) -> list[int]:
        """Rows of a passage, or of all it was cut into at build; empty if it is unknown."""
        rows = [row for _, row in self._candidates([passage_id])]
        for row in rows:
            whole = range(row, row + 1) if self[row].id == passage_id else self._cut(passage_id, row, rows)
            if live := [piece for piece in whole if self._live(piece)]:
                return live
        return []

    def cut_from(self, row: int) -> str | None:
        """The id of the document that the passage at a row was cut from at build; None where it stands as it was given.

        An id such as d1-0 alone does not tell: a file may have passages of such ids.
        """
        document, dash, number = self[row].id.rpartition("-")
        if not self.n_cut or not dash or not number.isdecimal():
            return None
        rows = [first for _, first in self._candidates([document])]
        return document if any(row in self._cut(document, first, rows) for first in rows) else None

    def deleted(self, passage_id: str) -> bool:
        """Whether there was a passage, or a document, of this id that is no longer there."""
        names = (passage_id, f"{passage_id}-0")
        was = any(self[row].id in names for _, row in self._candidates([passage_id]))
        return was and not self.pieces(passage_id)

    @cached_property
    def encoder_tokenizer(self) -> Tokenizer:
        return self._tokenizer("encoder")

    @cached_property
    def generator_tokenizer(self) -> Tokenizer:
        return self._tokenizer("generator")

    def _cut(self, document: str, first: int, found: Sequence[int]) -> range:
        """The rows that a document was cut into, if its first piece is at row `first`; found: all rows of its id."""
        if self[first].id != f"{document}-0":
            return range(0)
        last = max((row for row in found if row > first and self[row].id == f"{document}-{row - first}"), default=None)
        if last is None:  # built before the last piece was noted: pieces have ids that count on, of one document
            last = first
            while last + 1 < len(self) and self[last + 1].id == f"{document}-{last + 1 - first}":
                if self[last + 1].document != self[first].document:
                    break
                last += 1
            return range(first, last + 1) if last > first else range(0)
        return range(first, last + 1)

    def with_labels(self, wrapping: Wrapping) -> Self:
        """The same corpus, whose generator tokenizer wraps labels so; what is open is shared."""
        other = copy.copy(self)
        other.__dict__["generator_tokenizer"] = replace(self.generator_tokenizer, wrapping=wrapping)
        return other

    def _live(self, row: int) -> bool:
        return self.live_N is None or bool(self.live_N[row])

    def _candidates(self, passage_ids: Sequence[str]) -> list[tuple[int, int]]:
        return [
            (position, segment.first + row)
            for segment in self.segments
            for position, row in segment.candidates(passage_ids)
        ]

    def _files(self, segment: dict[str, Any]) -> dict[str, Entry]:
        """Entries of the files of a segment, without its directory."""
        prefix = f"{segment['directory']}/" if segment["directory"] else ""
        known = self.manifest["files"].items()
        return {name.removeprefix(prefix): entry for name, entry in known if name.startswith(prefix)}

    def _tokenizer(self, role: str) -> Tokenizer:
        tokenizer = tokenizers.load(self.directory / "tokenizers" / role)
        expected = self.manifest["tokenizers"][role]["hash"]
        if tokenizer.hash != expected:
            raise InputError(
                f"{self.directory}: the {role} tokenizer has hash {tokenizer.hash[:12]}, "
                f"the manifest says {expected[:12]}; build the corpus again"
            )
        return tokenizer

    def _table(self, name: str, dtype: str, *columns: int) -> Any:
        kind = np.dtype(dtype).newbyteorder("<")
        parts = [Part(s.rows, partial(s.array, name, kind, (s.rows, *columns))) for s in self.segments]
        return stack(parts, kind, columns)


def build(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    encoder_tokenizer: Tokenizer | str | Path | None = None,
    generator_tokenizer: Tokenizer | str | Path | None = None,
    tokenizers_from: str | Path | None = None,
    train_tokenizer: tuple[int, int] | None = None,
    encoder_length: int | None = None,
    generator_length: int | None = None,
    passage_words: int = 100,
    skip_bad_lines: bool = False,
    workers: int = 0,
    overwrite: bool = False,
) -> Corpus:
    """Makes the directory `out`, whole or not at all, and opens it.

    Tokenizers: given (objects, directories or hub names), those of another corpus, or trained on this one with
    `train_tokenizer` = sizes of the (encoder's, generator's) vocabulary. Lengths default to 160, or the other corpus'.
    """
    from rag_jax.corpus import build as corpus_build  # reading needs nothing of it

    options = corpus_build.Options(
        encoder_tokenizer=encoder_tokenizer,
        generator_tokenizer=generator_tokenizer,
        tokenizers_from=tokenizers_from,
        train_tokenizer=train_tokenizer,
        encoder_length=encoder_length,
        generator_length=generator_length,
        passage_words=passage_words,
        skip_bad_lines=skip_bad_lines,
        workers=workers,
        overwrite=overwrite,
    )
    corpus_build.write(inputs, out, options)
    return Corpus.open(out)


def update(
    base: str | Path,
    out: str | Path,
    *,
    add: Sequence[str | Path] = (),
    replace: Sequence[str | Path] = (),
    delete: Sequence[str] = (),
    overwrite: bool = False,
) -> Corpus:
    """Makes the corpus `out` of `base` with passages added, replaced and deleted, and opens it; `base` stays as it is.

    add, replace: inputs as for `build`, of ids that are new, and that are there. delete: ids of passages, or of
    documents, whose pieces all go. InputError names the id that is not as it should be.
    """
    from rag_jax.corpus import update as corpus_update

    corpus_update.write(Corpus.open(base), out, add, replace, delete, overwrite)
    return Corpus.open(out)


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `rag-jax corpus`."""
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="passages: a file (also .gz), part set or folder, perhaps FORMAT:PATH",
    )
    parser.add_argument(
        "--format", choices=FORMATS, default="", help="what the inputs are (default: as their content tells)"
    )
    parser.add_argument("--out", required=True, type=Path, help="corpus directory to make")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus that is already there")
    parser.add_argument("--train-tokenizer", action="store_true", help="train the tokenizers not given on this corpus")
    parser.add_argument("--encoder-vocab", type=int, default=4096, help="size of a trained one (default %(default)s)")
    parser.add_argument("--generator-vocab", type=int, default=4096, help="size of a trained one (default %(default)s)")
    parser.add_argument("--encoder-tokenizer", metavar="NAME", help="Hugging Face fast tokenizer: directory or name")
    parser.add_argument("--generator-tokenizer", metavar="NAME", help="likewise for the generator")
    parser.add_argument("--tokenizers-from", metavar="CORPUS", help="both tokenizers and the lengths of another corpus")
    parser.add_argument("--encoder-length", type=int, help="tokens kept per passage for the encoder (default 160)")
    parser.add_argument("--generator-length", type=int, help="tokens kept per passage for the generator (default 160)")
    parser.add_argument(
        "--passage-words", type=int, default=100, help="documents of over twice as many are cut; 0: never (default 100)"
    )
    parser.add_argument("--skip-bad-lines", action="store_true", help="count and report bad lines instead of stopping")
    parser.add_argument("--workers", type=int, default=0, help="threads for tokenising (default: all cores)")
    change = parser.add_argument_group("another corpus with changes (its files are shared, rows keep their numbers)")
    change.add_argument("--update", type=Path, metavar="CORPUS", help="the corpus to begin with; it is left as it is")
    change.add_argument("--add", nargs="+", default=[], metavar="INPUT", help="passages with new ids")
    change.add_argument("--replace", nargs="+", default=[], metavar="INPUT", help="passages for ids that are there")
    change.add_argument("--delete", nargs="+", default=[], metavar="ID|@FILE", help="ids, or files of one id a line")
    parser.epilog = (
        "examples:\n"
        "  rag-jax corpus passages.jsonl --out corpora/mine --train-tokenizer\n"
        "  rag-jax corpus psgs_w100.tsv.gz --out corpora/wiki --encoder-tokenizer DIR --generator-tokenizer DIR\n"
        "  rag-jax corpus nq-train.json dpr:nq-dev.json --out corpora/nq --train-tokenizer\n"
        "  rag-jax corpus edited.jsonl --out corpora/edited --tokenizers-from corpora/mine\n"
        "  rag-jax corpus --update corpora/mine --add new.jsonl --delete p7 @gone.txt --out corpora/monday"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Builds or updates the corpus and says what it holds."""
    started = time.monotonic()
    changes = {name: named(getattr(args, name), args.format) for name in ("add", "replace")} | {"delete": args.delete}
    if args.update is not None:
        if args.inputs:
            raise InputError(f"{args.inputs[0]}: with --update, passages are named by --add or --replace")
        changes["delete"] = read_ids(args.delete)
        corpus = update(args.update, args.out, **changes, overwrite=args.overwrite)
        counts = {name: corpus.manifest[name] for name in ("n_passages", "n_deleted")}
        seconds = round(time.monotonic() - started, 2)
        return {"out": str(args.out), **counts, "hash": corpus.hash, "seconds": seconds}
    wrong = [f"--{name}" for name, value in changes.items() if value]
    if wrong or not args.inputs:
        raise InputError(f"{wrong[0]} goes with --update CORPUS" if wrong else "no INPUT; name passages, or --update")
    corpus = build(
        named(args.inputs, args.format),
        args.out,
        encoder_tokenizer=args.encoder_tokenizer,
        generator_tokenizer=args.generator_tokenizer,
        tokenizers_from=args.tokenizers_from,
        train_tokenizer=(args.encoder_vocab, args.generator_vocab) if args.train_tokenizer else None,
        encoder_length=args.encoder_length,
        generator_length=args.generator_length,
        passage_words=args.passage_words,
        skip_bad_lines=args.skip_bad_lines,
        workers=args.workers,
        overwrite=args.overwrite,
    )
    seconds = time.monotonic() - started
    counts = {name: corpus.manifest[name] for name in ("n_passages", "n_cut", "skipped", "truncated")}
    vocabs = {f"{role}_vocab": about["vocab_size"] for role, about in corpus.manifest["tokenizers"].items()}
    times = {"seconds": round(seconds, 2), "passages_per_second": round(len(corpus) / seconds, 1)}
    return {"out": str(args.out), **counts, **vocabs, "hash": corpus.hash, **times}


def read_ids(words: Sequence[str]) -> list[str]:
    """Ids as given; @FILE stands for those in a file, one a line."""
    ids: list[str] = []
    for word in words:
        if not word.startswith("@"):
            ids.append(word)
            continue
        try:
            lines = Path(word[1:]).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{word[1:]}: unreadable ({error}); --delete @FILE wants one id a line") from error
        ids += [line.strip() for line in lines if line.strip()]
    return ids
