"""The Markdown report: it contains all that it was given and nothing else, and no text breaks its tables."""

import json
import re
from pathlib import Path

from rag_jax.evaluation.report import markdown
from rag_jax.evaluation.report.evaluation_plots import Picture

NASTY = 'a|b `c` *d* _e_ <script> [x](y) \\| # $1$ &amp;\n\nnew "line"'

FULL = {
    "about": [("Run | this", "runs/a")],
    "config": "configs/quickstart.py",
    "seed": 3,
    "seconds": 412.3,
    "stages": [{"name": "reader", "steps": 1200, "seconds": 150.2}, {"name": "joint|x", "steps": 900}],
    "n": 1234,
    "exact_match_unseen": 0.9534,
    "exact_match_unseen_low": 0.93,
    "exact_match_unseen_high": 0.97,
    "f1": 0.5,
    "recall_at_1": 0.25,
    "answer_recall_at_20": 1,
    "closed_book_exact_match": 0.0,
    "hot_swap_exact_match": 0.875,
    "commands": ["rag-jax world --out data", "rag-jax train configs/quickstart.py"],
}
EXAMPLES = [
    {
        "question": f"Who? {NASTY}",
        "prediction": NASTY,
        "answers": [NASTY, "Velor"],
        "gold": ["p1"],
        "right": True,
        "passages": [
            {"id": "p0", "title": NASTY, "text": NASTY * 20, "prior": 0.75, "posterior": 0.125},
            {"id": "p1", "title": "", "text": "short", "prior": 0.25, "posterior": 0.875},
        ],
    },
    {"question": "Когда?", "prediction": "", "answers": []},
]


def table_rows(page: str) -> list[list[str]]:
    """The cells of the table rows, split at pipes that are not escaped."""
    rows = [line for line in page.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1]] for line in rows]


def test_everything_given_is_on_the_page(tmp_path: Path) -> None:
    pictures = [Picture("curves.png", "Curves|of", "What | is there")]
    page = markdown.write(tmp_path, FULL, EXAMPLES, pictures).read_text(encoding="utf-8")
    rows = table_rows(page)
    assert ["reader", "1,200", "150"] in rows and ["joint\\|x", "900", ""] in rows
    assert ["Exact match, unseen entities", "95.3", "93.0 to 97.0"] in rows
    figures = [row[1] for row in rows if len(row) == 3 and row[0][0] in "EFRAC" and row[1].replace(".", "").isdigit()]
    assert figures == ["95.3", "50.0", "25.0", "100.0", "0.0", "87.5"]
    assert ["2 (gold)", "0.250", "0.875", "short"] in rows
    for part in (
        "Seed: 3",
        "6:52 (412 s)",
        "Over 1,234 questions.",
        "![Curves\\|of](curves.png)",
        "What \\| is there",
        "**, right (wanted",
        "- Run \\| this: runs/a",
        "Когда?",
        "(nothing)",
        "or Velor",
    ):
        assert part in page
    assert "```bash\n" + "\n".join(FULL["commands"]) + "\n```" in page  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]


def test_no_text_breaks_the_page(tmp_path: Path) -> None:
    page = markdown.write(tmp_path, {"title": NASTY, "stages": [{"name": NASTY}]}, EXAMPLES).read_text(encoding="utf-8")
    widths = {len(row) for row in table_rows(page)}
    assert widths == {3, 4}  # the stages and the passages: no cell more
    assert "<script>" not in page
    for mark in ("`", "*d", "_e", "[x", "# $", "$1"):
        assert not re.findall(r"(?<!\\)(?:\\\\)*" + re.escape(mark), page), mark
    assert len([line for line in page.splitlines() if line.startswith("| 1 |")]) == 1
    longest = max(len(cell) for row in table_rows(page) for cell in row)
    assert longest < 700  # passages are cut to the beginning


def test_absent_keys_leave_no_trace(tmp_path: Path) -> None:
    page = markdown.write(tmp_path, {}, []).read_text(encoding="utf-8")
    assert page == f"# Report of {tmp_path.name.replace('_', chr(92) + '_')}\n"
    page = markdown.write(tmp_path, {"f1": 0.5}, []).read_text(encoding="utf-8")
    assert table_rows(page) == [["Figure", "%"], ["---", "---:"], ["F1", "50.0"]]
    assert "##" in page and "Curves" not in page and "again" not in page


def test_a_config_given_whole_is_shown_as_json(tmp_path: Path) -> None:
    config = {"batch_size": 16, "note": "has ``` in it", "path": tmp_path}
    page = markdown.write(tmp_path, {"config": config}, []).read_text(encoding="utf-8")
    block = re.search(r"^````json\n(.*?)^````$", page, re.DOTALL | re.MULTILINE)
    assert block and json.loads(block[1]) == config | {"path": str(tmp_path)}
