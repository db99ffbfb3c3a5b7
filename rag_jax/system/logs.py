"""Progress and lines for people on stderr; metrics for programs in metrics.jsonl and TensorBoard event files."""

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from rag_jax.errors import InputError
from rag_jax.system import plain_text
from rag_jax.system.renaming import renamed, sync

METRICS_FILE = "metrics.jsonl"
LINE_SECONDS = 10.0
BAR_SECONDS = 0.2

_now = time.monotonic
_silent = threading.Event()  # global, like stderr itself


_stamp: list[str] = []  # one text between the time and a line; an empty list: lines have no time either


@contextlib.contextmanager
def stamped(process: int, processes: int) -> Iterator[None]:
    """Context manager: inside, every line begins with the time and, with several processes, which: `14:03:21 2/8`."""
    _stamp[:] = [f"{process}/{processes} " if processes > 1 else ""]
    try:
        yield
    finally:
        _stamp.clear()


def silence() -> None:
    """From now on this process prints neither lines nor progress, since another process of the same command does."""
    _silent.set()


def info(message: str) -> None:
    """Writes one line to stderr, above a progress bar if there is one."""
    if _silent.is_set():
        return
    message = plain_text.visible(message)
    message = f"{time.strftime('%H:%M:%S')} {_stamp[0]}{message}" if _stamp else message
    if sys.stderr.isatty():
        tqdm.write(message, file=sys.stderr)
    else:
        print(message, file=sys.stderr, flush=True)


class Progress:
    """Context manager that shows progress: a bar on a terminal, else a line at the start, every 10 s and at the end.

    total: None means unknown.
    initial: counts as done, but not in the rate.
    Values given to `update` are turned into text only when they are shown, so that a loop that passes arrays on the
    device does not wait for them at every step.
    """

    def __init__(self, total: int | None, desc: str, unit: str = "it", initial: int = 0) -> None:
        self.total, self.desc, self.unit, self.initial = total, desc, unit, initial
        self.done = initial
        self._values: dict[str, Any] = {}
        self._bar: tqdm | None = None

    def __enter__(self) -> Self:
        self._start = self._shown_at = _now()
        self._shown_done = self.done
        if sys.stderr.isatty() and not _silent.is_set():
            self._bar = tqdm(
                total=self.total, desc=self.desc, unit=self.unit, initial=self.initial, file=sys.stderr,
                dynamic_ncols=True, unit_scale=(self.total or 0) >= 100_000, mininterval=BAR_SECONDS,
            )  # fmt: skip
        else:
            info(f"{self.desc}: {self._count()}")
        return self

    def update(self, n: int = 1, **shown_values: Any) -> None:
        """Counts n more as done; `shown_values` (numbers, 0-d arrays or strings) are shown until they are replaced."""
        self.done += n
        self._values.update(shown_values)
        if self._bar is not None:
            self._bar.update(n)
        now = _now()
        if _silent.is_set() or now - self._shown_at < (LINE_SECONDS if self._bar is None else BAR_SECONDS):
            return
        if self._bar is None:
            # The rate since the last line: an average over all would include the first step, which compiles.
            rate = (self.done - self._shown_done) / (now - self._shown_at)
            info(f"{self.desc}: {self._count()}{self._rate(rate)}{self._left(rate)}{self._shown_values()}")
        else:
            self._bar.set_postfix_str(self._shown_values().removeprefix(", "))
        self._shown_at, self._shown_done = now, self.done

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            if kind is None:  # after an error the values may be what failed: do not touch them
                self._bar.set_postfix_str(self._shown_values().removeprefix(", "))
            self._bar.close()
            return
        seconds = _now() - self._start
        if kind is not None:
            info(f"{self.desc}: stopped at {self._count()} after {clock(seconds)}")
            return
        rate = (self.done - self.initial) / seconds if seconds > 0 else 0.0
        info(f"{self.desc}: {self._count()} in {clock(seconds)}{self._rate(rate)}{self._shown_values()}")

    def _count(self) -> str:
        if self.total is None:
            return f"{self.done:,} {self.unit}"
        percent = f" ({100 * self.done // self.total}%)" if self.total else ""
        return f"{self.done:,}/{self.total:,} {self.unit}{percent}"

    def _rate(self, rate: float) -> str:
        if rate <= 0:
            return ""
        return f", {rate:,.{1 if rate < 100 else 0}f} {self.unit}/s" if rate >= 1 else f", {1 / rate:.1f} s/{self.unit}"

    def _left(self, rate: float) -> str:
        return "" if self.total is None or rate <= 0 else f", {clock((self.total - self.done) / rate)} left"

    def _shown_values(self) -> str:
        return "".join(f", {name}={_short(value)}" for name, value in self._values.items())


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from an hour on."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{second:02}" if hours else f"{minutes}:{second:02}"


def _short(value: Any) -> str:
    value = plain(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plain(value: Any) -> Any:
    """The Python number in a 0-d array or NumPy scalar (exact, since float32 widens); other values unchanged."""
    return value.item() if hasattr(value, "item") else value


class MetricWriter:
    """Appends rows to `run_dir/metrics.jsonl` and scalars to event files in `run_dir/tensorboard`.

    Opening keeps the rows that are there, except a last line torn by a kill.
    resume_step: also drops rows with a larger step, which the resumed run will write again.
    Only one process at a time may write.
    """

    def __init__(self, run_dir: str | Path, resume_step: int | None = None) -> None:
        from tensorboardX.event_file_writer import EventsWriter  # synchronous, so a kill loses no queued events

        self.path = Path(run_dir) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _restore(self.path, resume_step)
        self._file = self.path.open("ab", buffering=0)
        events_dir = self.path.parent / "tensorboard"
        events_dir.mkdir(exist_ok=True)
        # The suffix keeps two files of the same second apart: opening the same name would empty the first.
        self._events = EventsWriter(str(events_dir / "events"), f".{os.getpid()}.{time.time_ns()}")
        if resume_step is not None:
            self._purge_events(resume_step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one row: numbers and 0-d arrays in full precision, strings (such as `stage`) only to metrics.jsonl.

        JSON has no NaN: numbers that are not finite are written as "NaN", "Infinity" or "-Infinity", and `read_rows`
        converts them back.
        """
        row = {"step": int(step)} | {name: plain(value) for name, value in values.items()}
        row_json = {name: _json_value(value) for name, value in row.items()}
        line = json.dumps(row_json, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        while line:  # on a disk that fills, less is taken than offered
            line = line[self._file.write(line) :]
        scalars = {name: float(value) for name, value in row.items() if name != "step" and not isinstance(value, str)}
        self._write_event(int(step), scalars)

    def close(self) -> None:
        """Closes both files; the writer cannot be used afterwards."""
        self._file.close()
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_event(self, step: int, scalars: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._events.flush()

    def _purge_events(self, resume_step: int) -> None:
        """Tells TensorBoard to forget the steps from resume_step + 1 on, written before the restart."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        start = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(wall_time=time.time(), step=resume_step + 1, session_log=start))
        self._events.flush()


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without a torn last line; InputError for a broken line elsewhere or no file."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; training writes it into its run directory")
    return [{name: _float_value(name, value) for name, value in row.items()} for row, _ in _parse(Path(path))]


def _parse(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    lines = path.read_bytes().split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError('no integer "step"')
        except ValueError as error:
            if number == len(lines):
                break
            raise InputError(f"{path}:{number}: not a metrics row ({error}); remove the line or the file") from error
        parsed.append((row, line))
    return parsed


def _restore(path: Path, resume_step: int | None) -> None:
    """Rewrites the file without a torn last line and without rows after `resume_step`; others keep their bytes."""
    if not path.exists():
        return
    kept = [line for row, line in _parse(path) if resume_step is None or row["step"] <= resume_step]
    content = b"".join(line + b"\n" for line in kept)
    if content == path.read_bytes():
        return
    with renamed(path) as temporary:
        temporary.write_bytes(content)
        sync(temporary)


_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _json_value(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _float_value(name: str, value: Any) -> Any:
    return _NOT_FINITE.get(value, value) if isinstance(value, str) and name != "stage" else value
