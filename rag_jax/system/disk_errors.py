"""Messages for errors of a disk (full, read-only, no permission, a file in the way) that say what to do.

Python raises OSError. Libraries in C++ and Rust (tensorstore below Orbax, tokenizers, ScaNN) raise other errors, which
only quote the system's message.
"""

import errno
import logging
import os
import re
import shutil
import sys
from typing import Any

# errno -> what the user can do about it
CURES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there, or ask for a larger quota",
    errno.EFBIG: "allow larger files (ulimit -f, or another file system)",
    errno.EROFS: "make it writable, or name another directory",
    errno.EACCES: "change the permissions, or name another directory",
    errno.EPERM: "change the permissions, or name another directory",
    errno.ENOTDIR: "a directory is needed where a file is: move that file, or name another directory",
    errno.EISDIR: "a file is needed where a directory is: move that directory, or name another one",
    errno.EEXIST: "move what is there, or name another directory",
    errno.ENOTEMPTY: "move what is there, or name another directory",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.ELOOP: "mend the symbolic link",
    errno.EIO: "the medium fails: name a directory on another one",
    errno.ESTALE: "mount the file system again",
    errno.EMFILE: "allow more open files (ulimit -n)",
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_QUOTED = {os.strerror(number): number for number in CURES}
_SHORT = re.compile(r"\d+ requested and \d+ written")  # NumPy's tofile on a full disk
_PATHS = re.compile(r"""["'](/[^"']+)["']|(?:file|path|directory):?\s+(/[^\s:"']+)""")
_TEMPORARY = re.compile(r"/\.([^/]+)\.building(-[0-9a-f]{8})?(?=/|$)|(\.orbax-checkpoint-tmp[^/]*)|(\.tmp$)")


def number(error: BaseException) -> int | None:
    """The errno of an error of a disk, a key of CURES; None for any other error."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in CURES else None
    if not isinstance(error, OSError | ValueError | RuntimeError) and type(error) is not Exception:
        return None  # only these types come from bindings to C++ and Rust, NumPy's tofile and shutil.copytree
    if _SHORT.search(str(error)):
        return errno.ENOSPC
    return next((number for cause, number in _QUOTED.items() if cause in str(error)), None)


def full(error: BaseException) -> bool:
    """Whether a write failed because there was no room: disk full, quota, or largest file size."""
    return number(error) in FULL


def words(error: BaseException, what: str = "") -> str | None:
    """One line for the user: the path, what is wrong with it, what to do; None for an error not of a disk.

    what: the path and what could not be done with it; by default the path that the error names.
    """
    found = number(error)
    if found is None:
        return None
    cause, where = os.strerror(found), _path(error)
    said = f"{what} ({cause})" if what else f"{where}: {cause}" if where else cause
    return f"{said}; {CURES[found]}, and give the same command again"


def _path(error: BaseException) -> str:
    """The path that the error is about; "" where it names none."""
    if isinstance(error, shutil.Error):
        return shown(str(error.args[0][-1][1])) if error.args and isinstance(error.args[0], list) else ""
    if isinstance(error, OSError) and error.errno is not None:
        name = error.filename
        return "" if not name or isinstance(name, int) else shown(os.fsdecode(name))  # int: a file descriptor
    quoted = _PATHS.findall(str(error))
    return shown(quoted[-1][0] or quoted[-1][1]) if quoted else ""  # tensorstore names the directory, then the file


def shown(path: str) -> str:
    """The path as the user knows it: a temporary name, used while writing, gives way to the final one."""
    return _TEMPORARY.sub(lambda hit: f"/{hit[1]}" if hit[1] else "", path)


def without_echoes() -> None:
    """Silences the tracebacks that libraries print about disk errors which they raise as well.

    Orbax logs each error in every thread that it passes through. It closes its event loop at the first failed write;
    tensorstore then reports the other failures to that loop, and prints that it is closed.
    """
    logging.getLogger("absl").addFilter(_is_news)
    sys.unraisablehook = _without_closed_loops


def _without_closed_loops(one: Any) -> None:
    if not (one.exc_type is RuntimeError and str(one.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(one)


def _is_news(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return error is None or number(error) is None
