"""The communication of one lane: exchange, tensor group and stage link, on communicators of the lane."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from mpi4py import MPI
from msgspec import Struct

from moempi.comm.batch import Batch
from moempi.comm.combine import Combine, HomeCombine
from moempi.comm.exchange import Exchange, OneHop, OnRoute
from moempi.comm.head_group import HeadGroup
from moempi.comm.hop import Hop
from moempi.comm.immediate import ImmediateLink
from moempi.comm.output_norms import OnLateNorms, OnNorms
from moempi.comm.rank_groups import RankGroups
from moempi.comm.row_shape import RowShape
from moempi.comm.stage_comm import StageComm
from moempi.comm.stage_link import StageLink
from moempi.comm.tensor_group import TensorGroup
from moempi.comm.transfers import Transfers
from moempi.comm.transport_factory import TransportFactory
from moempi.comm.transports.pairwise import Pairwise
from moempi.comm.two_hops import TwoHops
from moempi.layout.forwarders import Forwarders
from moempi.layout.grid import Grid
from moempi.layout.layout import Layout
from moempi.layout.placement import Placement
from moempi.layout.row_buffers import CHOICE_BYTES, SKEW_FACTOR
from moempi.layout.row_split import RowSplit
from moempi.layout.topology import Topology


class LaneComm(Struct, frozen=True):
    """One lane's `exchange` and `stage` between the ranks of a stage, `tensor` group, and `link` to other stages.

    The ranks of `head` divide the LM head: the tensor group, or on the last stage all its tensor groups.
    `home_combine` ends every MoE layer except, with immediate routing, the stage's last. `immediate` is the link if the
    outputs of the stage's last layer are sent directly to the next stage, else None. `comms` are its communicators.
    """

    exchange: Exchange
    stage: StageComm
    tensor: TensorGroup
    head: HeadGroup
    link: StageLink
    transfers: Transfers
    home_combine: HomeCombine
    immediate: ImmediateLink | None = None
    comms: Sequence[MPI.Intracomm] = ()

    def free(self) -> None:
        """Free the lane's communicators and shared memory, once all its steps are done; collective, blocks."""
        self.exchange.free()
        for comm in self.comms:
            comm.Free()

    def observe_norms(self, on_norms: OnNorms, on_late_norms: OnLateNorms) -> None:
        """Call one of these with the norms of the outputs for this rank's rows, in each layer in order.

        It is `on_late_norms` in a last layer whose outputs go to the next stage.
        """
        self.exchange.observe_norms(on_norms)
        if self.immediate is not None:
            self.immediate.observe_norms(on_late_norms)

    def last_combine(self, batch: Batch, split: RowSplit) -> Combine:
        """The end of the stage's last layer in one step."""
        return self.home_combine if self.immediate is None else self.immediate.combine(batch, split)


@dataclass(frozen=True, slots=True)
class LaneOptions:
    """The hops of a row to an expert, and a function that is called with every route before it is dispatched."""

    hops: int = 1
    on_route: OnRoute | None = None


def slot_rows(shape: RowShape, grid: Grid, rank: int) -> int:
    """Rows of a rank's slot."""
    coords = grid.coordinates(rank)
    return SKEW_FACTOR * shape.top_k * shape.rank_rows(grid, coords.stage, coords.data)


def make_lane_comm(
    groups: RankGroups,
    layout: Layout,
    topology: Topology,
    *,
    transports: TransportFactory,
    transfers: Transfers,
    lane: int = 0,
    options: LaneOptions = LaneOptions(),
) -> LaneComm:
    """The communication of a lane, of which each has another number, between ranks of this topology.

    Collective over each stage alone.
    """
    grid, backend, shape = layout.grid, transports.backend, transports.shape
    rank, coords = groups.ranks.rank, grid.coordinates(groups.ranks.rank)
    stage, tensor, link = groups.stage.Dup(), groups.tensor.Dup(), groups.link(lane)
    make_group = partial(TensorGroup, backend=backend, transfers=transfers, width=shape.width)
    tensor_group = make_group(tensor, first_rank=rank - coords.tensor)
    comms, across = [stage, tensor], MPI.COMM_SELF
    if coords.stage == len(grid.stages) - 1 and grid.head_ranks > grid.tensor:
        across = MPI.Intracomm(groups.stage.Split(coords.tensor, coords.data))
        comms.append(across)
    first_rank = grid.stages[coords.stage].ranks.start + coords.tensor
    across_groups = make_group(across, first_rank=first_rank, stride=grid.tensor)
    stage_comm = StageComm(stage, transfers)
    factory = ExchangeFactory(transports, transfers, options.on_route)
    make_exchange = factory.one_hop if options.hops == 1 else factory.two_hops
    exchange = make_exchange(stage, layout.placements[coords.stage], topology.subset(grid.stages[coords.stage].ranks))
    immediate = None
    if layout.immediate_stages:
        immediate = ImmediateLink(
            link,
            grid,
            backend,
            transfers=transfers,
            shape=shape,
            stage=stage_comm,
            immediate_stages=layout.immediate_stages,
        )
    return LaneComm(
        exchange=exchange,
        stage=stage_comm,
        tensor=tensor_group,
        head=HeadGroup(tensor_group, across_groups, backend, transfers=transfers),
        link=immediate or StageLink(link, grid, backend, transfers=transfers, shape=shape),
        transfers=transfers,
        home_combine=HomeCombine(exchange),
        immediate=immediate if immediate and immediate.sends_immediate else None,
        comms=comms,
    )


class ExchangeFactory(Struct, frozen=True):
    """Makes the exchanges of one lane."""

    transports: TransportFactory
    transfers: Transfers
    on_route: OnRoute | None = None

    def one_hop(self, comm: MPI.Intracomm, placements: Mapping[int, Placement], topology: Topology) -> OneHop:
        """An exchange of one hop between the ranks of `comm` with this topology; collective."""
        return OneHop(self._hop(comm, topology), placements, topology, on_route=self.on_route)

    def two_hops(self, comm: MPI.Intracomm, placements: Mapping[int, Placement], topology: Topology) -> TwoHops:
        """An exchange of two hops between the ranks of `comm` with this topology; collective."""
        node_ranks = Forwarders(topology.nodes, comm.rank).node_ranks
        node = MPI.Intracomm(comm.Split(topology.nodes[comm.rank], comm.rank))
        node_topology = topology.subset(node_ranks)
        node_placements = {layer: placement.subset(node_ranks) for layer, placement in placements.items()}
        inside = OneHop(self._hop(node, node_topology), node_placements, node_topology)
        across = self._hop(comm, topology, across=True)
        choices = Pairwise(comm, row_bytes=CHOICE_BYTES * self.transports.shape.top_k)
        return TwoHops(across, choices, inside, placements, topology, on_route=self.on_route)

    def _hop(self, comm: MPI.Intracomm, topology: Topology, *, across: bool = False) -> Hop:
        transport = self.transports.make(comm, topology, self.transfers.counters, across=across)
        return Hop(comm, self.transports.backend, transfers=self.transfers, transport=transport)
