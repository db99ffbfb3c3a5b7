"""Finding Hugging Face directories, on this disk or on the hub, and reading their JSON files."""

import json
import re
from pathlib import Path
from typing import Any

from rag_jax.data import tokenizers
from rag_jax.errors import InputError
from rag_jax.pretrained import encoder_files
from rag_jax.system import files

EXPORTED = "Hugging Face model"  # the kind in the manifest of an export (`save_pretrained`)
CONFIG, GENERATION = "config.json", "generation_config.json"


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file of a Hugging Face directory; InputError if it is absent or not an object."""
    return files.read_json_object(path, "a Hugging Face model directory has one")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file in place; only for a directory that still has its temporary name."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def is_hugging_face(directory: Path) -> bool:
    """Whether the directory has a config.json of transformers (one with a model_type)."""
    directory = encoder_files.transformer_directory(directory)
    return (directory / CONFIG).is_file() and "model_type" in read_json(directory / CONFIG)


def find(name_or_dir: str | Path) -> Path:
    """The local directory of this path or hub name, downloaded where it is not in the hub's cache.

    Files of an export are verified by its manifest. InputError where there is no such directory or model.
    """
    directory = Path(name_or_dir)
    if directory.is_dir():
        files.check_listed(directory, suffixes=(*files.SMALL, ".safetensors"), below=True, kinds=(EXPORTED,))
        return directory
    if not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", str(name_or_dir)):
        raise InputError(
            f"{name_or_dir}: no such directory; a run, a converted model or a Hugging Face model is wanted"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, patterns = str(name_or_dir), ["*.json", "*.safetensors", "*.txt", "*.model", "*/*.json", "*/*.txt"]
    try:
        try:
            return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        except LocalEntryNotFoundError:
            tokenizers.check_hub(name)
            found = Path(snapshot_download(name, allow_patterns=patterns))
            if not any(found.glob("*.safetensors")):
                found = Path(snapshot_download(name, allow_patterns=[*patterns, "pytorch_model*.bin"]))
            return found
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise InputError(
            f"{name_or_dir}: no such directory, and not to be had from the hub ({str(error).splitlines()[0]})"
        ) from error
