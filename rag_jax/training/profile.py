"""An XLA trace of a few steps of training."""

from pathlib import Path

import jax

from rag_jax.errors import InputError
from rag_jax.system import logs
from rag_jax.system.trace import Trace

STEPS = 3


class Profile:
    """A trace of STEPS steps, the first of which is step `at` of the run, in a directory that all processes share.

    Training goes on where a trace cannot be written: a line in the log says why.
    """

    def __init__(self, directory: Path, at: int) -> None:
        self.directory, self.at = directory, at
        self._trace = Trace(directory)
        self._running = False

    def prepare(self) -> None:
        """Makes the directory; InputError where that cannot be done."""
        self._trace.prepare()

    def before(self, step: int) -> None:
        """Begins where the next update is number `step`."""
        if step == self.at and not self._running:
            try:
                self._trace.start()
            except InputError as error:
                logs.info(f"warning: {error}; training goes on without it")
            else:
                self._running = True

    def after(self, step: int, state: object) -> None:
        """Ends once update number `step` is the last one wanted; waits for the devices."""
        if self._running and step >= self.at + STEPS - 1:
            jax.block_until_ready(state)
            self.stop()

    def stop(self) -> None:
        """Ends a trace that is under way, however many steps it has."""
        if not self._running:
            return
        self._running = False
        try:
            self._trace.stop()
        except InputError as error:
            logs.info(f"warning: {error}; training goes on without it")
        else:
            logs.info(f"{self.directory}: trace of steps from {self.at} on; tensorboard --logdir {self.directory}")
