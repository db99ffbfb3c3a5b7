"""A lock on a directory that only one command at a time may write to; the file `train.lock` names its holder.

Two mechanisms together, as neither is enough. The kernel's lock (flock) is released as soon as its process ends, but
some shared file systems do not support it, or not between hosts. The content of the file (host, process, when that
started) is visible everywhere. Whether the holder still runs is seen on its own host by its process, and on other hosts
by the modification time of the file, which the holder renews.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rag_jax.errors import InputError

NAME = "train.lock"
BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0  # a holder on another host that has not renewed the file for so long is dead
SETTLE_SECONDS = 0.5  # without flock: after this, two processes that took a stale lock at once see who wrote last
NO_FLOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class Lock:
    """A lock that this process holds; call `check` before every write that two processes must not both do."""

    def __init__(self, path: Path, descriptor: int, token: str) -> None:
        self.path, self._descriptor, self._token = path, descriptor, token
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """InputError where another process has taken the lock because this one seemed dead."""
        holder = read(self.path)
        if holder.get("token") != self._token:
            raise InputError(
                f"{self.path}: this process had to stop for over {STALE_SECONDS:.0f} s, and {named(holder)} trains "
                "here now; this one ends"
            )

    def release(self) -> None:
        self._done.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if read(self.path).get("token") == self._token:
                self.path.unlink()
        os.close(self._descriptor)

    def _beat(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._descriptor)


@contextlib.contextmanager
def held(directory: Path) -> Iterator[Lock]:
    """Holds the lock of a directory, which is made if it is missing.

    InputError with the holder's host and process where another process has the lock.
    """
    path = directory / NAME
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = _take(path)
    except OSError as error:
        raise InputError(f"{directory}: cannot be written ({error}); make room, or name another directory") from error
    try:
        yield lock
    finally:
        lock.release()


def read(path: Path) -> dict[str, Any]:
    """The content of a lock file, which describes the holder; {} where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def named(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', 'another host')}"


def _take(path: Path) -> Lock:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            locked = _flock(descriptor)
            if locked is False:
                raise _refused(path, read(path))
            if not _same(descriptor, path):  # the holder removed the file after it was opened here: lock the new one
                os.close(descriptor)
                continue
            holder = read(path)
            if holder and _alive(holder, path):
                raise _refused(path, holder)
            token = _write(descriptor)
            if locked is None:
                time.sleep(SETTLE_SECONDS)
                if read(path).get("token") != token:
                    raise _refused(path, read(path))
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise
        return Lock(path, descriptor, token)


def _flock(descriptor: int) -> bool | None:
    """Takes the kernel's lock; False where another process has it, None where the file system does not support it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        return None
    return True


def _same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _write(descriptor: int) -> str:
    token = secrets.token_hex(8)
    about = {"host": socket.gethostname(), "pid": os.getpid(), "boot": _boot(), "started": _started(os.getpid())}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({**about, "token": token}).encode(), 0)
    os.fsync(descriptor)
    return token


def _alive(holder: dict[str, Any], path: Path) -> bool:
    """Whether the holder named in the file still runs; called when the kernel's lock was free, or is not supported.

    On its own host: the boot is the same, and a process of that number and start time is there. On another host: the
    file was renewed less than STALE_SECONDS ago.
    """
    if holder.get("host") != socket.gethostname():
        return _age(path) < STALE_SECONDS
    pid = holder.get("pid")
    now = _started(pid) if isinstance(pid, int) else None
    return holder.get("boot") == _boot() and now is not None and now == holder.get("started")


def _age(path: Path) -> float:
    """Seconds since the holder renewed the file, by the clock of the file system, as clocks of hosts may differ."""
    probe = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _boot() -> str:
    """Identifier of this boot of the machine, "" where the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """Start time of a process of this machine in clock ticks since boot, which tells apart processes of one number.

    None where there is no such process, "" where the time cannot be read.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except FileNotFoundError:
        pass
    except (OSError, IndexError):
        return ""
    try:  # without /proc
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return None if Path("/proc/self").exists() else ""


def _refused(path: Path, holder: dict[str, Any]) -> InputError:
    wait = ""
    if holder.get("host") not in (None, socket.gethostname()):
        wait = f" (one that has died is seen {STALE_SECONDS:.0f} s after)"
    return InputError(
        f"{path.parent}: {named(holder)} trains here now; wait for its end, stop it, or name another --run "
        f"directory{wait}"
    )
