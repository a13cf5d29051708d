"""The rank layout: where a rank stands among all ranks of a run, and what it holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moempi.backend.select import find_island
from moempi.config.architecture import Architecture
from moempi.config.job import Job
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
    """Where a rank stands among all ranks of a run, and what it holds.

    `ranks` is a communicator of all ranks, counted node by node, which stand as `topology` says; `layout` is the job's
    layout on them, `coords` this rank's coordinates in its grid.
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
        """Memory of the fullest rank of this rank's stage."""
        return self.layout.memory[self.coords.stage]

    @property
    def stage(self) -> Stage:
        """The layers and ranks of this rank's stage."""
        return self.grid.stages[self.coords.stage]

    @property
    def hosted(self) -> Mapping[int, tuple[int, ...]]:
        """The experts that this rank hosts, by Mixture-of-Experts layer."""
        own = self.ranks.rank - self.stage.ranks.start
        return {layer: placement.hosted[own] for layer, placement in self.placements.items()}

    @property
    def num_groups(self) -> int:
        """Data parallel groups of the first stage that this rank computes for."""
        return len(self.grid.peers(self.coords.stage, self.coords.data, other=0))

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank's stage, the first, decides the steps."""
        return self.coords.stage == 0

    @property
    def writes_records(self) -> bool:
        """Whether this rank writes the records of its group; one rank of a tensor group does."""
        return self.coords.tensor == 0


def lay_out_rank(job: Job, world: World, architecture: Architecture, *, on_gpu: bool) -> RankLayout:
    """Lay the job out on the ranks of `world`, or their GPUs; collective. A ConfigError of it ends all ranks alike."""
    topology, ranks = world.by_node(job.topology, domain=find_island(world.local_rank, on_gpu=on_gpu))
    layout = world.collectively(
        lambda: make_layout(job, architecture, topology.nodes, placement=read_job_placement(job), on_gpu=on_gpu)
    )
    return RankLayout(ranks, topology, layout, layout.grid.coordinates(ranks.rank))


def available_bytes(job: Job, world: World, *, of_node: int) -> int:
    """This rank's memory: what the job says, or its share of what its node has free."""
    if job.topology.rank_memory != "auto":
        return parse_size(job.topology.rank_memory)
    return of_node // world.nodes.count(world.nodes[world.rank])
