"""The link of one lane between stages: rows and their batch go on to the next stage, picked tokens return to the first.

Every step sends one control message and one message of rows to each peer, also when there is nothing in them, so that
no data decides what is sent. A sender's rows are cut into parts as a RowSplit cuts its contribution, and part j goes
from the rank at place j of one tensor group to the rank at place j of the other.
"""

from dataclasses import dataclass
from functools import partial
from time import perf_counter, sleep
from typing import Any

from mpi4py import MPI

from moempi.backend.protocol import Array, Backend, SampledTokens
from moempi.comm.batch import NO_STEP, Batch
from moempi.comm.row_shape import RowShape
from moempi.comm.transfers import Steps, Transfer, Transfers, after_verbs, complete
from moempi.comm.transports.base import MpiRequest
from moempi.layout.grid import Grid
from moempi.layout.row_split import RowSplit, part_range

CONTROL, ROWS, SAMPLED, STOP = 1, 2, 3, 6
SPIN_S = 200e-6
NAP_S = 5e-3


@dataclass(frozen=True, slots=True)
class StepReceives:
    """The pending rows of a step: one transfer per source, into a buffer for the most rows that a source can send."""

    transfers: tuple[Transfer[Array], ...]


class StageLink:
    """A rank's messages to and from other stages; `comm` is the lane's own communicator of all ranks."""

    def __init__(
        self,
        comm: MPI.Intracomm,
        grid: Grid,
        backend: Backend,
        *,
        transfers: Transfers,
        shape: RowShape,
    ) -> None:
        coords = grid.coordinates(comm.rank)
        self.is_first = coords.stage == 0
        self.is_last = coords.stage == len(grid.stages) - 1
        self._comm = comm
        self._grid = grid
        self._coords = coords
        self._backend = backend
        self._transfers = transfers
        self._width = shape.width
        self._row = MPI.BYTE.Create_contiguous(shape.width * backend.row_dtype.itemsize).Commit()
        self._sent: list[Transfer[None]] = []
        self._has_requested_stop = self._stop_requested = False
        self._sources = () if self.is_first else grid.peers(coords.stage, coords.data, other=coords.stage - 1)
        self._buffers = [
            backend.comm_buffer(shape.rank_rows(grid, coords.stage - 1, source), shape.width)
            for source in self._sources
        ]

    def send(self, batch: Batch, rows: Array) -> None:
        """Send the batch and all its rows (T, D) on to the owners in the next stage; does not block on them."""
        self.wait_for_sends()
        later = self._coords.stage + 1
        for data in self._grid.peers(self._coords.stage, self._coords.data, other=later):
            part, index = batch.of_slots(self._grid.slots(later, data))
            kept = index[part_range(len(index), self._grid.tensor, self._coords.tensor)]
            outgoing = self._backend.comm_buffer(len(kept), self._width)
            self._backend.pack(rows, self._backend.upload(kept), outgoing)
            there = self._grid.rank(later, data, self._coords.tensor)
            self._track_send(self._comm.isend(part, there, CONTROL), part)
            self._send_rows(outgoing, there, ROWS)

    def stop(self) -> None:
        """Tell the next stage, if there is one, that no step follows; blocks until all that was sent is on its way."""
        if not self.is_last:
            self.send(NO_STEP, self._backend.unpack(self._backend.comm_buffer(0, self._width), None))
        self.wait_for_sends()

    def request_stop(self) -> None:
        """Tell the first rank of the first stage that this rank was asked to stop; does not block."""
        if not self._has_requested_stop:
            self._has_requested_stop = True
            self._track_send(self._comm.isend(None, self._grid.rank(0, 0, 0), STOP), None)

    def stop_requested(self) -> bool:
        """Whether a rank of a later stage has told this one so; does not block."""
        while self._comm.iprobe(tag=STOP):
            self._comm.recv(tag=STOP)
            self._stop_requested = True
        return self._stop_requested

    def post_receives(self) -> StepReceives:
        """Be ready for the rows of the next step; does not block."""
        transfers = []
        for source, buffer in zip(self._sources, self._buffers, strict=True):
            here = self._grid.rank(self._coords.stage - 1, source, self._coords.tensor)
            transfers.append(self._receive_rows(buffer, here, ROWS))
        return StepReceives(tuple(transfers))

    def receive(self, receives: StepReceives) -> tuple[Batch, RowSplit, Array]:
        """Block until the step is here: its batch, how its rows are divided, and this rank's part of them."""
        batches = [
            self._wait_for(self._grid.rank(self._coords.stage - 1, source, self._coords.tensor), CONTROL)
            for source in self._sources
        ]
        split = RowSplit(tuple(batch.num_rows for batch in batches), self._grid.tensor)
        parts = []
        for batch, transfer in zip(batches, receives.transfers, strict=True):
            own = len(part_range(batch.num_rows, self._grid.tensor, self._coords.tensor))
            parts.append(self._backend.unpack(transfer.finish()[:own], None))
        return Batch.join(batches), split, self._backend.join(parts)

    def send_sampled(self, batch: Batch, sampled: SampledTokens) -> None:
        """Send what was picked for the batch's wanted rows home to the first stage; does not block on it."""
        self.wait_for_sends()
        for data in self._grid.peers(self._coords.stage, self._coords.data, other=0):
            part = sampled.take(batch.logit_rows_of_slots(self._grid.slots(0, data)))
            self._track_send(self._comm.isend(part, self._grid.rank(0, data, self._coords.tensor), SAMPLED), part)

    def receive_sampled(self) -> SampledTokens:
        """Block until the picked tokens of this group's step are home, in the batch's order."""
        last = len(self._grid.stages) - 1
        groups = self._grid.peers(0, self._coords.data, other=last)
        return SampledTokens.join(
            [self._wait_for(self._grid.rank(last, data, self._coords.tensor), SAMPLED) for data in groups]
        )

    def _wait_for(self, source: int, tag: int) -> Any:
        """Block until a control message is here. A long wait sleeps, so that ranks that share a core get their turn."""
        begin = perf_counter()
        while (message := self._comm.improbe(source, tag)) is None:
            self._transfers.progress()
            if (waited := perf_counter() - begin) > SPIN_S:
                sleep(min(waited / 8, NAP_S))
        self._transfers.add_wait("pipeline", perf_counter() - begin)
        return message.recv()

    def _send_rows(self, rows: Array, there: int, tag: int) -> None:
        """Send the rows of a buffer as soon as they are written."""
        message = [rows, len(rows), self._row]
        request = after_verbs(self._backend, partial(self._comm.Isend, message, there, tag))
        self._sent.append(self._transfers.start_receive(_discard(request, rows), waiting="pipeline"))

    def _receive_rows(self, buffer: Array, source: int, tag: int) -> Transfer[Array]:
        """Receive into a buffer as soon as no verb reads it any more."""
        message = [buffer, len(buffer), self._row]
        request = after_verbs(self._backend, partial(self._comm.Irecv, message, source, tag))
        return self._transfers.start_receive(_into(request, buffer), waiting="pipeline")

    def _track_send(self, request: MpiRequest, message: object) -> None:
        self._sent.append(self._transfers.start_receive(complete(request, None, message), waiting="pipeline"))

    def wait_for_sends(self) -> None:
        """Block until the messages of the step before are received."""
        for transfer in self._sent:
            transfer.finish()
        self._sent.clear()


def _into(request: Steps[MpiRequest], buffer: Array) -> Steps[Array]:
    yield from request
    return buffer


def _discard(request: Steps[MpiRequest], buffer: Array) -> Steps[None]:
    """Keep the buffer alive until the request is complete."""
    yield from request
    del buffer
