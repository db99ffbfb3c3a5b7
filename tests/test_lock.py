"""One training at a time in a run directory; a lock of a dead process is recognised, at once on the same host."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from rag_jax.errors import InputError
from rag_jax.runs import lock

HOLD = """
import sys, time
from pathlib import Path
from rag_jax.runs import lock
with lock.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A separate process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def without_flock(monkeypatch):
    def refuse(descriptor, how):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.05)


@pytest.mark.parametrize("flock", [True, False])
def test_the_holder_is_named_and_its_death_is_seen_at_once(flock, holder, tmp_path, monkeypatch):
    if not flock:
        without_flock(monkeypatch)
    said = rf"run: process {holder.pid} on {socket.gethostname()} trains here now; .*another --run directory$"
    with pytest.raises(InputError, match=said), lock.held(tmp_path / "run"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with lock.held(tmp_path / "run") as mine:
        mine.check()
        assert lock.read(tmp_path / "run" / lock.NAME)["pid"] == os.getpid()
    assert not list((tmp_path / "run").iterdir())


def written(path, **changes):
    """Writes the lock file of another holder, without a lock of the kernel."""
    about = {"host": "elsewhere", "pid": 7, "boot": "b", "started": "1", "token": "t"} | changes
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(about))


def test_a_holder_on_another_host_lives_as_long_as_it_renews_the_file(tmp_path):
    path = tmp_path / "run" / lock.NAME
    written(path)
    with pytest.raises(InputError, match=r"process 7 on elsewhere .*one that has died is seen 60 s after"):
        lock._take(path)
    old = time.time() - lock.STALE_SECONDS - 1
    os.utime(path, (old, old))
    with lock.held(tmp_path / "run"):
        pass


@pytest.mark.parametrize(
    "changes",
    [{"pid": 2**22 + 1}, {"pid": os.getpid(), "started": "1"}, {"pid": os.getpid(), "boot": "before"}, {"pid": "x"}],
)
def test_the_dead_of_this_host(changes, tmp_path):
    """No such process, another process with its number, one from before the machine started, and a broken file."""
    here = {"host": socket.gethostname(), "boot": lock._boot(), "started": lock._started(os.getpid())}
    written(tmp_path / "run" / lock.NAME, **here | changes)
    with lock.held(tmp_path / "run"):
        pass
    written(tmp_path / "run" / lock.NAME, **here | {"pid": os.getpid()})
    with pytest.raises(InputError, match=f"process {os.getpid()} on"), lock.held(tmp_path / "run"):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b'"x"'])
def test_a_file_that_names_nobody_is_no_holder(content, tmp_path):
    (tmp_path / lock.NAME).write_bytes(content)
    with lock.held(tmp_path):
        pass


def test_it_is_renewed_and_a_theft_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.02)
    path = tmp_path / lock.NAME
    with lock.held(tmp_path) as mine:
        os.utime(path, (1, 1))
        until = time.monotonic() + 10
        while path.stat().st_mtime < 2 and time.monotonic() < until:
            time.sleep(0.01)
        assert lock._age(path) < 5
        mine.check()
        written(path)
        with pytest.raises(InputError, match="process 7 on elsewhere trains here now; this one ends"):
            mine.check()
    assert lock.read(path)["host"] == "elsewhere"  # we must not remove it


def test_of_many_at_once_one_has_it(tmp_path):
    got, refused, together = [], [], threading.Barrier(8)

    def take():
        together.wait()
        try:
            with lock.held(tmp_path):
                got.append(1)
                together.wait(5)
        except (InputError, threading.BrokenBarrierError) as error:
            refused.append(str(error))
            if isinstance(error, InputError):
                together.wait(5)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and len(refused) == 7


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/run: cannot be written"), lock.held(tmp_path / "file" / "run"):
        pass
