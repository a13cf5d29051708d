"""Immediate routing: the experts of a stage's last layer send their outputs straight to the next stage.

The home rank of a row sends the row's owner in the next stage what the sum needs beside the outputs: the row itself,
the shared experts' row, and which of the returned outputs belong to it. The experts' outputs follow without the way
over the home rank. The owner adds up as the home rank would, in the same order and with the same roundings: the bits
are the same.
"""

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from mpi4py import MPI

from moempi.arrays import Float32Array, Int32Array, IntArray
from moempi.backend.protocol import Array, Backend
from moempi.comm.batch import NO_STEP, NONE, Batch
from moempi.comm.combine import Addends
from moempi.comm.route_plan import RoutePlan
from moempi.comm.row_shape import RowShape
from moempi.comm.stage_comm import StageComm
from moempi.comm.stage_link import CONTROL, ROWS, StageLink, StepReceives
from moempi.comm.transfers import Transfer, Transfers
from moempi.comm.transports.buffers import BufferRing
from moempi.layout.grid import Grid
from moempi.layout.row_split import RowSplit, part_range
from moempi.layout.schedule import Point

SHARED, OUTPUTS = 4, 5


@dataclass(frozen=True, slots=True)
class ImmediateHeader:
    """What the owner of n rows must know of them; sent by their home rank.

    `batch` is the sub-batch that the owner's group computes, `rows` (n,) the rows' indices in it. `output_rows` (n, K)
    are the places of their choices among all choices that the home rank sent, `send_counts` (R,) how many of those went
    to each rank, `weights` (n, K) their factors. `shared` is whether rows of shared experts follow.
    """

    batch: Batch
    rows: IntArray
    output_rows: IntArray
    weights: Float32Array
    send_counts: IntArray
    shared: bool


NOTHING = np.zeros((0, 0), np.int64)
NO_HEADER = ImmediateHeader(NO_STEP, NONE, NOTHING, NOTHING.astype(np.float32), NONE, shared=False)


@dataclass(frozen=True, slots=True)
class Owner:
    """A rank of the next stage: its group's sub-batch, and its rows as `numbers` in that and as `rows` in the batch."""

    rank: int
    batch: Batch
    numbers: IntArray
    rows: IntArray


class ImmediateLink(StageLink):
    """A stage link in a job with immediate routing: rows leave the stages `immediate_stages` by it.

    `stage` are the ranks of this rank's stage.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        grid: Grid,
        backend: Backend,
        *,
        transfers: Transfers,
        shape: RowShape,
        stage: StageComm,
        immediate_stages: Collection[int],
    ) -> None:
        super().__init__(comm, grid, backend, transfers=transfers, shape=shape)
        self._stage = stage
        self.sends_immediate = self._coords.stage in immediate_stages
        self._receives_immediate = self._coords.stage - 1 in immediate_stages
        self._buffers_by_tag = {
            tag: BufferRing(1, partial(backend.comm_buffer, width=shape.width)) for tag in (ROWS, SHARED, OUTPUTS)
        }

    def combine(self, batch: Batch, split: RowSplit) -> "ImmediateCombine":
        """The end of the stage's last layer in this step."""
        own = split.indices[self._coords.tensor]
        return ImmediateCombine(self, self._stage, self._backend, owners=self.owners(batch), own=own)

    def stop(self) -> None:
        if self.sends_immediate:
            for owner in self.owners(NO_STEP):
                self.send_header(owner.rank, NO_HEADER)
            self.wait_for_sends()
        else:
            super().stop()

    def post_receives(self) -> StepReceives:
        """See `StageLink.post_receives`. The sizes of immediate rows are unknown until their header arrives."""
        return StepReceives(()) if self._receives_immediate else super().post_receives()

    def receive(self, receives: StepReceives) -> tuple[Batch, RowSplit, Array]:
        """See `StageLink.receive`; blocks also until the experts' outputs are here."""
        if not self._receives_immediate:
            return super().receive(receives)
        before, parts = self._coords.stage - 1, self._grid.tensor
        homes = [self._grid.rank(before, source, part) for source in self._sources for part in range(parts)]
        headers: list[ImmediateHeader] = [self._wait_for(home, CONTROL) for home in homes]
        batches = [header.batch for header in headers[::parts]]
        batch, split = Batch.join(batches), RowSplit(tuple(one.num_rows for one in batches), parts)
        return batch, split, self._sum(homes, headers, parts)

    def owners(self, batch: Batch) -> list[Owner]:
        """The ranks of the next stage that compute for the slots of this rank's group."""
        later, owners = self._coords.stage + 1, []
        for data in self._grid.peers(self._coords.stage, self._coords.data, other=later):
            own_batch, index = batch.of_slots(self._grid.slots(later, data))
            for tensor in range(self._grid.tensor):
                numbers = part_range(len(index), self._grid.tensor, tensor)
                owners.append(Owner(self._grid.rank(later, data, tensor), own_batch, numbers, index[numbers]))
        return owners

    def send_header(self, owner: int, header: ImmediateHeader) -> None:
        """Send a header; does not block."""
        self._track_send(self._comm.isend(header, owner, CONTROL), header)

    def send_to_owners(self, rows: Array, index: IntArray, owners: IntArray, tag: int) -> None:
        """Send rows[index[i]] to rank owners[i], for all i, in this order to each; does not block."""
        order = np.argsort(owners, kind="stable")
        outgoing = self._backend.comm_buffer(len(order), self._width)
        self._backend.pack(rows, self._backend.upload(index[order]), outgoing)
        first = 0
        for owner, count in zip(*(found.tolist() for found in np.unique(owners, return_counts=True)), strict=True):
            self._send_rows(outgoing[first : first + count], owner, tag)
            first += count

    def _sum(self, homes: Sequence[int], headers: Sequence[ImmediateHeader], parts: int) -> Array:
        """Receive the homes' rows and the experts' outputs; their sums in the order of the batch's rows."""
        output_rows, counts = output_rows_of(headers)
        first = self._grid.stages[self._coords.stage - 1].ranks.start
        num_rows = [len(header.rows) for header in headers]
        rows, row_transfers = self._receive_from(homes, num_rows, ROWS)
        num_shared = num_rows if headers[0].shared else [0] * len(homes)
        shared, shared_transfers = self._receive_from(homes, num_shared, SHARED)
        experts = range(first, first + len(counts))
        outputs, output_transfers = self._receive_from(experts, counts.tolist(), OUTPUTS)
        for transfer in (*row_transfers, *shared_transfers, *output_transfers):
            transfer.finish()
        backend, order = self._backend, batch_order(headers, parts)
        weights = np.concatenate([header.weights for header in headers])
        index = backend.upload(order)
        total = backend.combine(outputs, backend.upload(output_rows[order]), backend.upload(weights[order]))
        if headers[0].shared:
            total = backend.add(total, backend.unpack(shared, index))
        return backend.add(backend.unpack(rows, index), total)

    def _receive_from(
        self, sources: Sequence[int], counts: Sequence[int], tag: int
    ) -> tuple[Array, list[Transfer[Array]]]:
        """Start to receive counts[i] rows from sources[i], for all i, one after another in a buffer."""
        incoming = self._buffers_by_tag[tag].take(sum(counts))
        ends = np.cumsum(counts).tolist()
        transfers = [
            self._receive_rows(incoming[end - count : end], source, tag)
            for source, count, end in zip(sources, counts, ends, strict=True)
            if count
        ]
        return incoming, transfers


class ImmediateCombine:
    """The end of a stage's last layer in one step: everything goes to the `owners` of this rank's rows `own` (n,)."""

    def __init__(
        self, link: ImmediateLink, stage: StageComm, backend: Backend, *, owners: Sequence[Owner], own: IntArray
    ) -> None:
        self._link = link
        self._stage = stage
        self._backend = backend
        self._owners = owners
        self._own = own
        self._owner_of_row = np.empty(len(own), np.int32)
        for owner in owners:
            self._owner_of_row[np.isin(own, owner.rows)] = owner.rank
        self._owners_here: Transfer[Int32Array] | None = None

    def begin(self, plan: RoutePlan, addends: Addends) -> None:
        """Send the experts the owner of each row, and the owners a header, the residual and the shared experts' rows.

        Blocks until the messages of the step before are received, and to download the plan.
        """
        self._link.wait_for_sends()
        owners = self._owner_of_row[self._backend.download(plan.source_rows)]
        self._owners_here = self._stage.ialltoallv(owners, plan.send_counts, plan.recv_counts)
        output_rows, weights = self._backend.download(plan.output_rows), self._backend.download(plan.weights)
        for owner in self._owners:
            mine = np.flatnonzero(self._owner_of_row == owner.rank)
            numbers = owner.numbers[np.isin(owner.rows, self._own)]
            shared = addends.shared is not None
            header = ImmediateHeader(owner.batch, numbers, output_rows[mine], weights[mine], plan.send_counts, shared)
            self._link.send_header(owner.rank, header)
        every = np.arange(len(self._owner_of_row))
        self._link.send_to_owners(addends.residual, every, self._owner_of_row, ROWS)
        if addends.shared is not None:
            self._link.send_to_owners(addends.shared, every, self._owner_of_row, SHARED)

    def finish(self, outputs: Array, plan: RoutePlan, addends: Addends) -> Generator[Point, None, Array]:
        """Send the outputs to the owners of their rows; none stay here (0, D). Blocks until the owners are known."""
        yield from ()  # nothing returns here, so there is nothing to wait for
        if self._owners_here is None:
            raise RuntimeError("outputs are sent before the owners of their rows")
        owners = self._owners_here.finish()
        index = np.arange(len(owners)) if plan.by_source is None else plan.by_source
        self._link.send_to_owners(outputs, index, owners, OUTPUTS)
        return outputs[:0]


def output_rows_of(headers: Sequence[ImmediateHeader]) -> tuple[IntArray, IntArray]:
    """The index of each choice's output (n, K) among all that come here, and how many each rank sends (R,).

    Outputs come ordered by the rank of the expert, then by home rank, then as the home rank sent the choices.
    """
    ranks = [np.searchsorted(np.cumsum(header.send_counts), header.output_rows, side="right") for header in headers]
    homes = [np.full(header.output_rows.shape, home) for home, header in enumerate(headers)]
    rank_of_choice = np.concatenate(ranks)
    order = np.lexsort(
        [
            np.concatenate([header.output_rows for header in headers]).reshape(-1),
            np.concatenate(homes).reshape(-1),
            rank_of_choice.reshape(-1),
        ]
    )
    output_rows = np.empty(len(order), np.int64)
    output_rows[order] = np.arange(len(order))
    counts = np.bincount(rank_of_choice.reshape(-1), minlength=len(headers[0].send_counts))
    return output_rows.reshape(rank_of_choice.shape), counts


def batch_order(headers: Sequence[ImmediateHeader], parts: int) -> IntArray:
    """The received rows in the order of the batch: each group's `parts` home ranks hold some of the group's rows."""
    pieces, first = [], 0
    for group in range(0, len(headers), parts):
        numbers = np.concatenate([header.rows for header in headers[group : group + parts]])
        pieces.append(first + np.argsort(numbers, kind="stable"))
        first += len(numbers)
    return np.concatenate(pieces)
