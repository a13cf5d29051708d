"""What a job would reach on a machine that need not be there: tokens a second, and what holds them up. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from moempi.config.architecture import Architecture
from moempi.config.job import Job
from moempi.config.machine_file import MachineFile
from moempi.layout.layout import Plan
from moempi.layout.topology import Topology
from moempi.planning.simulate import Leg, overlapped_s, waiting_s
from moempi.planning.step_cost import Costs, Load


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
    turns: int
    stages: Sequence[StageForecast]

    def seconds(self, *, overlap: bool) -> float:
        """From one step of a lane to its next, all other lanes in between.

        A pipeline is held up by its slowest stage, or, with too few lanes to fill it, by the way through all stages.
        """
        turns = [stage.overlapped_s if overlap else stage.waiting_s for stage in self.stages]
        return max(self.turns * max(turns), sum(turns))

    def tokens_per_s(self, *, overlap: bool) -> float:
        """Tokens of all lanes in that time."""
        return self.tokens / self.seconds(overlap=overlap)


@dataclass(frozen=True, slots=True)
class Scene:
    """A job of a model, laid out on the ranks of a machine that stand as `where` says."""

    job: Job
    architecture: Architecture
    plan: Plan
    machine: MachineFile
    where: Topology


def forecast(scene: Scene, *, rows: float, sequences: float, context: float) -> Forecast:
    """What happens when every lane's step has so many rows, of so many sequences, in a group of the first stage."""
    grid, lanes = scene.plan.grid, scene.job.lanes
    together = lanes if len(grid.stages) == 1 else min(2, lanes)
    stages = []
    for index in range(len(grid.stages)):
        groups = grid.num_groups(0) / grid.num_groups(index)
        legs = _legs(scene, index, Load(rows * groups, sequences * groups, context))
        stages.append(
            StageForecast(
                compute_s=sum(leg.compute_s for leg in legs),
                travel_s=sum(leg.carry_s + leg.latency_s for leg in legs),
                waiting_s=waiting_s(legs, lanes=together),
                overlapped_s=overlapped_s(legs, lanes=together),
            )
        )
    return Forecast(rows * grid.num_groups(0) * lanes, -(-lanes // together), stages)


def _legs(scene: Scene, index: int, load: Load) -> list[Leg]:
    """A lane's step in a stage."""
    stages = scene.plan.grid.stages
    stage, following = stages[index], stages[(index + 1) % len(stages)]
    placements = scene.plan.placements[index].values()
    value_bytes = 2 if scene.job.run.precision == "bfloat16" else 4
    costs = Costs(
        scene.machine,
        scene.architecture,
        scene.where.part(stage.ranks),
        tensor=scene.plan.grid.tensor,
        hops=scene.job.exchange.hops,
        hosted=max((len(experts) for placement in placements for experts in placement.hosted), default=0),
        row_bytes=scene.architecture.width * value_bytes,
        value_bytes=value_bytes,
        onward=int(scene.where.levels(stage.ranks.start)[following.ranks.start]),
    )
    return costs.step(stage.layers, load, is_first=index == 0, is_last=index == len(stages) - 1)
