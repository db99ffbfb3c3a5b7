"""Builds a corpus: pass 1 stores texts and ids, pass 2 tokenises them; the texts are never all in memory.

Two passes, because tokenizers may be trained on the stored texts, and because the size of the token tables, which are
written row by row, is known only when all passages have been read.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rag_jax.corpus.directory import KIND, OLDEST, VERSION, Corpus
from rag_jax.corpus.passage_store import PassageStore
from rag_jax.corpus.segment import TABLES
from rag_jax.data import tokenizers
from rag_jax.data.cutting import cut
from rag_jax.data.joining import check_join, normalize_title, passage_text
from rag_jax.data.readers.formats import InputFile, Located, Passage, digest, expand, read_located
from rag_jax.data.tokenizers import Tokenizer, pad_rows
from rag_jax.errors import InputError
from rag_jax.system import files, logs

T = TypeVar("T")
INPUTS = "inputs.json"  # beside the tokenizers of a model: the passage length that its encoder was trained with
CHUNK = 2048  # passages read, or tokenised, at a time
TRAIN_SAMPLE = 100_000  # passages that a tokenizer is trained on
CHECK_SAMPLE = 256  # passages for which the joining of ids is checked
SHOWN_BAD_LINES = 20
Check = Callable[[Sequence[Located], Sequence[Sequence[Passage]]], None]  # passages, and the pieces each was cut into


@dataclass(frozen=True)
class BuildOptions:
    """How to build a corpus. Each role needs a tokenizer: passed in, of another corpus or model, or trained.

    encoder_tokenizer, generator_tokenizer: an object, a directory or the name of one on the hub.
    tokenizers_from: a corpus, a model or a directory whose two tokenizers and lengths are taken.
    train_tokenizer: vocabulary sizes (encoder, generator) of tokenizers trained on this corpus.
    encoder_length, generator_length: tokens of a passage; None: those of `tokenizers_from`, else 160.
    passage_words: words of the passages that longer documents are cut into; 0: never cut.
    skip_bad_lines: report unreadable lines and repeated ids, and go on.
    workers: threads of the tokenizers; 0: all cores.
    overwrite: replace a corpus that is there.
    """

    encoder_tokenizer: Tokenizer | str | Path | None = None
    generator_tokenizer: Tokenizer | str | Path | None = None
    tokenizers_from: str | Path | None = None
    train_tokenizer: tuple[int, int] | None = None
    encoder_length: int | None = None
    generator_length: int | None = None
    passage_words: int = 100
    skip_bad_lines: bool = False
    workers: int = 0
    overwrite: bool = False


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
    """Builds the corpus directory `out`, whole or not at all, and opens it.

    inputs: files or data sets of passages, as `rag-jax corpus` takes them. The other arguments: see `BuildOptions`.
    """
    options = BuildOptions(
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
    write(inputs, out, options)
    return Corpus.open(out)


def write(inputs: Sequence[str | Path], out: str | Path, options: BuildOptions) -> None:
    """Builds the corpus directory `out`, whole or not at all."""
    if options.workers > 0:
        os.environ["RAYON_NUM_THREADS"] = str(options.workers)  # only read before the first tokenising of a process
    sources = expand(inputs)
    options, given = _given(options)
    with files.new_directory(out, KIND, options.overwrite) as directory:
        counts = store(sources, directory, options)
        both = {role: given[role] or _train(role, directory, options) for role in given}
        check_join(both["generator"], [(p.title, p.text) for p in islice(stored(directory), CHECK_SAMPLE)])
        for role, tokenizer in both.items():
            tokenizer.save(directory / "tokenizers" / role)
        truncated = tokenise(directory, counts["n_passages"], both["encoder"], both["generator"], options)
        _finish(directory, sources, counts, truncated, both, options)


def _given(options: BuildOptions) -> tuple[BuildOptions, dict[str, Tokenizer | None]]:
    """Checked options with lengths filled in, and the tokenizer of each role; None for one that is to be trained."""
    named = {"encoder": options.encoder_tokenizer, "generator": options.generator_tokenizer}
    lengths = {"encoder": 160, "generator": 160}
    if options.tokenizers_from is not None:
        if any(named.values()) or options.train_tokenizer:
            raise InputError("--tokenizers-from names both tokenizers: leave out the other tokenizer options")
        other = Path(options.tokenizers_from)
        if files.kind_of(other) == KIND or not other.is_dir():
            lengths = files.read_manifest(other, KIND, VERSION, OLDEST)["lengths"]
        folder = other / "tokenizers" if (other / "tokenizers").is_dir() else other
        if (folder / INPUTS).is_file():
            lengths["encoder"] = _made_for(folder / INPUTS)
        named = {role: folder / role for role in named}
    untold = [role for role, tokenizer in named.items() if tokenizer is None]
    if untold and not options.train_tokenizer:
        wanted = " and ".join(f"--{role}-tokenizer" for role in untold)
        raise InputError(f"no tokenizer: pass {wanted}, or --train-tokenizer, or --tokenizers-from CORPUS")
    lengths |= {"encoder": options.encoder_length} if options.encoder_length is not None else {}
    lengths |= {"generator": options.generator_length} if options.generator_length is not None else {}
    for role, length in lengths.items():
        if not 8 <= length < 2**16:
            raise InputError(f"--{role}-length {length}: a number from 8 to 65535 is needed")
    for role, size in zip(named, options.train_tokenizer or (), strict=False):
        if size < 300:
            raise InputError(f"--{role}-vocab {size}: at least 300 are needed (256 bytes or the letters come first)")
    if options.passage_words < 0 or 0 < options.passage_words < 10:
        raise InputError(f"--passage-words {options.passage_words}: 0 (never cut) or at least 10 is needed")
    opened = {
        role: tokenizers.load(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
        for role, tokenizer in named.items()
    }
    return replace(options, encoder_length=lengths["encoder"], generator_length=lengths["generator"]), opened


def _made_for(path: Path) -> int:
    """The passage length in the INPUTS file of a model, in tokens."""
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["encoder_length"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: does not say encoder_length ({error!r}); convert the model again") from error


def _normalised(passage: Passage) -> Passage:
    return replace(passage, title=normalize_title(passage.title), text=passage.text.strip())


def store(
    sources: Sequence[InputFile], directory: Path, options: BuildOptions, check: Check | None = None
) -> dict[str, Any]:
    """Pass 1: writes texts and ids of the sources into a directory, and returns counts.

    check: called with each batch of passages before it is stored; raises to refuse one.
    """
    skipped = 0

    def on_bad(message: str) -> None:
        nonlocal skipped
        skipped += 1
        if skipped <= SHOWN_BAD_LINES:
            logs.info(message)

    n_cut = 0
    located = read_located(sources, skip_bad_lines=options.skip_bad_lines, on_bad=on_bad)
    with PassageStore(directory, sources) as passages, logs.Progress(None, "reading", unit="passages") as progress:
        for batch in _chunks(located, CHUNK):
            pieces = [cut(_normalised(item.passage), options.passage_words) for item in batch]
            if check is not None:
                check(batch, pieces)
            repeated = _repeated(passages, batch, pieces)
            for position, first in sorted(repeated.items()):
                item = batch[position]
                message = f"{sources[item.source].path}:{item.line}: duplicate id {item.passage.id!r}, first at {first}"
                if not options.skip_bad_lines:
                    raise InputError(f"{message}; make ids unique or pass --skip-bad-lines to keep the first")
                on_bad(f"skipped {message}")
            keep = [i for i in range(len(batch)) if i not in repeated]
            kept, pieces = [batch[i] for i in keep], [pieces[i] for i in keep]
            if kept:
                passages.add(kept, pieces)
            n_cut += sum(len(cuts) > 1 for cuts in pieces)
            progress.update(sum(map(len, pieces)))
        if not passages.count:
            raise InputError(f"{sources[0].path}: no passages left in the inputs")
    if skipped:
        logs.info(f"skipped {skipped:,} bad lines in all")
    return {"n_passages": passages.count, "n_cut": n_cut, "skipped": skipped, "per_input": passages.per_input}


def _repeated(store: PassageStore, batch: list[Located], pieces: Sequence[Sequence[Passage]]) -> dict[int, str]:
    """Positions in the batch whose id, or an id of whose pieces, is taken -> where that id occurs first."""
    entries, owner = [], []
    for position, (item, cuts) in enumerate(zip(batch, pieces, strict=True)):
        for passage in [item.passage, *cuts] if len(cuts) > 1 else [item.passage]:
            entries.append(item._replace(passage=passage))
            owner.append(position)
    return {owner[i]: place for i, place in store.duplicates(entries).items()}


def stored(directory: Path, rows: Iterable[int] | None = None) -> Iterator[Passage]:
    """The stored passages of a directory, in order; rows: only these, ascending."""
    wanted = None if rows is None else iter(rows)
    following = None if wanted is None else next(wanted, -1)
    with (directory / "passages.jsonl").open("rb") as stream:
        for row, line in enumerate(stream):
            if following is None or row == following:
                yield Passage(**json.loads(line))
                following = None if wanted is None else next(wanted, -1)


def _train(role: str, directory: Path, options: BuildOptions) -> Tokenizer:
    """A tokenizer trained on the stored passages; on evenly spaced ones where there are more than TRAIN_SAMPLE."""
    assert options.train_tokenizer is not None
    n = len(np.load(directory / "offsets.npy", mmap_mode="r")) - 1
    rows = None if n <= TRAIN_SAMPLE else (i * n // TRAIN_SAMPLE for i in range(TRAIN_SAMPLE))
    texts = (passage_text(p.title, p.text) for p in stored(directory, rows))
    logs.info(f"training the {role} tokenizer on {min(n, TRAIN_SAMPLE):,} passages")
    encoder_vocab, generator_vocab = options.train_tokenizer
    if role == "encoder":
        return tokenizers.train_wordpiece(texts, encoder_vocab)
    return tokenizers.train_bpe(texts, generator_vocab)


class _Table:
    """Writer of a token table, two .npy files that grow block by block: ids [N, L] and lengths uint16 [N]."""

    def __init__(self, directory: Path, role: str, n: int, length: int, tokenizer: Tokenizer) -> None:
        self.length, self.pad_id, self.truncated = length, tokenizer.pad_id, 0
        self.dtype = id_dtype(tokenizer.vocab_size)
        self.ids = self._open(directory / f"{role}_ids.npy", self.dtype, (n, length))
        self.lengths = self._open(directory / f"{role}_length.npy", np.dtype("<u2"), (n,))

    def write(self, rows: Sequence[Sequence[int]], full_lengths: Sequence[int]) -> None:
        ids_NL, length_N = pad_rows(rows, self.length, self.pad_id, self.dtype)
        self.ids.write(ids_NL.tobytes())
        self.lengths.write(length_N.astype("<u2").tobytes())
        self.truncated += sum(full > self.length for full in full_lengths)

    def close(self) -> None:
        self.ids.close()
        self.lengths.close()

    @staticmethod
    def _open(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> Any:
        stream = path.open("wb")
        fields = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, fields)
        return stream


def id_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned integer type that holds every id below `vocab_size`."""
    return np.min_scalar_type(vocab_size - 1).newbyteorder("<")


def encoder_rows(tokenizer: Tokenizer, passages: Sequence[Passage], length: int) -> tuple[list[list[int]], list[int]]:
    """Encoder inputs [CLS] title [SEP] text [SEP] (without a title: [CLS] text [SEP]), and their lengths when uncut.

    length: most tokens of a row. The closing tokens are never cut off; where the whole does not fit, the title gets at
    most half of the room, or more if the text is short.
    """
    prefix, middle, suffix = map(list, (tokenizer.prefix_ids, tokenizer.middle_ids, tokenizer.suffix_ids))
    rows, full_lengths = [], []
    titles = tokenizer.encode_batch([passage.title for passage in passages])
    texts = tokenizer.encode_batch([passage.text for passage in passages])
    for title, text in zip(titles, texts, strict=True):
        between = middle if title else []
        room = length - len(prefix) - len(between) - len(suffix)
        full_lengths.append(len(title) + len(text) + length - room)
        if len(title) + len(text) > room:
            title = title[: max(room // 2, room - len(text))]
        rows.append([*prefix, *title, *between, *text[: room - len(title)], *suffix])
    return rows, full_lengths


def tokenise(
    directory: Path, n: int, encoder: Tokenizer, generator: Tokenizer, options: BuildOptions
) -> dict[str, int]:
    """Pass 2: writes both token tables, and returns how many passages each of them cuts.

    One thread fills each table, so that one packs rows while the other tokenises on all cores.
    """
    assert options.encoder_length is not None and options.generator_length is not None
    encoder_table = _Table(directory, "encoder", n, options.encoder_length, encoder)
    generator_table = _Table(directory, "generator", n, options.generator_length, generator)

    def encode(passages: Sequence[Passage]) -> None:
        encoder_table.write(*encoder_rows(encoder, passages, encoder_table.length))

    def generate(passages: Sequence[Passage]) -> None:
        rows = generator.encode_batch([passage_text(passage.title, passage.text) for passage in passages])
        generator_table.write(rows, [len(row) for row in rows])

    waiting: list[Future[None]] = []
    with ThreadPoolExecutor(2) as pool, logs.Progress(n, "tokenising", unit="passages") as progress:
        done = 0
        for chunk in _chunks(stored(directory), CHUNK):
            for future in waiting:  # a chunk at a time: rows stay in order, and few texts are in memory
                future.result()
            progress.update(done)
            waiting, done = [pool.submit(encode, chunk), pool.submit(generate, chunk)], len(chunk)
        for future in waiting:
            future.result()
        progress.update(done)
    encoder_table.close()
    generator_table.close()
    return {"encoder": encoder_table.truncated, "generator": generator_table.truncated}


def _finish(
    directory: Path,
    sources: Sequence[InputFile],
    counts: dict[str, Any],
    truncated: dict[str, int],
    both: dict[str, Tokenizer],
    options: BuildOptions,
) -> None:
    """Writes the manifest; the hash of the corpus covers texts, token tables and tokenizers."""
    content = content_hashes(directory) | {role: tokenizer.hash for role, tokenizer in both.items()}
    corpus_hash = files.canonical_sha256(content)
    fields = {
        "n_passages": counts["n_passages"],
        "n_cut": counts["n_cut"],
        "skipped": counts["skipped"],
        "truncated": truncated,
        "hash": corpus_hash,
        "n_deleted": 0,
        "segments": [{"directory": "", "n_passages": counts["n_passages"], "hash": corpus_hash}],
        "inputs": inputs_of(sources, counts["per_input"]),
        "tokenizers": {role: {"hash": t.hash, "vocab_size": t.vocab_size} for role, t in both.items()},
        "lengths": {"encoder": options.encoder_length, "generator": options.generator_length},
        "dtype": {role: id_dtype(tokenizer.vocab_size).name for role, tokenizer in both.items()},
        "passage_words": options.passage_words,
    }
    files.write_manifest(directory, KIND, VERSION, fields)


def content_hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of the texts and token tables of a segment, by file name; the hash of a corpus is made from them."""
    return {name: files.file_sha256(directory / name) for name in ("passages.jsonl", *TABLES)}


def inputs_of(sources: Sequence[InputFile], passages: Sequence[int]) -> list[dict[str, Any]]:
    """Name, number of files, hash and number of passages of each input as the user named it, for the manifest.

    The hash of an input of several files is that of their names and hashes.
    """
    inputs = []
    for number, count in enumerate(passages):
        ours = [source for source in sources if source.input == number]
        hashes = [(source.name, digest(source)) for source in ours]
        name = ours[0].name if len(ours) == 1 else f"{ours[0].name} ... {ours[-1].name}"
        of_all = hashes[0][1] if len(hashes) == 1 else files.canonical_sha256(hashes)
        inputs.append({"name": name, "files": len(ours), "sha256": of_all, "passages": count})
    return inputs


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
