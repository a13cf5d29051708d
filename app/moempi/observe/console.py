"""Consoles on stdout and stderr, which print all strings as plain text."""

import os
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from moempi.printing import printable, shortened

T = TypeVar("T")
MAX_TEXT_LENGTH = 2000
"""A longer string is cut in its middle."""


class PlainConsole(Console):
    """A console for strings, also in tables, that may come from files: unprintable characters are escaped.

    Markup, emoji codes and highlighting are off. A `figures_table` becomes lines, one for each of its rows, if it is
    wider than the console: 80 columns where there is no terminal.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        """Print the objects, tables as they fit."""
        super().print(*map(self._fitted, objects), **options)

    def _fitted(self, printed: Any) -> Any:
        if not isinstance(printed, Table) or not all(column.no_wrap for column in printed.columns):
            return printed
        unlimited = self.options.update(max_width=MAX_TEXT_LENGTH)
        if Measurement.get(self, unlimited, printed).maximum <= self.width:
            return printed
        heads = [str(column.header) for column in printed.columns]
        rows = zip(*(column.cells for column in printed.columns), strict=True)
        lines = [", ".join(f"{head} {cell}" for head, cell in zip(heads, row, strict=True)) for row in rows]
        return Group(*_present(printed.title), *lines, *_present(printed.caption))

    def render_str(self, text: str, **options: Any) -> Text:
        """The string as rich text; rich calls it for every string that it prints or measures."""
        plain = {"markup": False, "emoji": False, "highlight": False}
        return super().render_str(printable(shortened(text, MAX_TEXT_LENGTH)), **(options | plain))


def _present(text: RenderableType | None) -> list[RenderableType]:
    return [] if text is None else [text]


def figures_table(*heads: str, title: str | None = None, caption: str | None = None) -> Table:
    """An empty table of figures, whose cells are never wrapped."""
    columns = (Column(head, no_wrap=True) for head in heads)
    table = Table(*columns, title=title, caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.title_justify = table.caption_justify = "left"
    return table


def console() -> Console:
    """A console on stdout, with colours only on a terminal.

    mpirun gives rank 0 a pseudo terminal as stdout even if its own output is a file, but never as stderr. So stderr
    decides, unless rich's variable TTY_COMPATIBLE is 1.
    """
    on_terminal = sys.stderr.isatty() or os.environ.get("TTY_COMPATIBLE") == "1"
    return PlainConsole(force_terminal=None if on_terminal else False)


def error_console() -> Console:
    """A console on stderr."""
    return PlainConsole(stderr=True)


def numbered_runs(rows: Iterable[T]) -> Iterator[tuple[str, T]]:
    """Each run of equal adjacent rows as one row, with the first and the last number of the run."""
    first = 0
    for row, equal in groupby(rows):
        last = first + len(list(equal)) - 1
        yield f"{first}" if first == last else f"{first} to {last}", row
        first = last + 1
