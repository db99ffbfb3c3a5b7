"""Untrusted text made safe to show: without control characters, escape sequences and changes of text direction.

Passages, titles, ids and answers come from anywhere. An escape sequence in one could clear the screen, change the
window's title or write into the clipboard; an override of the text direction displays another text than is there.
"""

import re

_ENDED = "(?:\x07|\x1b\\\\|\x9c)"
_STEERING = re.compile(
    "(?:\x1b[\\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c\n]*" + _ENDED  # OSC, DCS, SOS, PM, APC with their strings
    + "|(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor, screen
    + "|\x1b[ -/]*[0-~]?"  # all other escapes, and incomplete ones
    + "|[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]"  # C0 and C1 except white space
    + "|[\u202a-\u202e\u2066-\u2069]"  # embeddings, overrides and isolates of text direction
)  # fmt: skip
_LINES = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_HALVES = re.compile("[\ud800-\udfff]")  # lone halves of surrogate pairs, which cannot be encoded as UTF-8


def visible(text: str) -> str:
    """The text without control characters, escape sequences and changes of direction; line ends are \\n, tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return _HALVES.sub("\ufffd", _LINES.sub("\n", _STEERING.sub("", text)))


def one_line(text: str) -> str:
    """`visible` text with runs of white space as one blank, so that a title cannot imitate lines of our output."""
    return " ".join(visible(text).split())
