"""Immediate routing: the last experts of a stage answer straight to the owners of their rows in the next stage.

The home of a row hands its owner there what the sum needs beside the answers: the row itself, the shared network's row,
and where each answer stands among all that the home asked for. The experts' rows follow without the way over the home.
The owner adds up as the home would have, in the same order and with the same roundings: the bits are the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from moempi.arrays import IntArray
from moempi.backend.protocol import Array, Backend
from moempi.comm.batch import NO_STEP, NONE, Batch
from moempi.comm.route_plan import RoutePlan
from moempi.comm.stage_link import CONTROL, ROWS, StageLink, StepReceives
from moempi.comm.transfers import Transfers
from moempi.comm.transports.base import Transfer
from moempi.comm.transports.buffers import BufferRing
from moempi.layout.grid import Coordinates, Grid
from moempi.layout.row_split import RowSplit, part_range

SHARED, OUTPUTS = 4, 5


@dataclass(frozen=True, slots=True)
class ImmediateHeader:
    """What a home tells an owner in the next stage of the n rows that it hands over.

    `batch` is the part of the step that the owner's group computes, and `rows` (n,) say which of its rows these are.
    `places` (n, K) say where each choice stood among all that the home sent, `send_counts` (R,) how many of them went
    to each rank, and `weights` (n, K) what its answer counts. `shared` is whether rows of a shared network follow.
    """

    batch: Batch
    rows: IntArray
    output_rows: IntArray
    weights: npt.NDArray[np.float32]
    send_counts: IntArray
    shared: bool


NOTHING = np.zeros((0, 0), np.int64)
NO_HEADER = ImmediateHeader(NO_STEP, NONE, NOTHING, NOTHING.astype(np.float32), NONE, shared=False)


class ImmediateLink(StageLink):
    """A link over which the stage before routes immediately (`arrives`), or this one (`departs`), or both."""

    def __init__(
        self,
        comm: MPI.Intracomm,
        grid: Grid,
        coords: Coordinates,
        backend: Backend,
        *,
        transfers: Transfers,
        width: int,
        group_rows: int,
        receives_immediate: bool,
        sends_immediate: bool,
    ) -> None:
        super().__init__(comm, grid, coords, backend, transfers=transfers, width=width, group_rows=group_rows)
        self._receives_immediate = receives_immediate
        self._sends_immediate = sends_immediate
        self._buffers_by_tag = {
            tag: BufferRing(1, partial(backend.comm_buffer, width=width)) for tag in (ROWS, SHARED, OUTPUTS)
        }

    def immediate_combine(self, batch: Batch, split: RowSplit) -> "ImmediateCombine":
        """The way of this step's rows out of the stage's last layer; blocks until those of the step before are gone."""
        self._wait_for_sends()
        return ImmediateCombine(self, self._backend, self.owners(batch), split.indices[self._coords.tensor])

    def stop(self) -> None:
        if self._sends_immediate:
            for owner in self.owners(NO_STEP):
                self.send_header(owner.rank, NO_HEADER)
            self._wait_for_sends()
        else:
            super().stop()

    def post_receives(self) -> StepReceives:
        """See `StageLink.expect`; what comes immediately is not known before its notice."""
        return StepReceives(()) if self._receives_immediate else super().post_receives()

    def receive(self, receives: StepReceives) -> tuple[Batch, RowSplit, Array]:
        """See `StageLink.receive`; blocks also until the experts' answers are here."""
        if not self._receives_immediate:
            return super().receive(receives)
        before, parts = self._coords.stage - 1, self._grid.tensor
        homes = [self._grid.rank(before, source, part) for source in self._sources for part in range(parts)]
        notices: list[ImmediateHeader] = [self._wait_for(home, CONTROL) for home in homes]
        batches = [notice.batch for notice in notices[::parts]]
        batch, split = Batch.join(batches), RowSplit(tuple(part.num_rows for part in batches), parts)
        return batch, split, self._sum(homes, notices, parts)

    def _sum(self, homes: Sequence[int], headers: Sequence[ImmediateHeader], parts: int) -> Array:
        """Receive what the homes hand over and the experts answer; the sums in the order of the batch's rows."""
        places, counts = output_rows_of(headers)
        first = self._grid.stages[self._coords.stage - 1].ranks.start
        handed = [len(notice.rows) for notice in headers]
        rows, rows_coming = self._start(homes, handed, ROWS)
        shared, shared_coming = self._start(homes, handed if headers[0].shared else [0] * len(homes), SHARED)
        answers, answers_coming = self._start(range(first, first + len(counts)), counts.tolist(), OUTPUTS)
        for transfer in (*rows_coming, *shared_coming, *answers_coming):
            transfer.finish()
        order = batch_order(headers, parts)
        index, weights = self._backend.upload(order), np.concatenate([notice.weights for notice in headers])
        total = self._backend.combine(
            answers, self._backend.upload(places[order]), self._backend.upload(weights[order])
        )
        if headers[0].shared:
            total = self._backend.add(total, self._backend.unpack(shared, index))
        return self._backend.add(self._backend.unpack(rows, index), total)

    def _start(self, sources: Sequence[int], counts: Sequence[int], tag: int) -> tuple[Array, list[Transfer]]:
        """Start to receive counts[i] rows from sources[i], for all i, one after another in a buffer."""
        incoming = self._buffers_by_tag[tag].take(sum(counts))
        ends = np.cumsum(counts).tolist()
        transfers = []
        for source, count, end in zip(sources, counts, ends, strict=True):
            if count:
                rows = incoming[end - count : end]
                transfers.append(self._receive_rows(rows, source, tag))
        return incoming, transfers

    def owners(self, batch: Batch) -> "list[Owner]":
        """The ranks of the next stage that own rows of this group's batch, or might."""
        later, owners = self._coords.stage + 1, []
        for data in self._grid.peers(self._coords.stage, self._coords.data, other=later):
            part, index = batch.of_slots(self._grid.slots(later, data))
            for tensor in range(self._grid.tensor):
                numbers = part_range(len(index), self._grid.tensor, tensor)
                owners.append(Owner(self._grid.rank(later, data, tensor), part, numbers, index[numbers]))
        return owners

    def send_header(self, owner: int, header: ImmediateHeader) -> None:
        """Send a notice; does not block."""
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


@dataclass(frozen=True, slots=True)
class Owner:
    """A rank of the next stage: its group's part of a batch, its rows' numbers there, and in the whole batch."""

    rank: int
    batch: Batch
    numbers: IntArray
    rows: IntArray


class ImmediateCombine:
    """The way of one step's rows out of a stage; `owners` (n,) are the next ranks of this rank's n rows."""

    def __init__(self, link: ImmediateLink, backend: Backend, owners: Sequence[Owner], own: IntArray) -> None:
        self._link = link
        self._backend = backend
        self._next = owners
        self._own = own
        self.owners = np.empty(len(own), np.int32)
        for owner in owners:
            self.owners[np.isin(own, owner.rows)] = owner.rank

    def send_residual(self, plan: RoutePlan, x: Array, shared: Array | None) -> None:
        """Hand rows x (n, D), and those of the shared network, to their owners, with the notice of what they need."""
        places, weights = self._backend.download(plan.output_rows), self._backend.download(plan.weights)
        for owner in self._next:
            mine = np.flatnonzero(self.owners == owner.rank)
            numbers = owner.numbers[np.isin(owner.rows, self._own)]
            notice = ImmediateHeader(
                owner.batch, numbers, places[mine], weights[mine], plan.send_counts, shared=shared is not None
            )
            self._link.send_header(owner.rank, notice)
        every = np.arange(len(self.owners))
        self._link.send_to_owners(x, every, self.owners, ROWS)
        if shared is not None:
            self._link.send_to_owners(shared, every, self.owners, SHARED)

    def send_outputs(self, rows: Array, plan: RoutePlan, owners: IntArray) -> None:
        """Send the experts' rows, in expert order, to `owners`, which are those of the rows in source order."""
        index = np.arange(len(owners)) if plan.by_source is None else plan.by_source
        self._link.send_to_owners(rows, index, owners, OUTPUTS)


def output_rows_of(headers: Sequence[ImmediateHeader]) -> tuple[IntArray, IntArray]:
    """Where the answer to each choice stands among all that come here (n, K), and how many each rank sends (R,).

    Answers come ordered by the rank of the expert, then by home, then as the home sent the choices.
    """
    ranks = [np.searchsorted(np.cumsum(notice.send_counts), notice.output_rows, side="right") for notice in headers]
    homes = [np.full(notice.output_rows.shape, home) for home, notice in enumerate(headers)]
    rank_of_choice = np.concatenate(ranks)
    order = np.lexsort(
        [
            np.concatenate([notice.output_rows for notice in headers]).reshape(-1),
            np.concatenate(homes).reshape(-1),
            rank_of_choice.reshape(-1),
        ]
    )
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    counts = np.bincount(rank_of_choice.reshape(-1), minlength=len(headers[0].send_counts))
    return places.reshape(rank_of_choice.shape), counts


def batch_order(headers: Sequence[ImmediateHeader], parts: int) -> IntArray:
    """The handed-over rows in the order of the batch: each group's `parts` homes hold some of the group's rows."""
    pieces, first = [], 0
    for group in range(0, len(headers), parts):
        numbers = np.concatenate([notice.rows for notice in headers[group : group + parts]])
        pieces.append(first + np.argsort(numbers, kind="stable"))
        first += len(numbers)
    return np.concatenate(pieces)
