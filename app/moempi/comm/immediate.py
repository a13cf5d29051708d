"""Immediate routing: the experts of a stage's last layer send their outputs directly to the next stage.

A row has a home rank in its stage and an owner in the next stage. The home rank sends to the owner the residual, the
shared experts' row, and a header that says which outputs belong to the row. The experts send their outputs to the owner
and not back to the home rank. The owner adds in the order and with the rounding of the home rank: the bits are equal.
"""

from collections.abc import Collection, Sequence
from functools import partial

import numpy as np
from mpi4py import MPI
from msgspec import Struct

from moempi.arrays import Float32Array, Int32Array, IntArray
from moempi.backend.protocol import Backend
from moempi.backend.values import Array
from moempi.comm.addends import Addends, Sums
from moempi.comm.batch import NO_STEP, NONE, Batch
from moempi.comm.output_norms import OnLateNorms, row_norms
from moempi.comm.rank_groups import LinkComm
from moempi.comm.route_plan import RoutePlan
from moempi.comm.row_shape import RowShape
from moempi.comm.stage_comm import StageComm
from moempi.comm.stage_link import CONTROL, ROWS, StageLink, StageStep
from moempi.comm.transfers import Steps, Transfer, Transfers, Waits
from moempi.comm.transports.buffers import BufferRing
from moempi.layout.grid import Grid
from moempi.layout.row_split import RowSplit, part_range

SHARED, OUTPUTS = 4, 5


class ImmediateHeader(Struct, frozen=True):
    """The header that a home rank sends to the owner of n of its rows.

    `batch` is the sub-batch that the owner's group computes; `rows` (n,) are the rows' indices in it. `output_rows`
    (n, K) are the indices of their choices among all choices that the home rank dispatched, `weights` (n, K) the
    choices' weights; `send_counts` (R,) are all choices that it dispatched to each rank. `shared` is whether rows of
    shared experts follow.
    """

    batch: Batch
    rows: IntArray
    output_rows: IntArray
    weights: Float32Array
    send_counts: IntArray
    shared: bool


NO_CHOICES = np.zeros((0, 0), np.int64)
STOP_HEADER = ImmediateHeader(NO_STEP, NONE, NO_CHOICES, NO_CHOICES.astype(np.float32), NONE, shared=False)


class Owner(Struct, frozen=True):
    """A rank of the next stage: its group's sub-batch, and its rows as indices in it and in the sender's batch."""

    rank: int
    batch: Batch
    rows_in_part: IntArray
    rows: IntArray


class ImmediateLink(StageLink):
    """The stage link of a job with immediate routing, which the stages in `immediate_stages` use."""

    def __init__(
        self,
        comm: LinkComm,
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
        self._on_norms: OnLateNorms | None = None
        self.sends_immediate = self._coords.stage in immediate_stages
        self._receives_immediate = self._coords.stage - 1 in immediate_stages
        allocate = partial(backend.comm_buffer, width=shape.width)
        self._incoming_by_tag = {tag: BufferRing(1, allocate) for tag in (ROWS, SHARED, OUTPUTS)}
        # Each tag is sent once a step, after the sends of earlier steps are complete.
        self._outgoing_by_tag = {tag: BufferRing(1, allocate) for tag in (ROWS, SHARED, OUTPUTS)}

    def combine(self, batch: Batch, split: RowSplit) -> "ImmediateCombine":
        """The end of the stage's last layer in one step."""
        own = split.indices[self._coords.tensor]
        return ImmediateCombine(
            self, self._stage, self._backend, owners=self.owners(batch), own=own, on_norms=self._on_norms
        )

    def observe_norms(self, on_norms: OnLateNorms) -> None:
        """Call `on_norms` with a transfer of the norms of the outputs for this rank's rows, in each step."""
        self._on_norms = on_norms

    def start_norms(self, norms: Float32Array, plan: RoutePlan) -> Transfer[Float32Array]:
        """Start to send norms (N,), ordered by home rank; the value is the norms (T, K) of this rank. Collective."""
        return self._transfers.start(self._norm_steps(norms, plan, self._backend.download(plan.output_rows)))

    def _norm_steps(self, norms: Float32Array, plan: RoutePlan, output_rows: IntArray) -> Steps[Float32Array]:
        returning = self._stage.ialltoallv(norms.view(np.int32), plan.recv_counts, plan.send_counts)
        yield returning
        return returning.finish().view(np.float32)[output_rows]

    def stop(self) -> None:
        if self.sends_immediate:
            for owner in self.owners(NO_STEP):
                self.send_header(owner.rank, STOP_HEADER)
            self.wait_for_sends()
        else:
            super().stop()

    def _receive_steps(self) -> Steps[StageStep]:
        """Numbers of immediate rows are unknown until their headers are received; then their sums are computed."""
        if not self._receives_immediate:
            return (yield from super()._receive_steps())
        stage, parts = self._coords.stage - 1, self._grid.tensor
        home_ranks = [self._grid.rank(stage, data, part) for data in self._source_groups for part in range(parts)]
        headers: list[ImmediateHeader] = []
        for rank in home_ranks:
            headers.append((yield from self._message_steps(rank, CONTROL)))
        batches = [header.batch for header in headers[::parts]]
        split = RowSplit(tuple(batch.num_rows for batch in batches), parts)
        return StageStep(Batch.join(batches), split, (yield from self._sum_steps(home_ranks, headers)))

    def owners(self, batch: Batch) -> list[Owner]:
        """The ranks of the next stage that compute the slots of this rank's group."""
        stage, parts, owners = self._coords.stage + 1, self._grid.tensor, []
        for data in self._grid.peers(self._coords.stage, self._coords.data, other=stage):
            part, index = batch.of_slots(self._grid.slots(stage, data))
            for tensor in range(parts):
                rows = part_range(len(index), parts, tensor)
                owners.append(Owner(self._grid.rank(stage, data, tensor), part, rows, index[rows]))
        return owners

    def send_header(self, owner: int, header: ImmediateHeader) -> None:
        """Send a header; does not block."""
        self._send_message(header, owner, CONTROL)

    def send_to_owners(self, rows: Array, index: IntArray, owners: IntArray, tag: int) -> None:
        """Send rows[index[i]] to rank owners[i], for all i, in this order to each rank; does not block."""
        order = np.argsort(owners, kind="stable")
        outgoing = self._outgoing_by_tag[tag].take(len(order))
        self._backend.pack(rows, self._backend.upload(index[order]), outgoing)
        ranks, counts = np.unique(owners, return_counts=True)
        first = 0
        for owner, count in zip(ranks.tolist(), counts.tolist(), strict=True):
            self._send_rows(outgoing[first : first + count], owner, tag)
            first += count

    def _sum_steps(self, home_ranks: Sequence[int], headers: Sequence[ImmediateHeader]) -> Steps[Array]:
        """Receive residuals, shared experts' rows and outputs; their sums in the order of the batch's rows."""
        output_rows, counts = output_rows_of(headers)
        num_rows = [len(header.rows) for header in headers]
        residual, residual_transfers = self._receive_from(home_ranks, num_rows, ROWS)
        num_shared = num_rows if headers[0].shared else [0] * len(home_ranks)
        shared, shared_transfers = self._receive_from(home_ranks, num_shared, SHARED)
        expert_ranks = self._grid.stages[self._coords.stage - 1].ranks[: len(counts)]  # a STOP_HEADER has no counts
        outputs, output_transfers = self._receive_from(expert_ranks, counts.tolist(), OUTPUTS)
        yield from (*residual_transfers, *shared_transfers, *output_transfers)
        backend, order = self._backend, batch_order(headers, self._grid.tensor)
        weights = np.concatenate([header.weights for header in headers])
        index = backend.upload(order)
        addends = Addends(backend.unpack(shared, index) if headers[0].shared else None, backend.unpack(residual, index))
        choices = backend.upload(output_rows[order]), backend.upload(weights[order])
        return addends.combine(backend, outputs, *choices).rows

    def _receive_from(
        self, sources: Sequence[int], counts: Sequence[int], tag: int
    ) -> tuple[Array, list[Transfer[MPI.Request]]]:
        """Start to receive counts[i] rows from rank sources[i], for all i, into consecutive parts of one buffer."""
        incoming = self._incoming_by_tag[tag].take(sum(counts))
        ends = np.cumsum(counts).tolist()
        transfers = [
            self._receive_rows(incoming[end - count : end], source, tag)
            for source, count, end in zip(sources, counts, ends, strict=True)
            if count
        ]
        return incoming, transfers


class ImmediateCombine:
    """The outputs are sent to the owners of their rows.

    `owners` are the owners of the rows of this rank's group, `own` (n,) the indices of this rank's rows in the batch.
    The outputs' norms return to the home ranks, if `on_norms` takes them.
    """

    def __init__(
        self,
        link: ImmediateLink,
        stage: StageComm,
        backend: Backend,
        *,
        owners: Sequence[Owner],
        own: IntArray,
        on_norms: OnLateNorms | None = None,
    ) -> None:
        self._on_norms = on_norms
        self._link = link
        self._stage = stage
        self._backend = backend
        self._owners = owners
        self._own = own
        self._owner_of_row = np.empty(len(own), np.int32)
        for owner in owners:
            self._owner_of_row[np.isin(own, owner.rows)] = owner.rank
        self._output_owners: Transfer[Int32Array] | None = None

    def begin(self, plan: RoutePlan, addends: Addends) -> None:
        """Send each row's owner to the row's experts, and to the owners headers, residuals and shared experts' rows.

        Blocks until earlier sends are complete, and to download the plan.
        """
        self._link.wait_for_sends()
        output_rows, weights = self._backend.download(plan.output_rows), self._backend.download(plan.weights)
        owners = np.empty(output_rows.size, np.int32)
        owners[output_rows] = self._owner_of_row[:, None]
        self._output_owners = self._stage.ialltoallv(owners, plan.send_counts, plan.recv_counts)
        for owner in self._owners:
            owned = self._owner_of_row == owner.rank
            header = ImmediateHeader(
                batch=owner.batch,
                rows=owner.rows_in_part[np.isin(owner.rows, self._own)],
                output_rows=output_rows[owned],
                weights=weights[owned],
                send_counts=plan.send_counts,
                shared=addends.shared is not None,
            )
            self._link.send_header(owner.rank, header)
        all_rows = np.arange(len(self._owner_of_row))
        self._link.send_to_owners(addends.residual, all_rows, self._owner_of_row, ROWS)
        if addends.shared is not None:
            self._link.send_to_owners(addends.shared, all_rows, self._owner_of_row, SHARED)

    def finish(self, outputs: Array, plan: RoutePlan, addends: Addends) -> Waits[Sums]:
        """Returns no rows (0, D). Blocks until the owners of the outputs' rows are received."""
        yield from ()  # a generator like every `finish`, although no rows return to this rank
        if self._output_owners is None:
            raise RuntimeError("the outputs are ready before the owners of their rows were requested")
        owners = self._output_owners.finish()
        index = np.arange(len(owners)) if plan.by_source is None else plan.by_source
        self._link.send_to_owners(outputs, index, owners, OUTPUTS)
        if self._on_norms is not None:
            norms = row_norms(self._backend, outputs)[index]
            self._on_norms(self._link.start_norms(norms, plan))
        return Sums(outputs[:0])


def output_rows_of(headers: Sequence[ImmediateHeader]) -> tuple[IntArray, IntArray]:
    """The index of each choice's output (n, K) among all received outputs, and the outputs from each rank (R,).

    Outputs are received in the order of the expert's rank, then of the home rank, then of the home rank's choices.
    """
    ranks = [np.searchsorted(np.cumsum(header.send_counts), header.output_rows, side="right") for header in headers]
    home_of_choice = [np.full(header.output_rows.shape, home) for home, header in enumerate(headers)]
    rank_of_choice = np.concatenate(ranks)
    order = np.lexsort(
        [
            np.concatenate([header.output_rows for header in headers]).reshape(-1),
            np.concatenate(home_of_choice).reshape(-1),
            rank_of_choice.reshape(-1),
        ]
    )
    output_rows = np.empty(len(order), np.int64)
    output_rows[order] = np.arange(len(order))
    counts = np.bincount(rank_of_choice.reshape(-1), minlength=len(headers[0].send_counts))
    return output_rows.reshape(rank_of_choice.shape), counts


def batch_order(headers: Sequence[ImmediateHeader], parts: int) -> IntArray:
    """The index of each row of the batch among the received rows; a group's rows are from its `parts` home ranks."""
    pieces, first = [], 0
    for group in range(0, len(headers), parts):
        rows = np.concatenate([header.rows for header in headers[group : group + parts]])
        pieces.append(first + np.argsort(rows, kind="stable"))
        first += len(rows)
    return np.concatenate(pieces)
