"""The board of the `shared` transport: who has posted rows for whom, and who has read them.

A compiled board where there is a C compiler (shared_flags.c, where its words are explained), else the same in Python; ranks
with either meet on one board.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moempi.backend.c_compiler import load_kernel

IntArray = npt.NDArray[np.integer]

SOURCE = Path(__file__).with_name("shared_flags.c")
LINE_BYTES = 64
LINE_WORDS = LINE_BYTES // 8
BY_MESSAGE = -1
WAITING, IN_ROOMS, NOT_ALL = range(3)
"""What a look finds: some have not posted; all rows lie in rooms; some of them come as messages."""
INT64 = np.dtype(np.int64)


def board_bytes(size: int) -> int:
    """Memory of the words of `size` ranks."""
    return 4 * size * size * LINE_BYTES


class Board:
    """One rank's view of the words, which start at zero. Places are the node's ranks in ascending order.

    `room_rows` is how many rows fit into a room; `sync` orders rows and words.
    """

    def __init__(
        self, words: npt.NDArray[np.uint8], ranks: Sequence[int], *, own: int, room_rows: int, sync: Callable[[], None]
    ) -> None:
        size = len(ranks)
        self._ranks = np.array(ranks, np.int64)
        self._own = own
        self._room_rows = room_rows
        self._sync = sync
        lines: Any = words.view(np.int64)
        self._words = memoryview(lines)
        self._expected, self._missing, self._firsts, self._landing = np.zeros((4, 2, size), np.int64)
        self._rows = [np.zeros(0, np.int64), np.zeros(0, np.int64)]

    def is_free(self, turn: int) -> bool:
        """Whether all readers have read what was posted the last time that it was this turn."""
        return all(
            not expected or self._words[self._line(place, 2 + turn, self._own)] == expected
            for place, expected in enumerate(self._expected[turn].tolist())
        )

    def post(self, number: int, *, fits: bool, sent: IntArray, landing: IntArray, num_rows: int) -> None:
        """Tell the readers where their rows are, or that they come as messages, and note which rows are awaited.

        Counts (R,) are those to and from each rank of the group; `num_rows` come in all.
        """
        turn, before = number % 2, np.cumsum(sent) - sent
        others = np.arange(len(self._ranks)) != self._own
        self._landing[turn] = landing[self._ranks]
        self._missing[turn] = others & (self._landing[turn] > 0)
        self._expected[turn] = np.where(others & (sent[self._ranks] > 0), number, 0)
        self._firsts[turn] = before[self._ranks] if fits else BY_MESSAGE
        readers = np.flatnonzero(self._expected[turn]).tolist()
        for place in readers:
            self._words[self._line(self._own, turn, place) + 1] = int(self._firsts[turn, place])
        self._sync()
        for place in readers:
            self._words[self._line(self._own, turn, place)] = number

    def look(self, number: int, *, patience: int) -> int:
        """WAITING, IN_ROOMS or NOT_ALL, after at most `patience` looks; only the compiled board looks twice."""
        turn = number % 2
        for place in np.flatnonzero(self._missing[turn]).tolist():
            line = self._line(place, turn, self._own)
            if self._words[line] == number:
                self._sync()
                self._firsts[turn, place] = self._words[line + 1]
                self._missing[turn, place] = 0
        if self._missing[turn].any():
            return WAITING
        counts, firsts = self._landing[turn], self._firsts[turn]
        if (firsts[counts > 0] == BY_MESSAGE).any():
            return NOT_ALL
        rooms = (2 * np.arange(len(counts)) + turn) * self._room_rows
        ends = np.cumsum(counts)
        self._rows[turn] = np.repeat(rooms + firsts - (ends - counts), counts) + np.arange(counts.sum())
        return IN_ROOMS

    def rows(self, number: int, num_rows: int) -> IntArray:
        """Where each of the awaited rows lies among those of all rooms, by place, once a look found them IN_ROOMS.

        Of so many rows; written again by the transfer after the next.
        """
        return self._rows[number % 2][:num_rows]

    def first_row(self, number: int, place: int) -> int:
        """Where the rows of a place begin in its room, or BY_MESSAGE."""
        return int(self._firsts[number % 2, place])

    def release(self, number: int) -> None:
        """Tell the producers that their rows have been read."""
        turn = number % 2
        self._sync()
        for place in np.flatnonzero(self._landing[turn]).tolist():
            if place != self._own:
                self._words[self._line(self._own, 2 + turn, place)] = number

    def _line(self, owner: int, kind: int, other: int) -> int:
        return ((owner * 4 + kind) * len(self._ranks) + other) * LINE_WORDS


class _Fields(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("size", "own", "room_rows")),
        ("numbers", ctypes.c_int64 * 2),
        *((name, ctypes.c_void_p) for name in ("ranks", "words", "expected", "missing", "firsts", "landing", "free")),
        ("num_rows", ctypes.c_int64 * 2),
        ("rows", ctypes.c_void_p * 2),
    )


class CompiledBoard(Board):
    """The same by board.c, which counts the transfers itself: ctypes passes small numbers and bytes as they are."""

    def __init__(
        self, words: npt.NDArray[np.uint8], ranks: Sequence[int], *, own: int, room_rows: int, sync: Callable[[], None]
    ) -> None:
        super().__init__(words, ranks, own=own, room_rows=room_rows, sync=sync)
        free = np.ones(2, np.int64)
        arrays = (self._ranks, words, self._expected, self._missing, self._firsts, self._landing, free)
        addresses = (array.ctypes.data for array in arrays)
        self._fields = _Fields(len(ranks), own, room_rows, (0, -1), *addresses)
        self._place = ctypes.byref(self._fields)
        self._seen_free = memoryview(free)  # type: ignore[arg-type]  # NumPy stubs: not every array is a buffer
        self._library: Any = _library()

    def is_free(self, turn: int) -> bool:
        """See `Board.is_free`."""
        return bool(self._seen_free[turn] or self._library.is_free(self._place, turn))

    def post(self, number: int, *, fits: bool, sent: IntArray, landing: IntArray, num_rows: int) -> None:
        """See `Board.post`."""
        turn = number % 2
        if num_rows > len(self._rows[turn]):
            self._rows[turn] = np.zeros(2 * num_rows, np.int64)
            self._fields.rows[turn] = self._rows[turn].ctypes.data
            self._fields.num_rows[turn] = len(self._rows[turn])
        self._library.post(self._place, turn, int(fits), _words(sent), _words(landing))

    def look(self, number: int, *, patience: int) -> int:
        """See `Board.look`."""
        found: int = self._library.look(self._place, number % 2, patience)
        return found

    def release(self, number: int) -> None:
        """See `Board.release`."""
        self._library.release(self._place, number % 2)


def _words(counts: IntArray) -> bytes:
    """Counts as board.c reads them; quicker to pass than an array's address."""
    return counts.tobytes() if counts.dtype is INT64 else counts.astype(np.int64).tobytes()


def make_board(
    words: npt.NDArray[np.uint8], ranks: Sequence[int], *, own: int, room_rows: int, sync: Callable[[], None]
) -> Board:
    """A compiled board where that can be had."""
    kind = Board if _library() is None else CompiledBoard
    return kind(words, ranks, own=own, room_rows=room_rows, sync=sync)


@cache
def _library() -> ctypes.PyDLL | None:
    """The compiled board. Its calls are so short that they keep the interpreter to themselves."""
    library = load_kernel(SOURCE)
    if library is None:
        return None
    board = ctypes.PyDLL(library._name)
    board.post.restype = board.release.restype = None
    return board
