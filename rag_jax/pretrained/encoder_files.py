"""What lies beside an encoder's weights, read from and written to its directory: sentence-transformers' files and the
settings of its tokenizer.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag_jax.errors import InputError
from rag_jax.models.hf import sentence
from rag_jax.models.hf.sentence import MODEL, MODULES, TRANSFORMER_FILES, Layout
from rag_jax.models.hf.settings import Account
from rag_jax.models.protocols import Pooling
from rag_jax.system import files

# Of a BERT without modules.json, by the class that wrote it: what its hidden states become.
BY_ARCHITECTURE: dict[str, Pooling] = {"BertModel": "cls", "BertForPreTraining": "cls", "Contriever": "mean"}


@dataclass(frozen=True)
class Asked:
    """What `rag-jax convert` is told about the encoder; 0, "" and None leave it to the checkpoint."""

    pooling: str = ""
    question_length: int = 0
    passage_length: int = 0
    query_prefix: str | None = None
    passage_prefix: str | None = None


def read_any(path: Path) -> Any:
    """The content of a JSON file of the checkpoint, whatever it is."""
    return files.read_json(path, "download the checkpoint again, with its folders")


def sentence_files(directory: Path) -> dict[str, Any]:
    """The files of sentence-transformers in a directory: path -> content; {} where there are none."""
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
    """Where the encoder itself is: older releases of sentence-transformers kept it in a folder of its own."""
    if (directory / "config.json").is_file() or not (directory / MODULES).is_file():
        return directory
    modules = sentence.modules_of(read_any(directory / MODULES), str(directory / MODULES))
    return next((directory / folder for kind, folder in modules if kind == "Transformer"), directory)


def read_layout(directory: Path, account: Account) -> Layout:
    """What sentence-transformers' files of the directory say."""
    return sentence.read_layout(sentence_files(directory), str(directory), account)


def pooling_of(layout: Layout, config: dict[str, Any], where: str, asked: Asked) -> Pooling:
    """How a BERT's hidden states become a vector: as asked, as its files say, or as the class that wrote it has it;
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
    """The longest input that a tokenizer was saved for (model_max_length), 0 where it does not say."""
    path = folder / "tokenizer_config.json"
    found = read_any(path) if path.is_file() else {}
    limit = found.get("model_max_length") if isinstance(found, dict) else None
    return int(limit) if isinstance(limit, int | float) and 0 < limit < 1_000_000 else 0
