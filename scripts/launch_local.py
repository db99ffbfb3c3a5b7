"""Runs one command as several processes on this machine, as it would run on several hosts.

    python scripts/launch_local.py --processes 2 --devices 4 -- train --config configs/world.py --run runs/world
    python scripts/launch_local.py --processes 4 --gpus 8 -- train --config configs/squad.py --run runs/squad

--devices: so many fake CPU devices are divided among the processes, to try a mesh. --gpus: so many GPUs are divided
among them, in order. Every line that a process writes to standard error begins with its number. SIGTERM and Ctrl-C are
forwarded to all of them. When one fails, the others have a minute to say why and to end; then they are killed. The exit
status is that of the first that failed.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import IO

GRACE_SECONDS = 60
HOST_DEVICES = "--xla_force_host_platform_device_count"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environments(processes: int, devices: int, gpus: int, base: Mapping[str, str]) -> list[dict[str, str]]:
    """The environment of each process: the common one, and its share of fake CPU devices or of GPUs."""
    if gpus:
        share = gpus // processes
        lists = [range(i * share, (i + 1) * share) for i in range(processes)]
        return [{**base, "CUDA_VISIBLE_DEVICES": ",".join(map(str, mine))} for mine in lists]
    share = devices // processes
    flags = " ".join(flag for flag in base.get("XLA_FLAGS", "").split() if not flag.startswith(HOST_DEVICES))
    # with fewer threads than twice the devices, collectives of two unfinished steps can deadlock
    threads = str(max(64, 2 * share))
    own = {"JAX_PLATFORMS": "cpu", "NPROC": threads, "XLA_FLAGS": f"{flags} {HOST_DEVICES}={share}"}
    return [{**base, **own}] * processes


def start(words: list[str], environment: list[dict[str, str]]) -> list[subprocess.Popen[str]]:
    """Starts the processes of one command, connected through a free port; environment: one for each process."""
    port, count = free_port(), len(environment)
    meet = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(count)] if count > 1 else []
    started = []
    for i, own in enumerate(environment):
        number = ["--process", str(i)] if count > 1 else []
        command = [sys.executable, "-m", "rag_jax", *words, *meet, *number]
        pipe = subprocess.PIPE
        # in a session of its own, so that Ctrl-C reaches it once, from this launcher, and not also from the terminal
        one = subprocess.Popen(
            command, env=own, stdout=pipe, stderr=pipe, text=True, errors="replace", start_new_session=True
        )
        started.append(one)
    return started


def copy(source: IO[str], target: IO[str], mark: str) -> threading.Thread:
    """Starts a thread that copies lines from source to target, with `mark` before each."""

    def lines() -> None:
        for line in source:
            target.write(f"{mark}{line}")
            target.flush()

    thread = threading.Thread(target=lines, daemon=True)
    thread.start()
    return thread


def wait(processes: list[subprocess.Popen[str]], grace: float = GRACE_SECONDS) -> int:
    """Waits until all processes have ended; returns the status of the first that failed, or 0.

    grace: seconds after a failure until the others are killed.
    """
    failed, since = 0, 0.0
    while any(process.poll() is None for process in processes):
        time.sleep(0.1)
        bad = [process.returncode for process in processes if process.returncode]
        if bad and not failed:
            failed, since = bad[0], time.monotonic()
            number = next(i for i, process in enumerate(processes) if process.returncode)
            print(f"process {number} ended with status {failed}; the others have {grace} s to end", file=sys.stderr)
        if failed and time.monotonic() - since > grace:
            for process in processes:
                process.kill()
    return failed or next((process.returncode for process in processes if process.returncode), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=8, help="CPU devices in all (default: %(default)s)")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs in all, instead")
    parser.add_argument("words", nargs="+", metavar="COMMAND", help="a command of rag-jax and its words, after --")
    args = parser.parse_args()
    total = args.gpus or args.devices
    if args.processes < 1 or total % args.processes:
        sys.exit(f"{total} devices cannot be shared out evenly over {args.processes} processes")
    processes = start(args.words, environments(args.processes, args.devices, args.gpus, os.environ))

    def forward(number: int, _: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    threads = []
    for i, process in enumerate(processes):
        mark = f"[{i}] " if args.processes > 1 else ""
        assert process.stdout is not None and process.stderr is not None
        threads += [copy(process.stdout, sys.stdout, ""), copy(process.stderr, sys.stderr, mark)]
    status = wait(processes)
    for thread in threads:
        thread.join(timeout=5)
    sys.exit(status if status >= 0 else 128 - status)


if __name__ == "__main__":
    main()
