"""Cuts long documents into passages of about equal length, at the ends of sentences where there are some."""

import re
from bisect import bisect_left, bisect_right
from dataclasses import replace
from itertools import accumulate

from rag_jax.data.readers.formats import Passage

# Scripts written without spaces: each character is a word of its own here and counts half.
_CJK = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
)
_HALF = re.compile(f"[{_CJK}]")
_ATOM = re.compile(f"[{_CJK}]|[^\\s{_CJK}]+")
_END = re.compile("[.!?…。！？．｡؟۔।॥][\"'”’»)\\]」』）]*$")
_CLOSERS = frozenset("。！？．｡”’」』）")


def cut(passage: Passage, words: int) -> list[Passage]:
    """The pieces of a passage, of about `words` words, with ids `<id>-<n>` and the same document.

    A passage of up to twice that many words stays whole; every passage does with words=0.
    """
    text = passage.text
    if not words or len(text) <= 4 * words:  # a word takes two characters with its space, a CJK half-word one
        return [passage]
    if text.isascii() and len(text.split()) <= 2 * words:
        return [passage]
    atoms = list(_ATOM.finditer(text))
    ends = list(accumulate(0.5 if _half(atom[0]) else 1.0 for atom in atoms))
    if not ends or ends[-1] <= 2 * words:
        return [passage]
    pieces = round(ends[-1] / words)
    target = ends[-1] / pieces
    last = [i for i in range(len(atoms) - 1) if _ends_sentence(text, atoms, i)]
    sentence_ends = [ends[i] for i in last]
    starts = [0]
    for piece in range(1, pieces):
        ideal = piece * target
        low = bisect_left(sentence_ends, ideal - 0.3 * target)
        high = bisect_right(sentence_ends, ideal + 0.3 * target)
        near = min(range(low, high), key=lambda i: abs(sentence_ends[i] - ideal), default=None)
        starts.append((last[near] if near is not None else bisect_left(ends, ideal)) + 1)
    stops = [*(start - 1 for start in starts[1:]), len(atoms) - 1]
    return [
        replace(passage, id=f"{passage.id}-{n}", text=text[atoms[start].start() : atoms[stop].end()])
        for n, (start, stop) in enumerate(zip(starts, stops, strict=True))
    ]


def _half(word: str) -> bool:
    return _HALF.match(word) is not None


def _ends_sentence(text: str, atoms: list[re.Match[str]], i: int) -> bool:
    """Whether a cut after atom i falls between sentences or paragraphs, and not before a closing mark."""
    if atoms[i + 1][0] in _CLOSERS:
        return False
    if "\n" in text[atoms[i].end() : atoms[i + 1].start()].replace("\r", "").strip(" \t")[1:]:
        return True
    # "3.5" or "example.com" written into CJK text is no end: a Latin mark counts only before space.
    word = atoms[i][0]
    if _END.search(word) is None:
        return word in _CLOSERS and i > 0 and atoms[i - 1][0] in "。！？．｡"
    return _half(word) or atoms[i + 1].start() > atoms[i].end()
