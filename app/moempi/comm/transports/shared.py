"""`shared`: inside a node rows stay where their sender packed them, and the receivers read them there.

One window of the node holds a board (board.py) and two rooms a rank, which its transfers use in turn. A sender packs
rows into its room and then posts, for each neighbour, the number of the transfer and where its rows begin. When all
have posted, a receiver knows where each of its rows lies among the rows of all rooms, and reads them from there, once;
`release` then notes the number as read, which frees the room for the transfer after the next. Between nodes, and where
rows exceed the room, they go as messages into the receiver's own buffer; the posted word says so, and the other rows
are copied beside them.
"""

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from moempi.arrays import ALIGNMENT_BYTES, aligned_rows
from moempi.comm.transports.buffers import Rooms
from moempi.comm.transports.pairwise import TAGS, blocks, copy_rows
from moempi.comm.transports.shared_flags import BY_MESSAGE, IN_ROOMS, WAITING, Board, board_bytes, make_board

IntArray = npt.NDArray[np.integer]

SHARED_MEMORY = Path("/dev/shm")
ROOM_BYTES = 16 << 20
SHARE_OF_FREE = 4
"""Of the node's shared memory that is free, one part in so many may be taken: what is written beyond it kills."""
PATIENCE = 256
"""Looks at the board before MPI gets its turn."""


@dataclass(slots=True)
class _Landing:
    """A transfer under way: `counts` (R,) rows from each rank, which stay in the rooms where that is so for all.

    `requests` are its messages; `overflow` is what this rank sends when that does not fit into its room.
    """

    transport: "Shared"
    number: int
    incoming: Any
    counts: IntArray
    requests: list[MPI.Request]
    overflow: Any = None
    posted: bool = False
    in_rooms: bool = False

    def Test(self) -> bool:  # noqa: N802
        """See `Pending.Test`."""
        return self._look(1)

    def Wait(self) -> None:  # noqa: N802
        """See `Pending.Wait`."""
        while not self._look(PATIENCE):
            self.transport.pause()

    def rows(self) -> tuple[Any, IntArray | None]:
        """See `Landing.rows`."""
        if not self.in_rooms:
            return self.incoming, None
        return self.transport.rooms, self.transport.board.rows(self.number, len(self.incoming))

    def release(self) -> None:
        """See `Landing.release`."""
        if self.in_rooms:
            self.transport.board.release(self.number)

    def _look(self, patience: int) -> bool:
        if not self.posted:
            found = self.transport.board.look(self.number, patience=patience)
            if found == WAITING:
                return False
            self.posted = True
            self.in_rooms = found == IN_ROOMS and self.transport.keeps_in_rooms(self.counts)
            if not self.in_rooms:
                self.transport.fetch(self)
        return not self.requests or bool(MPI.Request.Testall(self.requests))


class Shared:
    """Rows through a window of `comm`'s ranks on this node, of whom `nodes` may say who they are.

    A rank has two rooms of `room_bytes`; `reach` hears of all rooms' memory, before it is used, and `allocate(rows)`
    makes the buffers of what does not fit. With `in_place` off, rows are copied to the receiver's buffer. The rooms are
    smaller where `windows` such windows would take too much of the node's shared memory. Making one is collective.
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
        in_place: bool = True,
        windows: int = 1,
        make_board: Callable[..., Board] = make_board,
    ) -> None:
        shared = comm.Split_type(MPI.COMM_TYPE_SHARED)
        neighbours = MPI.Intracomm(shared.Split(nodes[comm.rank] if nodes else 0))
        shared.Free()
        self._comm = comm
        self._row = MPI.BYTE.Create_contiguous(row_bytes).Commit()
        self._ranks: list[int] = neighbours.allgather(comm.rank)
        self._places = {rank: place for place, rank in enumerate(self._ranks)}
        self._own = neighbours.rank
        self._in_place = in_place
        self._has_others = len(self._ranks) < comm.size
        room_bytes = neighbours.allreduce(room_bytes, MPI.MAX)  # groups of a stage can differ in their rows
        window_bytes = neighbours.allreduce(_free_bytes() // SHARE_OF_FREE // windows, MPI.MIN)
        allowed_bytes = window_bytes // (2 * neighbours.size)
        aligned = math.lcm(row_bytes, ALIGNMENT_BYTES)
        self._room_rows = min(-(-room_bytes // aligned), allowed_bytes // aligned) * aligned // row_bytes
        self._window, memory = _open(
            neighbours, board_bytes(neighbours.size), 2 * neighbours.size * self._room_rows * row_bytes
        )
        words = memory[: board_bytes(neighbours.size)]
        self.rooms = memory[len(words) :].reshape(-1, row_bytes)
        reach(self.rooms)
        self.board = make_board(
            words, self._ranks, own=self._own, room_rows=self._room_rows, sync=self._window.Sync
        )
        self._overflow = Rooms(2, allocate or partial(aligned_rows, row_bytes=row_bytes))
        self._number = 0

    def outgoing(self, rows: int) -> Any:
        """See `Transport.outgoing`."""
        turn = (self._number + 1) % 2
        while not self.board.is_free(turn):
            self.pause()
        if rows > self._room_rows:
            return self._overflow.take(rows)
        first = (2 * self._own + turn) * self._room_rows
        return self.rooms[first : first + rows]

    def start(self, outgoing: Any, send_counts: IntArray, incoming: Any, recv_counts: IntArray) -> _Landing:
        """See `Transport.start`."""
        self._number += 1
        landing = _Landing(self, self._number, incoming, recv_counts, [])
        fits = len(outgoing) <= self._room_rows
        if not fits or self._has_others:
            self._exchange_messages(landing, outgoing, send_counts, fits=fits)
        self.board.post(self._number, fits=fits, sent=send_counts, landing=recv_counts, num_rows=len(incoming))
        return landing

    def keeps_in_rooms(self, counts: IntArray) -> bool:
        """Whether rows that neighbours posted in their rooms are read there: those of other nodes do not lie there."""
        return self._in_place and not (self._has_others and self._comes_from_others(counts))

    def fetch(self, landing: _Landing) -> None:
        """All neighbours have posted: copy their rows, and ask for what comes as messages."""
        for rank, (first, last) in blocks(landing.counts).items():
            if rank in self._places:
                self._take(landing, rank, first, last)
        self.board.release(landing.number)

    def pause(self) -> None:
        """Between two looks at the board: MPI moves other transfers on, and another process may have the core."""
        self._comm.Iprobe()
        os.sched_yield()

    def _exchange_messages(self, landing: _Landing, outgoing: Any, send_counts: IntArray, *, fits: bool) -> None:
        """Ask for the rows of other nodes, and send what goes there or does not fit."""
        for rank, (first, last) in blocks(landing.counts).items():
            if rank not in self._places:
                landing.requests.append(self._receive(landing, rank, first, last))
        for rank, (first, last) in blocks(send_counts).items():
            if rank == self._comm.rank:
                landing.overflow = None if fits else outgoing[first:last]
            elif rank not in self._places or not fits:
                message = [outgoing[first:last], last - first, self._row]
                landing.requests.append(self._comm.Isend(message, rank, landing.number % TAGS))

    def _comes_from_others(self, counts: IntArray) -> bool:
        return any(rank not in self._places for rank in blocks(counts))

    def _take(self, landing: _Landing, rank: int, first: int, last: int) -> None:
        """Copy the rows of a neighbour, or of this rank itself, to the receiver's buffer."""
        place = self._places[rank]
        begin = self.board.first_row(landing.number, place)
        if begin != BY_MESSAGE:
            begin += (2 * place + landing.number % 2) * self._room_rows
            copy_rows(landing.incoming, (first, last), self.rooms[begin : begin + last - first])
        elif place == self._own:
            copy_rows(landing.incoming, (first, last), landing.overflow)
        else:
            landing.requests.append(self._receive(landing, rank, first, last))

    def _receive(self, landing: _Landing, rank: int, first: int, last: int) -> MPI.Request:
        message = [landing.incoming[first:last], last - first, self._row]
        return self._comm.Irecv(message, rank, landing.number % TAGS)


def _free_bytes() -> int:
    """What is free of the memory that MPI takes such windows from."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 1 << 62


def _open(neighbours: MPI.Intracomm, words_bytes: int, rooms_bytes: int) -> tuple[MPI.Win, npt.NDArray[np.uint8]]:
    """A window of all neighbours, in one piece, its words zero; collective."""
    whole = words_bytes + rooms_bytes + ALIGNMENT_BYTES
    window = MPI.Win.Allocate_shared(whole if neighbours.rank == 0 else 0, 1, comm=neighbours)
    window.Lock_all(MPI.MODE_NOCHECK)
    segment: Any = window.Shared_query(0)[0]
    memory: npt.NDArray[np.uint8] = np.frombuffer(segment, np.uint8)
    skip = -memory.ctypes.data % ALIGNMENT_BYTES
    memory = memory[skip : skip + words_bytes + rooms_bytes]
    if neighbours.rank == 0:
        memory[:words_bytes] = 0
    window.Sync()
    neighbours.Barrier()
    window.Sync()
    return window, memory
