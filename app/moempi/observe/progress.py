"""Progress of a run on stderr."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from moempi.observe.console import error_console

LINE_EVERY_S = 5.0


class Progress:
    """A bar on a terminal, elsewhere one line every LINE_EVERY_S seconds; prints nothing unless `enabled` (rank 0)."""

    def __init__(self, total: int, *, enabled: bool, console: Console | None = None) -> None:
        self._total = total
        self._enabled = enabled
        self._console = console or error_console()
        self._begin = time.monotonic()
        self._line_due = self._begin + LINE_EVERY_S
        self._counts = (0, 0)
        self._bar: Bar | None = None
        self._task = TaskID(0)

    def update(self, done: int, tokens: int) -> None:
        """Show `done` finished requests and `tokens` scored or generated tokens; cheap enough for every step."""
        self._counts = (done, tokens)
        if not self._enabled:
            return
        if self._console.is_terminal:
            self._draw()
        elif time.monotonic() >= self._line_due:
            self._line_due = time.monotonic() + LINE_EVERY_S
            self._console.print(f"moempi: {self._text()}", soft_wrap=True)

    def close(self) -> None:
        """Stop the bar in its last state, or print a last line."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._draw()
            self._bar.stop()
        else:
            self._console.print(f"moempi: {self._text()}", soft_wrap=True)

    def _draw(self) -> None:
        if self._bar is None:
            requests = TextColumn("requests, {task.fields[rate]}")
            self._bar = Bar(BarColumn(), MofNCompleteColumn(), requests, TimeElapsedColumn(), console=self._console)
            self._task = self._bar.add_task("run", total=self._total, rate="")
            self._bar.start()
        self._bar.update(self._task, completed=self._counts[0], rate=self._rate())

    def _text(self) -> str:
        return f"{self._counts[0]}/{self._total} requests, {self._rate()}"

    def _rate(self) -> str:
        elapsed_s = time.monotonic() - self._begin
        return f"{self._counts[1] / max(elapsed_s, 1e-9):,.0f} tokens/s"
