"""Tokenised questions on disk, memory-mapped: a run that goes on does not tokenise again."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rag_jax.data.examples import Examples, PassageTable
from rag_jax.data.readers import formats
from rag_jax.errors import InputError
from rag_jax.system import files
from rag_jax.system.logs import info

KIND, VERSION = "tokenised questions", 2


def made_of(inputs: Sequence[str], corpus: PassageTable, corpus_hash: str, **settings: Any) -> dict[str, Any]:
    """What decides the arrays: the content of the question files, the tokenizers, the corpus, and settings (JSON)."""
    sources = [[digests(source) for source in formats.expand([one], "questions")] for one in inputs]
    tokenizers = [corpus.encoder_tokenizer.hash, corpus.generator_tokenizer.hash]
    return {"inputs": sources, "tokenizers": tokenizers, "corpus": corpus_hash, **settings}


def digests(source: formats.Source) -> list[str]:
    """Name, format and content of all files of a source."""
    beside = [] if source.beside is None else [files.file_sha256(source.beside)]
    return [source.name, source.format, formats.digest(source), *beside]


def read(directory: Path, wanted: dict[str, Any]) -> Examples | None:
    """The examples made of what is wanted; None where there are none, and a line says why those there are not used."""
    if not directory.is_dir():
        return None
    try:
        manifest = files.read_verified(directory, KIND, VERSION)
        if manifest["made_of"] != wanted:
            info(f"{directory}: made of other questions, tokenizers, passages or lengths; the questions are read again")
            return None
        names = [name.removesuffix(".npy") for name in manifest["files"]]
        return Examples.of({name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in names})
    except (InputError, ValueError, KeyError) as error:
        info(f"{error}; the questions are read again")
        return None


def write(directory: Path, examples: Examples, wanted: dict[str, Any]) -> None:
    """Keeps them in place of others that are there; where that cannot be, a line says so."""
    try:
        if directory.exists():
            shutil.rmtree(directory)
        with files.new_directory(directory, KIND) as temporary:
            for name, array in examples.arrays().items():
                np.save(temporary / f"{name}.npy", array, allow_pickle=False)
            files.write_manifest(temporary, KIND, VERSION, {"made_of": wanted})
    except (OSError, InputError) as error:
        info(f"{directory}: not kept ({error})")
