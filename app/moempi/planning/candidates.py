"""The layouts that a search compares, and the kinds of steps that fit into the memory of each. Pure.

A layout is a number of replicas, which are independent jobs, with stages, tensor groups and hops. Stages have equal
ranks and layers that are balanced by weights, or ranks or layers that even out the seconds of their steps. Tensor
groups divide the LM head, or in the fastest layout of a shape with equal ranks all ranks of the last stage.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heapreplace
from itertools import product
from math import ceil, inf
from typing import Literal, NamedTuple

import numpy as np
from msgspec import structs

from moempi.config.architecture import Architecture
from moempi.config.job import Job
from moempi.config.machine_file import MachineFile
from moempi.errors import ConfigError
from moempi.layout.grid import balanced_stages
from moempi.layout.layout import make_layout
from moempi.layout.memory import pages_for
from moempi.layout.topology import Topology
from moempi.planning.forecast import Forecast, PlannedJob, Step, forecast_step
from moempi.planning.workload import Workload

BATCH_TOKENS = (256, 512, 1024, 2048, 4096, 8192, 16384)
LANES = (1, 2, 3, 4)
Route = tuple[Literal[1, 2], bool]
"""Hops, and whether routing is immediate."""
ROUTES: tuple[Route, ...] = ((1, False), (1, True), (2, False))
MICRO_BATCHES_OF_STAGE = (1.0, 1.02, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 2.0, 3.0, 4.0)
"""Micro-batches in flight, as multiples of the number of stages; at most one for each lane of each stage."""
SHARES_OF_SEQUENCES = tuple(0.5 ** (power / 2) for power in range(17))
"""Sequences, as shares of those for which there is memory: with fewer, each has its next token sooner."""
MOST_SEQUENCES = 1_000_000
MOST_MICRO_BATCHES = 4096
FREE_SHARE = 1 / 16
"""Share of a rank's memory that stays free for MPI, the interpreter and temporary arrays."""


class Shape(NamedTuple):
    """Independent replicas of a job, each with `stages` stages of tensor groups of `tensor` ranks."""

    replicas: int
    stages: int
    tensor: int


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """A job and a model without a layout, the machine, all of its ranks, and what the job computes.

    A layout decides keys of `[parallel]`, `[exchange]` and `[run]`; all other keys are the job's.
    """

    job: Job
    architecture: Architecture
    machine: MachineFile
    topology: Topology
    workload: Workload


@dataclass(frozen=True)
class Candidates:
    """A layout of one of `replicas` replicas, and all kinds of steps (n,) that fit into its memory.

    `forecast` is of all of them at once, and gives bounds only.
    """

    replicas: int
    planned: PlannedJob
    steps: Step
    forecast: Forecast

    @property
    def shape(self) -> Shape:
        """The shape of the layout."""
        parallel = self.planned.job.parallel
        return Shape(self.replicas, parallel.stages, parallel.tensor)

    def step(self, index: int) -> Step:
        """One kind of step."""
        return Step(*(int(np.asarray(numbers)[index]) for numbers in self.steps))

    def job(self, index: int) -> Job:
        """The job that takes this kind of step in this layout."""
        planned, (micro_batches, lanes, batch_tokens, slots) = self.planned, self.step(index)
        used_bytes, _, state_bytes = _memory(planned, batch_tokens * lanes)
        free = _cache_bytes(planned, used_bytes) - slots * state_bytes
        run = structs.replace(
            planned.job.run,
            micro_batches=micro_batches,
            lanes=lanes,
            batch_tokens=batch_tokens,
            max_sequences=slots,
            kv_memory=f"{free // 10**6}MB" if free % 10**6 == 0 else f"{free}B",
        )
        return structs.replace(planned.job, run=run)


def all_shapes(request: SearchRequest) -> Iterator[Shape]:
    """Every number of replicas, stages and ranks of a tensor group that may divide ranks and layers."""
    num_ranks, num_layers = len(request.topology.nodes), request.architecture.num_layers
    fewest = {ceil(num_layers / most) for most in range(1, num_layers + 1)}
    for replicas in _replicas(request):
        ranks = num_ranks // replicas
        stages = sorted(fewest | {count for count in _divisors(ranks) if count <= num_layers})
        for tensor in _divisors(min(ranks, _ranks_per_node(request))):
            yield from (Shape(replicas, count, tensor) for count in stages if count * tensor <= ranks)


def conventional_shapes(request: SearchRequest) -> dict[str, list[Shape]]:
    """The shapes of layouts in common use by name, each a part of `all_shapes`."""
    num_ranks, on_node, experts = (
        len(request.topology.nodes),
        _ranks_per_node(request),
        request.architecture.experts.num,
    )
    hosts = max(count for count in _divisors(num_ranks) if count <= experts)
    kinds: dict[str, list[Shape]] = {f"TP{on_node} x PP": [], "EP in a node": [], f"EP{hosts}, no stages": []}
    for shape in all_shapes(request):
        ranks_of_stage = num_ranks / shape.replicas / shape.stages
        is_kind = (
            shape.tensor == ranks_of_stage == on_node,
            shape.tensor == 1 and ranks_of_stage == on_node,
            shape.stages == 1 and ranks_of_stage == hosts,
        )
        for kind, fits in zip(kinds.values(), is_kind, strict=True):
            kind.extend([shape] * fits)
    return kinds


def candidates(request: SearchRequest, shapes: Iterable[Shape]) -> Iterator[Candidates]:
    """The layouts of these shapes that fit into the memory of a rank, each with its kinds of steps."""
    for shape in shapes:
        equal = _with_steps(request, shape)
        if not equal:
            continue
        fastest, step = _fastest(equal)
        yield from (*equal, *_with_stage_head(request, shape, fastest))
        if shape.stages > 1:
            for layers, ranks in dict.fromkeys(_uneven(fastest, step)):
                yield from _with_steps(request, shape, layers=layers, ranks=ranks)


def least_memory(request: SearchRequest, shapes: Iterable[Shape]) -> float:
    """Bytes of a rank with which one of these layouts would fit; infinite if the model cannot be divided like them."""
    least = inf
    for shape in shapes:
        try:
            planned = lay_out(request, shape)
        except ConfigError:
            continue
        used_bytes, page_bytes, state_bytes = _memory(planned, min(_batch_tokens(request)))
        sequence_bytes = pages_for(request.workload.cached) * page_bytes + state_bytes
        cache_bytes = planned.job.parallel.stages * sequence_bytes
        least = min(least, (used_bytes + cache_bytes) / (1 - FREE_SHARE))
    return least


def _with_stage_head(request: SearchRequest, shape: Shape, of: Candidates) -> list[Candidates]:
    """A layout with the LM head divided among all ranks of its last stage; [] if they are one tensor group."""
    exchange, grid = of.planned.job.exchange, of.planned.layout.grid
    if grid.num_groups(len(grid.stages) - 1) == 1:
        return []
    return _with_steps(request, shape, head="stage", routes=[(exchange.hops, exchange.immediate)])


def _with_steps(
    request: SearchRequest,
    shape: Shape,
    *,
    layers: Sequence[int] = (),
    ranks: Sequence[int] = (),
    head: Literal["tensor", "stage"] = "tensor",
    routes: Sequence[Route] = ROUTES,
) -> list[Candidates]:
    """The layout with each of the routes that makes a difference, and its kinds of steps; [] if nothing fits."""
    found = []
    for hops, immediate in routes:
        try:
            planned = lay_out(request, shape, layers=layers, ranks=ranks, head=head, hops=hops, immediate=immediate)
        except ConfigError:
            continue
        nodes = planned.topology.nodes
        spans_nodes = any(nodes[stage.ranks[0]] != nodes[stage.ranks[-1]] for stage in planned.layout.grid.stages)
        if (spans_nodes or hops == 1) and (planned.layout.immediate_stages or not immediate):
            steps = _steps(planned, request)
            if steps is not None:
                found.append(
                    Candidates(shape.replicas, planned, steps, forecast_step(planned, request.workload, steps))
                )
    return found


def lay_out(
    request: SearchRequest,
    shape: Shape,
    *,
    layers: Sequence[int] = (),
    ranks: Sequence[int] = (),
    head: Literal["tensor", "stage"] = "tensor",
    hops: Literal[1, 2] = 1,
    immediate: bool = False,
) -> PlannedJob:
    """The job in a layout of this shape, with one lane and all slots.

    `layers` and `ranks` are those of each stage, () for the default. Raises ConfigError if it cannot be divided so.
    """
    job = request.job
    parallel = structs.replace(
        job.parallel,
        stages=shape.stages,
        tensor=shape.tensor,
        stage_layers=tuple(layers),
        stage_ranks=tuple(ranks),
        head=head,
    )
    run = structs.replace(job.run, overlap=True, micro_batches=1, lanes=1, max_sequences=MOST_SEQUENCES)
    exchange = structs.replace(job.exchange, hops=hops, immediate=immediate)
    job = structs.replace(job, parallel=parallel, run=run, exchange=exchange)
    topology = request.topology.subset(range(len(request.topology.nodes) // shape.replicas))
    layout = make_layout(job, request.architecture, topology.nodes, on_gpu=job.run.backend == "cupy")
    return PlannedJob(job, request.architecture, layout, request.machine, topology)


def _fastest(layouts: Sequence[Candidates]) -> tuple[Candidates, int]:
    """The layout and the kind of step with the lowest bound."""
    seconds = [np.asarray(one.forecast.least_s / one.forecast.tokens) for one in layouts]
    layout = min(range(len(layouts)), key=lambda index: float(seconds[index].min()))
    return layouts[layout], int(seconds[layout].argmin())


def _uneven(of: Candidates, index: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Layers, and ranks, of each stage that even out the seconds of one kind of step; () stands for the given ones."""
    found = forecast_step(of.planned, of.forecast.workload, of.step(index))
    parallel, layout = of.planned.job.parallel, of.planned.layout
    costs, load = replace(found.stages[0].step.costs, immediate=False), found.stages[0].step.load
    last, joined = of.planned.architecture.num_layers - 1, of.planned.architecture.joined_layers
    seconds = []
    for layer in range(last + 1):
        phases = costs.step(range(layer, layer + 1), load, is_first=layer == 0, is_last=layer == last)
        seconds.append(sum(phase.compute_s + phase.beside_s for phase in phases))
    layers = balanced_stages(tuple(round(one / min(seconds), 2) for one in seconds), parallel.stages, joined)
    if layers != tuple(len(stage.layers) for stage in layout.grid.stages):
        yield layers, ()
    work = [stage.compute_s * stage.ranks for stage in found.stages]
    num_ranks = len(of.planned.topology.nodes)
    for unit in {_ranks_per_node(of.planned), parallel.tensor}:
        if not num_ranks % unit and num_ranks // unit >= parallel.stages:
            ranks = tuple(unit * share for share in apportioned(num_ranks // unit, work))
            if ranks != tuple(len(stage.ranks) for stage in layout.grid.stages):
                yield (), ranks


def apportioned(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers of at least 1 with this total whose largest weight / number is the smallest possible."""
    shares = [1] * len(weights)
    queue = [(-weight, index) for index, weight in enumerate(weights)]
    heapify(queue)
    for _ in range(total - len(weights)):
        index = queue[0][1]
        shares[index] += 1
        heapreplace(queue, (-weights[index] / shares[index], index))
    return shares


def _steps(planned: PlannedJob, request: SearchRequest) -> Step | None:
    """All kinds of steps (n,) whose sequences fit into the memory of a layout; None if there are none."""
    ranks = [len(stage.ranks) for stage in planned.layout.grid.stages]
    least_slots = max(ceil(count / ranks[0]) for count in ranks)
    found = set()
    for lanes, batch_tokens in product(LANES, _batch_tokens(request)):
        used_bytes, page_bytes, state_bytes = _memory(planned, lanes * batch_tokens)
        sequence_bytes = pages_for(request.workload.cached) * page_bytes + state_bytes
        fitting = _cache_bytes(planned, used_bytes) // sequence_bytes
        for micro_batches in _micro_batches(len(ranks), lanes):
            most = min(fitting, micro_batches * request.workload.most_slots(batch_tokens), MOST_SEQUENCES)
            least = max(micro_batches, least_slots)
            slots = {int(most * share) for share in SHARES_OF_SEQUENCES}
            found |= {Step(micro_batches, lanes, batch_tokens, count) for count in slots if count >= least}
    return Step(*np.array(sorted(found)).T.astype(float)) if found else None


def _memory(planned: PlannedJob, rows: int) -> tuple[int, int, int]:
    """Bytes of a rank for weights and the rows of all lanes, for a page, and for the state of a sequence of each group.

    Each is on the rank that needs most.
    """
    memories, of_job = planned.layout.memory, planned.job.run.batch_tokens * planned.job.lanes
    used_bytes = max(memory.weights + memory.rows // of_job * rows for memory in memories)
    slots = planned.layout.grid.slots_per_group
    state_bytes = max(-(-memory.state * memory.slots // slots) for memory in memories)
    return used_bytes, max(memory.page * memory.groups for memory in memories), state_bytes


def _cache_bytes(planned: PlannedJob, used_bytes: int) -> int:
    """What is left for the cache, in whole megabytes if it is a gigabyte or more."""
    left = max(int(planned.memory * (1 - FREE_SHARE)) - used_bytes, 0)
    return left - left % 10**6 if left >= 10**9 else left


def _batch_tokens(request: SearchRequest) -> list[int]:
    """Rows of a step: the job's own, and others; for outputs alone only more, as the job's own are for its prompts."""
    own = request.job.run.batch_tokens
    return sorted({own, *(rows for rows in BATCH_TOKENS if request.workload.prompt or rows > own)})


def _micro_batches(stages: int, lanes: int) -> list[int]:
    """Numbers of micro-batches in flight, from one for each stage to one for each lane of each stage."""
    counts = {max(lanes, ceil(share * stages)) for share in MICRO_BATCHES_OF_STAGE if share <= lanes}
    return sorted(count for count in counts if count <= MOST_MICRO_BATCHES)


def _replicas(request: SearchRequest) -> list[int]:
    """Numbers of equal parts of the ranks: parts of equal nodes, or of whole nodes."""
    num_ranks, on_node = len(request.topology.nodes), _ranks_per_node(request)
    if num_ranks % on_node:
        return [1]
    parts = {count: num_ranks // count for count in _divisors(num_ranks)}
    return [count for count, ranks in parts.items() if not ranks % on_node or not on_node % ranks]


def _ranks_per_node(request: SearchRequest | PlannedJob) -> int:
    return request.topology.nodes.count(0)


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]
