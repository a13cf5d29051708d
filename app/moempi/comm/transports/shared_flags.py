"""Flags of the `shared` transport in shared memory: which rows are ready to read, and which have been read.

CompiledFlags uses C (shared_flags.c, which describes the memory layout) if it can be compiled, else SharedFlags does
the same in Python. Ranks with either can share one set of flags.
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
"""Results of a poll: not all senders have signalled; all rows are in slots; some rows are sent as messages."""
INT64 = np.dtype(np.int64)


def flags_bytes(size: int) -> int:
    """Bytes of the words of `size` ranks."""
    return 4 * size * size * LINE_BYTES


class SharedFlags:
    """One rank's view of the words, which start at zero.

    `ranks` are the node's ranks in the group, ascending; a local rank, such as `own`, is an index into them. A slot
    holds `slot_rows` rows. `sync` orders memory accesses to rows and words.
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
        """Whether all receivers have read the rows of the last transfer of this parity."""
        return all(
            not expected or self._words[self._line(receiver, 2 + parity, self._own)] == expected
            for receiver, expected in enumerate(self._expected[parity].tolist())
        )

    def signal(self, number: int, *, fits: bool, sent: IntArray) -> None:
        """Signal to the receivers where their rows are, or, unless the rows `fits`, that they are sent as messages.

        `sent` (R,) are rows to each rank of the group.
        """
        parity, before = number % 2, np.cumsum(sent) - sent
        others = np.arange(len(self._ranks)) != self._own
        self._expected[parity] = np.where(others & (sent[self._ranks] > 0), number, 0)
        self._firsts[parity] = before[self._ranks] if fits else BY_MESSAGE
        receivers = np.flatnonzero(self._expected[parity]).tolist()
        for receiver in receivers:
            self._words[self._line(self._own, parity, receiver) + 1] = int(self._firsts[parity, receiver])
        self._sync()
        for receiver in receivers:
            self._words[self._line(self._own, parity, receiver)] = number

    def expect(self, number: int, *, received: IntArray, num_rows: int) -> None:
        """Expect the signals of the senders of this transfer, after this rank's own signal.

        `received` (R,) are rows from each rank of the group; `num_rows` is their sum, or 0 if `rows` are not needed.
        """
        parity, others = number % 2, np.arange(len(self._ranks)) != self._own
        self._received[parity] = received[self._ranks]
        self._missing[parity] = others & (self._received[parity] > 0)

    def poll(self, number: int) -> int:
        """WAITING, ALL_IN_SLOTS or SOME_BY_MESSAGE, after `expect`; does not block."""
        parity = number % 2
        for sender in np.flatnonzero(self._missing[parity]).tolist():
            line = self._line(sender, parity, self._own)
            if self._words[line] == number:
                self._sync()
                self._firsts[parity, sender] = self._words[line + 1]
                self._missing[parity, sender] = 0
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
        """The index among the rows of all slots of each received row (num_rows,), ordered by sender.

        Valid after a poll returned ALL_IN_SLOTS, until the transfer after the next overwrites it.
        """
        return self._rows[number % 2][:num_rows]

    def first_row(self, number: int, local_rank: int) -> int:
        """The first row for this rank in the slot of `local_rank`, or BY_MESSAGE."""
        return int(self._firsts[number % 2, local_rank])

    def release(self, number: int) -> None:
        """Flag the rows of this transfer as read."""
        parity = number % 2
        self._sync()
        for sender in np.flatnonzero(self._received[parity]).tolist():
            if sender != self._own:
                self._words[self._line(self._own, 2 + parity, sender)] = number

    def _line(self, owner: int, kind: int, other: int) -> int:
        return ((owner * 4 + kind) * len(self._ranks) + other) * LINE_WORDS


class _Fields(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("size", "own", "slot_rows")),
        ("numbers", ctypes.c_int64 * 2),
        *((name, ctypes.c_void_p) for name in ("ranks", "words", "expected", "missing", "firsts", "received", "free")),
        ("capacities", ctypes.c_int64 * 2),
        ("rows", ctypes.c_void_p * 2),
    )


class CompiledFlags(SharedFlags):
    """The same in C. shared_flags.c counts the transfers itself, because ctypes passes small numbers fastest."""

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

    def signal(self, number: int, *, fits: bool, sent: IntArray) -> None:
        self._library.flags_signal(self._address, number % 2, int(fits), _words(sent))

    def expect(self, number: int, *, received: IntArray, num_rows: int) -> None:
        parity = number % 2
        if num_rows > len(self._rows[parity]):
            self._rows[parity] = np.zeros(2 * num_rows, np.int64)
            self._fields.rows[parity] = self._rows[parity].ctypes.data
            self._fields.capacities[parity] = len(self._rows[parity])
        self._library.flags_expect(self._address, parity, _words(received))

    def poll(self, number: int) -> int:
        found: int = self._library.flags_poll(self._address, number % 2)
        return found

    def release(self, number: int) -> None:
        self._library.flags_release(self._address, number % 2)


def _words(counts: IntArray) -> bytes:
    """Counts as shared_flags.c reads them; ctypes passes bytes faster than an array's address."""
    return counts.tobytes() if counts.dtype is INT64 else counts.astype(np.int64).tobytes()


def make_shared_flags(
    words: npt.NDArray[np.uint8], ranks: Sequence[int], *, own: int, slot_rows: int, sync: Callable[[], None]
) -> SharedFlags:
    """Make CompiledFlags if shared_flags.c can be compiled and loaded, else SharedFlags."""
    kind = SharedFlags if _library() is None else CompiledFlags
    return kind(words, ranks, own=own, slot_rows=slot_rows, sync=sync)


@cache
def _library() -> ctypes.PyDLL | None:
    """The library of shared_flags.c, or None if it cannot be compiled or loaded.

    A PyDLL holds the interpreter lock during calls, which are too short to release it.
    """
    library = load_kernel(SOURCE)
    if library is None:
        return None
    flags = ctypes.PyDLL(library._name, handle=library._handle)
    flags.flags_signal.restype = flags.flags_expect.restype = flags.flags_release.restype = None
    return flags
