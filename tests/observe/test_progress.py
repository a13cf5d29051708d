"""Progress: a bar on a terminal, lines elsewhere, nothing on other ranks."""

import io

import pytest
from rich.console import Console

from moempi.observe import progress
from moempi.observe.progress import Counts, Progress


@pytest.fixture
def screen():
    return io.StringIO()


@pytest.fixture
def clock(monkeypatch):
    """A clock in a list."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_come_every_few_seconds_while_loading_and_running_and_at_the_end(screen, clock):
    shown = Progress(256, enabled=True, console=Console(file=screen, force_terminal=False))
    for second in range(7):
        clock[0] = 100.0 + second
        shown.loading(second, 8, second << 20)
    for second in range(7, 18):
        clock[0] = 100.0 + second
        done = second - 7
        shown.update(Counts(done * 10, 0, 32, prompt_tokens=done * 3000, generated=done * 1000))
    shown.close()
    rates = "3,000 prompt + 1,000 output tokens/s"
    assert screen.getvalue().splitlines() == [
        "moempi: loading weights, 5/8 layers of rank 0, 5.00 MiB",
        f"moempi: 30/256 requests, 32 running, 194 waiting, {rates}, 0:03, 0:23 left",
        f"moempi: 80/256 requests, 32 running, 144 waiting, {rates}, 0:08, 0:18 left",
        f"moempi: 100/256 requests, 32 running, 124 waiting, {rates}, 0:10, 0:16 left",
    ]


def test_a_run_that_finishes_no_request_still_shows_that_it_goes_on(screen, clock):
    shown = Progress(2, enabled=True, console=Console(file=screen, force_terminal=False))
    for second in range(12):
        clock[0] = 100.0 + second
        shown.update(Counts(0, 0, 2, generated=second))
    lines = screen.getvalue().splitlines()
    assert lines == [
        "moempi: 0/2 requests, 2 running, 0 waiting, 0 prompt + 1 output tokens/s, 0:05",
        "moempi: 0/2 requests, 2 running, 0 waiting, 0 prompt + 1 output tokens/s, 0:10",
    ]


def test_rates_are_of_the_last_seconds_and_time_left_of_this_attempt(screen, clock):
    shown = Progress(100, enabled=True, console=Console(file=screen, force_terminal=False))
    shown.update(Counts(50))
    for second in range(1, 6):
        clock[0] = 100.0 + second
        shown.update(Counts(50 + 2 * second, 0, 4, generated=100 * max(second - 3, 0)))
    assert screen.getvalue() == (
        "moempi: 60/100 requests, 4 running, 36 waiting, 0 prompt + 50 output tokens/s, 0:05, 0:20 left\n"
    )


def test_no_time_left_is_shown_until_all_requests_are_read(screen, clock):
    shown = Progress(20, has_more=True, enabled=True, console=Console(file=screen, force_terminal=False))
    for second in range(11):
        clock[0] = 100.0 + second
        if second == 8:
            shown.expect(40, has_more=False)
        shown.update(Counts(2 * second, 0, 4, generated=0))
    assert screen.getvalue().splitlines() == [
        "moempi: 10/20+ requests, 4 running, 6 waiting, 0 prompt + 0 output tokens/s, 0:05",
        "moempi: 20/40 requests, 4 running, 16 waiting, 0 prompt + 0 output tokens/s, 0:10, 0:10 left",
    ]


def test_a_terminal_gets_a_bar(screen):
    shown = Progress(4, enabled=True, console=Console(file=screen, force_terminal=True, width=100))
    shown.loading(1, 2, 1 << 20)
    shown.update(Counts(2, 10))
    shown.update(Counts(4, 20))
    shown.close()
    assert "4/4" in screen.getvalue()
    assert "tokens/s" in screen.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_other_ranks_are_silent(screen, terminal):
    shown = Progress(4, enabled=False, console=Console(file=screen, force_terminal=terminal))
    shown.loading(1, 2, 1 << 20)
    shown.update(Counts(4, 20))
    shown.close()
    assert screen.getvalue() == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (75, "1:15"), (7325, "2:02:05")])
def test_clock(seconds, text):
    assert progress._clock(seconds) == text
