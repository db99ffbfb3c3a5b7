"""The picture of the training curves: its size, its content, and the metrics that it must cope with."""

import json
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from rag_jax.errors import InputError
from rag_jax.evaluation.report import training_plot


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_rows() -> list[dict]:
    rows: list[dict] = []
    for stage, first in (("reader", 0), ("joint", 1000)):
        for step in range(first + 10, first + 1001, 10):
            row = {"step": step, "stage": stage, "loss": 50 / step, "learning_rate": 1e-3, "tokens_per_second": 9000.0}
            if stage == "joint":
                row |= {"recall_at_1": 0.5, "prior_entropy": 1.2, "unique_documents": 0.8}
            rows.append(row)
        rows.append({"step": first + 1000, "stage": stage, "eval/exact_match": 0.4, "eval/recall_at_1": 0.6})
    return rows


def titles(figure: matplotlib.figure.Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def test_a_whole_run(tmp_path: Path, figures: list[matplotlib.figure.Figure]) -> None:
    png = training_plot.training_curves(write_rows(tmp_path / "metrics.jsonl", run_rows()), tmp_path / "curves.png")
    image = imread(png)
    assert image.shape[:2] == (800, 1200)
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 100  # not an empty sheet
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]
    (figure,) = figures
    assert len(titles(figure)) == 6 and titles(figure)[:2] == ["Loss", "Answers and retrieval"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["reader", "joint"]
    loss, answers = figure.axes[:2]
    assert loss.get_yscale() == "log"
    assert loss.get_xlim() == (10, 2000)
    drawn = {(line.get_label(), tuple(line.get_xdata()), tuple(line.get_ydata())) for line in answers.lines}
    assert ("exact match", (1000,), (0.4,)) in drawn
    shades = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in loss.patches]
    assert shades == [(10, 1000), (1000, 2000)]


def test_no_text_lies_over_another(tmp_path: Path, figures: list[matplotlib.figure.Figure]) -> None:
    rows = [row | {"stage": f"{row['stage']} {row['step'] // 200} with a name"} for row in run_rows()]
    training_plot.training_curves(write_rows(tmp_path / "metrics.jsonl", rows), tmp_path / "curves.png")
    (figure,) = figures
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [figure.legends[0].get_window_extent(renderer)]
    for axes in figure.axes:
        x_low, x_high = axes.get_xlim()
        y_low, y_high = axes.get_ylim()
        boxes += [axes.xaxis.label.get_window_extent(renderer), axes._left_title.get_window_extent(renderer)]
        ticks = [(t.label1, t.get_loc(), x_low, x_high) for t in axes.xaxis.get_major_ticks()]
        ticks += [(t.label1, t.get_loc(), y_low, y_high) for t in axes.yaxis.get_major_ticks()]
        boxes += [label.get_window_extent(renderer) for label, at, low, high in ticks if low <= at <= high]
    boxes = [box for box in boxes if box.width and box.height]
    assert len(boxes) > 50
    for i, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= 1200 and box.y1 <= 800
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_what_is_missing_has_no_panel(tmp_path: Path, figures: list[matplotlib.figure.Figure]) -> None:
    rows = [{"step": 1, "loss": 2.0, "stage": "a"}, {"step": 2, "prior_entropy": 0.5, "learning_rate": "none"}]
    training_plot.training_curves(write_rows(tmp_path / "metrics.jsonl", rows), tmp_path / "curves.png")
    training_plot.training_curves(
        write_rows(tmp_path / "metrics.jsonl", [{"step": 7, "loss": "NaN"}]), tmp_path / "curves.png"
    )
    assert titles(figures[0]) == ["Loss", "Prior entropy (nats)"]
    assert titles(figures[1]) == ["Loss"] and not figures[1].legends


def test_stages_that_count_from_the_start_again_follow_each_other(
    tmp_path: Path, figures: list[matplotlib.figure.Figure]
) -> None:
    rows = [{"step": step, "stage": stage, "loss": 1.0} for stage in ("a", "b", "c") for step in (10, 20, 30)]
    training_plot.training_curves(write_rows(tmp_path / "metrics.jsonl", rows), tmp_path / "curves.png")
    drawn = [list(line.get_xdata()) for line in figures[0].axes[0].lines]
    assert drawn == [[10, 20, 30], [40, 50, 60], [70, 80, 90]]


def test_long_noisy_curves_are_smoothed_within_their_stage(
    tmp_path: Path, figures: list[matplotlib.figure.Figure]
) -> None:
    rows: list[dict] = [
        {"step": i, "stage": "a" if i < 100 else "b", "loss": 1.0 if i < 100 else 9.0} for i in range(200)
    ]
    rows[50]["loss"], rows[51]["loss"] = 1000.0, "NaN"
    training_plot.training_curves(write_rows(tmp_path / "metrics.jsonl", rows), tmp_path / "curves.png")
    pale_a, smooth_a, _, smooth_b = figures[0].axes[0].lines
    assert np.nanmax(pale_a.get_ydata()) == 1000
    assert set(smooth_a.get_ydata()) == {1.0} and set(smooth_b.get_ydata()) == {9.0}


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to draw"):
        training_plot.training_curves(
            write_rows(tmp_path / "metrics.jsonl", [{"step": 1, "other": 2}]), tmp_path / "x.png"
        )
    with pytest.raises(InputError, match="no such file"):
        training_plot.training_curves(tmp_path / "absent.jsonl", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
