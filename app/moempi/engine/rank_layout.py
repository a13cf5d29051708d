"""The rank layout: a rank's coordinates in the grid, and its layers and experts."""

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

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


class RankLayout(Struct, frozen=True):
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
    def is_last_stage(self) -> bool:
        """Whether this rank is in the last stage, which has the head."""
        return self.coords.stage == len(self.grid.stages) - 1

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
    topology, ranks = find_ranks(job, world, on_gpu=on_gpu)
    return world.collectively(
        lambda: rank_layout_on(ranks, topology, job, architecture, on_gpu=on_gpu, widened=widened)
    )


def find_ranks(job: Job, world: World, *, on_gpu: bool) -> tuple[Topology, Any]:
    """The topology of all ranks, and a communicator of them in its order; collective, blocks."""
    return world.by_node(job.topology, domain=find_island(world.local_rank, on_gpu=on_gpu))


def rank_layout_on(
    ranks: Any, topology: Topology, job: Job, architecture: Architecture, *, on_gpu: bool, widened: bool
) -> RankLayout:
    """The rank layout of this rank of `ranks`, of a topology; raises MoempiError. Not collective."""
    placement = read_job_placement(job)
    layout = make_layout(job, architecture, topology.nodes, placement=placement, on_gpu=on_gpu, widened=widened)
    return RankLayout(ranks, topology, layout, layout.grid.coordinates(ranks.rank))


def rank_threads(run: RunSection, world: World) -> int:
    """Threads of this rank: `run.threads`, or an equal share of its cores among the ranks of its node.

    Collective over them. A quota of processor time, as containers have, limits the number of cores.
    """
    if run.threads != "auto":
        return run.threads
    cores = usable_cores()
    of_node = world.node.allgather(cores)
    usable = min(len(cores.split(",")), processors())
    return max(1, int(usable) // of_node.count(cores))


def available_bytes(section: TopologySection, world: World, backend: Backend) -> int:
    """This rank's memory: `rank_memory` of the job, or an equal share of what is free in the memory of its backend.

    The ranks of a node whose backends have the same memory share it. Collective over them.
    """
    if section.rank_memory != "auto":
        return parse_size(section.rank_memory)
    memories = world.node.allgather(backend.memory_id)
    return backend.available_bytes() // memories.count(backend.memory_id)
