"""Forecast of a job's throughput on a machine that need not exist: tokens per second and the limiting stage. Pure."""

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
    """A stage: compute and transfer seconds of one step.

    `waiting_s` and `overlapped_s` are the seconds for one step of each of the stage's lanes, without and with overlap.
    """

    compute_s: float
    travel_s: float
    waiting_s: float
    overlapped_s: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """One step of every micro-batch: `tokens` of all of them go through all `stages`.

    Each lane of a stage takes `steps_per_lane` of the steps, on the average.
    """

    tokens: float
    steps_per_lane: float
    stages: Sequence[StageForecast]

    def seconds(self, *, overlap: bool) -> float:
        """Seconds from one step of a micro-batch to its next, with the steps of all others in between.

        The limit of a pipeline is its slowest stage, or the latency through all stages for too few micro-batches.
        """
        of_stages = [stage.overlapped_s if overlap else stage.waiting_s for stage in self.stages]
        return max(self.steps_per_lane * max(of_stages), sum(of_stages))

    def tokens_per_s(self, *, overlap: bool) -> float:
        """Tokens of all micro-batches per second."""
        return self.tokens / self.seconds(overlap=overlap)


@dataclass(frozen=True, slots=True)
class Deployment:
    """A job and a model, laid out on the ranks of a machine with this topology."""

    job: Job
    architecture: Architecture
    layout: Layout
    machine: MachineFile
    topology: Topology


def forecast(deployment: Deployment, *, rows: float, sequences: float, context: float) -> Forecast:
    """Forecast steps: every micro-batch has `rows` rows of `sequences` sequences in each group of the first stage.

    Each row attends to `context` positions.
    """
    grid, job = deployment.layout.grid, deployment.job
    stages = []
    for index in range(len(grid.stages)):
        groups = grid.num_groups(0) / grid.num_groups(index)
        phases = _phases(deployment, index, StepLoad(rows * groups, sequences * groups, context))
        stages.append(
            StageForecast(
                compute_s=sum(phase.compute_s + phase.beside_s for phase in phases),
                travel_s=sum(phase.travel_s for phase in phases),
                waiting_s=waiting_s(phases, lanes=job.lanes),
                overlapped_s=overlapped_s(phases, lanes=job.lanes),
            )
        )
    tokens = rows * grid.num_groups(0) * job.num_micro_batches
    return Forecast(tokens, job.num_micro_batches / job.lanes, stages)


def _phases(deployment: Deployment, index: int, load: StepLoad) -> list[Phase]:
    """The phases of one step in stage `index`."""
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
