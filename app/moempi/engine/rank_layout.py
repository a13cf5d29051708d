"""The rank layout: a rank's coordinates in the grid, and its layers and experts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moempi.backend.cpu.control_groups import processors
from moempi.backend.locality import usable_cores
from moempi.backend.protocol import Backend
from moempi.backend.select import find_island
from moempi.config.architecture import Architecture
from moempi.config.job import Job, RunSection, TopologySection
from moempi.config.placement_file import read_job_placement
from moempi.config.size import parse_size
from moempi.layout.grid import Coordinates, Grid, Stage
from moempi.layout.layout import Layout, make_layout
from moempi.layout.memory import Memory
from moempi.layout.placement import Placement
from moempi.layout.topology import Topology
from moempi.runtime.world import World


@dataclass(frozen=True, slots=True)
class RankLayout:
    """A rank's position among all ranks of a run.

    `ranks` is a communicator of all ranks, numbered node by node, `topology` their topology and `layout` the job's
    layout on them; `coords` are this rank's coordinates in its grid.
    """

    ranks: Any
    topology: Topology
    layout: Layout
    coords: Coordinates

    @property
    def grid(self) -> Grid:
        """The grid of all ranks."""
        return self.layout.grid

    @property
    def placements(self) -> Mapping[int, Placement]:
        """The placement of each MoE layer of this rank's stage."""
        return self.layout.placements[self.coords.stage]

    @property
    def memory(self) -> Memory:
        """Memory of the rank of this stage that needs most."""
        return self.layout.memory[self.coords.stage]

    @property
    def stage(self) -> Stage:
        """The layers and ranks of this rank's stage."""
        return self.grid.stages[self.coords.stage]

    @property
    def hosted(self) -> Mapping[int, tuple[int, ...]]:
        """The experts that this rank hosts, by Mixture-of-Experts layer."""
        stage_rank = self.ranks.rank - self.stage.ranks.start
        return {layer: placement.hosted[stage_rank] for layer, placement in self.placements.items()}

    @property
    def num_groups(self) -> int:
        """Number of data parallel groups of the first stage that this rank computes for."""
        return len(self.grid.peers(self.coords.stage, self.coords.data, other=0))

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank is in the first stage, which schedules the requests."""
        return self.coords.stage == 0

    @property
    def writes_records(self) -> bool:
        """Whether this rank writes its group's request records: one rank of each tensor group of the first stage."""
        return self.is_first_stage and self.coords.tensor == 0


def lay_out_rank(
    job: Job, world: World, architecture: Architecture, *, on_gpu: bool, widened: bool = False
) -> RankLayout:
    """Lay the job out on the ranks of `world`; collective, blocks. A MoempiError of any rank ends all ranks.

    `on_gpu` and `widened` are of this rank's backend, as in `make_layout`.
    """
    topology, ranks = world.by_node(job.topology, domain=find_island(world.local_rank, on_gpu=on_gpu))
    layout = world.collectively(
        lambda: make_layout(
            job,
            architecture,
            topology.nodes,
            placement=read_job_placement(job),
            on_gpu=on_gpu,
            widened=widened,
        )
    )
    return RankLayout(ranks, topology, layout, layout.grid.coordinates(ranks.rank))


def rank_threads(run: RunSection, world: World) -> int:
    """Threads of this rank: `run.threads`, or an equal share of its cores among the ranks of its node. Collective.

    A quota of processor time, as containers have, limits the number of cores.
    """
    cores = usable_cores()
    all_cores = world.comm.allgather((world.nodes[world.rank], cores))
    if run.threads != "auto":
        return run.threads
    usable = min(len(cores.split(",")), processors())
    return max(1, int(usable) // all_cores.count((world.nodes[world.rank], cores)))


def available_bytes(section: TopologySection, world: World, backend: Backend) -> int:
    """This rank's memory: `rank_memory` of the job, or an equal share of what is free in the memory of its backend.

    The ranks of a node whose backends have the same memory share it. Collective.
    """
    if section.rank_memory != "auto":
        return parse_size(section.rank_memory)
    memories = world.comm.allgather((world.nodes[world.rank], backend.memory_id))
    return backend.available_bytes() // memories.count(memories[world.rank])
