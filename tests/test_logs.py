"""Progress lines on a fake clock; metric files through restarts, kills and other readers."""

import io
import json
import math
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.errors import InputError
from rag_jax.system import logs


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(logs, "_now", clock)
    return clock


def test_lines_at_once_every_ten_seconds_and_at_the_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with logs.Progress(1200, "train", unit="step", initial=200) as progress:
        assert capsys.readouterr().err == "train: 200/1,200 step (16%)\n"
        for step in range(25):
            clock.now += 1
            progress.update(20, loss=np.float32(1 / 3), stage="joint", step=step)
        assert capsys.readouterr().err.splitlines() == [
            "train: 400/1,200 step (33%), 20.0 step/s, 0:40 left, loss=0.3333, stage=joint, step=9",
            "train: 600/1,200 step (50%), 20.0 step/s, 0:30 left, loss=0.3333, stage=joint, step=19",
        ]
        clock.now += 3700
        progress.update(1)  # the rate since the last line, and values are kept
        assert capsys.readouterr().err == (
            "train: 701/1,200 step (58%), 36.7 s/step, 5:05:05 left, loss=0.3333, stage=joint, step=24\n"
        )
        clock.now += 1
        progress.update(499)
    assert capsys.readouterr().err == (
        "train: 1,200/1,200 step (100%) in 1:02:06, 3.7 s/step, loss=0.3333, stage=joint, step=24\n"
    )


def test_unknown_total_and_an_error(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), logs.Progress(None, "read", unit="passages") as progress:
        clock.now += 10
        progress.update(123456)
        clock.now += 2
        raise KeyError
    assert capsys.readouterr().err.splitlines() == [
        "read: 0 passages",
        "read: 123,456 passages, 12,346 passages/s",
        "read: stopped at 123,456 passages after 0:12",
    ]


def test_nothing_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with logs.Progress(0, "encode"):
        pass
    assert capsys.readouterr().err == "encode: 0/0 it\nencode: 0/0 it in 0:00\n"


def test_values_are_read_only_when_shown(clock: Clock) -> None:
    reads = []

    class OnDevice:
        def item(self) -> float:
            reads.append(1)
            return 2.5

    with logs.Progress(100, "train") as progress:
        for _ in range(100):
            clock.now += 0.15
            progress.update(loss=OnDevice())
    assert len(reads) == 2  # the line after ten seconds and the last one


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with logs.Progress(50, "train", unit="step", initial=10) as progress:
        progress.update(20, loss=9.0)
        clock.now += 1
        progress.update(20, loss=0.123456)
        logs.info("a line in between")
    shown = terminal.getvalue()
    assert "50/50" in shown and "loss=0.1235" in shown and "train: 100%" in shown
    assert "\ra line in between\n" in shown or "\na line in between\n" in shown
    assert capsys.readouterr().out == ""


def rows_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_silent_process_shows_nothing(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    monkeypatch.setattr(logs, "_silent", threading.Event())
    screen = Terminal()
    if terminal:
        monkeypatch.setattr(sys, "stderr", screen)
    logs.silence()
    logs.info("a line")
    with logs.Progress(3, "steps") as progress:
        clock.now += 60
        progress.update(3, loss=jnp.float32(1))
    assert progress.done == 3 and screen.getvalue() == ""
    if not terminal:
        assert capsys.readouterr().err == ""


def test_values_keep_every_bit(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    with logs.MetricWriter(tmp_path / "new" / "run") as writer:
        for step, value in enumerate(values):
            row = {
                "loss": jnp.asarray(value),
                "host": value,
                "double": float(value) / 3,
                "stage": "é",
                "n": np.int64(2**60),
            }
            writer.write(step, row)
    rows = rows_of(tmp_path / "new" / "run")
    assert [row["step"] for row in rows] == list(range(50))
    assert [row["double"] for row in rows] == [float(value) / 3 for value in values]
    for key in ("loss", "host"):
        assert np.array([row[key] for row in rows]).astype(np.float32).tobytes() == values.tobytes()
    assert rows[0]["stage"] == "é" and rows[0]["n"] == 2**60


def test_each_row_is_on_disk_at_once(tmp_path: Path) -> None:
    writer = logs.MetricWriter(tmp_path)
    writer.write(3, {"loss": 1.5})
    assert rows_of(tmp_path) == [{"step": 3, "loss": 1.5}]
    assert scalars_of(tmp_path) == {"loss": [(3, 1.5)]}
    writer.close()


def test_what_is_not_finite_is_still_json(tmp_path: Path) -> None:
    with logs.MetricWriter(tmp_path) as writer:
        writer.write(0, {"a": math.nan, "b": jnp.inf, "c": np.float32(-math.inf), "stage": "NaN"})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line == '{"step": 0, "a": "NaN", "b": "Infinity", "c": "-Infinity", "stage": "NaN"}\n'
    (row,) = logs.read_rows(tmp_path / "metrics.jsonl")
    assert math.isnan(row["a"]) and (row["b"], row["c"], row["stage"]) == (math.inf, -math.inf, "NaN")


def test_resuming_drops_later_rows_and_keeps_the_others_byte_for_byte(tmp_path: Path) -> None:
    with logs.MetricWriter(tmp_path) as writer:
        for step in (10, 20, 30, 40):
            writer.write(step, {"loss": 1 / step})
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    with logs.MetricWriter(tmp_path, resume_step=20) as writer:
        assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(before[:2])
        writer.write(30, {"loss": 7.0})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(before[:2]) + b'{"step": 30, "loss": 7.0}\n'
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["metrics.jsonl"]
    with logs.MetricWriter(tmp_path, resume_step=-1):
        assert rows_of(tmp_path) == []


def test_opening_without_a_step_goes_on_at_the_end(tmp_path: Path) -> None:
    for step in (1, 2):
        with logs.MetricWriter(tmp_path) as writer:
            writer.write(step, {"loss": 0.5})
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2]
    assert scalars_of(tmp_path) == {"loss": [(1, 0.5), (2, 0.5)]}


@pytest.mark.parametrize("resume_step", [None, 2])
@pytest.mark.parametrize("cut", range(1, 26))
def test_a_line_torn_anywhere_is_dropped(tmp_path: Path, cut: int, resume_step: int | None) -> None:
    whole = b'{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 1.25}\n'
    (tmp_path / "metrics.jsonl").write_bytes(whole[:-cut])
    kept = [1, 2] if cut == 1 else [1]  # a row that lacks only its newline is complete
    assert [row["step"] for row in logs.read_rows(tmp_path / "metrics.jsonl")] == kept
    with logs.MetricWriter(tmp_path, resume_step) as writer:
        writer.write(3, {"loss": 0.5})
    assert [row["step"] for row in rows_of(tmp_path)] == [*kept, 3]


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"loss": 1}', '{"step": "1"}', ""])
def test_a_broken_line_elsewhere_is_an_error_and_changes_nothing(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    content = '{"step": 1}\n' + line + '\n{"step": 2}\n'
    path.write_text(content)
    with pytest.raises(InputError, match=re.escape(f"{path}:2: ")):
        logs.MetricWriter(tmp_path, resume_step=1)
    with pytest.raises(InputError, match=re.escape(f"{path}:2: ")):
        logs.read_rows(path)
    assert path.read_text() == content


def test_a_killed_writer_leaves_whole_rows(tmp_path: Path) -> None:
    program = (
        "import itertools, sys; from rag_jax.system import logs; writer = logs.MetricWriter(sys.argv[1])\n"
        "for i in itertools.count():\n writer.write(i, {'loss': i / 7, 'stage': 'x'})\n print(i, flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = [int(process.stdout.readline()) for _ in range(20)]
        process.send_signal(signal.SIGKILL)
    assert [row["step"] for row in logs.read_rows(tmp_path / "metrics.jsonl")][:20] == seen
    with logs.MetricWriter(tmp_path, resume_step=9) as writer:
        writer.write(10, {"loss": 10 / 7, "stage": "x"})
    assert rows_of(tmp_path) == [{"step": i, "loss": i / 7, "stage": "x"} for i in range(11)]


def scalars_of(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars in the event files, read record by record as TensorBoard does; a restart purges later steps."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    scalars: dict[str, list[tuple[int, float]]] = {}
    for path in sorted((run_dir / "tensorboard").glob("*tfevents*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            if event.session_log.status == SessionLog.START:
                scalars = {tag: [row for row in rows if row[0] < event.step] for tag, rows in scalars.items()}
            for value in event.summary.value:
                scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    return scalars


def test_tensorboard_events(tmp_path: Path) -> None:
    with logs.MetricWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 0.5 * step, "eval/exact_match": 1, "stage": "joint"})
    with logs.MetricWriter(tmp_path, resume_step=1) as writer:
        writer.write(2, {"loss": 8.0})
    assert scalars_of(tmp_path) == {"loss": [(1, 0.5), (2, 8.0)], "eval/exact_match": [(1, 1.0)]}
    assert not [name for name in sys.modules if name.split(".")[0] == "tensorflow"]


def test_lines_say_when_and_of_several_processes_which(capsys: pytest.CaptureFixture[str]) -> None:
    with logs.stamped(2, 8):
        logs.info("begun")
    with logs.stamped(0, 1):
        logs.info("alone")
    logs.info("plain")
    many, one, plain = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d 2/8 begun", many) and re.fullmatch(r"\d\d:\d\d:\d\d alone", one)
    assert plain == "plain"
