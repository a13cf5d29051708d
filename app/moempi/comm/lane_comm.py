"""The network of one lane: all ways by which its rows reach other ranks."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mpi4py import MPI

from moempi.backend.protocol import Backend
from moempi.comm.exchange import Exchange
from moempi.comm.immediate import ImmediateLink
from moempi.comm.select_transport import ChosenTransport, fastest, make_transport
from moempi.comm.stage_link import StageLink
from moempi.comm.tensor_group import TensorGroup
from moempi.comm.transfers import Transfers
from moempi.comm.transports.base import Transport
from moempi.comm.transports.counted import Counted
from moempi.comm.transports.emulated import EmulatedLinks, Link, Links
from moempi.comm.transports.verified import Verified
from moempi.comm.two_hops import TwoHops
from moempi.config.job import TopologySection
from moempi.config.topology_file import read_topology
from moempi.layout.forwarders import Forwarders
from moempi.layout.grid import Grid
from moempi.layout.placement import Placement
from moempi.layout.topology import SELF, Topology

# A rank's share of shared memory, in rows that an even load would send at once; more than that goes as messages.
SKEW_FACTOR = 2


@dataclass(frozen=True, slots=True)
class LaneComm:
    """One lane's exchange (among its stage), tensor group, and link between stages, on communicators of their own.

    `onward` is the link once more where rows leave the stage's last layer by immediate routing.
    """

    exchange: Exchange
    tensor: TensorGroup
    link: StageLink
    transfers: Transfers
    immediate: ImmediateLink | None = None


def emulated_links(job: TopologySection) -> Links:
    """One rank's links to other ranks as the job's file has them; none without such a file.

    Raises NoInputError and ConfigError of the file.
    """
    levels = read_topology(job.emulate).levels if job.emulate else ()
    return {
        number: Link(level.latency_us * 1e-6, level.bandwidth_gb_s * 1e9)
        for number, level in enumerate(levels)
        if number != SELF
    }


def choose_transport(
    name: str, comm: MPI.Intracomm, grid: Grid, backend: Backend, *, topology: Topology, width: int
) -> ChosenTransport:
    """The job's transport, or for "auto" the fastest for rows of `width`; logged.

    Collective over all ranks of `comm`, which count as `topology` has them; a probe blocks for some milliseconds.
    """
    choice = ChosenTransport(name, "as the job says")
    if name == "auto":
        place = grid.coordinates(comm.rank)
        stage, own = MPI.Intracomm(comm.Split(place.stage, comm.rank)), grid.stages[place.stage].ranks
        choice = fastest(comm, stage, backend, width=width, nodes=topology.subset(own).nodes)
        stage.Free()
    logging.getLogger(__name__).info("transport %s: %s", choice.name, choice.reason)
    return choice


def make_lane_comm(
    comm: MPI.Intracomm,
    grid: Grid,
    placements: Mapping[int, Placement],
    backend: Backend,
    *,
    topology: Topology,
    transport: str,
    hops: int,
    verify: bool,
    width: int,
    top_k: int,
    group_rows: int,
    overlap: bool,
    immediate_stages: Collection[int] = (),
    lanes: int = 1,
    links: Links | None = None,
) -> LaneComm:
    """The network of one more lane; collective over all ranks of `comm`, which stand as `topology` says.

    A data parallel group of the first stage has at most `group_rows` rows in a step, each for `top_k` experts. Rows
    leave the stages `departing` by immediate routing. There will be `lanes` such networks; the `links` of this rank,
    which they share, are emulated.
    """
    place = grid.coordinates(comm.rank)
    stage = MPI.Intracomm(comm.Split(place.stage, comm.rank))
    tensor = MPI.Intracomm(stage.Split(place.data, comm.rank))
    transfers = Transfers(overlap=overlap, backend=backend)
    most_rows = -(-group_rows * len(grid.peers(place.stage, place.data, other=0)) // grid.tensor)
    factory = ExchangeFactory(
        backend=backend,
        transfers=transfers,
        transport=transport,
        verify=verify,
        width=width,
        slot_rows=SKEW_FACTOR * top_k * most_rows,
        lanes=lanes,
        links=links,
    )
    make_exchange = factory.one_hop if hops == 1 else factory.two_hops
    exchange = make_exchange(stage, placements, topology.subset(grid.stages[place.stage].ranks))
    link = ImmediateLink(
        comm.Dup(),
        grid,
        place,
        backend,
        transfers=transfers,
        width=width,
        group_rows=group_rows,
        receives_immediate=place.stage - 1 in immediate_stages,
        sends_immediate=place.stage in immediate_stages,
    )
    onward = link if place.stage in immediate_stages else None
    return LaneComm(exchange, TensorGroup(tensor, backend, transfers=transfers, width=width), link, transfers, onward)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeFactory:
    """What the exchanges of one lane have in common; a rank should be able to send `room_rows` at once."""

    backend: Backend
    transfers: Transfers
    transport: str
    verify: bool = False
    width: int
    slot_rows: int
    lanes: int = 1
    links: Links | None = None

    def one_hop(self, comm: MPI.Intracomm, placements: Mapping[int, Placement], topology: Topology) -> Exchange:
        """An exchange from rank to rank; `topology` is that of the ranks of `comm`; collective."""
        return Exchange(
            comm,
            placements,
            self.backend,
            topology=topology,
            transfers=self.transfers,
            transport=self._counted(self.transport, comm, topology),
            width=self.width,
        )

    def two_hops(self, comm: MPI.Intracomm, placements: Mapping[int, Placement], topology: Topology) -> Exchange:
        """An exchange from node to node, and inside each; the same arguments; collective."""
        neighbours = Forwarders(topology.nodes, comm.rank).node_ranks
        inside = {layer: placement.subset(neighbours) for layer, placement in placements.items()}
        node = MPI.Intracomm(comm.Split(topology.nodes[comm.rank], comm.rank))
        # Rows that go on from here and back are the gate's own: no two ranks of a node exchange any on the first hop.
        across = "pairwise" if self.transport == "shared" else self.transport
        return TwoHops(
            comm,
            placements,
            self.backend,
            topology=topology,
            inside=self.one_hop(node, inside, topology.subset(neighbours)),
            transfers=self.transfers,
            transport=self._counted(across, comm, topology),
            width=self.width,
        )

    def _counted(self, name: str, comm: MPI.Intracomm, topology: Topology) -> Transport:
        row_bytes = self.width * self.backend.row_dtype.itemsize
        # Of its own: a transfer may start late, and what its ranks do on one communicator must have one order.
        own = comm.Dup()
        transport = make_transport(
            name,
            own,
            self.backend,
            width=self.width,
            nodes=topology.nodes,
            slot_bytes=self.slot_rows * row_bytes,
            windows=self.lanes,
        )
        levels = topology.levels(comm.rank)
        if self.verify:
            transport = Verified(transport, comm)
        if self.links:
            transport = EmulatedLinks(transport, self.links, levels=levels, row_bytes=row_bytes)
        return Counted(transport, self.transfers.counters, levels=levels, row_bytes=row_bytes)
