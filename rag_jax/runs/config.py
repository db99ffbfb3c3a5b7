"""The configuration of a run as far as others use what it trained; `training.config` adds how it is trained."""

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
    """What evaluation, `ask` and export read of a run's config.json.

    corpus, dev: as it was trained on and is evaluated on by default. task: what is read and written. answering: how the
    run answers by default: fields of AnswerConfig over those that follow from the model. target_length: tokens of an
    answer. live: the corpus may be updated while a program runs. mesh: sizes of its axes.
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
    """The part of a run's config.json that RunConfig has; InputError where it cannot be read."""
    values, known = stored(path), {f.name for f in fields(RunConfig)}
    return build(RunConfig, {name: value for name, value in values.items() if name in known}, str(path))


def save(config: RunConfig, path: Path) -> None:
    path.write_text(json.dumps(plain(config), indent=2) + "\n")


def stored(path: Path) -> dict[str, Any]:
    """The values of a run's config.json, with the names of now; InputError where it cannot be read."""
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
    """The configuration of a run that an earlier version wrote, with the names of now in its model."""
    model = values.get("model")
    generator = model.get("generator") if isinstance(model, Mapping) else None
    if isinstance(model, Mapping) and isinstance(generator, Mapping) and "generate_from_eos" in generator:
        now = {name: value for name, value in generator.items() if name != "generate_from_eos"}
        now |= {"start_id": generator.get("eos_id", 2)} if generator["generate_from_eos"] else {}
        return {**values, "model": {**model, "generator": now}}
    return values
