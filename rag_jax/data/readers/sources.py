"""Finds the files behind an input: a file, a glob, a folder, a set of parts, a pair of files that belong together."""

import glob
import math
import os
import re
from pathlib import Path
from typing import Literal, NamedTuple

from rag_jax.errors import InputError

Kind = Literal["passages", "questions"]

PART = re.compile(r"^(?P<stem>.*)-(?P<index>\d+)-of-(?P<count>\d+)(?P<ext>\..*)?$")
_WIKI = re.compile(r"^wiki_\d+(\.gz)?$")  # as wikiextractor names its files
_WEIGHTED = re.compile(r"([^\s*]+)\*(\S.*)")  # WEIGHT*INPUT
_TEXT_SUFFIXES = (".txt", ".md")
_ASKED = ("queries", "topics")  # in the names of query files; the file of their judgements has "qrels" in its name
_TABLE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".tsv")


class InputFile(NamedTuple):
    """A file to read.

    name: its name, which does not depend on the machine.
    input: number of the input it belongs to; all files of a part set or folder have the same.
    format: a key of `formats.FORMATS`; "": detect it.
    beside: the file with the other half of each record, or None.
    """

    path: Path
    name: str
    input: int
    kind: Kind = "passages"
    format: str = ""
    beside: Path | None = None


class MatchingFile(NamedTuple):
    """A file found behind an input, with the fields of `InputFile` that its name and folder determine."""

    path: Path
    format: str = ""
    beside: Path | None = None


def suffix(path: Path) -> str:
    """The last suffix of a file in lower case, after removing .gz and the number of a part."""
    match = PART.match(path.name)
    name = match["stem"] + (match["ext"] or "") if match else path.name
    return Path(name.removesuffix(".gz")).suffix.lower()


def stem(name: str) -> str:
    """A file's name without the number of its part and without suffixes of formats: train.jsonl.gz is train."""
    match = PART.match(name)
    name = match["stem"] + (match["ext"] or "") if match else name
    name = name.removesuffix(".gz")
    return re.sub(r"\.(jsonl?|ndjson|tsv|csv|txt|source)$", "", name) or name


def weighted(train: str) -> dict[str, float]:
    """Parses `INPUT` or `WEIGHT*INPUT + WEIGHT*INPUT` into {input: weight}; InputError names a bad term."""
    terms = [term.strip() for term in train.split(" + ")]
    if len(terms) == 1:
        return {train: 1.0}
    weights: dict[str, float] = {}
    for term in terms:
        match = _WEIGHTED.fullmatch(term)
        if match is None:
            raise InputError(f"train: {term!r} has no weight; write 0.5*{term or 'INPUT'}")
        try:
            weight = float(match[1])
        except ValueError:
            weight = math.nan
        if not (weight > 0 and math.isfinite(weight)):
            raise InputError(f"train: the weight {match[1]} of {match[2]!r} must be a positive number")
        if match[2] in weights:
            raise InputError(f"train: {match[2]!r} stands there twice; add up its weights")
        weights[match[2]] = weight
    return weights


def files_of(path: Path, kind: Kind) -> list[MatchingFile]:
    """The files to read for the input `path`; InputError where there are none or one is missing."""
    if path.is_dir():
        beir = (path / "queries.jsonl").exists() or (path / "qrels").is_dir() or _beside(path, "corpus")
        if beir:
            return _beir(path, kind)
        if kind == "questions":
            raise InputError(f"{path}: a folder; name a question file, or a BEIR folder with queries.jsonl and qrels/")
        return [MatchingFile(file) for file in _folder(path)]
    if path.exists():
        if kind == "questions" and suffix(path) in (".source", ".target"):
            return [_pair(path)]
        if kind == "questions" and path.parent.name == "qrels" and _beside(path.parent.parent, "queries"):
            return _beir_questions(path.parent.parent, path)
        if kind == "questions" and (judged := _judged(path)):
            return [judged]
        return [MatchingFile(file) for file in (_part_set(path) if PART.match(path.name) else [path])]
    if glob.has_magic(str(path)):
        matches = sorted(glob.glob(str(path)))
        if not matches:
            raise InputError(f"{path}: no file matches this pattern")
        return [found for match in matches for found in files_of(Path(match), kind)]
    return [MatchingFile(file) for file in _parts_named(path)]


def _parts_named(path: Path) -> list[Path]:
    """All parts of the set named `path`, or of the set to which the missing file `path` would belong."""
    start, dot, end = path.name.partition(".")
    patterns = (f"{path.name}-*-of-*", f"{start}-*-of-*{dot}{end}", f"{start}-*-of-*{dot}{end}.gz")
    for pattern in patterns:
        escaped = "*".join(glob.escape(piece) for piece in pattern.split("*"))
        parts = [part for part in sorted(path.parent.glob(escaped)) if PART.match(part.name)]
        if parts:
            return _part_set(parts[0])
    if PART.match(path.name):
        return _part_set(path)
    raise InputError(f"{path}: no such file or folder, and no parts {start}-00000-of-0000N of it")


def _part_set(path: Path) -> list[Path]:
    """All parts of the set that `path` belongs to, in order; a missing one raises."""
    match = PART.match(path.name)
    assert match is not None
    count, ext = match["count"], match["ext"] or ""
    width = len(match["index"])
    parts = [path.with_name(f"{match['stem']}-{i:0{width}d}-of-{count}{ext}") for i in range(int(count))]
    missing = [part.name for part in parts if not part.exists()]
    if missing or int(match["index"]) >= int(count):
        names = ", ".join(missing[:3]) or f"a part numbered below {count}"
        raise InputError(f"{path}: the set has {int(count)} parts and misses {names}; fetch the missing parts")
    others = [p.name for p in path.parent.glob(f"{glob.escape(match['stem'])}-*-of-*{glob.escape(ext)}")]
    other = [n for n in others if (m := PART.match(n)) and m["stem"] == match["stem"] and m["count"] != count]
    if other:
        raise InputError(f"{path}: parts of two sets lie together ({other[0]} too); remove the one not meant")
    return parts


def _folder(path: Path) -> list[Path]:
    """The .txt and .md files of a folder, or wikiextractor's; InputError if data files are among them.

    Such a file may be meant as well, so it is not silently left out.
    """
    texts, wiki, tables = [], [], []
    for folder, subfolders, names in os.walk(path):
        subfolders.sort()
        for name in sorted(names):
            file = Path(folder, name)
            if suffix(file) in _TEXT_SUFFIXES and not name.startswith("."):
                texts.append(file)
            elif _WIKI.match(name):
                wiki.append(file)
            elif suffix(file) in _TABLE_SUFFIXES:
                tables.append(file)
    if tables:
        raise InputError(f"{path}: holds {tables[0].name}; a folder is read as .txt/.md files: name data files singly")
    if texts and wiki:
        raise InputError(f"{path}: holds {texts[0].name} and {wiki[0].name}; name the texts and the wiki files singly")
    if not texts and not wiki:
        raise InputError(f"{path}: no .txt or .md file in this folder")
    return texts or wiki


def _pair(path: Path) -> MatchingFile:
    """The pair NAME.source and NAME.target from the name of either."""
    zipped = path.name.removesuffix(".gz")
    source, target = (path.with_name(Path(zipped).stem + end) for end in (".source", ".target"))
    source, target = (p if p.exists() else p.with_name(p.name + ".gz") for p in (source, target))
    for file in (source, target):
        if not file.exists():
            raise InputError(f"{path}: {file.name.removesuffix('.gz')} is missing beside it; a pair of files is needed")
    return MatchingFile(source, "hf_rag", target)


def _judged(path: Path) -> MatchingFile | None:
    """Queries and their qrels from the name of either: those named alike (queries.dev.tsv, qrels.dev.tsv), else the
    only ones in the folder. None if `path` is neither, or has no qrels.
    """
    name = path.name.lower()
    mine = next((word for word in (*_ASKED, "qrels") if word in name), None)
    if mine is None or suffix(path) not in (".tsv", ".txt"):
        return None
    wanted = _ASKED if mine == "qrels" else ("qrels",)
    files = [file for file in sorted(path.parent.iterdir()) if suffix(file) in (".tsv", ".txt")]
    others = [file for file in files if any(word in file.name.lower() for word in wanted)]
    alike = [file for file in others if any(stem(file.name) == stem(path.name).replace(mine, word) for word in wanted)]
    found = alike if len(alike) == 1 else others if len(others) == 1 else []
    if mine == "qrels":
        if not found:
            names = "queries.dev.tsv and qrels.dev.tsv"
            raise InputError(f"{path}: judgements without their queries beside them; call the two alike, as {names}")
        return MatchingFile(found[0], "qrels", path)
    return MatchingFile(path, "qrels", found[0]) if found else None


def _beside(folder: Path, name: str) -> Path | None:
    files = (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz")
    return next((file for file in files if file.exists()), None)


def _beir(folder: Path, kind: Kind) -> list[MatchingFile]:
    if kind == "questions":
        qrels = sorted((folder / "qrels").glob("*.tsv")) + sorted((folder / "qrels").glob("*.tsv.gz"))
        if len(qrels) != 1:
            names = ", ".join(f"qrels/{file.name}" for file in qrels) or "no qrels/*.tsv"
            raise InputError(f"{folder}: a BEIR folder with {names}; name the one qrels file whose questions are meant")
        return _beir_questions(folder, qrels[0])
    corpus = _beside(folder, "corpus")
    if corpus is None:
        raise InputError(f"{folder}: a BEIR folder without corpus.jsonl; fetch it")
    return [MatchingFile(corpus, "beir")]


def _beir_questions(folder: Path, qrels: Path) -> list[MatchingFile]:
    queries = _beside(folder, "queries")
    if queries is None:
        raise InputError(f"{folder}: a BEIR folder without queries.jsonl; fetch it")
    return [MatchingFile(queries, "beir", qrels)]
