"""Preemption: SIGTERM says that the machine will be taken away, so the run saves its state and ends without error."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):
    """Raised when the run has stopped after `step`, with everything up to there saved."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


class Preemption:
    """Context manager: inside, SIGTERM does not end the process; `asked` says whether it came.

    With several processes, JAX catches the signal in each of them (`distributed.initialize`) and agrees on one step for
    all. A single process catches it here, if this is its main thread: Python allows signal handlers nowhere else.
    """

    def __init__(self) -> None:
        self._came = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = True

    def asked(self, step: int) -> bool:
        """Whether to stop before `step`, the same in all processes; call it before each step, in ascending order."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._came
