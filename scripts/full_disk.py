"""Does every command that writes survive a full disk? It must print one line, end with status 2, leave nothing
half-written, and give the right result when it is repeated.

    python scripts/full_disk.py --out runs/full_disk

Each command runs with its output on a small disk of its own (a tmpfs): once with enough room, then with room for n
bytes, for SIZES values of n up to what it needs; then, with enough room again, the same command must succeed with the
result of the first time and without stray files. After that it runs on a read-only disk, without permission, with a
file where the directory should be, and with a path below a file. Prints a table and writes OUT/report.json; the exit
status is 1 where anything is wrong.

Needs Linux and the right to mount a tmpfs: as root, or in a user namespace (unshare), which it creates by itself; where
neither is allowed it says so and ends with status 0. Some 700 runs take hours on two cores, mostly in train and
evaluate; --commands and --sizes make it shorter. Every run is a process of its own, forked from one that has loaded the
libraries.
"""

import argparse
import contextlib
import ctypes
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import kill_resume

PRELOAD = [
    f"rag_jax.{name}"
    for name in ("training.train", "evaluation.evaluate", "evaluation.compare", "pretrained.export", "bench.stages")
]
PAGE = os.sysconf("SC_PAGE_SIZE")
ROOM = "200m"


class Command(NamedTuple):
    """A command to be tried.

    words: its command line, with the placeholders {ready} (prepared inputs) and {out} (its output).
    result: of the output, the value that must be the same after a full disk.
    resumes: whether finished parts may stay after a full disk, since the command resumes from them.
    """

    words: str
    result: Callable[[Path], Any]
    resumes: bool = False


def contents(directory: Path) -> dict[str, str]:
    """sha256 of every file by its path."""
    found = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def names(directory: Path) -> list[str]:
    """Sorted names of all files, whatever their content."""
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


def evaluation(directory: Path) -> Any:
    """The names of the files, and the predictions, which contain no times."""
    return names(directory), (directory / "predictions.jsonl").read_bytes()


def parameters(directory: Path) -> Any:
    """A hash of a run's parameters, and the names in its directory (those deeper down are random ones of Orbax)."""
    import jax

    from rag_jax.pretrained import load
    from rag_jax.runs import checkpoint

    params = jax.device_get(load.from_pretrained(directory)[1])
    return checkpoint.tree_hash(params), sorted(path.name for path in directory.iterdir())


def trained(directory: Path) -> Any:
    """Parameters, index, metrics without times, and steps of the checkpoints."""
    rows = [
        {name: value for name, value in row.items() if name not in kill_resume.TIMES}
        for row in map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    ]
    steps = sorted(path.name for path in (directory / "checkpoints").iterdir())
    return parameters(directory), contents(directory / "index"), rows, steps


COMMANDS = {
    "world": Command("world --out {out} --entities 60 --workers 1", contents),
    "corpus": Command(
        "corpus {ready}/world/passages.jsonl --out {out} --train-tokenizer --encoder-vocab 500 --generator-vocab 800",
        contents,
    ),
    "corpus --update": Command("corpus --update {ready}/corpus --add {ready}/more.jsonl --out {out}", contents),
    "encode": Command("encode {ready}/run --corpus {ready}/corpus --out {out} --shard-rows 8", contents, True),
    "index": Command("index {ready}/run --corpus {ready}/corpus --out {out}", contents),
    "index of a job": Command("index {ready}/job --out {out}", contents),
    "index --update": Command(
        "index --update {ready}/run/index --run {ready}/run --corpus {ready}/updated --out {out}", contents
    ),
    "train": Command("train --config {config} --run {out} --stage retriever {settings}", trained, True),
    "evaluate": Command("evaluate {ready}/run --out {out} --limit 8", evaluation),
    "evaluate with a curve": Command("evaluate {ready}/run --out {out} --limit 8 --n-docs-curve 1,2", evaluation, True),
    "compare": Command("compare {ready}/one {ready}/other --out {out}", contents),
    "convert": Command(
        "convert --question-encoder {ready}/encoder --generator {ready}/exported --out {out}", parameters
    ),
    "export": Command("export {ready}/run --part generator --out {out}", contents),
    "bench": Command(
        "bench train --load small --questions 1 --docs 1 --question 8 --source 32 --target 8 --passages 64 "
        "--vocabulary 100 --encoder-layers 1 --decoder-layers 1 --bert-layers 1 --repeats 1 --alone --profile {out}",
        lambda out: sorted(path.suffix for path in out.rglob("*") if path.is_file()),
        True,
    ),
}  # fmt: skip


class Disk:
    """A tmpfs, with a path `out` on it for the command's output."""

    def __init__(self, mount: Path) -> None:
        self.mount, self.out = mount, mount / "out"

    @contextlib.contextmanager
    def mounted(self, size: str) -> Iterator[Path]:
        self.mount.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", self.mount], check=True)
        try:
            yield self.out
        finally:
            subprocess.run(["umount", "-l", self.mount], check=True)

    def resize(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.mount], check=True)

    def used(self) -> int:
        found = os.statvfs(self.mount)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    def there(self) -> list[str]:
        return sorted(str(path.relative_to(self.mount)) for path in self.mount.rglob("*"))


class Trial:
    """Runs of the command line, each in a process of its own."""

    def __init__(self, out: Path, settings: str) -> None:
        self.out, self.disk, self.settings = out, Disk(out / "disk"), settings
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(PRELOAD)

    def words(self, text: str, out: Path) -> list[str]:
        config = f"{kill_resume.__file__}:{self.out}/ready"
        found = text.format(ready=self.out / "ready", out=out, config=config, settings=self.settings)
        return found.split()

    def run(self, text: str, out: Path, obeying: bool = False) -> tuple[int, str]:
        """Runs a command; returns its exit status and output. obeying: without root's right to write anywhere."""
        said = self.out / "said.txt"
        process = self.processes.Process(target=command, args=(self.words(text, out), said, obeying))
        process.start()
        process.join()
        with (self.out / "log.txt").open("a") as log:
            log.write(f"--- {text} -> {process.exitcode}\n{said.read_text(errors='replace')}")
        return process.exitcode, said.read_text(errors="replace")

    def finish(self, text: str) -> None:
        status, said = self.run(text, Path())
        if status:
            sys.exit(f"{text}: status {status}\n{said}")


def command(words: list[str], said: Path, obeying: bool) -> None:
    """The body of a process: runs the command line as `rag-jax` does, with its output to the file `said`."""
    from rag_jax import __main__ as cli

    stream = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(stream, number)
    if obeying:
        obey_permissions()
    sys.exit(cli.main(words))


def obey_permissions() -> None:
    """Drops root's right to ignore permissions in this process (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the interface, this process
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    if libc.capget(header, data) == 0:
        data[0] &= ~0b110
        libc.capset(header, data)


def prepare(trial: Trial) -> None:
    """Makes the inputs of all commands, on a disk with room."""
    ready = trial.out / "ready"
    ready.mkdir()
    trial.finish("world --out {ready}/world --entities 60 --workers 1")
    trial.finish(f"{COMMANDS['corpus'].words}".replace("{out}", "{ready}/corpus"))
    more = {"id": "more", "title": "Oslo", "text": "Oslo is the capital of Norway."}
    (ready / "more.jsonl").write_text(json.dumps(more) + "\n")
    trial.finish("corpus --update {ready}/corpus --add {ready}/more.jsonl --out {ready}/updated")
    trial.finish("train --config {config} --run {ready}/run {settings}")
    trial.finish("encode {ready}/run --corpus {ready}/corpus --out {ready}/job --shard-rows 8")
    trial.finish("export {ready}/run --part generator --out {ready}/exported")
    trial.finish("export {ready}/run --part question_encoder --out {ready}/encoder")
    for name, docs in (("one", 1), ("other", 2)):
        trial.finish(f"evaluate {{ready}}/run --out {{ready}}/{name} --limit 8 --n-docs {docs}")


def faults(status: int, said: str, wanted: int = 2) -> list[str]:
    """Faults in the way a command ended: another status, a traceback, or a last line that is no message of rag-jax."""
    last = (said.splitlines() or [""])[-1]
    found = [] if status == wanted else [f"status {status}: {last}"]
    found += ["a traceback"] if "Traceback" in said or "Exception ignored" in said else []
    if wanted == 2 and status == 2 and not last.startswith("rag-jax: "):
        found.append(f"the last line is {last!r}")
    return found


def full(trial: Trial, one: Command, room: int, right: Any) -> tuple[bool, list[str]]:
    """Runs the command with `room` bytes, then with enough: (whether `room` was too little, faults).

    right: the result with enough room.
    """
    with trial.disk.mounted(str(max(room // PAGE, 1) * PAGE)) as out:
        status, said = trial.run(one.words, out)
        wrong = faults(status, said, wanted=2 if status else 0)
        half = [name for name in trial.disk.there() if "building" in name or "tmp" in name or name.endswith(".tmp")]
        left = trial.disk.there() if status and not one.resumes else half
        wrong += [f"left behind: {', '.join(left[:5])}"] if left else []
        trial.disk.resize(f"size={ROOM}")
        again, said = trial.run(one.words, out)
        if again and not status and "already" in said:  # finished the first time
            again = 0
        wrong += [f"again: {fault}" for fault in faults(again, said, wanted=0)]
        if not wrong and one.result(out) != right:
            wrong.append("again: another result")
        return status != 0, wrong


def refused(trial: Trial, one: Command) -> dict[str, list[str]]:
    """Runs the command with outputs that cannot be written to: place -> faults, where there are any."""
    found: dict[str, list[str]] = {}
    with trial.disk.mounted(ROOM) as out:
        out.write_text("a file")
        before = trial.disk.there()
        found["a file"] = faults(*trial.run(one.words, out))
        found["below a file"] = faults(*trial.run(one.words, out / "below"))
        out.unlink()
        trial.disk.resize("ro")
        found["read-only"] = faults(*trial.run(one.words, out))
        found["read-only, below"] = faults(*trial.run(one.words, out / "below" / "further"))
        trial.disk.resize("rw")
        trial.disk.mount.chmod(0o555)
        found["no permission"] = faults(*trial.run(one.words, out, obeying=True))
        left = [name for name in trial.disk.there() if name not in before]
        found["all"] = [f"left behind: {', '.join(left[:5])}"] if left else []
    return {name: wrong for name, wrong in found.items() if wrong}


def attempt(trial: Trial, name: str, sizes: int) -> dict[str, Any]:
    """Tries one command in every way: a row of the report."""
    one, begun = COMMANDS[name], time.monotonic()
    with trial.disk.mounted(ROOM) as out:
        status, said = trial.run(one.words, out)
        if status:
            sys.exit(f"{name}: status {status} with room\n{said}")
        right, needed = one.result(out), trial.disk.used()
    rooms = [needed * i // sizes for i in range(sizes)]
    tried = {room: full(trial, one, room, right) for room in rooms}
    wrong = {f"{room} bytes": faults for room, (_, faults) in tried.items() if faults} | refused(trial, one)
    row = {"needs": needed, "tried": sizes, "too_little": sum(short for short, _ in tried.values()), "wrong": wrong}
    seconds = time.monotonic() - begun
    print(f"{name:<16} {needed:>10,} {sizes:>6} {row['too_little']:>11} {len(wrong):>6} {seconds:>6.0f} s", flush=True)
    for where, faults_ in wrong.items():
        print(f"    {where}: {'; '.join(faults_)}", flush=True)
    return row


def in_namespace() -> None:
    """Restarts this script in a namespace where it may mount, or ends it with a message where there can be none."""
    probe = ["sh", "-c", "mount -t tmpfs tmpfs /mnt && umount /mnt"]
    unshare = ["unshare", "--mount", *(["--user", "--map-root-user"] if os.geteuid() else [])]
    if "FULL_DISK_MOUNTS" in os.environ:
        return
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, *probe], capture_output=True, check=False).returncode
    ):
        print("this machine allows no tmpfs to be mounted (as root, or in a user namespace): nothing was tried")
        sys.exit(0)
    os.execvpe(unshare[0], [*unshare, sys.executable, *sys.argv], os.environ | {"FULL_DISK_MOUNTS": "1"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for everything; must not exist")
    parser.add_argument("--sizes", type=int, default=20, help="numbers of bytes for each command")
    parser.add_argument("--steps", type=int, default=24, help="training steps")
    parser.add_argument("--commands", default=",".join(COMMANDS), metavar="A,B", help="default: %(default)s")
    args = parser.parse_args()
    in_namespace()
    chosen = [name for name in COMMANDS if name in args.commands.split(",")]
    if args.out.exists():
        sys.exit(f"{args.out} exists; remove it, or name another --out")
    args.out.mkdir(parents=True)
    out = args.out.absolute()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(out / "compiled"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    stages = ("retriever", "denoise", "read", "joint")
    settings = " ".join(f"--set stages.{name}.steps={max(args.steps // 4, 1)}" for name in stages)
    trial = Trial(out, f"{settings} --set checkpoint_every=3 --set log_every=3 --set model.encoder.norm=post")
    if any("{ready}" in COMMANDS[name].words or "{config}" in COMMANDS[name].words for name in chosen):
        prepare(trial)
    print(f"{'command':<16} {'bytes':>10} {'tried':>6} {'too little':>11} {'wrong':>6}", flush=True)
    rows = {name: attempt(trial, name, args.sizes) for name in chosen}
    (out / "report.json").write_text(json.dumps(rows, indent=2) + "\n")
    sys.exit(any(row["wrong"] for row in rows.values()))


if __name__ == "__main__":
    main()
