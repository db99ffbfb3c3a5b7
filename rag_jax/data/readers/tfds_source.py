"""Questions and passages from prepared TensorFlow Datasets, read by random access, without tensorflow.

    tfds:NAME[/CONFIG][:VERSION]/SPLIT[?FIELD=FEATURE&...&data_dir=DIR]

FIELD is one of ours: id, question, answers, target, title, text, positive_passage_ids, ..., or any name to keep in
`extra`. `context` is the text that a question was asked about, which becomes its right passage; `is_impossible` marks
questions that it does not answer. FEATURE is one of the data set, with dots where it is nested (`answers.text`), or
several with commas between them. Without any FIELD, MAPPINGS decides, else features with our names are taken. The data
set must have been prepared as array_record files: nothing is downloaded here.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rag_jax.data.readers import simple_rows, squad
from rag_jax.data.readers.rows import (
    BadLine,
    Fields,
    OnBad,
    Passage,
    Question,
    Row,
    content_id,
    identity,
    optional,
    refuse,
    string,
)
from rag_jax.data.readers.sources import InputFile
from rag_jax.errors import InputError
from rag_jax.system import files

PREFIX = "tfds:"
_SQUAD = {
    "id": "id",
    "question": "question",
    "answers": "answers.text",
    "title": "title",
    "context": "context",
}
_WORLD = ("id", "question", "answers", "positive_passage_ids", "previous_answers", "title", "text")
# Features of the standard data sets, by name, or by name and configuration.
MAPPINGS: dict[str, Mapping[str, str]] = {
    "squad": _SQUAD,
    "squad/v2.0": {**_SQUAD, "is_impossible": "is_impossible"},
    "xquad": _SQUAD,
    "mlqa": _SQUAD,
    "tydi_qa": _SQUAD,
    "natural_questions_open": {"question": "question", "answers": "answer"},
    "web_questions": {"question": "question", "answers": "answers"},
    "trivia_qa": {"id": "question_id", "question": "question", "answers": "answer.value,answer.aliases"},
    "bool_q": {"question": "question", "answers": "answer", "title": "title", "context": "passage"},
    "world": {name: name for name in (*_WORLD, "relation", "changed")},
}
_LISTS = {
    "answers",
    "positive_passage_ids",
    "also_relevant_passage_ids",
    "hard_negative_passage_ids",
    "negative_passage_ids",
}
_OURS = ("id", "question", "target", "title", "text", "context", "document", "is_impossible", *sorted(_LISTS))


class Spec(NamedTuple):
    """A parsed input `tfds:...` (see above). fields: our name -> paths of features, with commas between them."""

    name: str
    split: str
    fields: Mapping[str, str]
    data_dir: str | None


def spec(text: str) -> Spec:
    """Parses an input `tfds:...`; InputError if it does not have the form above."""
    place, _, query = text.removeprefix(PREFIX).partition("?")
    name, slash, split = place.rpartition("/")
    pairs = [pair.partition("=") for pair in query.split("&")] if query else []
    if not slash or not name or not split or not all(key and value for key, _, value in pairs):
        raise InputError(f"{text}: expected tfds:NAME/SPLIT or tfds:NAME/CONFIG/SPLIT?question=FEATURE&answers=FEATURE")
    fields = {key: value for key, _, value in pairs}
    data_dir = fields.pop("data_dir", None)
    bare = name.partition(":")[0]
    return Spec(name, split, fields or MAPPINGS.get(bare) or MAPPINGS.get(bare.partition("/")[0], {}), data_dir)


def title(text: str) -> str:
    """The name of an input, the same on every machine."""
    wanted = spec(text)
    return f"{wanted.name}/{wanted.split}"


def rows(source: InputFile, report: OnBad | None) -> Iterator[Row]:
    """Every record of the split, in order, with our field names; `line` counts records."""
    wanted = spec(str(source.path))
    records = _open(str(source.path), wanted)[1]
    fields: Mapping[str, str] = {}
    for number, record in enumerate(records, start=1):
        if number == 1:
            fields = wanted.fields or {name: name for name in _OURS if name in record}
            _check(str(source.path), fields, record)
        try:
            mapped = {ours: _mapped(record, ours, paths) for ours, paths in fields.items()}
        except BadLine as bad:
            refuse(f"{source.path}:{number}: {bad}", report)
            continue
        yield Row(number, number, mapped)


def question(fields: Fields, own_id: str) -> list[Question]:
    """A question; one with a `context` is read like SQuAD's."""
    fields = {"id": own_id, "answers": [], **fields}
    if "context" not in fields:
        return simple_rows.question({name: value for name, value in fields.items() if name not in ("title", "text")})
    right = content_id(optional(fields, "title"), string(fields, "context"))
    answers = [{"text": answer} for answer in fields["answers"]]
    kept = {name: value for name, value in fields.items() if name not in ("title", "context")}
    return [squad.question({**kept, "answers": answers}, right)]


def passage(fields: Fields, own_id: str) -> list[Passage]:
    """A passage under its own id; the context of a question under that of its content."""
    if "text" in fields:
        title = optional(fields, "title")
        named = {"id": identity(fields, "id") if "id" in fields else content_id(title, string(fields, "text"))}
        return simple_rows.passage({**fields, **named, "title": title})
    if "context" not in fields:
        raise BadLine("neither text nor context; name the feature: ?text=FEATURE&title=FEATURE")
    return [squad.passage(optional(fields, "title"), string(fields, "context"))]


def digest(source: InputFile) -> str:
    """SHA-256 of the split's files and of how they are read."""
    wanted = spec(str(source.path))
    builder, _ = _open(str(source.path), wanted)
    paths = sorted({Path(part.filename) for part in builder.info.splits[wanted.split].file_instructions})
    hashes = [(path.name, files.file_sha256(path)) for path in paths]
    return files.canonical_sha256([wanted.name, wanted.split, dict(wanted.fields), hashes])


def _open(text: str, wanted: Spec) -> tuple[Any, Any]:
    """The builder of the prepared files, and their records with random access."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(f"{text}: needs tensorflow-datasets ({error}); pip install 'rag-jax[tfds]'") from error
    kwargs = f'"{wanted.name}", file_format="array_record"' + (
        f', data_dir="{wanted.data_dir}"' if wanted.data_dir else ""
    )
    how = f"prepare it once: python -c 'import tensorflow_datasets as t; t.builder({kwargs}).download_and_prepare()'"
    try:
        builder = tfds.core.read_only_builder.builder_from_files(wanted.name, data_dir=wanted.data_dir)
    except (tfds.core.registered.DatasetNotFoundError, ValueError, OSError) as error:
        where = wanted.data_dir or tfds.core.constants.DATA_DIR
        raise InputError(f"{text}: no prepared data set {wanted.name!r} in {where}; {how}") from error
    base = wanted.split.partition("[")[0]
    if base not in builder.info.splits:
        raise InputError(f"{text}: no split {base!r}; there are {', '.join(builder.info.splits)}")
    try:
        return builder, builder.as_data_source(wanted.split)
    except NotImplementedError as error:
        raise InputError(
            f"{text}: prepared as {builder.info.file_format.value} without random access; {how}"
        ) from error
    except ValueError as error:
        raise InputError(f"{text}: cannot read this part of the split ({str(error).splitlines()[0]})") from error


def _check(text: str, fields: Mapping[str, str], record: Mapping[str, Any]) -> None:
    """Raises InputError for a feature that the records do not have."""
    names = sorted(_paths(record))
    for ours, paths in fields.items():
        for path in paths.split(","):
            if path not in names:
                raise InputError(f"{text}: {ours}={path}: no such feature; there are {', '.join(names)}")


def _paths(record: Mapping[str, Any], before: str = "") -> Iterator[str]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{before}{name}.")
        else:
            yield before + name


def _mapped(record: Mapping[str, Any], ours: str, paths: str) -> Any:
    """The value of a field: the feature, or a list of several; as answers, true and false become yes and no."""
    found = []
    for path in paths.split(","):
        value: Any = record
        for name in path.split("."):
            value = value[name]
        found.append(_plain(value))
    if ours not in _LISTS:
        return found[0] if len(found) == 1 else found
    values = [item for value in found for item in (value if isinstance(value, list) else [value])]
    values = [{True: "yes", False: "no"}[value] if isinstance(value, bool) else value for value in values]
    return list(dict.fromkeys(values))


def _plain(value: Any) -> Any:
    """The value in Python's types: bytes as text, NumPy scalars and arrays as numbers and lists."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadLine(f"not UTF-8 (byte 0x{value[error.start]:02x})") from None
