"""The part of a run's configuration that all commands read; `training.config` adds how it is trained."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rag_jax.data.tasks import TaskConfig
from rag_jax.errors import InputError
from rag_jax.rag import RagConfig
from rag_jax.retrieval.config import SearchConfig
from rag_jax.system.configuration import build, plain


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The part of a run's config.json that evaluation, `ask` and export read.

    corpus: directory of the corpus.
    dev: file of questions for evaluation.
    model: see rag.RagConfig.
    task: what the model reads and writes, see data.tasks.
    answering: fields of inference.config.AnswerConfig that the run sets for answering.
    search: how passages are searched, see retrieval.config.
    live: the corpus may be replaced by an update of it while a program runs.
    mesh: number of devices on each mesh axis (data, fsdp, tensor), -1 for the rest; {}: all devices on data.
    target_length: tokens of a target at most, with start and end.
    """

    corpus: str
    dev: str
    model: RagConfig = field(default_factory=RagConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    answering: Mapping[str, object] = field(default_factory=dict)
    search: SearchConfig = field(default_factory=SearchConfig)
    live: bool = False
    mesh: Mapping[str, int] = field(default_factory=dict)
    target_length: int = 32


def read(path: Path) -> RunConfig:
    """RunConfig from a run's config.json, without its other fields; InputError where it cannot be read."""
    values, known = stored(path), {f.name for f in fields(RunConfig)}
    return build(RunConfig, {name: value for name, value in values.items() if name in known}, str(path))


def save(config: RunConfig, path: Path) -> None:
    path.write_text(json.dumps(plain(config), indent=2) + "\n")


def stored(path: Path) -> dict[str, Any]:
    """All values of a run's config.json, under their present names; InputError where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if text else None
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); it must be in a run directory, made by rag-jax train"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        why = "not a JSON object" if text else "the file is empty"
        raise InputError(f"{path}: {why}; restore it from a copy, or name another run directory")
    return renewed(values)


def renewed(values: dict[str, Any]) -> dict[str, Any]:
    """Stored values with `generate_from_eos`, as earlier versions wrote it, replaced by the generator's start_id."""
    model = values.get("model")
    generator = model.get("generator") if isinstance(model, Mapping) else None
    if isinstance(model, Mapping) and isinstance(generator, Mapping) and "generate_from_eos" in generator:
        now = {name: value for name, value in generator.items() if name != "generate_from_eos"}
        now |= {"start_id": generator.get("eos_id", 2)} if generator["generate_from_eos"] else {}
        return {**values, "model": {**model, "generator": now}}
    return values
