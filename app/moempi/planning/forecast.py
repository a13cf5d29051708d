"""What a job would reach on a machine that need not be there: tokens a second, and what holds them up. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from moempi.config.architecture import Architecture
from moempi.config.job import Job
from moempi.config.machine_file import MachineFile
from moempi.layout.layout import Layout
from moempi.layout.topology import Topology
from moempi.planning.simulate import Phase, overlapped_s, waiting_s
from moempi.planning.step_cost import StepCosts, StepLoad


@dataclass(frozen=True, slots=True)
class StageForecast:
    """One lane's step in a stage: seconds that it computes, and that its rows travel.

    `waiting_s` and `overlapped_s` are a turn of all lanes that the stage takes together.
    """

    compute_s: float
    travel_s: float
    waiting_s: float
    overlapped_s: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """A step of every lane: `tokens` of all groups and lanes go through `stages`, each in so many `turns`."""

    tokens: float
    rounds: int
    stages: Sequence[StageForecast]

    def seconds(self, *, overlap: bool) -> float:
        """From one step of a lane to its next, all other lanes in between.

        A pipeline is held up by its slowest stage, or, with too few lanes to fill it, by the way through all stages.
        """
        turns = [stage.overlapped_s if overlap else stage.waiting_s for stage in self.stages]
        return max(self.rounds * max(turns), sum(turns))

    def tokens_per_s(self, *, overlap: bool) -> float:
        """Tokens of all lanes in that time."""
        return self.tokens / self.seconds(overlap=overlap)


@dataclass(frozen=True, slots=True)
class Deployment:
    """A job of a model, laid out on the ranks of a machine that stand as `where` says."""

    job: Job
    architecture: Architecture
    layout: Layout
    machine: MachineFile
    topology: Topology


def forecast(deployment: Deployment, *, rows: float, sequences: float, context: float) -> Forecast:
    """What happens when every lane's step has so many rows, of so many sequences, in a group of the first stage."""
    grid, lanes = deployment.layout.grid, deployment.job.lanes
    together = lanes if len(grid.stages) == 1 else min(2, lanes)
    stages = []
    for index in range(len(grid.stages)):
        groups = grid.num_groups(0) / grid.num_groups(index)
        legs = _phases(deployment, index, StepLoad(rows * groups, sequences * groups, context))
        stages.append(
            StageForecast(
                compute_s=sum(leg.compute_s for leg in legs),
                travel_s=sum(leg.link_s + leg.latency_s for leg in legs),
                waiting_s=waiting_s(legs, lanes=together),
                overlapped_s=overlapped_s(legs, lanes=together),
            )
        )
    return Forecast(rows * grid.num_groups(0) * lanes, -(-lanes // together), stages)


def _phases(deployment: Deployment, index: int, load: StepLoad) -> list[Phase]:
    """A lane's step in a stage."""
    stages = deployment.layout.grid.stages
    stage, following = stages[index], stages[(index + 1) % len(stages)]
    placements = deployment.layout.placements[index].values()
    value_bytes = 2 if deployment.job.run.precision == "bfloat16" else 4
    costs = StepCosts(
        deployment.machine,
        deployment.architecture,
        deployment.topology.subset(stage.ranks),
        tensor=deployment.layout.grid.tensor,
        hops=deployment.job.exchange.hops,
        hosted=max((len(experts) for placement in placements for experts in placement.hosted), default=0),
        row_bytes=deployment.architecture.width * value_bytes,
        value_bytes=value_bytes,
        stage_link_level=int(deployment.topology.levels(stage.ranks.start)[following.ranks.start]),
    )
    return costs.step(stage.layers, load, is_first=index == 0, is_last=index == len(stages) - 1)
