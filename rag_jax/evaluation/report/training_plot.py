"""Draws the training curves of a run as one picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rag_jax.errors import InputError
from rag_jax.system.logs import read_rows
from rag_jax.system.renaming import renamed

_WIDTH, _HEIGHT, _DPI = 12.0, 8.0, 100  # 1200 x 800 pixels
_STAGE_COLORS = (
    "#4c72b0", "#dd8452", "#55a868", "#8172b3", "#937860", "#da8bc3", "#8c8c8c", "#b5a83c", "#3fa7b5", "#c44e52",
)  # fmt: skip
_LINE_COLORS = ("#1f6fb4", "#d1495b", "#2a9d6f", "#8d6cab")
_SMOOTH_FROM = 60  # points from which on a noisy curve is smoothed


@dataclass(frozen=True)
class _Panel:
    """One panel. curves: (metric name, label); metrics under eval/ are drawn with markers."""

    title: str
    curves: tuple[tuple[str, str], ...]
    share: bool = False  # the values are shares: the axis goes from 0 to 1
    log: bool = False  # a logarithmic axis where the values span much
    noisy: bool = True  # a long curve is drawn pale, with its running median over it
    by_stage: bool = False  # the curve has the colours of the stages


_PANELS = (
    _Panel("Loss", (("loss", "loss"),), log=True, by_stage=True),
    _Panel(
        "Answers and retrieval",
        (
            ("recall_at_1", "recall@1, training"),
            ("eval/recall_at_1", "recall@1, evaluation"),
            ("eval/exact_match", "exact match"),
            ("eval/f1", "F1"),
        ),
        share=True,
    ),
    _Panel("Prior entropy (nats)", (("prior_entropy", "prior entropy"),)),
    _Panel("Unique documents in the batch (share)", (("unique_documents", "unique documents"),), share=True),
    _Panel("Learning rate", (("learning_rate", "learning rate"),), noisy=False),
    _Panel("Tokens per second", (("tokens_per_second", "tokens per second"),)),
)


@dataclass(frozen=True)
class _Stage:
    """The rows of one stage of training; steps are counted over all stages."""

    name: str
    first: int  # step at which the shading begins: the last one of the stage before
    steps: list[int]
    rows: list[dict[str, Any]]

    def values(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of the rows in which this metric is a number."""
        has = [i for i, row in enumerate(self.rows) if _is_number(row.get(name))]
        return np.array([self.steps[i] for i in has]), np.array([float(self.rows[i][name]) for i in has])


def training_curves(metrics_jsonl: str | Path, png: str | Path) -> Path:
    """Draws the rows of a metrics.jsonl, stages shaded, as a PNG of 1200 x 800 pixels; only logged metrics get a panel.

    InputError where there is nothing to draw.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    stages = _read(Path(metrics_jsonl))
    logged = {name for stage in stages for row in stage.rows for name in row if _is_number(row[name])}
    panels = [panel for panel in _PANELS if any(name in logged for name, _ in panel.curves)]
    if not panels:
        known = ", ".join(name for panel in _PANELS for name, _ in panel.curves)
        raise InputError(f"{metrics_jsonl}: nothing to draw; no row has any of {known}")
    layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.1, hspace=0.06, wspace=0.04)
    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=_DPI, layout=layout)
    names = [name for name in dict.fromkeys(stage.name for stage in stages) if name]
    colors = {name: _STAGE_COLORS[i % len(_STAGE_COLORS)] for i, name in enumerate(names)}
    for axes, panel in zip(_grid(figure, len(panels)), panels, strict=True):
        _draw(axes, panel, stages, colors)
    if colors:
        from matplotlib.patches import Patch

        patches = [Patch(color=color, alpha=0.45, label=stage) for stage, color in colors.items()]
        figure.legend(
            handles=patches, loc="outside upper center", ncols=min(5, len(patches)), frameon=False, title="stage"
        )
    png = Path(png)
    with renamed(png) as temporary:
        figure.savefig(temporary, format="png")
    return png


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _read(path: Path) -> list[_Stage]:
    stages: list[_Stage] = []
    offset = last = 0
    for row in read_rows(path):
        name = str(row.get("stage", stages[-1].name if stages else ""))
        if offset + row["step"] < last:  # each stage counts its own steps
            offset = last
        if not stages or stages[-1].name != name:
            stages.append(_Stage(name, last if stages else row["step"], [], []))
        last = offset + row["step"]
        stages[-1].steps.append(last)
        stages[-1].rows.append(row)
    return stages


def _grid(figure: Any, n: int) -> list[Any]:
    """n axes in two columns, row by row; if n is odd, the last one spans both."""
    rows = (n + 1) // 2
    grid = figure.add_gridspec(rows, 2)
    cells = [grid[i // 2, :] if i == n - 1 and n % 2 else grid[i // 2, i % 2] for i in range(n)]
    grid_axes = [figure.add_subplot(cell) for cell in cells]
    for axes in grid_axes[-1:] if n % 2 else grid_axes[-2:]:
        axes.set_xlabel("step", fontsize=11)
    return grid_axes


def _draw(axes: Any, panel: _Panel, stages: Sequence[_Stage], colors: Mapping[str, str]) -> None:
    drawn: dict[str, list[np.ndarray]] = {}
    for stage in stages:
        if stage.name:
            axes.axvspan(stage.first, stage.steps[-1], color=colors[stage.name], alpha=0.13, linewidth=0, zorder=0)
        for line_color, (name, label) in zip(_LINE_COLORS, panel.curves, strict=False):
            steps, values = stage.values(name)
            if len(steps):
                color = colors.get(stage.name, line_color) if panel.by_stage else line_color
                # Labelled once: a curve runs through several stages, but the legend needs one entry.
                shown = label if label not in drawn else None
                _draw_curve(axes, panel, steps, values, color, shown, marked=name.startswith("eval/"))
                drawn.setdefault(label, []).append(values)
    _scale(axes, panel, np.concatenate([values for parts in drawn.values() for values in parts]))
    first, last = float(stages[0].first), float(stages[-1].steps[-1])
    axes.set_xlim((first, last) if last > first else (first - 0.5, last + 0.5))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(panel.title, loc="left", fontsize=12, fontweight="bold")
    axes.grid(color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=10)
    if len(drawn) > 1:
        axes.legend(fontsize=9, loc="best", framealpha=0.85, edgecolor="0.85")


def _draw_curve(
    axes: Any, panel: _Panel, steps: np.ndarray, values: np.ndarray, color: str, label: str | None, *, marked: bool
) -> None:
    if marked or not panel.noisy or len(values) < _SMOOTH_FROM:
        marker = "o" if marked or len(values) == 1 else None
        axes.plot(steps, values, color=color, label=label, linewidth=1.8, marker=marker, markersize=4)
        return
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smooth(values, len(values) // 20), color=color, label=label, linewidth=1.8)


def _smooth(values: np.ndarray, half: int) -> np.ndarray:
    """The running median over 2 * half + 1 points, fewer at the ends; values that are not finite are ignored."""
    finite = np.where(np.isfinite(values), values, np.nan)
    return np.array([_median(finite[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _median(window: np.ndarray) -> float:
    known = window[~np.isnan(window)]
    return float(np.median(known)) if len(known) else float("nan")


def _scale(axes: Any, panel: _Panel, values: np.ndarray) -> None:
    finite = values[np.isfinite(values)]
    if panel.share and len(finite) and finite.min() >= 0 and finite.max() <= 1:
        axes.set_ylim(-0.03, 1.03)
    elif panel.log and len(finite) and finite.min() > 0 and finite.max() > 20 * finite.min():
        axes.set_yscale("log")
    elif len(finite) and finite.min() >= 0:
        axes.set_ylim(0, 1.08 * (finite.max() or 1.0))
    if len(finite) and finite.max() >= 1000:
        axes.yaxis.set_major_formatter("{x:,.0f}")
