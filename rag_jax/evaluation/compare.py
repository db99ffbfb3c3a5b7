"""Compares evaluations of the same questions: all others with the first, question by question (paired bootstrap, Koehn
2004).
"""

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rag_jax import metrics
from rag_jax.corpus.directory import Corpus
from rag_jax.errors import InputError
from rag_jax.evaluation.report import html, markdown, write_report
from rag_jax.metrics import bootstrap, verdicts
from rag_jax.metrics.figures import Figure
from rag_jax.system import files

ASKED = ("question", "answers", "target", "label", "unanswerable", "gold", "relevance")  # keys that must be the same


class StoredEvaluation(NamedTuple):
    """An evaluation that `rag-jax evaluate` wrote.

    directory: where.
    rows: rows of predictions.jsonl by the id of the question.
    setting: how they are judged.
    corpus: directory of the corpus that they were answered from.
    notes: a sentence on gold passages that this corpus lacks, or "".
    """

    directory: Path
    rows: dict[str, dict[str, Any]]
    setting: metrics.Judging
    corpus: str
    notes: str = ""


def read(directory: Path) -> StoredEvaluation:
    """Reads the evaluation in a directory; InputError, with file and line, where there is none."""
    again = "make it with rag-jax evaluate RUN --out DIR"
    try:
        written = json.loads((directory / "report.json").read_text(encoding="utf-8"))
        lines = (directory / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
        setting = metrics.Judging(tuple(written["labels"]), written["match"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{directory}: not an evaluation ({error}); {again}") from error
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(filter(None, lines), start=1):
        try:
            row = json.loads(line)
            rows[row["id"]] = row | {name: row[name] for name in ("prediction", "score", "retrieved", *ASKED)}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{directory / 'predictions.jsonl'}:{number}: not a prediction ({error}); {again}"
            ) from error
    return StoredEvaluation(
        directory, rows, setting, written.get("corpus", ""), write_report.gold_ids({"corpus": "", **written})
    )


def check_same(one: StoredEvaluation, other: StoredEvaluation) -> None:
    """Raises InputError, with the difference, if two evaluations are of different questions or judged differently."""
    names = f"{one.directory} and {other.directory}"
    if one.setting != other.setting:
        raise InputError(f"{names} are judged otherwise: {one.setting}, {other.setting}; evaluate both alike")
    only, missing = (list(a.rows.keys() - b.rows.keys()) for a, b in ((one, other), (other, one)))
    if only or missing:
        shown = ", ".join(sorted(only + missing)[:3])
        raise InputError(
            f"{names} are of other questions: {len(only)} only in the first, {len(missing)} only in the second "
            f"({shown}); evaluate both on one file, with the same --where and --limit"
        )
    for identity, row in one.rows.items():
        levels = [a.rows[identity].get("level") or "passage" for a in (one, other)]
        if row["gold"] and levels[0] != levels[1]:
            raise InputError(
                f"{names}: the ranking of question {identity} is judged by {levels[0]} and by {levels[1]}, as their "
                "corpora were cut otherwise; evaluate both on corpora with the same --passage-words"
            )
        for name in ASKED:
            if row[name] != other.rows[identity][name]:
                mine, theirs = (json.dumps(x, ensure_ascii=False)[:80] for x in (row[name], other.rows[identity][name]))
                raise InputError(f"{names}: question {identity} has another {name}, {mine} and {theirs}; use one file")


def opened(directories: Sequence[Path]) -> list[StoredEvaluation]:
    """Reads the evaluations; InputError if there are fewer than two or they do not fit (`check_same`)."""
    if len(directories) < 2:
        raise InputError("compare needs at least two evaluations: rag-jax compare RUN RUN...")
    evaluations = [read(directory) for directory in directories]
    for other in evaluations[1:]:
        check_same(evaluations[0], other)
    return evaluations


def compare(
    directories: Sequence[Path], names: Sequence[str] = (), seed: int = 0, out: Path | None = None
) -> dict[str, Any]:
    """Compares the evaluations in these directories (see `compared`), and writes pages into `out` if it is given."""
    evaluations = opened(directories)
    result = compared(evaluations, names, seed)
    if out is not None:
        write(out, evaluations, result)
    return result


def compared(evaluations: Sequence[StoredEvaluation], names: Sequence[str] = (), seed: int = 0) -> dict[str, Any]:
    """The figures that all evaluations have: {"runs", "n", "figures": {name: [{"value", "low", "high"}, ...]}}.

    Runs are in the order given. All but the first also have difference, difference_low, difference_high (to the first)
    and p.
    """
    metrics.check_names(names)
    first = evaluations[0]
    rows = [[one.rows[identity] for identity in first.rows] for one in evaluations]
    found = [metrics.figures_of(one, first.setting, names) for one in rows]
    shared = [name for name in found[0] if all(name in one and one[name].n == found[0][name].n for one in found)]
    if not shared:
        raise InputError(f"these evaluations have no figure in common{f' of {list(names)}' if names else ''}")
    draws = metrics.resampled({f"{i} {name}": one[name] for i, one in enumerate(found) for name in shared}, seed)
    figures = {}
    for name in shared:
        values = [(one[name], draws[f"{i} {name}"]) for i, one in enumerate(found)]
        figures[name] = [beside(values[0], one, paired=i > 0) for i, one in enumerate(values)]
    notes = [one.notes for one in evaluations]
    result = {"runs": [str(one.directory) for one in evaluations], "n": len(first.rows), "figures": figures}
    return result | ({"gold_ids": notes} if any(notes) else {})


def beside(first: tuple[Figure, np.ndarray], other: tuple[Figure, np.ndarray], paired: bool) -> dict[str, float]:
    """Value and interval of a figure, and with `paired` its difference to the first run's, interval and p.

    first, other: (figure, its values [R] in the same resamples).
    """
    figure, values_R = other
    value = bootstrap.value(figure.statistic, figure.n)
    low, high = figure.interval(values_R, value)
    cell = {"value": value, "low": low, "high": high}
    if paired:
        difference = value - bootstrap.value(first[0].statistic, figure.n)
        differences_R = figure.around(values_R - first[1], difference)
        low, high = bootstrap.interval(differences_R)
        cell |= {"difference": difference, "difference_low": low, "difference_high": high}
        cell["p"] = bootstrap.p_value(differences_R)
    return cell


def letters(result: dict[str, Any]) -> list[str]:
    """Names of the runs in tables: A, B, ..."""
    return [chr(ord("A") + i) if i < 26 else f"run {i + 1}" for i in range(len(result["runs"]))]


def gold_notes(result: dict[str, Any]) -> list[tuple[str, str]]:
    """(letter of a run, sentence on the gold passages that its corpus lacks), for runs where it lacks some."""
    return [pair for pair in zip(letters(result), result.get("gold_ids", []), strict=False) if pair[1]]


def about(result: dict[str, Any]) -> str:
    return f"{result['n']:,} questions, %, 95% intervals and p of {bootstrap.RESAMPLES:,} paired resamples"


def cells(result: dict[str, Any]) -> list[list[str]]:
    """Rows of a table: a head, then percentages with 95% intervals, a column per run, and differences to the first."""
    head, body = ["", *letters(result)], []
    for letter in letters(result)[1:]:
        head += [f"{letter} - A", "p"]
    for name, found in result["figures"].items():
        row = [name, *(f"{_percent(c['value'])} ({_percent(c['low'])} to {_percent(c['high'])})" for c in found)]
        for cell in found[1:]:
            low, high = (_signed(cell[f"difference_{side}"]) for side in ("low", "high"))
            row += [f"{_signed(cell['difference'])} ({low} to {high})", f"{cell['p']:.3f}"]
        body.append(row)
    return [head, *body]


def table(result: dict[str, Any]) -> str:
    """`cells` as text for a terminal, below a list of the runs with their letters."""
    lines = [f"{letter}  {run}" for letter, run in zip(letters(result), result["runs"], strict=True)]
    lines += [f"{letter}: {note}" for letter, note in gold_notes(result)]
    lines += [about(result), ""]
    rows = cells(result)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        padded = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *padded]).rstrip())
    return "\n".join(lines)


def write(out: Path, evaluations: Sequence[StoredEvaluation], result: dict[str, Any]) -> None:
    """Writes compare.md, and compare.html with the answers of all runs and the passages of the first one."""
    first = evaluations[0]
    corpus = Corpus.open(first.corpus)
    names = [f"{letter}: {run}" for letter, run in zip(letters(result), result["runs"], strict=True)]
    rows = [{**row, "runs": [_said(one, identity) for one in evaluations]} for identity, row in first.rows.items()]
    if not all("read" in row for row in rows):
        raise InputError(f"{first.directory}: its predictions do not say what was read; evaluate again for --out")
    notes = [f"{letter}: {note}" for letter, note in gold_notes(result)]
    facts = [("Runs", "\n".join(names)), ("Over", about(result)), *(("Gold ids", note) for note in notes)]
    page = html.Page("Comparison of runs", cells(result), facts, runs=names)
    with files.new_files(out, last="compare.md") as temporary:
        texts = partial(write_report.passage, corpus)
        html.write(temporary / "compare.html", page, rows, first.setting, texts)
        lines = [*names, *notes, about(result)]
        markdown.write_page(temporary / "compare.md", "Comparison of runs", lines, cells(result))


def _said(one: StoredEvaluation, identity: str) -> list[Any]:
    row = one.rows[identity]
    score = round(row["score"], 4) if row["prediction"] is not None and math.isfinite(row["score"]) else None
    return [html.cut(row["prediction"] or "")[0], verdicts.right(row, one.setting), score]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}"
