"""Reading ahead: a file's bytes are on their way to memory while its reader works on earlier ones."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

from moempi.errors import DataError
from moempi.storage.closeable import Closeable

LEAD_BYTES = 256 << 20
"""How far the reading is ahead of the reader, at most: what the page cache keeps for it."""
PIECE_BYTES = 4 << 20
POLL_S = 0.005


class ReadAhead(Closeable):
    """Lets the operating system read `ranges` of a file into its page cache, in order and beside their reader.

    `consumed` gives the bytes of the ranges that the reader has read so far. Failures of the disk and damage of the
    file are the reader's to report. Not collective; a thread of its own waits for the disk, and where none can start,
    nothing is read ahead.
    """

    def __init__(self, path: Path, ranges: Iterable[range], consumed: Callable[[], int]) -> None:
        self._path = path
        self._ranges = ranges
        self._consumed = consumed
        self._closed = Event()
        self._thread = Thread(target=self._run, name="read ahead", daemon=True)
        with suppress(RuntimeError):  # no more threads here
            self._thread.start()

    def close(self) -> None:
        """End the reading; blocks for the piece that is being read."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        ahead = 0
        # A DataError is the file's; there is no posix_fadvise but on Linux.
        with suppress(OSError, AttributeError, DataError), self._path.open("rb") as file:
            for piece in _pieces(self._ranges):
                while ahead - self._consumed() > LEAD_BYTES and not self._closed.wait(POLL_S):
                    pass
                if self._closed.is_set():
                    return
                ahead += len(piece)
                if ahead > self._consumed():
                    os.posix_fadvise(file.fileno(), piece.start, len(piece), os.POSIX_FADV_WILLNEED)


def _pieces(ranges: Iterable[range]) -> Iterator[range]:
    for one in ranges:
        for start in range(one.start, one.stop, PIECE_BYTES):
            yield range(start, min(start + PIECE_BYTES, one.stop))
