"""Runs one command as several processes of this machine, as it would run on several hosts.

    python scripts/launch_local.py --processes 4 --devices 8 -- train --config configs/world.py --run runs/world
    python scripts/launch_local.py --processes 4 --gpus 8 -- train --config configs/squad.py --run runs/squad

--devices: so many CPU devices are made up and shared out, to try a mesh. --gpus: so many GPUs are shared out, in order.
Every line that a process writes begins with its number. SIGTERM and Ctrl-C go on to all of them. Where one fails, the
others have a minute to say why and to end; then they are killed. The exit status is that of the first that failed.
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
    """The environment of each process, made of a common one."""
    if gpus:
        share = gpus // processes
        lists = [range(i * share, (i + 1) * share) for i in range(processes)]
        return [{**base, "CUDA_VISIBLE_DEVICES": ",".join(map(str, mine))} for mine in lists]
    share = devices // processes
    flags = " ".join(flag for flag in base.get("XLA_FLAGS", "").split() if not flag.startswith(HOST_DEVICES))
    # with fewer threads than twice the devices, collectives of two steps under way can block each other
    threads = str(max(64, 2 * share))
    own = {"JAX_PLATFORMS": "cpu", "NPROC": threads, "XLA_FLAGS": f"{flags} {HOST_DEVICES}={share}"}
    return [{**base, **own}] * processes


def start(words: list[str], environment: list[dict[str, str]]) -> list[subprocess.Popen[str]]:
    """The processes of one command, which meet at a free port."""
    port, count = free_port(), len(environment)
    meet = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(count)] if count > 1 else []
    started = []
    for i, own in enumerate(environment):
        number = ["--process", str(i)] if count > 1 else []
        command = [sys.executable, "-m", "rag_jax", *words, *meet, *number]
        pipe = subprocess.PIPE
        # a session of its own: Ctrl-C reaches it through the launcher alone, once
        one = subprocess.Popen(
            command, env=own, stdout=pipe, stderr=pipe, text=True, errors="replace", start_new_session=True
        )
        started.append(one)
    return started


def copy(source: IO[str], target: IO[str], mark: str) -> threading.Thread:
    """A thread that passes lines on, each with a mark before it."""

    def lines() -> None:
        for line in source:
            target.write(f"{mark}{line}")
            target.flush()

    thread = threading.Thread(target=lines, daemon=True)
    thread.start()
    return thread


def wait(processes: list[subprocess.Popen[str]], grace: float = GRACE_SECONDS) -> int:
    """Until all have ended, which is soon after one has failed; the status of that one, or 0."""
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
