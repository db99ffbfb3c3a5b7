"""The corpus directory: passages in a random-access store, and the token table for encoder and generator.

manifest.json          counts, inputs and tokenizers with their hashes, lengths; written last
passages.jsonl         {"id", "title", "text", "document"} a line; offsets.npy uint64 [N+1]
encoder_ids.npy        [N, Le] [CLS] title [SEP] text [SEP], padded; encoder_length.npy [N]
generator_ids.npy      [N, Lg] `title / text` without specials, padded; generator_length.npy [N]
id_hashes.npy, id_rows.npy   row of an id; tokenizers/encoder, tokenizers/generator
"""

import argparse
import json
import mmap
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from rag_jax import files
from rag_jax.data import tokenizers
from rag_jax.data.formats import Passage
from rag_jax.data.joining import join, join_tail
from rag_jax.data.tokenizers import Tokenizer
from rag_jax.errors import InputError
from rag_jax.retrieval.ids import hash_ids, matches

__all__ = ["KIND", "VERSION", "Corpus", "build", "configure", "join", "join_tail", "run"]

KIND, VERSION = "corpus", 1


class Corpus:
    """An opened corpus directory. Nothing is read into memory but what is asked for."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory, self.manifest = directory, manifest
        self.hash: str = manifest["hash"]
        n = manifest["n_passages"]
        self._offsets = self._array("offsets.npy", (n + 1,))
        self.encoder_ids = self._array("encoder_ids.npy", (n, manifest["lengths"]["encoder"]))
        self.encoder_length = self._array("encoder_length.npy", (n,))
        self.generator_ids = self._array("generator_ids.npy", (n, manifest["lengths"]["generator"]))
        self.generator_length = self._array("generator_length.npy", (n,))
        with open(directory / "passages.jsonl", "rb") as stream:
            self._passages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

    @classmethod
    def open(cls, directory: str | Path, verify: bool = False) -> Self:
        """Opens a finished corpus; `verify` also hashes every file. InputError for anything else."""
        directory = Path(directory)
        return cls(directory, files.read_manifest(directory, KIND, VERSION, verify))

    def __len__(self) -> int:
        return self.manifest["n_passages"]

    def __getitem__(self, row: int) -> Passage:
        row = int(row)
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a corpus of {len(self)} passages")
        line = self._passages[int(self._offsets[row]) : int(self._offsets[row + 1])]
        return Passage(**json.loads(line))

    def row(self, passage_id: str) -> int:
        """Row of a passage id; InputError if there is none."""
        return int(self.rows([passage_id])[0])

    def rows(self, passage_ids: Sequence[str], missing: int | None = None) -> np.ndarray:
        """Rows [n] int64 of ids; an unknown one gives `missing`, or raises InputError where that is None."""
        rows = np.full(len(passage_ids), -1, np.int64)
        for position, row in self._candidates(passage_ids):
            if self[row].id == passage_ids[position]:
                rows[position] = row
        unknown = np.flatnonzero(rows < 0)
        if len(unknown) and missing is None:
            passage_id = passage_ids[unknown[0]]
            cut = self.pieces(passage_id)
            why = f"was cut into {len(cut)} passages ({passage_id}-0 ...)" if cut else "is not in this corpus"
            raise InputError(f"{self.directory}: passage {passage_id!r} {why}")
        if missing is not None:
            rows[unknown] = missing
        return rows

    def pieces(self, passage_id: str) -> list[int]:
        """Rows of a passage, or of all it was cut into at build; empty if it is unknown."""
        for _, row in self._candidates([passage_id]):
            if self[row].id == passage_id:
                return [row]
            if self[row].id == f"{passage_id}-0":
                last = row + 1
                while last < len(self) and self[last].id == f"{passage_id}-{last - row}":
                    last += 1
                return list(range(row, last))
        return []

    @cached_property
    def encoder_tokenizer(self) -> Tokenizer:
        return self._tokenizer("encoder")

    @cached_property
    def generator_tokenizer(self) -> Tokenizer:
        return self._tokenizer("generator")

    @cached_property
    def _id_table(self) -> tuple[np.ndarray, np.ndarray]:
        return self._array("id_hashes.npy"), self._array("id_rows.npy")

    def _candidates(self, passage_ids: Sequence[str]) -> list[tuple[int, int]]:
        hashes, rows = self._id_table
        return [(position, int(rows[place])) for position, place in matches(hashes, hash_ids(passage_ids))]

    def _tokenizer(self, role: str) -> Tokenizer:
        tokenizer = tokenizers.load(self.directory / "tokenizers" / role)
        expected = self.manifest["tokenizers"][role]["hash"]
        if tokenizer.hash != expected:
            raise InputError(
                f"{self.directory}: the {role} tokenizer has hash {tokenizer.hash[:12]}, "
                f"the manifest says {expected[:12]}; build the corpus again"
            )
        return tokenizer

    def _array(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        path = self.directory / name
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: unreadable ({error}); build the corpus again") from error
        if shape is not None and array.shape != shape:
            raise InputError(f"{path}: shape {array.shape}, the manifest says {shape}; build the corpus again")
        return array


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
    from rag_jax.retrieval import corpus_build  # reading needs nothing of it

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


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `rag-jax corpus`."""
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="JSONL or TSV (also .gz, part sets), or text folder")
    parser.add_argument("--out", required=True, help="corpus directory to make")
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
    parser.epilog = (
        "examples:\n"
        "  rag-jax corpus passages.jsonl --out corpora/mine --train-tokenizer\n"
        "  rag-jax corpus psgs_w100.tsv.gz --out corpora/wiki --encoder-tokenizer DIR --generator-tokenizer DIR\n"
        "  rag-jax corpus edited.jsonl --out corpora/edited --tokenizers-from corpora/mine"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Builds the corpus and says what it holds."""
    started = time.monotonic()
    corpus = build(
        args.inputs,
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
