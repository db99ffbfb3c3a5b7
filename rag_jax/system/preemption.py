"""SIGTERM: the machine is about to be taken away. The run saves what it has, and ends as if all were well."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):
    """The run has stopped after `step`, and everything up to there is saved."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


class Preemption:
    """Context manager: inside, SIGTERM does not end the process, and `asked` tells of it.

    Of several processes, JAX hears it in each (`distributed.initialize`) and agrees on a step with the others. A
    process alone listens here, if this is its main thread.
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
        """Whether to stop before `step`, the same in all processes; asked before each step, in ascending order."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._came
