"""Forecast of a job on a machine that need not exist: whether it fits, its speed, and what limits each stage. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, inf
from typing import NamedTuple

from msgspec import structs

from moempi.config.architecture import Architecture
from moempi.config.job import Job
from moempi.config.machine_file import MachineFile
from moempi.config.size import format_size, parse_size
from moempi.errors import ConfigError
from moempi.layout.layout import Layout
from moempi.layout.memory import affordable_pages, pages_for
from moempi.layout.topology import Topology
from moempi.planning.pipeline import step_ends_s
from moempi.planning.simulate import Phase, overlapped_s, waiting_s
from moempi.planning.step_cost import StepCosts, StepLoad

FILLING_ROUNDS, MEASURED_ROUNDS = 1, 1
"""Rounds of all micro-batches in virtual time before those that are measured, and those."""
EXPOSED = 1.05
"""A stage is limited by latency if a step takes more than this times its compute and link time."""


class Workload(NamedTuple):
    """What a job computes: sequences of a prompt of `prompt` tokens, then `output` tokens; `cached` are in its cache.

    A step of it is full of prompt tokens if there is no output, of generated tokens if there is no prompt, and of both
    in their proportion otherwise.
    """

    name: str
    prompt: float
    output: float
    cached: int

    def load(self, slots: float, batch_tokens: int) -> StepLoad:
        """A step of a micro-batch that has `slots` sequences in a group."""
        if not self.output:
            rows = min(batch_tokens, slots * self.prompt)
            return StepLoad(rows, max(1.0, rows / self.prompt), self.prompt / 2)
        rows = min(batch_tokens, slots * (1 + self.prompt / self.output))
        generated = rows * self.output / (self.output + self.prompt)
        from_prompts = rows - generated
        context = self.prompt + self.output / 2 if self.prompt else self.cached
        sequences = generated + (from_prompts / self.prompt if self.prompt else 0.0)
        mean = (generated * context + from_prompts * self.prompt / 2) / rows
        return StepLoad(rows, sequences, mean, cached=context)


def prefill(prompt: int) -> Workload:
    """Prompts of `prompt` tokens, and no outputs."""
    return Workload("prefill", prompt, 0, prompt)


def decode(context: int) -> Workload:
    """Outputs only, with `context` tokens in the cache of each sequence."""
    return Workload("decode", 0, 1, context)


def mixed(prompt: int, output: int) -> Workload:
    """Prompts of `prompt` tokens and their outputs of `output` tokens."""
    return Workload("mixed", prompt, output, prompt + output)


@dataclass(frozen=True, slots=True)
class StageForecast:
    """A stage of `ranks` ranks: the seconds of one step on its busiest rank, and their parts.

    `arithmetic_s` is the compute time if memory were free, `memory_s` if arithmetic were, `host_s` the host's overhead.
    `waiting_s` and `overlapped_s` are the seconds between the steps of its lanes, without and with overlap.
    """

    ranks: int
    compute_s: float
    arithmetic_s: float
    memory_s: float
    host_s: float
    link_s: float
    travel_s: float
    waiting_s: float
    overlapped_s: float

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

    All groups together compute `sequences` sequences at a time. Each stage has `lanes` lanes; `steps` has the phases of
    one step of each stage.
    """

    workload: Workload
    tokens: float
    sequences: int
    in_flight: int
    lanes: int
    stages: Sequence[StageForecast]
    steps: Sequence[Sequence[Phase]]

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
        prompt_of_step = self.tokens * self.workload.prompt / (self.workload.prompt + self.workload.output)
        sequences = max(1.0, self.sequences / self.in_flight)
        steps = ceil(sequences * self.workload.prompt / prompt_of_step) if prompt_of_step else 1
        return steps * self.seconds(overlap=True)

    @cached_property
    def _overlapped_s(self) -> float:
        """A pipeline whose lanes are all busy is as fast as its slowest stage; one with less work is simulated."""
        slowest = max(stage.overlapped_s for stage in self.stages)
        if self.in_flight >= self.lanes * len(self.stages):
            return slowest
        rounds = FILLING_ROUNDS + MEASURED_ROUNDS
        ends = step_ends_s(
            self.steps, lanes=self.lanes, in_flight=self.in_flight, num_steps=rounds * self.in_flight + 1
        )
        first = FILLING_ROUNDS * self.in_flight
        return max(slowest, float(ends[-1] - ends[first]) / (MEASURED_ROUNDS * self.in_flight))


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
        stated = self.job.topology.rank_memory
        return parse_size(stated) if stated != "auto" else self.machine.memory_gb * 1e9 or inf


def forecast(planned: PlannedJob, workload: Workload) -> Forecast:
    """Forecast steps of a workload in which every slot that a step can use has a sequence.

    Raises ConfigError, with bytes and with what would fit, if a rank has too little memory for weights, rows or caches.
    """
    grid, job = planned.layout.grid, planned.job
    load = workload.load(grid.slots_per_group / job.num_micro_batches, job.run.batch_tokens)
    sequences = grid.slots_per_group
    if not workload.output:
        sequences = min(sequences, ceil(load.sequences) * job.num_micro_batches)
    _require_memory(planned, sequences, workload.cached)
    known: dict[object, tuple[StageForecast, Sequence[Phase]]] = {}
    found = []
    for index in range(len(grid.stages)):
        key = _signature(planned, index)
        if key not in known:
            known[key] = _stage(planned, index, load)
        found.append(known[key])
    groups = grid.num_groups(0)
    return Forecast(
        workload=workload,
        tokens=load.rows * groups,
        sequences=sequences * groups,
        in_flight=job.num_micro_batches,
        lanes=job.lanes,
        stages=[stage for stage, _ in found],
        steps=[phases for _, phases in found],
    )


def fitting_sequences(planned: PlannedJob, tokens: int) -> tuple[int, int]:
    """How many sequences of `tokens` tokens a group of the first stage can have, and the stage that limits them."""
    pages = [
        affordable_pages(planned.job.run, memory, available=int(planned.memory)) for memory in planned.layout.memory
    ]
    return min(pages) // pages_for(tokens), pages.index(min(pages))


def _require_memory(planned: PlannedJob, sequences: int, tokens: int) -> None:
    """Raise ConfigError if weights, rows and the caches of these sequences of a group exceed a rank's memory."""
    if planned.memory == inf:
        return
    fitting, stage = fitting_sequences(planned, tokens)
    memory = planned.layout.memory[stage]
    needed = memory.weights + memory.rows + sequences * pages_for(tokens) * memory.page * memory.groups
    if sequences > fitting or needed > planned.memory:
        raise ConfigError(
            f"{sequences:,} sequences of {tokens:,} tokens in a group need {format_size(needed)} on a rank of stage "
            f"{stage}, which has {format_size(planned.memory)}; {fitting:,} fit: lower run.max_sequences, or "
            "raise run.kv_memory"
        )


def _signature(planned: PlannedJob, index: int) -> object:
    """Stages with equal signatures take equal times."""
    grid, architecture = planned.layout.grid, planned.architecture
    stage = grid.stages[index]
    kinds = tuple((architecture.is_moe(layer), architecture.window(layer)) for layer in stage.layers)
    following = grid.stages[(index + 1) % len(grid.stages)]
    link = int(planned.topology.levels(stage.ranks.start)[following.ranks.start])
    nodes = planned.topology.subset(stage.ranks).nodes
    return kinds, nodes, link, _hosted(planned, index), index == 0, index == len(grid.stages) - 1


def _hosted(planned: PlannedJob, index: int) -> int:
    """Experts of a layer on the rank of a stage that has the most."""
    placements = planned.layout.placements[index].values()
    return max((len(experts) for placement in placements for experts in placement.hosted), default=0)


def _stage(planned: PlannedJob, index: int, load: StepLoad) -> tuple[StageForecast, Sequence[Phase]]:
    """The forecast of a stage, and the phases of one of its steps, if a group of the first stage has this load."""
    grid, lanes = planned.layout.grid, planned.job.lanes
    groups = grid.num_groups(0) / grid.num_groups(index)
    own_load = replace(load, rows=load.rows * groups, sequences=load.sequences * groups)
    machine = planned.machine
    phases, free_memory, free_arithmetic = (
        _phases(planned, index, own_load, other)
        for other in (
            machine,
            structs.replace(machine, memory_gb_s=inf, turn_us=0.0),
            structs.replace(machine, tflops=inf, turn_us=0.0),
        )
    )
    stage = StageForecast(
        ranks=len(grid.stages[index].ranks),
        compute_s=_compute_s(phases),
        arithmetic_s=_compute_s(free_memory),
        memory_s=_compute_s(free_arithmetic),
        host_s=len(phases) * machine.turn_us * 1e-6,
        link_s=sum(phase.link_s for phase in phases),
        travel_s=sum(phase.travel_s for phase in phases),
        waiting_s=waiting_s(phases, lanes=1),
        overlapped_s=overlapped_s(phases, lanes=lanes) / lanes,
    )
    return stage, phases


def _compute_s(phases: Sequence[Phase]) -> float:
    return sum(phase.compute_s + phase.beside_s for phase in phases)


def _phases(planned: PlannedJob, index: int, load: StepLoad, machine: MachineFile) -> list[Phase]:
    """The phases of one step in stage `index`."""
    stages = planned.layout.grid.stages
    stage, following = stages[index], stages[(index + 1) % len(stages)]
    value_bytes = 2 if planned.job.run.precision == "bfloat16" else 4
    costs = StepCosts(
        machine,
        planned.architecture,
        planned.topology.subset(stage.ranks),
        tensor=planned.layout.grid.tensor,
        hops=planned.job.exchange.hops,
        hosted=_hosted(planned, index),
        row_bytes=planned.architecture.width * value_bytes,
        value_bytes=value_bytes,
        stage_link_level=int(planned.topology.levels(stage.ranks.start)[following.ranks.start]),
    )
    return costs.step(stage.layers, load, is_first=index == 0, is_last=index == len(stages) - 1)
