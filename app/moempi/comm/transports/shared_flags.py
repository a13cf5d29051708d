"""Flags of the `shared` transport in shared memory: which rows are ready to read, and which have been read.

Compiled C where there is a compiler (shared_flags.c, which explains the memory layout), else the same in Python. Ranks
with either share one set of flags.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moempi.arrays import IntArray
from moempi.backend.c_compiler import load_kernel

SOURCE = Path(__file__).with_name("shared_flags.c")
LINE_BYTES = 64
LINE_WORDS = LINE_BYTES // 8
BY_MESSAGE = -1
WAITING, ALL_IN_SLOTS, SOME_BY_MESSAGE = range(3)
"""What a look finds: some have not posted; all rows lie in slots; some of them come as messages."""
INT64 = np.dtype(np.int64)


def flags_bytes(size: int) -> int:
    """Memory of the words of `size` ranks."""
    return 4 * size * size * LINE_BYTES


class SharedFlags:
    """One rank's view of the words, which start at zero. Places are the node's ranks in ascending order.

    `slot_rows` is how many rows fit into a slot; `sync` orders rows and words.
    """

    def __init__(
        self, words: npt.NDArray[np.uint8], ranks: Sequence[int], *, own: int, slot_rows: int, sync: Callable[[], None]
    ) -> None:
        size = len(ranks)
        self._ranks = np.array(ranks, np.int64)
        self._own = own
        self._slot_rows = slot_rows
        self._sync = sync
        lines: Any = words.view(np.int64)
        self._words = memoryview(lines)
        self._expected, self._missing, self._firsts, self._received = np.zeros((4, 2, size), np.int64)
        self._rows = [np.zeros(0, np.int64), np.zeros(0, np.int64)]

    def slot_is_free(self, parity: int) -> bool:
        """Whether all readers have read what was posted the last time that it was this parity."""
        return all(
            not expected or self._words[self._line(peer, 2 + parity, self._own)] == expected
            for peer, expected in enumerate(self._expected[parity].tolist())
        )

    def signal(self, number: int, *, fits: bool, sent: IntArray, received: IntArray, num_rows: int) -> None:
        """Tell the readers where their rows are, or that they come as messages, and note which rows are awaited.

        Counts (R,) are those to and from each rank of the group; `num_rows` come in all.
        """
        parity, before = number % 2, np.cumsum(sent) - sent
        others = np.arange(len(self._ranks)) != self._own
        self._received[parity] = received[self._ranks]
        self._missing[parity] = others & (self._received[parity] > 0)
        self._expected[parity] = np.where(others & (sent[self._ranks] > 0), number, 0)
        self._firsts[parity] = before[self._ranks] if fits else BY_MESSAGE
        readers = np.flatnonzero(self._expected[parity]).tolist()
        for peer in readers:
            self._words[self._line(self._own, parity, peer) + 1] = int(self._firsts[parity, peer])
        self._sync()
        for peer in readers:
            self._words[self._line(self._own, parity, peer)] = number

    def poll(self, number: int, *, max_polls: int) -> int:
        """WAITING, IN_ROOMS or NOT_ALL, after at most `max_polls` looks; only the compiled board looks twice."""
        parity = number % 2
        for peer in np.flatnonzero(self._missing[parity]).tolist():
            line = self._line(peer, parity, self._own)
            if self._words[line] == number:
                self._sync()
                self._firsts[parity, peer] = self._words[line + 1]
                self._missing[parity, peer] = 0
        if self._missing[parity].any():
            return WAITING
        counts, firsts = self._received[parity], self._firsts[parity]
        if (firsts[counts > 0] == BY_MESSAGE).any():
            return SOME_BY_MESSAGE
        slots = (2 * np.arange(len(counts)) + parity) * self._slot_rows
        ends = np.cumsum(counts)
        self._rows[parity] = np.repeat(slots + firsts - (ends - counts), counts) + np.arange(counts.sum())
        return ALL_IN_SLOTS

    def rows(self, number: int, num_rows: int) -> IntArray:
        """Where each of the awaited rows lies among those of all slots, by peer, once a look found them IN_ROOMS.

        Of so many rows; written again by the transfer after the next.
        """
        return self._rows[number % 2][:num_rows]

    def first_row(self, number: int, local_rank: int) -> int:
        """Where the rows of a peer begin in its slot, or BY_MESSAGE."""
        return int(self._firsts[number % 2, local_rank])

    def release(self, number: int) -> None:
        """Tell the producers that their rows have been read."""
        parity = number % 2
        self._sync()
        for peer in np.flatnonzero(self._received[parity]).tolist():
            if peer != self._own:
                self._words[self._line(self._own, 2 + parity, peer)] = number

    def _line(self, owner: int, kind: int, other: int) -> int:
        return ((owner * 4 + kind) * len(self._ranks) + other) * LINE_WORDS


class _Fields(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("size", "own", "slot_rows")),
        ("numbers", ctypes.c_int64 * 2),
        *((name, ctypes.c_void_p) for name in ("ranks", "words", "expected", "missing", "firsts", "received", "free")),
        ("num_rows", ctypes.c_int64 * 2),
        ("rows", ctypes.c_void_p * 2),
    )


class CompiledFlags(SharedFlags):
    """The same by shared_flags.c, which counts the transfers itself: ctypes passes small numbers and bytes quickly."""

    def __init__(
        self, words: npt.NDArray[np.uint8], ranks: Sequence[int], *, own: int, slot_rows: int, sync: Callable[[], None]
    ) -> None:
        super().__init__(words, ranks, own=own, slot_rows=slot_rows, sync=sync)
        free = np.ones(2, np.int64)
        arrays = (self._ranks, words, self._expected, self._missing, self._firsts, self._received, free)
        addresses = (array.ctypes.data for array in arrays)
        self._fields = _Fields(len(ranks), own, slot_rows, (0, -1), *addresses)
        self._address = ctypes.byref(self._fields)
        self._seen_free = memoryview(free)  # type: ignore[arg-type]  # NumPy stubs: not every array is a buffer
        self._library: Any = _library()

    def slot_is_free(self, parity: int) -> bool:
        return bool(self._seen_free[parity] or self._library.flags_slot_is_free(self._address, parity))

    def signal(self, number: int, *, fits: bool, sent: IntArray, received: IntArray, num_rows: int) -> None:
        parity = number % 2
        if num_rows > len(self._rows[parity]):
            self._rows[parity] = np.zeros(2 * num_rows, np.int64)
            self._fields.rows[parity] = self._rows[parity].ctypes.data
            self._fields.num_rows[parity] = len(self._rows[parity])
        self._library.flags_signal(self._address, parity, int(fits), _words(sent), _words(received))

    def poll(self, number: int, *, max_polls: int) -> int:
        found: int = self._library.flags_poll(self._address, number % 2, max_polls)
        return found

    def release(self, number: int) -> None:
        self._library.flags_release(self._address, number % 2)


def _words(counts: IntArray) -> bytes:
    """Counts as shared_flags.c reads them; quicker to pass than an array's address."""
    return counts.tobytes() if counts.dtype is INT64 else counts.astype(np.int64).tobytes()


def make_shared_flags(
    words: npt.NDArray[np.uint8], ranks: Sequence[int], *, own: int, slot_rows: int, sync: Callable[[], None]
) -> SharedFlags:
    """A compiled board where that can be had."""
    kind = SharedFlags if _library() is None else CompiledFlags
    return kind(words, ranks, own=own, slot_rows=slot_rows, sync=sync)


@cache
def _library() -> ctypes.PyDLL | None:
    """The compiled board. Its calls are so short that they keep the interpreter to themselves."""
    library = load_kernel(SOURCE)
    if library is None:
        return None
    flags = ctypes.PyDLL(library._name, handle=library._handle)
    flags.flags_signal.restype = flags.flags_release.restype = None
    return flags
