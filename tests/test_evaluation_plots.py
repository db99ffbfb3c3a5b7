"""The pictures of an evaluation: each draws what its curve says."""

from typing import Any

import matplotlib.figure
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from rag_jax.evaluation.report import evaluation_plots


def report() -> dict[str, Any]:
    curve = {"k": [1, 2, 3], "value": [0.5, 0.75, 1.0], "low": [0.4, 0.7, 0.9], "high": [0.6, 0.8, 1.0]}
    point = {
        "exact_match": 0.4,
        "exact_match_low": 0.3,
        "exact_match_high": 0.5,
        "f1": 0.6,
        "f1_low": 0.5,
        "f1_high": 0.8,
    }
    bins = [
        {"n": 2, "confidence": 0.2, "right": 0.5, "low": 0.1, "high": 0.9},
        {"n": 8, "confidence": 0.9, "right": 0.7, "low": 0.5, "high": 0.8},
    ]
    found = {"n": 10, "error": 0.22, "bins": bins}
    return {
        "curves": {
            "recall": {"gold": curve, "answer": {**curve, "k": [1, 2, 50]}},
            "n_docs": [{"n_docs": 1, **point}, {"n_docs": 50, **point}],
            "calibration": {"prior": found, "posterior": found, "answer": found, "token": found},
        },
        "risk_coverage": [(0.5, 0.1), (1.0, 0.3)],
    }


def lines(figure: matplotlib.figure.Figure) -> dict[str, tuple[list, list]]:
    """The drawn lines by label; the points of error bars are lines, too."""
    axes = figure.axes[0]
    names = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    found = {name: getattr(handle, "lines", [handle])[0] for name, handle in names.items()}
    return {name: (list(line.get_xdata()), list(line.get_ydata())) for name, line in found.items()}


def test_every_curve_has_its_picture(tmp_path, figures):
    pictures = evaluation_plots.draw(report(), tmp_path)
    names = ["recall.png", "n_docs.png", "calibration_passages.png", "calibration_answers.png", "risk_coverage.png"]
    assert [picture.file for picture in pictures] == names and sorted(names) == sorted(
        p.name for p in tmp_path.iterdir()
    )
    for name in names:
        image = imread(tmp_path / name)
        assert image.shape[:2] == (462, 704) and len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 50
    recall, by_docs, passages, answers, risk = map(lines, figures)
    assert recall["a gold passage"] == ([1, 2, 3], [0.5, 0.75, 1.0])
    assert by_docs["exact match"][1] == [0.4, 0.4] and by_docs["F1"][1] == [0.6, 0.6]
    np.testing.assert_allclose([*by_docs["exact match"][0], *by_docs["F1"][0]], [1, 50, 1.02, 51])
    assert passages["posterior"] == answers["p(y|x)"] == ([0.2, 0.9], [0.5, 0.7])
    assert not risk and figures[4].axes[0].lines[0].get_xdata().tolist() == [0.5, 1.0]
    assert "prior 0.220, posterior 0.220" in pictures[2].about
    assert figures[0].axes[0].get_xscale() == "log" and figures[0].axes[0].get_ylim()[0] < 0.4


def test_texts_lie_within_the_picture_and_over_nothing(tmp_path, figures):
    evaluation_plots.draw(report(), tmp_path)
    for figure in figures:
        renderer, axes = FigureCanvasAgg(figure).get_renderer(), figure.axes[0]
        texts = [axes.xaxis.label, axes.yaxis.label, axes._left_title, *figure.legends]
        texts += [label for label in (*axes.get_xticklabels(), *axes.get_yticklabels()) if label.get_text()]
        boxes = [text.get_window_extent(renderer) for text in texts]
        for box in boxes[: 3 + len(figure.legends)]:
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= 704 and box.y1 <= 462
            assert not any(box.overlaps(other) for other in boxes if other is not box)


def test_what_is_not_there_has_no_picture_and_an_old_one_is_gone(tmp_path):
    evaluation_plots.draw(report(), tmp_path)
    one = {"curves": {"recall": {"gold": {"k": [1], "value": [0.0], "low": [0.0], "high": [0.0]}}, "calibration": {}}}
    assert [picture.file for picture in evaluation_plots.draw(one, tmp_path)] == ["recall.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["recall.png"]
    assert evaluation_plots.draw({}, tmp_path) == [] and not list(tmp_path.iterdir())
