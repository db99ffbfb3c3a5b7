"""The words of `refresh`, against lists of steps written down by hand."""

import pytest

from rag_jax.errors import InputError
from rag_jax.schedule import Schedule, parse


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
    ],
)
def test_background_builds_are_put_in_place(text, expected):
    schedule = parse(text)
    found = {into: schedule.begun(into) for into in range(17)}
    assert {into: begun for into, begun in found.items() if begun is not None} == expected


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
