"""An XLA trace of a few steps of training, for TensorBoard, XProf or Perfetto."""

from pathlib import Path

import jax

from rag_jax.system import logs

STEPS = 3


class Profile:
    """Writes DIR/plugins/profile/... of STEPS steps, the first of which is step `at` of the run; each process its
    own.
    """

    def __init__(self, directory: Path, at: int) -> None:
        self.directory, self.at = directory, at
        self._running = False

    def before(self, step: int) -> None:
        """Begins where the next update is number `step`."""
        if step == self.at and not self._running:
            jax.profiler.start_trace(str(self.directory))
            self._running = True

    def after(self, step: int, state: object) -> None:
        """Ends once update number `step` is the last one wanted; waits for the devices."""
        if self._running and step >= self.at + STEPS - 1:
            jax.block_until_ready(state)
            self.stop()

    def stop(self) -> None:
        """Ends a trace that is under way, however many steps it has."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            logs.info(f"{self.directory}: trace of steps from {self.at} on; tensorboard --logdir {self.directory}")
