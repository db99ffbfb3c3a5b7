"""Cache of tokenised questions on disk, memory-mapped, so that a resumed run does not tokenise again."""

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
    """Key of the cache, for JSON: hashes of the question files, tokenizers and corpus, and the settings."""
    sources = [[digests(source) for source in formats.expand([one], "questions")] for one in inputs]
    tokenizers = [corpus.encoder_tokenizer.hash, corpus.generator_tokenizer.hash]
    return {"inputs": sources, "tokenizers": tokenizers, "corpus": corpus_hash, **settings}


def digests(source: formats.InputFile) -> list[str]:
    """Name, format and content of all files of a source."""
    beside = [] if source.beside is None else [files.file_sha256(source.beside)]
    return [source.name, source.format, formats.digest(source), *beside]


def read(directory: Path, wanted: dict[str, Any]) -> Examples | None:
    """The cached examples with the key `wanted`, or None; a line on stderr says why examples there are not used."""
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
    """Writes the examples with the key `wanted`, replacing those that are there; a line says so where that fails."""
    try:
        if directory.exists():
            shutil.rmtree(directory)
        with files.new_directory(directory, KIND) as temporary:
            for name, array in examples.arrays().items():
                np.save(temporary / f"{name}.npy", array, allow_pickle=False)
            files.write_manifest(temporary, KIND, VERSION, {"made_of": wanted})
    except (OSError, InputError) as error:
        info(f"{directory}: not kept ({error})")
