"""Makes the transports of a run: the selected one, with checksums, emulated links and counters around it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from mpi4py import MPI

from moempi.backend.protocol import Backend
from moempi.comm.row_shape import RowShape
from moempi.comm.select_transport import INSIDE_NODES, make_transport
from moempi.comm.transports.base import Transport
from moempi.comm.transports.counted import Counted, Counters
from moempi.comm.transports.emulated import EmulatedLinks, Link
from moempi.comm.transports.verified import Verified
from moempi.config.job import TopologySection
from moempi.config.topology_file import read_topology
from moempi.layout.topology import SELF, Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportFactory:
    """Makes transports of kind `name` for rows of the run's `shape`.

    `slot_rows` are the rows of a shared-memory slot; each of `num_lanes` has a window of slots. With `verify`, rows are
    sent with checksums. `links` by level are emulated; all transports of a rank share them.
    """

    backend: Backend
    name: str
    shape: RowShape
    slot_rows: int
    verify: bool = False
    num_lanes: int = 1
    links: Mapping[int, Link] = field(default_factory=dict)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in a comm buffer."""
        return self.shape.routed_width * self.backend.row_dtype.itemsize

    def make(self, comm: MPI.Intracomm, topology: Topology, counters: Counters, *, across: bool = False) -> Transport:
        """A transport between the ranks of `comm` with this topology, which adds to `counters`; collective.

        `across` is for the first hop of two, in which ranks exchange no rows with other ranks of their node: the
        transports inside a node would be unused.
        """
        name = "pairwise" if across and self.name in INSIDE_NODES else self.name
        transport = make_transport(
            name,
            comm,
            self.backend,
            width=self.shape.routed_width,
            nodes=topology.nodes,
            slot_bytes=self.slot_rows * self.row_bytes,
            windows=self.num_lanes,
        )
        levels = topology.levels(comm.rank)
        if self.verify and comm.size > 1:
            transport = Verified(transport, comm)
        if self.links:
            transport = EmulatedLinks(transport, self.links, levels=levels, row_bytes=self.row_bytes)
        return Counted(transport, counters, levels=levels, row_bytes=self.row_bytes)


def emulated_links(section: TopologySection) -> dict[int, Link]:
    """This rank's links to other ranks by level, from the file `topology.emulate`; empty without such a file.

    Raises NoInputError and ConfigError of the file.
    """
    levels = read_topology(section.emulate).levels if section.emulate else ()
    return {
        number: Link(level.latency_us * 1e-6, level.bandwidth_gb_s * 1e9)
        for number, level in enumerate(levels)
        if number != SELF
    }
