"""The files beside an encoder's weights: those of sentence-transformers, and the tokenizer's longest input."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag_jax.errors import InputError
from rag_jax.models.hf import sentence
from rag_jax.models.hf.sentence import MODEL, MODULES, TRANSFORMER_FILES, Layout
from rag_jax.models.hf.settings import Account
from rag_jax.models.protocols import Pooling
from rag_jax.system import files

# class that wrote a BERT without modules.json -> how its hidden states are pooled
BY_ARCHITECTURE: dict[str, Pooling] = {"BertModel": "cls", "BertForPreTraining": "cls", "Contriever": "mean"}


@dataclass(frozen=True)
class Asked:
    """Settings of the encoder given to `rag-jax convert`; 0, "" and None leave them to the checkpoint.

    pooling: how hidden states become one vector.
    question_length, passage_length: tokens, without the prefix.
    query_prefix, passage_prefix: texts before each question and each passage.
    """

    pooling: str = ""
    question_length: int = 0
    passage_length: int = 0
    query_prefix: str | None = None
    passage_prefix: str | None = None


def read_any(path: Path) -> Any:
    """The content of a JSON file of the checkpoint, of any type; InputError where it is absent or not JSON."""
    return files.read_json(path, "download the checkpoint again, with its folders")


def sentence_files(directory: Path) -> dict[str, Any]:
    """The files of sentence-transformers in a directory, path -> content; {} where there are none."""
    found = {name: read_any(directory / name) for name in (MODULES, MODEL) if (directory / name).is_file()}
    folders = [""]
    for kind, folder in sentence.modules_of(found.get(MODULES, []), str(directory / MODULES)):
        if kind == "Pooling":
            path = sentence.config_path(folder)
            found[path] = read_any(directory / path)
        elif kind == "Transformer":
            folders.insert(0, folder)
    paths = [f"{folder}/{name}".removeprefix("/") for folder in folders for name in TRANSFORMER_FILES]
    own = next((path for path in paths if (directory / path).is_file()), None)
    if own is not None:
        found[own] = read_any(directory / own)
    if strange := [path for path, content in found.items() if path != MODULES and not isinstance(content, dict)]:
        raise InputError(f"{directory / strange[0]}: not a JSON object")
    return found


def transformer_directory(directory: Path) -> Path:
    """The directory with the encoder's weights, which older sentence-transformers put in a folder of modules.json."""
    if (directory / "config.json").is_file() or not (directory / MODULES).is_file():
        return directory
    modules = sentence.modules_of(read_any(directory / MODULES), str(directory / MODULES))
    return next((directory / folder for kind, folder in modules if kind == "Transformer"), directory)


def read_layout(directory: Path, account: Account) -> Layout:
    """Pooling, lengths and prefixes in the files of sentence-transformers; defaults where there are none."""
    return sentence.read_layout(sentence_files(directory), str(directory), account)


def pooling_of(layout: Layout, config: dict[str, Any], where: str, asked: Asked) -> Pooling:
    """How a BERT's hidden states become one vector: as asked, else by its files, else by the class that wrote it.

    InputError where none of them tells.
    """
    if asked.pooling or layout.pooling:
        return asked.pooling or layout.pooling  # type: ignore[return-value]
    names = config.get("architectures") or ["BertModel"]
    known = [BY_ARCHITECTURE[name] for name in names if name in BY_ARCHITECTURE]
    if not known:
        raise InputError(
            f"{where}: written by {', '.join(names)}, which does not say how hidden states become one vector; pass "
            "--pooling cls, --pooling mean or another if this is an encoder of questions and passages"
        )
    return known[0]


def token_limit(folder: Path) -> int:
    """A tokenizer's longest input in tokens (model_max_length); 0 where its file gives none."""
    path = folder / "tokenizer_config.json"
    found = read_any(path) if path.is_file() else {}
    limit = found.get("model_max_length") if isinstance(found, dict) else None
    return int(limit) if isinstance(limit, int | float) and 0 < limit < 1_000_000 else 0
