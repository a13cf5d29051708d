"""Reused buffers for rows, so that a step allocates none."""

from collections.abc import Callable
from typing import Any

from moempi.layout.row_buffers import grown


class BufferRing:
    """`count` buffers that `take` returns in rotation; each one stays untouched for `count - 1` further calls.

    `allocate(rows)` makes a buffer; a buffer that is too small is replaced by a larger one.
    """

    def __init__(self, count: int, allocate: Callable[[int], Any]) -> None:
        self._allocate = allocate
        self._buffers = [allocate(0) for _ in range(count)]
        self._taken = list(self._buffers)  # views of the buffers; a view takes longer than a look at the last one
        self._next = 0

    def take(self, rows: int) -> Any:
        """A buffer of `rows` rows with undefined contents."""
        number = self._next = (self._next + 1) % len(self._buffers)
        if len(self._buffers[number]) < rows:
            self._buffers[number] = self._allocate(grown(rows))
        if len(self._taken[number]) != rows:
            self._taken[number] = self._buffers[number][:rows]
        return self._taken[number]
