"""An XLA trace on disk, for TensorBoard, XProf or Perfetto: whole, or not there."""

import secrets
from pathlib import Path

import jax

from rag_jax.errors import InputError
from rag_jax.system import disk_errors, files


class Trace:
    """Writes directory/plugins/profile/TIME/HOST.xplane.pb, by way of a hidden directory beside it.

    InputError where the directory cannot be made, and from `stop` where the disk is full.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._temporary: Path | None = None

    def prepare(self) -> None:
        """Makes the directory, so that what is wrong with it is said before any work."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._error(error) from error

    def start(self) -> None:
        self.prepare()
        temporary = self.directory / f".trace.building-{secrets.token_hex(4)}"
        jax.profiler.start_trace(str(temporary))
        self._temporary = temporary

    def stop(self) -> None:
        """Ends the trace, if one is under way."""
        temporary, self._temporary = self._temporary, None
        if temporary is None:
            return
        try:
            jax.profiler.stop_trace()
            for made in (temporary / "plugins" / "profile").iterdir():
                target = self.directory / "plugins" / "profile" / made.name
                target.mkdir(parents=True, exist_ok=True)  # other processes of the run write there, too
                for file in made.iterdir():
                    file.rename(target / file.name)
        except Exception as error:
            if disk_errors.number(error) is None:
                raise
            raise self._error(error) from error
        finally:
            files.remove_tree(temporary)

    def _error(self, error: Exception) -> InputError:
        what = f"{self.directory}: no trace can be written there"
        return InputError(disk_errors.words(error, what) or f"{what} ({error})")
