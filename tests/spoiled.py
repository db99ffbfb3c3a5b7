"""Predictions made from real questions, deterministic: every kind of right and wrong answer."""

import json
from pathlib import Path

SPOILS = (
    lambda words, other: words,
    lambda words, other: ["The", *words, "!"],
    lambda words, other: [word.upper() for word in words],
    lambda words, other: words[:-1],
    lambda words, other: words[1:] + other[:2],
    lambda words, other: words[::-1],
    lambda words, other: other,
    lambda words, other: [*words, *words[:1], "a", "(1,000)"],
    lambda words, other: words[: len(words) // 2] + other[len(other) // 2 :],
    lambda words, other: [],
    lambda words, other: ["«", *words, "—", "x-y"],
)


def rows(path: Path, limit: int) -> list[dict]:
    """The first rows of a JSONL file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line, _ in zip(file, range(limit), strict=False)]


def predictions(golds: list[list[str]]) -> list[str]:
    """One prediction for each list of gold texts: one of them, unchanged or spoiled in one of eleven ways."""
    made = []
    for i, texts in enumerate(golds):
        words, other = texts[i % len(texts)].split(), golds[(i * 7 + 3) % len(golds)][0].split()
        made.append(" ".join(SPOILS[i % len(SPOILS)](words, other)))
    return made
