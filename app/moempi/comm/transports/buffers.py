"""Buffers for rows that are used again and again, so that the loop allocates nothing."""

from collections.abc import Callable
from typing import Any


class BufferRing:
    """`count` buffers handed out in turn; what `take` returned stays untouched for `count - 1` further calls.

    `allocate(rows)` makes a buffer; one that is too small is replaced by a larger one.
    """

    def __init__(self, count: int, allocate: Callable[[int], Any]) -> None:
        self._allocate = allocate
        self._buffers = [allocate(0) for _ in range(count)]
        self._next = 0

    def take(self, rows: int) -> Any:
        """A buffer of as many rows; what is in it is undefined."""
        self._next = (self._next + 1) % len(self._buffers)
        if len(self._buffers[self._next]) < rows:
            self._buffers[self._next] = self._allocate(rows + rows // 4)
        return self._buffers[self._next][:rows]
