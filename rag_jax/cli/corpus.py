"""`rag-jax corpus`: passages, read and tokenised once, as a corpus directory; or another corpus with changes."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rag_jax.corpus.build import build
from rag_jax.corpus.directory import Corpus
from rag_jax.corpus.update import update
from rag_jax.data.readers.formats import FORMATS, named
from rag_jax.errors import InputError


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `rag-jax corpus`."""
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
    """Builds or updates a corpus, and returns its counts and hash."""
    started = time.monotonic()
    changes = {name: named(getattr(args, name), args.format) for name in ("add", "replace")} | {"delete": args.delete}
    if args.update is not None:
        if args.inputs:
            raise InputError(f"{args.inputs[0]}: with --update, passages are named by --add or --replace")
        changes["delete"] = read_ids(args.delete)
        corpus = update(args.update, args.out, **changes, overwrite=args.overwrite)
        counts = {name: corpus.manifest[name] for name in ("n_passages", "n_deleted")}
        seconds = round(time.monotonic() - started, 2)
        said = f"{args.out}: {corpus.n_live:,} passages, {counts['n_deleted']:,} deleted, in {seconds} s"
        return {"text": said, "out": str(args.out), **counts, "hash": corpus.hash, "seconds": seconds}
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
    result = {"out": str(args.out), **counts, **vocabs, "hash": corpus.hash, **times}
    return {"text": text(result, corpus), **result}


def text(result: dict[str, Any], corpus: Corpus) -> str:
    """The printed summary: passages, cuts and bad lines, and a hint at the next command."""
    lines = [f"{result['out']}: {result['n_passages']:,} passages in {result['seconds']:,.1f} s"]
    for role, length in (("encoder", corpus.encoder_ids.shape[1]), ("generator", corpus.generator_ids.shape[1])):
        cut = result["truncated"][role]
        said = f"{cut:,} cut to {length} tokens" if cut else f"none longer than {length} tokens"
        lines.append(f"{role}: {result[f'{role}_vocab']:,} tokens in the vocabulary; {said}")
    if result["skipped"]:
        lines.append(f"{result['skipped']:,} bad lines skipped")
    return "\n".join([*lines, f"next: rag-jax index RUN --corpus {result['out']}, or rag-jax train with it"])


def read_ids(words: Sequence[str]) -> list[str]:
    """The ids of --delete; @FILE stands for the ids in a file, one per line."""
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
