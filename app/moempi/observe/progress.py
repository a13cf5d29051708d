"""Progress of a run on stderr."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from moempi.config.size import format_size

if TYPE_CHECKING:  # rich is imported by the one rank that prints
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

LINE_EVERY_S = 5.0
RATE_OVER_S = 2.0
"""A rate is of at least this many seconds before."""
BAR_WIDTH = 16


class Counts(NamedTuple):
    """Requests and tokens of a run so far, over all ranks.

    `finished` counts requests, also of earlier attempts. `tokens` counts the tokens, scored or generated, of requests
    that this attempt finished. `running` requests have a slot. `prompt_tokens` are computed and `generated` tokens
    sampled, also of running requests. `errors` counts the finished requests with an error.
    """

    finished: int = 0
    tokens: int = 0
    running: int = 0
    prompt_tokens: int = 0
    generated: int = 0
    errors: int = 0


class Progress:
    """A bar on a terminal, elsewhere one line every LINE_EVERY_S seconds; prints nothing unless `enabled` (rank 0).

    There are `total` requests, and others if it `has_more`.
    """

    def __init__(self, total: int, *, has_more: bool = False, enabled: bool, console: "Console | None" = None) -> None:
        self._total = total
        self._has_more = has_more
        self._console = (console or _error_console()) if enabled else None
        self._is_terminal = self._console is not None and self._console.is_terminal
        self._line_due = time.monotonic() + LINE_EVERY_S
        self._counts = Counts()
        self._first: tuple[float, Counts] | None = None
        self._before: tuple[float, Counts] | None = None
        self._rates = (0.0, 0.0)
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def loading(self, layer: int, num_layers: int, num_bytes: int) -> None:
        """Show that `layer` layers of the rank's `num_layers` are loaded, and `num_bytes` are read."""
        text = f"loading weights, {layer}/{num_layers} layers of rank 0, {format_size(num_bytes)}"
        self._show(lambda: text, share=0.0)

    def expect(self, total: int, *, has_more: bool) -> None:
        """From now on there are `total` requests, and others if it `has_more`."""
        self._total, self._has_more = total, has_more

    def update(self, counts: Counts) -> None:
        """Show the counts after a step; cheap enough for every step."""
        now = time.monotonic()
        self._counts = counts
        self._first = self._first or (now, counts)
        self._before = self._before or self._first
        seconds = now - self._before[0]
        if seconds >= RATE_OVER_S or self._before is self._first:
            self._rates = _rates(counts, self._before[1], seconds)
        if seconds >= RATE_OVER_S:
            self._before = now, counts
        if self._console is not None:
            self._show(self._text, share=counts.finished / max(self._total, 1))

    def close(self) -> None:
        """Stop the bar in its last state, or print a last line, with the rates of the whole run."""
        if self._console is None:
            return
        if self._first is not None:
            self._rates = _rates(self._counts, self._first[1], time.monotonic() - self._first[0])
        if self._bar is not None:
            self._show(self._text, share=self._counts.finished / max(self._total, 1))
            self._bar.stop()
        else:
            self._console.print(f"moempi: {self._text()}", soft_wrap=True)

    def _show(self, text: Callable[[], str], *, share: float) -> None:
        if self._console is None:
            return
        if self._is_terminal:
            self._draw(self._console, text(), share)
        elif time.monotonic() >= self._line_due:
            self._line_due = time.monotonic() + LINE_EVERY_S
            self._console.print(f"moempi: {text()}", soft_wrap=True)

    def _draw(self, console: "Console", text: str, share: float) -> None:
        if self._bar is None or self._task is None:
            from rich.progress import BarColumn, Progress, TextColumn

            self._bar = Progress(BarColumn(BAR_WIDTH), TextColumn("{task.description}", markup=False), console=console)
            self._task = self._bar.add_task("", total=1.0)
            self._bar.start()
        self._bar.update(self._task, completed=share, description=text)

    def _text(self) -> str:
        finished, running = self._counts.finished, self._counts.running
        prompt, generated = self._rates
        waiting = max(self._total - finished - running, 0)
        more = "+" if self._has_more else ""
        return (
            f"{finished}/{self._total}{more} requests, {running} running, {waiting} waiting, "
            f"{prompt:,.0f} prompt + {generated:,.0f} output tokens/s, {self._time()}"
        )

    def _time(self) -> str:
        """The time since the first step, and an estimate of the time left once requests have finished."""
        if self._first is None:
            return "0:00"
        elapsed_s = time.monotonic() - self._first[0]
        done, left = self._counts.finished - self._first[1].finished, self._total - self._counts.finished
        if not done or not left or self._has_more:
            return _clock(elapsed_s)
        return f"{_clock(elapsed_s)}, {_clock(elapsed_s * left / done)} left"


def _error_console() -> "Console":
    from moempi.observe.console import error_console

    return error_console()


def _rates(now: Counts, before: Counts, seconds: float) -> tuple[float, float]:
    """Tokens of prompts, and generated tokens, per second."""
    seconds = max(seconds, 1e-9)
    return (now.prompt_tokens - before.prompt_tokens) / seconds, (now.generated - before.generated) / seconds


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
