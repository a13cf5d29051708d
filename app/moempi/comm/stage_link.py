"""The link of one lane between stages: it sends rows and their batch to the next stage, sampled tokens to the first.

Every step sends one control message and one message of rows to each peer, even if they are empty, so the sequence of
messages does not depend on data. A sender's rows are divided into parts as a RowSplit divides its contribution: part j
is sent from rank j of one tensor group to rank j of the other.
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
from moempi.comm.transports.buffers import BufferRing
from moempi.layout.grid import Grid
from moempi.layout.row_split import RowSplit, part_range

CONTROL, ROWS, SAMPLED, STOP = 1, 2, 3, 6
SPIN_S = 200e-6
"""Seconds of waiting for a message before the process sleeps."""
NAP_S = 5e-3
"""Longest sleep between two probes."""
EVENT_NAP_S = 50e-6
"""Longest sleep if verbs return before they are done: events that occur meanwhile start transfers of other lanes."""


@dataclass(frozen=True, slots=True)
class StepReceives:
    """The pending rows of a step: one transfer per source, into a buffer for the most rows that the source can send."""

    transfers: tuple[Transfer[Array], ...]


class StageLink:
    """A rank's messages to and from other stages; `comm` is the lane's own communicator of all ranks."""

    def __init__(
        self, comm: MPI.Intracomm, grid: Grid, backend: Backend, *, transfers: Transfers, shape: RowShape
    ) -> None:
        coords = grid.coordinates(comm.rank)
        self.is_first = coords.stage == 0
        self.is_last = coords.stage == len(grid.stages) - 1
        self._comm = comm
        self._grid = grid
        self._coords = coords
        self._backend = backend
        self._transfers = transfers
        self._longest_nap_s = NAP_S if backend.record_event() is None else EVENT_NAP_S
        self._row = MPI.BYTE.Create_contiguous(shape.width * backend.row_dtype.itemsize).Commit()
        self._owner_groups = () if self.is_last else grid.peers(coords.stage, coords.data, other=coords.stage + 1)
        # `send` takes each of them once, after all earlier sends are complete.
        self._outgoing = BufferRing(max(1, len(self._owner_groups)), partial(backend.comm_buffer, width=shape.width))
        self._sent: list[Transfer[Any]] = []
        self._has_requested_stop = self._stop_requested = False
        stage = coords.stage - 1
        self._source_groups = () if self.is_first else grid.peers(coords.stage, coords.data, other=stage)
        self._sources = [grid.rank(stage, data, coords.tensor) for data in self._source_groups]
        self._buffers = [
            backend.comm_buffer(shape.rank_rows(grid, stage, data), shape.width) for data in self._source_groups
        ]

    def send(self, batch: Batch, rows: Array) -> None:
        """Send the batch and its rows (T, D) to their owners in the next stage.

        Blocks until earlier sends are complete, not until these rows are received.
        """
        self.wait_for_sends()
        stage, tensor = self._coords.stage + 1, self._coords.tensor
        for data in self._owner_groups:
            part, index = batch.of_slots(self._grid.slots(stage, data))
            index = index[part_range(len(index), self._grid.tensor, tensor)]
            outgoing = self._outgoing.take(len(index))
            self._backend.pack(rows, self._backend.upload(index), outgoing)
            owner = self._grid.rank(stage, data, tensor)
            self._send_message(part, owner, CONTROL)
            self._send_rows(outgoing, owner, ROWS)

    def stop(self) -> None:
        """Announce to the next stage, if there is one, that no step follows; blocks until all sends are complete."""
        if not self.is_last:
            self.send(NO_STEP, self._backend.unpack(self._outgoing.take(0), None))
        self.wait_for_sends()

    def request_stop(self) -> None:
        """Request the first rank of the first stage to stop all ranks; does not block. Repeated calls do nothing."""
        if not self._has_requested_stop:
            self._has_requested_stop = True
            self._send_message(None, self._grid.rank(0, 0, 0), STOP)

    def stop_requested(self) -> bool:
        """Whether any rank of a later stage has called `request_stop`; does not block."""
        while self._comm.iprobe(tag=STOP):
            self._comm.recv(tag=STOP)
            self._stop_requested = True
        return self._stop_requested

    def post_receives(self) -> StepReceives:
        """Start to receive the rows of the next step; does not block."""
        pairs = zip(self._sources, self._buffers, strict=True)
        return StepReceives(tuple(self._receive_rows(buffer, source, ROWS) for source, buffer in pairs))

    def receive(self, receives: StepReceives) -> tuple[Batch, RowSplit, Array]:
        """Block until a step is received; its batch, the division of its rows, and this rank's part of them."""
        batches: list[Batch] = [self._wait_for(source, CONTROL) for source in self._sources]
        split = RowSplit(tuple(batch.num_rows for batch in batches), self._grid.tensor)
        parts = []
        for batch, transfer in zip(batches, receives.transfers, strict=True):
            own = len(part_range(batch.num_rows, self._grid.tensor, self._coords.tensor))
            parts.append(self._backend.unpack(transfer.finish()[:own], None))
        return Batch.join(batches), split, self._backend.join(parts)

    def send_sampled(self, batch: Batch, sampled: SampledTokens) -> None:
        """Send the tokens sampled for the batch's logit rows to the first stage.

        Blocks until earlier sends are complete, not until these tokens are received.
        """
        self.wait_for_sends()
        for data in self._grid.peers(self._coords.stage, self._coords.data, other=0):
            part = sampled.take(batch.logit_rows_of_slots(self._grid.slots(0, data)))
            self._send_message(part, self._grid.rank(0, data, self._coords.tensor), SAMPLED)

    def receive_sampled(self) -> SampledTokens:
        """Block until the sampled tokens of this group's step are received, in the batch's order."""
        last = len(self._grid.stages) - 1
        groups = self._grid.peers(0, self._coords.data, other=last)
        return SampledTokens.join(
            [self._wait_for(self._grid.rank(last, data, self._coords.tensor), SAMPLED) for data in groups]
        )

    def wait_for_sends(self) -> None:
        """Block until all sends so far are complete."""
        for transfer in self._sent:
            transfer.finish()
        self._sent.clear()

    def _wait_for(self, source: int, tag: int) -> Any:
        """Block until a message is received. A long wait sleeps, so that other ranks on this core can run."""
        begin = perf_counter()
        while (message := self._comm.improbe(source, tag)) is None:
            self._transfers.progress()
            if (waited := perf_counter() - begin) > SPIN_S:
                sleep(min(waited / 8, self._longest_nap_s))
        self._transfers.add_wait("pipeline", perf_counter() - begin)
        return message.recv()

    def _send_message(self, message: object, rank: int, tag: int) -> None:
        """Send an object; does not block."""
        request = self._comm.isend(message, rank, tag)
        self._sent.append(self._transfers.start_between_stages(complete(request, None)))

    def _send_rows(self, rows: Array, rank: int, tag: int) -> None:
        """Send the rows of a buffer once they are written; does not block."""
        start = partial(self._comm.Isend, [rows, len(rows), self._row], rank, tag)
        self._sent.append(self._transfers.start_between_stages(after_verbs(self._backend, start)))

    def _receive_rows(self, buffer: Array, source: int, tag: int) -> Transfer[Array]:
        """Receive into a buffer once no verb reads it; the value is the buffer. Does not block."""
        return self._transfers.start_between_stages(self._receive_steps(buffer, source, tag))

    def _receive_steps(self, buffer: Array, source: int, tag: int) -> Steps[Array]:
        message = [buffer, len(buffer), self._row]
        yield from after_verbs(self._backend, partial(self._comm.Irecv, message, source, tag))
        return buffer
