"""The syntax of `refresh`, against lists of steps written by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_jax.errors import InputError
from rag_jax.index.refresh_schedule import Schedule, parse


def due(text, stop, epoch=1):
    schedule = parse(text, epoch)
    return [step for step in range(stop) if schedule.due(step)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("4", [0, 4, 8, 12, 16]),
        ("epoch", [0, 6, 12, 18]),
        ("2epoch", [0, 12]),
        ("0-6:2,6-:5", [0, 2, 4, 6, 11, 16]),
        ("0-6:epoch,10-14:2", [0, 10, 12]),
        ("3-:7", [3, 10, 17]),
        ("when:overlap<0.9:8", [0, 8, 16]),
        ("background:9", [0, 9, 18]),
    ],
)
def test_due(text, expected):
    assert due(text, 20, epoch=6) == expected


def test_kinds():
    assert parse("rolling:500") == Schedule("rolling", turn=500)
    assert parse("rolling:2epoch", 7).turn == 14
    assert parse("background+3:9") == Schedule("background", ((0, None, 9),), lag=3)
    assert parse("when:overlap<0.9") == Schedule("when", ((0, None, 50),), overlap=0.9)
    assert parse("when:overlap<1").overlap == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("background:4", {8: 4, 12: 8, 16: 12}),  # what is begun at 0 is the index of the stage's start itself
        ("background+3:4", {7: 4, 11: 8, 15: 12}),
        ("background:0-8:4,8-:6", {8: 4, 14: 8}),
        ("background+3:0-6:4,6-:5", {6: 4, 9: 6, 14: 11}),  # the second span begins while the build of 4 is under way
        ("background:0-6:4", {8: 4}),  # no other begins
        ("background+2:1-3:3,6-:3", {3: 1, 8: 6, 11: 9, 14: 12}),
    ],
)
def test_background_builds_are_put_in_place(text, expected):
    schedule = parse(text)
    found = {into: schedule.begun(into) for into in range(17)}
    assert {into: begun for into, begun in found.items() if begun is not None} == expected


@st.composite
def schedules(draw):
    """Background schedules of up to four spans, with gaps and borders anywhere."""
    spans, first = [], draw(st.integers(0, 12))
    for _ in range(draw(st.integers(1, 4))):
        every = draw(st.integers(1, 15))
        stop = first + draw(st.integers(1, 40))
        spans.append((first, stop, every))
        first = stop + draw(st.integers(0, 1)) * draw(st.integers(0, 20))
    lag = draw(st.integers(0, min(every for *_, every in spans) - 1))
    last = "" if draw(st.booleans()) else spans[-1][1]
    words = [f"{a}-{b}:{every}" for a, b, every in spans[:-1]] + [f"{spans[-1][0]}-{last}:{spans[-1][2]}"]
    return parse(f"background{f'+{lag}' if lag else ''}:{','.join(words)}")


def walk(schedule, pending, start, stop):
    """(step, build put in place) in order, and the build under way at the end, as Upkeep does before every step."""
    put = []
    for into in range(start, stop):
        if schedule.begun(into) is not None:
            assert pending == schedule.begun(into)
            put.append((into, pending))
            pending = None
        if schedule.due(into):
            assert pending is None, f"the build of {pending} would be lost at {into}"
            pending = into
    return put, pending


@given(schedules(), st.integers(1, 300))
def test_builds_are_put_in_place_once_each_and_in_order(schedule, cut):
    put, pending = walk(schedule, None, 1, 300)
    due = [into for into in range(1, 300) if schedule.due(into)]
    assert [build for _, build in put] == due[: len(put)] and due[len(put) :] == [pending] * (pending is not None)
    assert all(build < into for into, build in put) and sorted(put) == put
    assert all(into - build <= schedule.lag for into, build in put if schedule.lag)
    before, kept = walk(schedule, None, 1, cut)  # a checkpoint keeps the build under way
    after, _ = walk(schedule, kept, cut, 300)
    assert before + after == put


def test_an_epoch_need_not_be_known():
    assert parse("background+50:epoch").lag == 50
    with pytest.raises(InputError, match="a build takes 50 steps, and the next begins after 20"):
        parse("background+50:epoch", 20)


@pytest.mark.parametrize(
    "text",
    [
        *("0", "-3", "2.5", "often", "0epoch", "rolling", "rolling:", "rolling:0", "background", "background:x"),
        *("background+9:9", "background-1:9", "when:", "when:age<3", "when:overlap<2", "when:overlap<0.9:0"),
        *("0-10:", "10-5:2", "0-10:2,5-:3", "0-:2,10-:3", "0-10:2;10-:4"),
    ],
)
def test_refused(text):
    with pytest.raises(InputError, match="refresh="):
        parse(text)
