"""Draws the curves of an evaluation: recall@k, answers by documents read, reliability, risk and coverage."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rag_jax.system.renaming import renamed

_SIZE, _DPI = (6.4, 4.2), 110
_PLACE = (0.12, 0.2, 0.85, 0.72)  # left, bottom, width, height
_COLORS = ("#1f6fb4", "#d1495b", "#2a9d6f", "#8d6cab")
_POINTS: dict[str, Any] = {"marker": "o", "capsize": 3, "linewidth": 1.6}
_FOUND = {"gold": "a gold passage", "answer": "a passage with the answer"}
_FIGURES = {
    "exact_match": "exact match", "accuracy": "label accuracy", "f1": "F1", "rouge_l": "ROUGE-L", "bleu": "BLEU",
}  # fmt: skip
_PROBABILITIES = {"prior": "prior", "posterior": "posterior", "answer": "p(y|x)", "token": "mean over tokens"}


class Picture(NamedTuple):
    """A picture in a report: its file, its title, and a sentence on what it shows."""

    file: str
    title: str
    about: str


FILES = ("recall.png", "n_docs.png", "calibration_passages.png", "calibration_answers.png", "risk_coverage.png")


def draw(report: Mapping[str, Any], out: Path) -> list[Picture]:
    """Writes a PNG into `out` for every curve that the report has."""
    curves = report.get("curves", {})
    calibrated = curves.get("calibration", {})
    passages = {name: calibrated[name] for name in ("prior", "posterior") if name in calibrated}
    answers = {name: calibrated[name] for name in ("answer", "token") if name in calibrated}
    wanted: list[tuple[Picture, Callable[[Any], None], Any]] = [
        (
            Picture("recall.png", "Recall by passages retrieved", "Share of questions; the band is the 95% interval"),
            lambda axes: _recall(axes, curves["recall"]),
            curves.get("recall"),
        ),
        (
            Picture("n_docs.png", "Answers by documents read", "The paper's figure 3; bars are 95% intervals"),
            lambda axes: _by_docs(axes, curves["n_docs"]),
            curves.get("n_docs"),
        ),
        (
            Picture(
                "calibration_passages.png",
                "Best passage: probability and truth",
                "Is the passage with the largest prior or posterior the right one as often as that says? "
                f"{_errors(passages)}",
            ),
            lambda axes: _reliability(axes, passages, "probability of the best passage", "share that are right"),
            passages,
        ),
        (
            Picture(
                "calibration_answers.png",
                "Answer: probability and truth",
                f"Is the answer right as often as its probability, or that of its tokens, says? {_errors(answers)}",
            ),
            lambda axes: _reliability(axes, answers, "probability of the answer", "share that are right"),
            answers,
        ),
        (
            Picture(
                "risk_coverage.png",
                "Risk and coverage",
                "Wrong ones among the most confident share of the answers",
            ),
            lambda axes: _risk(axes, report["risk_coverage"]),
            report.get("risk_coverage"),
        ),
    ]
    found = []
    for picture, fill, has in wanted:
        (out / picture.file).unlink(missing_ok=True)
        if has:
            _write(out / picture.file, picture.title, fill)
            found.append(picture)
    return found


def _write(path: Path, title: str, fill: Callable[[Any], None]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, dpi=_DPI)
    axes = figure.add_axes(_PLACE)  # a layout engine would draw everything twice
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.grid(color="0.87", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    fill(axes)
    if axes.get_legend_handles_labels()[1]:
        figure.legend(loc="lower center", ncols=3, frameon=False, fontsize=10)
    with renamed(path) as temporary:
        figure.savefig(temporary, format="png")


def _recall(axes: Any, curves: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    for color, dashes, (name, curve) in zip(_COLORS, ("-", "--"), curves.items(), strict=False):  # they may coincide
        how = {"color": color, "linestyle": dashes, "linewidth": 1.8, "marker": "o" if len(curve["k"]) < 2 else None}
        axes.plot(curve["k"], curve["value"], label=_FOUND[name], **how)
        axes.fill_between(curve["k"], curve["low"], curve["high"], color=color, alpha=0.18, linewidth=0)
    _count_axis(axes, "passages retrieved, k", [k for curve in curves.values() for k in curve["k"]])
    least = min(low for curve in curves.values() for low in curve["low"])
    _share_axis(axes, "share of questions with", max(0.0, np.floor(10 * least - 0.5) / 10))


def _by_docs(axes: Any, points: Sequence[Mapping[str, float]]) -> None:
    names = [name for name in _FIGURES if name in points[0]]
    n_docs = [point["n_docs"] for point in points]
    for place, (color, name) in enumerate(zip(_COLORS, names, strict=False)):
        values = [point[name] for point in points]
        aside = [n * (1 + 0.02 * place) for n in n_docs]  # so that bars do not lie over each other
        bars = [[abs(point[name] - point[f"{name}_{side}"]) for point in points] for side in ("low", "high")]
        axes.errorbar(aside, values, yerr=bars, color=color, label=_FIGURES[name], **_POINTS)
    _count_axis(axes, "documents read per question", n_docs, ticks=n_docs)
    axes.set_ylabel("score")


def _reliability(axes: Any, found: Mapping[str, Mapping[str, Any]], x: str, y: str) -> None:
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="as it should be")
    for color, (name, one) in zip(_COLORS, found.items(), strict=False):
        bins = one["bins"]
        at, right = [b["confidence"] for b in bins], [b["right"] for b in bins]
        bars = [[abs(b["right"] - b[side]) for b in bins] for side in ("low", "high")]
        axes.errorbar(at, right, yerr=bars, color=color, label=_PROBABILITIES[name], **_POINTS)
    axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel(x)
    _share_axis(axes, y)


def _risk(axes: Any, points: Sequence[Sequence[float]]) -> None:
    coverage, risk = zip(*points, strict=True)
    axes.plot(coverage, risk, color=_COLORS[1], linewidth=1.8, marker="o", markersize=3)
    axes.set_xlim(0, 1.03)
    axes.set_ylim(0, max(1.08 * max(risk), 0.05))
    axes.set_xlabel("coverage: share of questions answered")
    axes.set_ylabel("risk: share of them wrong")


def _count_axis(axes: Any, label: str, values: Sequence[float], ticks: Sequence[float] = ()) -> None:
    """Formats an axis of counts: logarithmic if they span more than a factor of 10, with plain numbers on it."""
    most = max(values)
    if most > 10 * min(values):
        axes.set_xscale("log")
        ticks = ticks or [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if k <= most]
    if ticks:
        axes.set_xticks(ticks, labels=[f"{tick:,.0f}" for tick in ticks])
        axes.minorticks_off()
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(label)


def _share_axis(axes: Any, label: str, least: float = 0.0) -> None:
    margin = 0.03 * (1 - least)
    axes.set_ylim(least - margin, 1 + margin)
    axes.set_ylabel(label)


def _errors(found: Mapping[str, Mapping[str, Any]]) -> str:
    parts = [f"{_PROBABILITIES[name]} {one['error']:.3f}" for name, one in found.items()]
    return f"Expected calibration error: {', '.join(parts)}"
