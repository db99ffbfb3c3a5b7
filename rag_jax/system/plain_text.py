"""Texts of others as they may be shown: without what would steer a terminal or show letters in another order.

Passages, titles, ids and answers come from anywhere. An escape sequence in one could clear the screen, change the
window's title or write into the clipboard; an override of direction shows a text that is not there.
"""

import re

_ENDED = "(?:\x07|\x1b\\\\|\x9c)"
_STEERING = re.compile(
    "(?:\x1b[\\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c\n]*" + _ENDED  # OSC, DCS, SOS, PM, APC with their strings
    + "|(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor, screen
    + "|\x1b[ -/]*[0-~]?"  # all other escapes, and those that are cut off
    + "|[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]"  # C0 and C1 but for white space
    + "|[\u202a-\u202e\u2066-\u2069]"  # embeddings, overrides and isolates of direction
)  # fmt: skip
_LINES = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_HALVES = re.compile("[\ud800-\udfff]")  # of surrogate pairs, which no stream takes


def visible(text: str) -> str:
    """The text without control characters, escape sequences and changes of direction; line ends are \\n, tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return _HALVES.sub("\ufffd", _LINES.sub("\n", _STEERING.sub("", text)))


def one_line(text: str) -> str:
    """The same with every white space as one blank, so that a title cannot look like several lines of ours."""
    return " ".join(visible(text).split())
