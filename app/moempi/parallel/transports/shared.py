"""`shared`: inside a node the senders write rows into memory that the receivers read; between nodes as `pairwise`.

Each rank owns a segment of one shared window: control words, and two rooms that its transfers use in turn. A sender
packs rows into its room and then posts, for each neighbour, the number of the transfer and where its rows begin. The
neighbour copies them out and notes the number as taken, which frees the room for the transfer after the next. Every
word has one writer and a cache line of its own; `Win.Sync` between rows and words orders them (MPI 4.1, 12.5.4).
Rows that exceed the room go as messages; the posted word says so.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from moempi.arrays import ALIGNMENT_BYTES, aligned_rows
from moempi.parallel.transports.pairwise import TAGS, Messages, blocks, copy_rows
from moempi.parallel.transports.rooms import Rooms

IntArray = npt.NDArray[np.integer]

ROOM_BYTES = 16 << 20
WORDS = ALIGNMENT_BYTES // 8
BY_MESSAGE = -1


@dataclass(frozen=True, slots=True)
class _Segment:
    """One rank's part of the window: its control words and its two rooms, as bytes."""

    words: memoryview
    rooms: npt.NDArray[np.uint8]


@dataclass(slots=True)
class _Taking:
    """A transfer under way: `missing` are the neighbours, by place, whose rows [first, last) are not here yet."""

    transport: "Shared"
    number: int
    missing: dict[int, tuple[int, int]]
    incoming: Any
    messages: Messages

    def Test(self) -> bool:  # noqa: N802
        """See `Pending.Test`."""
        for place in list(self.missing):
            if self.transport.take(self.number, place, self.missing[place], self.incoming, self.messages):
                del self.missing[place]
        return not self.missing and self.messages.Test()

    def Wait(self) -> None:  # noqa: N802
        """See `Pending.Wait`."""
        while not self.Test():
            self.transport.pause()


class Shared:
    """Rows through a window of `comm`'s ranks on this node, of whom `nodes` may say who they are.

    A rank has two rooms of `room_bytes`; `reach` hears of their memory, before it is used, and `allocate(rows)` makes
    the buffers of what does not fit. Making one is collective.
    """

    name = "shared"

    def __init__(
        self,
        comm: MPI.Intracomm,
        *,
        row_bytes: int,
        nodes: tuple[int, ...] | None = None,
        room_bytes: int = ROOM_BYTES,
        allocate: Callable[[int], Any] | None = None,
        reach: Callable[[npt.NDArray[np.uint8]], None] = lambda memory: None,
    ) -> None:
        shared = comm.Split_type(MPI.COMM_TYPE_SHARED)
        neighbours = MPI.Intracomm(shared.Split(nodes[comm.rank] if nodes else 0))
        shared.Free()
        self._comm = comm
        self._row_bytes = row_bytes
        self._row = MPI.BYTE.Create_contiguous(row_bytes).Commit()
        self._ranks = neighbours.allgather(comm.rank)
        self._places = {rank: place for place, rank in enumerate(self._ranks)}
        self._own = neighbours.rank
        room_bytes = neighbours.allreduce(room_bytes, MPI.MAX)  # groups of a stage can differ in their rows
        self._room_bytes = -(-room_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self._window, self._segments = _open(neighbours, self._room_bytes)
        reach(self._segments[self._own].rooms)
        self._overflow = Rooms(2, allocate or partial(aligned_rows, row_bytes=row_bytes))
        self._number = 0
        self._posted: dict[int, list[int]] = {0: [], 1: []}

    def outgoing(self, rows: int) -> Any:
        """See `Transport.outgoing`."""
        turn = (self._number + 1) % 2
        while not self._is_free(turn):
            self.pause()
        if not self._fits(rows):
            return self._overflow.take(rows)
        return self._segments[self._own].rooms[turn][: rows * self._row_bytes].reshape(rows, self._row_bytes)

    def start(self, outgoing: Any, send_counts: IntArray, incoming: Any, recv_counts: IntArray) -> _Taking:
        """See `Transport.start`."""
        self._number += 1
        landings, sent = blocks(recv_counts), blocks(send_counts)
        requests = [
            self.receive(incoming, rows, rank, self._number)
            for rank, rows in landings.items()
            if rank not in self._places
        ]
        self._post(outgoing, sent, fits=self._fits(len(outgoing)))
        by_message = [rank for rank in sent if rank not in self._places or not self._fits(len(outgoing))]
        for rank in by_message:
            if rank != self._comm.rank:
                first, last = sent[rank]
                message = [outgoing[first:last], last - first, self._row]
                requests.append(self._comm.Isend(message, rank, self._number % TAGS))
        missing = {self._places[rank]: rows for rank, rows in landings.items() if rank in self._places}
        if self._own in missing:
            first, last = sent[self._comm.rank]
            copy_rows(incoming, missing.pop(self._own), outgoing[first:last])
        return _Taking(self, self._number, missing, incoming, Messages(requests))

    def take(self, number: int, place: int, rows: tuple[int, int], incoming: Any, messages: Messages) -> bool:
        """Take the rows of a neighbour if they have been posted; where they come by message, ask for that message."""
        turn, size = number % 2, len(self._ranks)
        words = self._segments[place].words
        line = (turn * size + self._own) * WORDS
        if words[line] != number:
            return False
        self._window.Sync()
        first_byte = words[line + 1]
        if first_byte == BY_MESSAGE:
            messages.requests.append(self.receive(incoming, rows, self._ranks[place], number))
        else:
            num_bytes = (rows[1] - rows[0]) * self._row_bytes
            copy_rows(incoming, rows, self._segments[place].rooms[turn][first_byte : first_byte + num_bytes])
            self._window.Sync()
        self._segments[self._own].words[((2 + turn) * size + place) * WORDS] = number
        return True

    def receive(self, incoming: Any, rows: tuple[int, int], rank: int, number: int) -> MPI.Request:
        """Ask for rows that come as a message."""
        first, last = rows
        return self._comm.Irecv([incoming[first:last], last - first, self._row], rank, number % TAGS)

    def pause(self) -> None:
        """Between two looks at the words: MPI moves other transfers on, and another process may have the core."""
        self._comm.Iprobe()
        os.sched_yield()

    def _fits(self, rows: int) -> bool:
        return rows * self._row_bytes <= self._room_bytes

    def _is_free(self, turn: int) -> bool:
        """Whether all neighbours have taken what was posted the last time that it was this room's turn."""
        line = ((2 + turn) * len(self._ranks) + self._own) * WORDS
        expected = self._number - 1
        return all(self._segments[place].words[line] == expected for place in self._posted[turn])

    def _post(self, outgoing: Any, sent: dict[int, tuple[int, int]], *, fits: bool) -> None:
        """Tell the neighbours where their rows are."""
        turn, size = self._number % 2, len(self._ranks)
        places = [self._places[rank] for rank in sent if rank in self._places and rank != self._comm.rank]
        words = self._segments[self._own].words
        for place in places:
            first_row = sent[self._ranks[place]][0]
            words[(turn * size + place) * WORDS + 1] = first_row * self._row_bytes if fits else BY_MESSAGE
        self._window.Sync()
        for place in places:
            words[(turn * size + place) * WORDS] = self._number
        self._posted[turn] = places


def _open(neighbours: MPI.Intracomm, room_bytes: int) -> tuple[MPI.Win, list[_Segment]]:
    """A window of all neighbours, its words zero; collective."""
    words_bytes = 4 * neighbours.size * ALIGNMENT_BYTES
    window = MPI.Win.Allocate_shared(words_bytes + 2 * room_bytes + ALIGNMENT_BYTES, 1, comm=neighbours)
    window.Lock_all(MPI.MODE_NOCHECK)
    segments = []
    for place in range(neighbours.size):
        segment: Any = window.Shared_query(place)[0]
        memory: Any = np.frombuffer(segment, np.uint8)
        memory = memory[-memory.ctypes.data % ALIGNMENT_BYTES :]
        rooms = memory[words_bytes : words_bytes + 2 * room_bytes].reshape(2, room_bytes)
        segments.append(_Segment(memoryview(memory[:words_bytes].view(np.int64)), rooms))
    np.frombuffer(segments[neighbours.rank].words, np.int64)[:] = 0
    window.Sync()
    neighbours.Barrier()
    window.Sync()
    return window, segments
