"""Forecast of a job on a machine that need not exist: whether it fits, its speed, and what limits each stage. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from typing import NamedTuple

import numpy as np
from msgspec import structs

from moempi.arrays import larger, smaller
from moempi.config.architecture import Architecture
from moempi.config.job import Job
from moempi.config.machine_file import MachineFile
from moempi.config.size import format_size, parse_size
from moempi.errors import ConfigError
from moempi.layout.layout import Layout
from moempi.layout.memory import affordable_pages, pages_for
from moempi.layout.topology import Topology
from moempi.planning.pipeline import step_ends_s
from moempi.planning.simulate import Phase, equal_steps, overlapped_s, waiting_s
from moempi.planning.step_cost import StepCosts, StepLoad
from moempi.planning.workload import Workload

NO_OVERHEAD = {"turn_us": 0.0, "tensor_overhead_us": 0.0}
"""Keys of a machine whose host takes no time."""
FILLING_ROUNDS, MEASURED_ROUNDS = 1, 1
"""Rounds of all micro-batches in virtual time before those that are measured, and those."""
EXPOSED = 1.05
"""A stage is limited by latency if a step takes more than this times its compute and link time."""


class Step(NamedTuple):
    """A kind of step: micro-batches in flight, lanes, most rows of a group, and slots of a group for all micro-batches.

    Of n kinds, all are arrays (n,).
    """

    micro_batches: int
    lanes: int
    batch_tokens: int
    slots: int


@dataclass(frozen=True, slots=True)
class StageStep:
    """One step of a stage of `ranks` ranks: what it computes, and its costs on the busiest rank."""

    costs: StepCosts
    ranks: int
    layers: range
    load: StepLoad
    is_first: bool
    is_last: bool

    def phases(self, **machine: float) -> Sequence[Phase]:
        """The phases of the step; `machine` changes keys of the machine."""
        costs = replace(self.costs, machine=structs.replace(self.costs.machine, **machine)) if machine else self.costs
        return costs.step(self.layers, self.load, is_first=self.is_first, is_last=self.is_last)


@dataclass(frozen=True, eq=False)
class StageForecast:
    """A stage whose `lanes` lanes take steps; what needs a simulation is simulated when it is used."""

    step: StageStep
    lanes: int

    @property
    def ranks(self) -> int:
        """Ranks of the stage."""
        return self.step.ranks

    @property
    def phases(self) -> Sequence[Phase]:
        """The phases of a step, computed at each use: kept for many loads at once, they would fill the memory."""
        return self.step.phases()

    @property
    def compute_s(self) -> float:
        """Seconds of computing in a step."""
        return self._sums[0]

    @property
    def arithmetic_s(self) -> float:
        """Seconds of computing if memory and host took no time."""
        return _compute_s(self.step.phases(memory_gb_s=inf, **NO_OVERHEAD))

    @property
    def memory_s(self) -> float:
        """Seconds of computing if arithmetic and host took no time."""
        return _compute_s(self.step.phases(tflops=inf, **NO_OVERHEAD))

    @property
    def host_s(self) -> float:
        """Seconds of the host's overhead in a step."""
        return sum(self.step.costs.host_overhead_s(phase.point) for phase in self.phases)

    @property
    def link_s(self) -> float:
        """Seconds in which a step occupies the rank's link."""
        return self._sums[1]

    @property
    def busy_s(self) -> float:
        """Seconds in which a step occupies the rank or its link, whichever is longer."""
        return larger(self.compute_s, self.link_s)

    @property
    def travel_s(self) -> float:
        """Seconds of the transfers for which a step waits, on a link that is free."""
        return sum(phase.travel_s for phase in self.phases)

    @property
    def path_s(self) -> float:
        """Seconds of a step that is alone on the rank and the link."""
        return self._sums[2]

    @cached_property
    def _sums(self) -> tuple[float, float, float]:
        phases = self.phases
        path_s = sum(phase.compute_s + larger(phase.beside_s, phase.travel_s) for phase in phases)
        return _compute_s(phases), sum(phase.link_s for phase in phases), path_s

    @cached_property
    def waiting_s(self) -> float:
        """Seconds from step to step if the host waits for every transfer."""
        return waiting_s(self.phases, lanes=1)

    @cached_property
    def overlapped_s(self) -> float:
        """Seconds from step to step with overlap."""
        return overlapped_s(self.phases, lanes=self.lanes) / self.lanes

    @property
    def limit(self) -> str:
        """What takes most of an overlapped step: arithmetic, memory, link, host, or latency that no lane hides."""
        if self.overlapped_s > EXPOSED * max(self.compute_s, self.link_s):
            return "latency"
        parts = {"arithmetic": self.arithmetic_s, "memory": self.memory_s, "link": self.link_s, "host": self.host_s}
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True)
class Forecast:
    """The steps of a workload: each micro-batch has `tokens` tokens, and `in_flight` of them are in the pipeline.

    All groups together compute `sequences` sequences at a time. Each stage has `lanes` lanes.
    """

    workload: Workload
    tokens: float
    sequences: float
    in_flight: int
    lanes: int
    stages: Sequence[StageForecast]

    def micro_batch_s(self, *, overlap: bool) -> float:
        """Seconds between the steps of consecutive micro-batches, in a full pipeline."""
        if overlap:
            return self._overlapped_s
        waiting = [stage.waiting_s for stage in self.stages]
        return max(sum(waiting) / self.in_flight, *waiting)

    def seconds(self, *, overlap: bool) -> float:
        """Seconds from one step of a micro-batch to its next, with the steps of all others in between."""
        return self.in_flight * self.micro_batch_s(overlap=overlap)

    def tokens_per_s(self, *, overlap: bool) -> float:
        """Tokens of all micro-batches per second."""
        return self.tokens / self.micro_batch_s(overlap=overlap)

    @property
    def num_ranks(self) -> int:
        """Ranks of all stages."""
        return sum(stage.ranks for stage in self.stages)

    @property
    def ideal_s(self) -> float:
        """Seconds between micro-batches if no rank waited: the mean compute time of all ranks."""
        return sum(stage.ranks * stage.compute_s for stage in self.stages) / self.num_ranks

    @property
    def first_token_s(self) -> float:
        """Seconds from the first step of a prompt to the token after it, in a full pipeline."""
        return self.first_token_steps * self.seconds(overlap=True)

    @property
    def first_token_steps(self) -> float:
        """Steps of a micro-batch that its prompts take."""
        prompt_of_step = self.tokens * self.workload.prompt / (self.workload.prompt + self.workload.output)
        sequences = larger(1.0, self.sequences / self.in_flight)
        return np.ceil(sequences * self.workload.prompt / prompt_of_step) if self.workload.prompt else 1

    @property
    def least_s(self) -> float:
        """A bound of `micro_batch_s` with overlap: the busiest rank or link, and the path of a micro-batch alone."""
        least_s = sum(stage.path_s for stage in self.stages) / self.in_flight
        for stage in {*self.stages}:
            least_s = larger(least_s, larger(stage.busy_s, stage.path_s / self.lanes))
        return least_s

    @property
    def likely_s(self) -> float:
        """An estimate of `micro_batch_s` with overlap: midway between bounds of closed networks of queues.

        The bounds are the asymptotic one and that of Zahorjan et al. 1982, for the lanes of a stage and for a pipeline.
        """
        slowest_s = 0.0
        for stage in {*self.stages}:
            slowest_s = larger(slowest_s, _midway_s(stage.busy_s, stage.path_s, self.lanes))
        pipeline_s = _midway_s(slowest_s, sum(stage.path_s for stage in self.stages), self.in_flight)
        return slowest_s * self.is_full + pipeline_s * (1 - self.is_full)

    @property
    def is_full(self) -> bool:
        """Whether there is a micro-batch for every lane of every stage."""
        return self.in_flight >= self.lanes * len(self.stages)

    @cached_property
    def _overlapped_s(self) -> float:
        """A full pipeline is as fast as its slowest stage; one with less work is simulated."""
        if self.is_full:
            return max(stage.overlapped_s for stage in {*self.stages})
        first, last = FILLING_ROUNDS * self.in_flight, (FILLING_ROUNDS + MEASURED_ROUNDS) * self.in_flight
        phases = {stage: equal_steps(stage.phases) for stage in {*self.stages}}
        steps = [phases[stage] for stage in self.stages]
        ends = step_ends_s(steps, lanes=self.lanes, in_flight=self.in_flight, num_steps=last + 1)
        return max(self.least_s, float(ends[last] - ends[first]) / (last - first))


@dataclass(frozen=True, slots=True)
class PlannedJob:
    """A job and a model, laid out on the ranks of a machine with this topology."""

    job: Job
    architecture: Architecture
    layout: Layout
    machine: MachineFile
    topology: Topology

    @property
    def memory(self) -> float:
        """Bytes of a rank's memory; infinite if neither job nor machine says it."""
        return rank_memory(self.job, self.machine)


def rank_memory(job: Job, machine: MachineFile) -> float:
    """Bytes of a rank's memory; infinite if neither job nor machine says it."""
    stated = job.topology.rank_memory
    return parse_size(stated) if stated != "auto" else machine.memory_gb * 1e9 or inf


def forecast(planned: PlannedJob, workload: Workload) -> Forecast:
    """Forecast steps of a workload in which every slot that a step can use has a sequence.

    Raises ConfigError, with bytes and with what would fit, if a rank has too little memory for weights, rows or caches.
    """
    grid, job = planned.layout.grid, planned.job
    step = Step(job.num_micro_batches, job.lanes, job.run.batch_tokens, grid.slots_per_group)
    found = forecast_step(planned, workload, step)
    _require_memory(planned, int(found.sequences) // grid.num_groups(0), workload.cached)
    return found


def forecast_step(planned: PlannedJob, workload: Workload, step: Step) -> Forecast:
    """Forecast another kind of step than that of the job, whether or not it fits into the memory.

    If the step has arrays, so have the forecast and the phases of its stages, which cannot be simulated.
    """
    load = workload.load(step.slots / step.micro_batches, step.batch_tokens)
    groups, slots = planned.layout.grid.num_groups(0), step.slots * 1.0
    if not workload.output:
        slots = smaller(slots, np.ceil(load.sequences) * step.micro_batches)
    return Forecast(
        workload=workload,
        tokens=load.rows * groups,
        sequences=slots * groups,
        in_flight=step.micro_batches,
        lanes=step.lanes,
        stages=_stages(planned, load, step.lanes),
    )


def fitting_sequences(planned: PlannedJob, tokens: int) -> tuple[int, int]:
    """How many sequences of `tokens` tokens a group of the first stage can have, and the stage that limits them."""
    pages = [
        affordable_pages(planned.job.run, memory, available=int(planned.memory)) for memory in planned.layout.memory
    ]
    return min(pages) // pages_for(tokens), pages.index(min(pages))


def _require_memory(planned: PlannedJob, sequences: int, tokens: int) -> None:
    """Raise ConfigError if all that is held and the caches of these sequences of a group exceed a rank's memory."""
    if planned.memory == inf:
        return
    fitting, stage = fitting_sequences(planned, tokens)
    memory = planned.layout.memory[stage]
    needed = memory.held + sequences * pages_for(tokens) * memory.page * memory.groups
    if sequences > fitting or needed > planned.memory:
        raise ConfigError(
            f"{sequences:,} sequences of {tokens:,} tokens in a group need {format_size(needed)} on a rank of stage "
            f"{stage}, which has {format_size(planned.memory)}; {fitting:,} fit: lower run.max_sequences, or "
            "raise run.kv_memory"
        )


def _stages(planned: PlannedJob, load: StepLoad, lanes: int) -> list[StageForecast]:
    """The forecast of each stage if a group of the first has this load; equal stages are one object."""
    equal_stages: dict[object, StageForecast] = {}
    found = []
    for index in range(len(planned.layout.grid.stages)):
        key = _signature(planned, index)
        if key not in equal_stages:
            equal_stages[key] = StageForecast(_stage_step(planned, index, load), lanes)
        found.append(equal_stages[key])
    return found


def _signature(planned: PlannedJob, index: int) -> object:
    """Stages with equal signatures take equal times."""
    grid, architecture = planned.layout.grid, planned.architecture
    stage = grid.stages[index]
    kinds = tuple(map(architecture.kind, stage.layers))
    nodes = planned.topology.subset(stage.ranks).nodes
    is_end = index == 0, index == len(grid.stages) - 1
    immediate = index in planned.layout.immediate_stages
    return kinds, nodes, _link_level(planned, index), _hosted(planned, index), is_end, immediate


def _link_level(planned: PlannedJob, index: int) -> int:
    """The level of the links from a stage to the next."""
    stages = planned.layout.grid.stages
    return planned.topology.level(stages[index].ranks.start, stages[(index + 1) % len(stages)].ranks.start)


def _hosted(planned: PlannedJob, index: int) -> int:
    """Experts of a layer on the rank of a stage that has the most."""
    return max((placement.most for placement in planned.layout.placements[index].values()), default=0)


def _midway_s(busy_s: float, path_s: float, number: int) -> float:
    """Seconds from step to step of a number of customers that share a server for busy_s of their path."""
    return (larger(busy_s, path_s / number) + busy_s + (path_s - busy_s) / number) / 2


def _compute_s(phases: Sequence[Phase]) -> float:
    return sum(phase.compute_s + phase.beside_s for phase in phases)


def _stage_step(planned: PlannedJob, index: int, load: StepLoad) -> StageStep:
    """One step of a stage if a group of the first stage has this load."""
    grid = planned.layout.grid
    stage, groups = grid.stages[index], grid.num_groups(0) / grid.num_groups(index)
    value_bytes = 2 if planned.job.run.precision == "bfloat16" else 4
    costs = StepCosts(
        planned.machine,
        planned.architecture,
        planned.topology.subset(stage.ranks),
        tensor=grid.tensor,
        hops=planned.job.exchange.hops,
        hosted=_hosted(planned, index),
        row_bytes=planned.architecture.width * value_bytes,
        value_bytes=value_bytes,
        stage_link_level=_link_level(planned, index),
        immediate=index in planned.layout.immediate_stages,
        head=grid.head,
    )
    return StageStep(
        costs,
        ranks=len(stage.ranks),
        layers=stage.layers,
        load=replace(load, rows=load.rows * groups, sequences=load.sequences * groups),
        is_first=index == 0,
        is_last=index == len(grid.stages) - 1,
    )
