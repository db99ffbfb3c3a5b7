"""When the index is made anew while training: the words of `refresh` in a stage, and what they say of a step.

""                       at the stage's start only
250                      every 250 steps; also `epoch`, `2epoch`
0-1000:250,1000-:1000    every 250 steps up to step 1000 of the stage, then every 1000
rolling:500              N/500 rows in every step, inside it: no row is ever older than 500 steps
background:250           begun every 250 steps beside training, put in place 250 steps later
background+50:250        put in place 50 steps after it was begun
                         (both earlier where another span begins the next one before that)
when:overlap<0.9         when the stored index and fresh embeddings disagree: measured every 50 steps
when:overlap<0.9:20      measured every 20 steps
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rag_jax.errors import InputError

CHECK_EVERY = 50
UNKNOWN = 2**30  # steps of an epoch before the questions are read
WORDS = (
    "expected steps (250, epoch, 2epoch), a schedule (0-1000:250,1000-:1000), rolling:500, background:250, "
    "background+50:250 or when:overlap<0.9"
)


@dataclass(frozen=True)
class Schedule:
    """spans: (first step, last step or None, every), in order; turn: steps of a rolling turn; lag: steps from the
    beginning of a background build to its use; overlap: the least that is borne. Steps count from the stage's start.
    """

    kind: Literal["synchronous", "rolling", "background", "when"] = "synchronous"
    spans: tuple[tuple[int, int | None, int], ...] = ()
    turn: int = 0
    lag: int = 0
    overlap: float = 0.0

    def due(self, into: int) -> bool:
        """Whether step `into` of the stage is one of the spans' steps."""
        for first, stop, every in self.spans:
            if first <= into and (stop is None or into < stop):
                return (into - first) % every == 0
        return False

    def begun(self, into: int) -> int | None:
        """The step at which the background build that is put in place at step `into` was begun; None if none is.

        One build is under way at a time, so the last one is put in place before the next begins, however little of its
        lag is over: indexes come in the order of their steps, and each once.
        """
        began, every = max((span_last(span, into) for span in self.spans), default=(0, 0))
        if not began:
            return None
        put = began + (self.lag or every)
        return began if into == put or (into < put and self.due(into)) else None


def span_last(span: tuple[int, int | None, int], into: int) -> tuple[int, int]:
    """The last step before `into` at which a build of the span begins, and the steps from one to the next; (0, 0) where
    there is none. (At step 0 of a stage its index has just been made.)
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


# WORD of `WORD:REST` or `WORD+LAG:REST` -> (REST, LAG, steps of an epoch, the whole text) -> its schedule. All other
# texts are spans. One of your own is a row here; a subclass of Schedule may decide otherwise which steps are due.
SCHEDULES: dict[str, Callable[[str, str, int, str], Schedule]] = {
    "rolling": rolling,
    "background": background,
    "when": when_overlap,
}


def parse(text: str, epoch: int = UNKNOWN) -> Schedule:
    """InputError for what is none of the words above. epoch: steps of one."""
    word, _, rest = text.partition(":")
    name, _, lag = word.partition("+")
    if name in SCHEDULES and (word == name or (name == "background" and lag.isdigit())):
        return SCHEDULES[name](rest, lag, epoch, text)
    return Schedule(spans=spans(text, epoch, text) if text else ())


def count(text: str, epoch: int, whole: str) -> int:
    """Steps, from `250`, `epoch` or `2epoch`."""
    match = re.fullmatch(r"(\d+)|(\d*)epoch", text)
    steps = 0 if not match else int(match[1]) if match[1] else int(match[2] or 1) * epoch
    if steps < 1:
        raise InputError(f"refresh={whole!r}: {WORDS}")
    return steps


def spans(text: str, epoch: int, whole: str) -> tuple[tuple[int, int | None, int], ...]:
    """`250` or `0-1000:250,1000-:1000`; they may not overlap."""
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
