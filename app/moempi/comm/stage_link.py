"""The link of one lane between stages: it sends rows and their batch to the next stage, sampled tokens to the first.

Every step sends one control message and one message of rows to each peer, even if they are empty, so the sequence of
messages does not depend on data. A sender's rows are divided into parts as a RowSplit divides its contribution: part j
is sent from rank j of one tensor group to rank j of the other.
"""

from functools import partial
from typing import Any, NamedTuple

from mpi4py import MPI

from moempi.backend.protocol import Backend
from moempi.backend.values import Array, SampledTokens
from moempi.comm.batch import NO_STEP, Batch
from moempi.comm.rank_groups import LinkComm
from moempi.comm.row_shape import RowShape
from moempi.comm.transfers import PIPELINE, Condition, Steps, Transfer, Transfers, after_verbs, complete
from moempi.comm.transports.buffers import BufferRing
from moempi.comm.transports.counted import TO_STAGE
from moempi.layout.grid import Grid
from moempi.layout.row_split import RowSplit, part_range

CONTROL, ROWS, SAMPLED, STOP = 1, 2, 3, 6


class StageStep(NamedTuple):
    """A step as a stage receives it: the batch, the division of its rows, and this rank's part of them."""

    batch: Batch
    split: RowSplit
    rows: Array


class StageLink:
    """A rank's messages to and from other stages, over `comm`, whose tags no other lane uses."""

    def __init__(self, comm: LinkComm, grid: Grid, backend: Backend, *, transfers: Transfers, shape: RowShape) -> None:
        coords = grid.coordinates(comm.ranks.rank)
        self.is_first = coords.stage == 0
        self.is_last = coords.stage == len(grid.stages) - 1
        self._comm, self._first_tag = comm
        self._grid = grid
        self._coords = coords
        self._backend = backend
        self._transfers = transfers
        self._row = MPI.BYTE.Create_contiguous(shape.width * backend.row_dtype.itemsize).Commit()
        self._owner_groups = () if self.is_last else grid.peers(coords.stage, coords.data, other=coords.stage + 1)
        # `send` takes each of them once, after all earlier sends are complete.
        self._outgoing = BufferRing(max(1, len(self._owner_groups)), partial(backend.comm_buffer, width=shape.width))
        self._sent: list[Transfer[Any]] = []
        self._has_requested_stop = self._stop_requested = False
        self._receiving_sampled: Transfer[SampledTokens] | None = None
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
        while not self.is_last and self._comm.iprobe(tag=self._first_tag + STOP):
            self._comm.recv(tag=self._first_tag + STOP)
            self._stop_requested = True
        return self._stop_requested

    def start_receive(self) -> Transfer[StageStep]:
        """Start to receive the next step; does not block."""
        return self._transfers.start(self._receive_steps(), waiting=PIPELINE)

    def send_sampled(self, batch: Batch, sampled: SampledTokens) -> None:
        """Send the tokens sampled for the batch's logit rows to the first stage.

        Blocks until earlier sends are complete, not until these tokens are received.
        """
        self.wait_for_sends()
        for data in self._grid.peers(self._coords.stage, self._coords.data, other=0):
            part = sampled.take(batch.logit_rows_of_slots(self._grid.slots(0, data)))
            self._send_message(part, self._grid.rank(0, data, self._coords.tensor), SAMPLED)

    def start_receive_sampled(self) -> Transfer[SampledTokens]:
        """Start to receive the sampled tokens of this group's next step, in the batch's order; does not block."""
        steps = self._receive_sampled_steps(self._receiving_sampled)
        self._receiving_sampled = self._transfers.start(steps, waiting=PIPELINE)
        return self._receiving_sampled

    def wait_for_sends(self) -> None:
        """Block until all sends so far are complete."""
        for transfer in self._sent:
            transfer.finish()
        self._sent.clear()

    def _receive_steps(self) -> Steps[StageStep]:
        """The rows are received into buffers for the most rows that each source can send."""
        pairs = zip(self._sources, self._buffers, strict=True)
        receiving = [self._receive_rows(buffer, source, ROWS) for source, buffer in pairs]
        batches: list[Batch] = []
        for source in self._sources:
            batches.append((yield from self._message_steps(source, CONTROL)))
        split = RowSplit(tuple(batch.num_rows for batch in batches), self._grid.tensor)
        parts = []
        for batch, buffer, transfer in zip(batches, self._buffers, receiving, strict=True):
            yield transfer
            own = len(part_range(batch.num_rows, self._grid.tensor, self._coords.tensor))
            parts.append(self._backend.unpack(buffer[:own], None))
        return StageStep(Batch.join(batches), split, self._backend.join(parts))

    def _receive_sampled_steps(self, before: Transfer[SampledTokens] | None) -> Steps[SampledTokens]:
        """Each message belongs to the earliest step without tokens: wait until those `before` are received."""
        if before is not None:
            yield before
        last = len(self._grid.stages) - 1
        parts: list[SampledTokens] = []
        for data in self._grid.peers(0, self._coords.data, other=last):
            source = self._grid.rank(last, data, self._coords.tensor)
            parts.append((yield from self._message_steps(source, SAMPLED)))
        return SampledTokens.join(parts)

    def _message_steps(self, source: int, tag: int) -> Steps[Any]:
        """Receive an object, once it has arrived."""
        yield Condition(partial(self._comm.iprobe, source, self._first_tag + tag))
        return self._comm.recv(source=source, tag=self._first_tag + tag)

    def _send_message(self, message: object, rank: int, tag: int) -> None:
        """Send an object; does not block."""
        request = self._comm.isend(message, rank, self._first_tag + tag)
        self._sent.append(self._transfers.start(complete(request, None), waiting=PIPELINE))

    def _send_rows(self, rows: Array, rank: int, tag: int) -> None:
        """Send the rows of a buffer once they are written; does not block."""
        self._transfers.count_sent(TO_STAGE, rank, len(rows) * self._row.size)
        start = partial(self._comm.Isend, [rows, len(rows), self._row], rank, self._first_tag + tag)
        self._sent.append(self._transfers.start(after_verbs(self._backend, start), waiting=PIPELINE))

    def _receive_rows(self, buffer: Array, source: int, tag: int) -> Transfer[MPI.Request]:
        """Receive into a buffer once no verb reads it; does not block."""
        start = partial(self._comm.Irecv, [buffer, len(buffer), self._row], source, self._first_tag + tag)
        return self._transfers.start(after_verbs(self._backend, start), waiting=PIPELINE)
