"""Progress: a bar on a terminal, lines elsewhere, nothing on other ranks."""

import io

import pytest
from rich.console import Console

from moempi.observe import progress
from moempi.observe.progress import Progress


@pytest.fixture
def screen():
    return io.StringIO()


def test_lines_come_every_few_seconds_and_at_the_end(screen, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = Progress(256, enabled=True, console=Console(file=screen, force_terminal=False))
    for second in range(11):
        now[0] = 100.0 + second
        shown.update(second * 10, second * 1000)
    shown.close()
    assert screen.getvalue().splitlines() == [
        "moempi: 50/256 requests, 1,000 tokens/s",
        "moempi: 100/256 requests, 1,000 tokens/s",
        "moempi: 100/256 requests, 1,000 tokens/s",
    ]


def test_a_terminal_gets_a_bar(screen):
    shown = Progress(4, enabled=True, console=Console(file=screen, force_terminal=True, width=100))
    shown.update(2, 10)
    shown.update(4, 20)
    shown.close()
    assert "4/4" in screen.getvalue()
    assert "tokens/s" in screen.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_other_ranks_are_silent(screen, terminal):
    shown = Progress(4, enabled=False, console=Console(file=screen, force_terminal=terminal))
    shown.update(4, 20)
    shown.close()
    assert screen.getvalue() == ""
