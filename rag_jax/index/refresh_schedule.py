"""When the index is refreshed while training: the syntax of a stage's `refresh`, and which steps it makes due.

""                       only at the start of the stage
250                      every 250 steps; also `epoch`, `2epoch`
0-1000:250,1000-:1000    every 250 steps up to step 1000 of the stage, then every 1000
rolling:500              N/500 rows in every step, inside it: no row is ever older than 500 steps
background:250           a build is begun every 250 steps beside training, and used 250 steps later
background+50:250        used 50 steps after it was begun
                         (both earlier where another span begins the next build before that)
when:overlap<0.9         rebuilt when recall@k of the stored index against fresh embeddings is below 0.9; measured every
                         50 steps
when:overlap<0.9:20      measured every 20 steps
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rag_jax.errors import InputError

CHECK_EVERY = 50
UNKNOWN = 2**30  # stands for the steps of an epoch until the questions are read
WORDS = (
    "expected steps (250, epoch, 2epoch), a schedule (0-1000:250,1000-:1000), rolling:500, background:250, "
    "background+50:250 or when:overlap<0.9"
)


@dataclass(frozen=True)
class Schedule:
    """A parsed refresh schedule; steps count from the start of the stage.

    spans: (first step, step after the last or None for no end, steps between two refreshes), ascending.
    turn: steps in which a rolling refresh embeds every row once.
    lag: steps from the beginning of a background build to its use; 0: as many as between two builds.
    overlap: of `when`, the recall@k below which the index is rebuilt.
    """

    kind: Literal["synchronous", "rolling", "background", "when"] = "synchronous"
    spans: tuple[tuple[int, int | None, int], ...] = ()
    turn: int = 0
    lag: int = 0
    overlap: float = 0.0

    def due(self, into: int) -> bool:
        """Whether a refresh, a background build or a measurement begins at step `into` of the stage."""
        for first, stop, every in self.spans:
            if first <= into and (stop is None or into < stop):
                return (into - first) % every == 0
        return False

    def begun(self, into: int) -> int | None:
        """The step at which the background build to be used from step `into` on was begun; None if none is due.

        Only one build runs at a time, so a build is used at the latest when the next one begins, even if its lag is not
        over: indexes are used in the order of their steps, and each once.
        """
        began, every = max((span_last(span, into) for span in self.spans), default=(0, 0))
        if not began:
            return None
        put = began + (self.lag or every)
        return began if into == put or (into < put and self.due(into)) else None


def span_last(span: tuple[int, int | None, int], into: int) -> tuple[int, int]:
    """The last step before `into` at which a build of the span begins, and the steps between builds; (0, 0) for none.

    No build begins at step 0 of a stage, when its index has just been built.
    """
    first, stop, every = span
    last = min(into, into if stop is None else stop) - 1
    step = first + (last - first) // every * every
    return (step, every) if last >= first and step > 0 else (0, 0)


def rolling(rest: str, lag: str, epoch: int, text: str) -> Schedule:
    return Schedule("rolling", turn=count(rest, epoch, text))


def background(rest: str, lag: str, epoch: int, text: str) -> Schedule:
    found = Schedule("background", spans(rest, epoch, text), lag=int(lag or 0))
    shortest = min(every for _, _, every in found.spans)
    if found.lag >= shortest:
        raise InputError(f"refresh={text!r}: a build takes {found.lag} steps, and the next begins after {shortest}")
    return found


def when_overlap(rest: str, lag: str, epoch: int, text: str) -> Schedule:
    match = re.fullmatch(r"overlap<(0?\.\d+|1(?:\.0*)?)(?::(.+))?", rest)
    if not match:
        raise InputError(f"refresh={text!r}: expected when:overlap<X or when:overlap<X:STEPS, with X up to 1")
    every = count(match[2], epoch, text) if match[2] else CHECK_EVERY
    return Schedule("when", ((0, None, every),), overlap=float(match[1]))


# WORD of `WORD:REST` or `WORD+LAG:REST` -> function (REST, LAG, steps of an epoch, the whole text) -> Schedule. All
# other texts are spans. Your own schedule is a row here; a subclass of Schedule may override which steps are due.
SCHEDULES: dict[str, Callable[[str, str, int, str], Schedule]] = {
    "rolling": rolling,
    "background": background,
    "when": when_overlap,
}


def parse(text: str, epoch: int = UNKNOWN) -> Schedule:
    """The schedule of a stage's `refresh`; InputError for a text that is none of the above. epoch: its steps."""
    word, _, rest = text.partition(":")
    name, _, lag = word.partition("+")
    if name in SCHEDULES and (word == name or (name == "background" and lag.isdigit())):
        return SCHEDULES[name](rest, lag, epoch, text)
    return Schedule(spans=spans(text, epoch, text) if text else ())


def count(text: str, epoch: int, whole: str) -> int:
    """Number of steps in `250`, `epoch` or `2epoch`; whole: the text that the InputError shows."""
    match = re.fullmatch(r"(\d+)|(\d*)epoch", text)
    steps = 0 if not match else int(match[1]) if match[1] else int(match[2] or 1) * epoch
    if steps < 1:
        raise InputError(f"refresh={whole!r}: {WORDS}")
    return steps


def spans(text: str, epoch: int, whole: str) -> tuple[tuple[int, int | None, int], ...]:
    """Parses `250` or `0-1000:250,1000-:1000`; InputError for spans that are empty, overlap or do not ascend."""
    if ":" not in text:
        return ((0, None, count(text, epoch, whole)),)
    found: list[tuple[int, int | None, int]] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)-(\d*):(\w+)", part)
        if not match:
            raise InputError(f"refresh={whole!r}: {part!r} is no FIRST-LAST:STEPS; {WORDS}")
        first, stop = int(match[1]), int(match[2]) if match[2] else None
        if (stop is not None and stop <= first) or (found and (found[-1][1] is None or first < found[-1][1])):
            raise InputError(f"refresh={whole!r}: the span {part!r} is empty, or begins before the one before it ends")
        found.append((first, stop, count(match[3], epoch, whole)))
    return tuple(found)
