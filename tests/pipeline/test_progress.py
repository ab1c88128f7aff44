"""Lines in a log, a bar in a terminal, and no estimate before there is a basis for one."""

from __future__ import annotations

import contextlib
import io

import pytest

from pipeline import progress
from pipeline.progress import Progress, duration


class Clock:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_lines_of_a_log(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("pairs", 1000, "pairs", interval=5) as counted:
        for seconds, count in ((4, 10), (6, 10), (7, 10), (20, 170), (30, 800)):
            clock.now = seconds
            counted.add(count, note="; a note")
    assert capsys.readouterr().out.splitlines() == [
        "pairs: 20 of 1,000 pairs, 3.3/s; a note",  # 2 % are no ground for an estimate
        "pairs: 200 of 1,000 pairs, 10.0/s, 80 s left; a note",
        "pairs: 1,000 of 1,000 pairs, 33.3/s, 0 s left; a note",
    ]


def test_many_reports_are_ground_for_an_estimate(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("pairs", 10_000_000, "pairs", interval=5) as counted:
        for clock.now in range(10, 100, 10):
            counted.add(100)
    lines = capsys.readouterr().out.splitlines()
    assert ["left" in line for line in lines] == [False] * 7 + [True] * 2
    assert lines[-1] == "pairs: 900 of 10,000,000 pairs, 10.0/s, 11 d 14 h left"


def test_items_that_count_for_nothing_are_no_ground(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("evaluation", 100, "network evaluations") as counted:
        for clock.now in range(10, 100, 10):
            counted.add(0)
    assert set(capsys.readouterr().out.splitlines()) == {"evaluation: 0 of 100 network evaluations"}


def test_a_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with contextlib.suppress(KeyboardInterrupt), Progress("pairs", 100, "pairs") as counted:
        counted.add(100)
        print("a line of another")
        raise KeyboardInterrupt
    shown = terminal.getvalue()
    assert "100 of 100 pairs" in shown
    assert "a line of another\n" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is back


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (119, "119 s"),
        (120, "2 min"),
        (7100, "118 min"),
        (7300, "2 h 2 min"),
        (171_000, "47 h 30 min"),
        (8e5, "9 d 6 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
