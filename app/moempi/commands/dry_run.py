"""The dry run of `moempi run`: layout and memory of a job, and errors it would end with, without reading weights."""

from collections.abc import Mapping, Sequence

from moempi.config.architecture import Architecture, read_architecture_file
from moempi.config.input_file import file_mode
from moempi.config.job import Job
from moempi.config.placement_file import read_job_placement
from moempi.config.size import format_size, parse_size
from moempi.config.tensors import PAGE_ROWS
from moempi.config.traces import recorded_bytes
from moempi.errors import ConfigError
from moempi.layout.grid import Stage
from moempi.layout.layout import Layout, make_layout
from moempi.layout.memory import Memory, affordable_pages, pages_for
from moempi.layout.placement import Placement
from moempi.observe.run_report import LayoutTable, StageRow
from moempi.storage.weights import WeightFile

DEFAULT_CONTEXT = 2048


def dry_run(job: Job, nodes: Sequence[int], *, context: int = 0) -> LayoutTable:
    """Lay the job out on ranks whose node is nodes[rank], which ascends from 0. Not collective.

    A sequence has `context` tokens, 0 stands for DEFAULT_CONTEXT, and at most all positions of the model. Raises the
    MoempiErrors that the run would raise for its layout.
    """
    architecture = architecture_of(job)
    layout = make_layout(job, architecture, nodes, placement=read_job_placement(job), on_gpu=job.run.backend == "cupy")
    title = (
        f"{len(nodes):,} ranks on {len(set(nodes)):,} nodes, {len(layout.grid.stages)} stages, "
        f"tensor groups of {layout.grid.tensor}; "
        f"{sum(map(sum, map(_counts, layout.placements))):,} experts in {len(architecture.moe_layers)} MoE layers, "
        f"{len(architecture.dense_layers)} dense layers"
    )
    context = min(context or DEFAULT_CONTEXT, architecture.max_positions)
    rows = [_row(job, layout, index, nodes, context=context) for index in range(len(layout.grid.stages))]
    return LayoutTable(
        title, rows, context, refused=_memory_errors(job, layout), recorded=recorded_bytes(job, architecture)
    )


def architecture_of(job: Job) -> Architecture:
    """The architecture of the weight file, or of the job's architecture file if the weight file does not exist.

    Raises the MoempiErrors of reading them, and ConfigError for an impossible architecture.
    """
    if job.model.architecture and not file_mode(job.model.weights):
        return read_architecture_file(job.model.architecture)
    with WeightFile.open(job.model.weights) as weights:
        return weights.architecture


def _counts(placements: Mapping[int, Placement]) -> list[int]:
    """Number of experts of each rank and layer of a stage."""
    return [len(experts) for placement in placements.values() for experts in placement.hosted]


def _row(job: Job, layout: Layout, index: int, nodes: Sequence[int], *, context: int) -> StageRow:
    stage, memory = layout.grid.stages[index], layout.memory[index]
    counts = _counts(layout.placements[index]) or [0]
    has_states = any(of_stage.state for of_stage in layout.memory)
    sequences = _sequences(job, memory, slots=layout.grid.slots_per_group, context=context)
    pages = max(sequences * pages_for(context), 1)
    return StageRow(
        layers=len(stage.layers),
        ranks=len(stage.ranks),
        nodes=_num_nodes(stage, nodes),
        groups=layout.grid.num_groups(index),
        experts=f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}",
        memory={
            "weights": memory.weights,
            "rows": memory.rows,
            "a cached token": memory.page // PAGE_ROWS,
            **({"a sequence's state": memory.state} if has_states else {}),
        },
        sequences=sequences,
        total=memory.held + pages * memory.page * memory.groups,
    )


def _sequences(job: Job, memory: Memory, *, slots: int, context: int) -> int:
    """Sequences of `context` tokens that a group can compute at a time, all `slots` if the job states no memory."""
    if job.topology.rank_memory == "auto":
        return slots
    try:
        pages = affordable_pages(job.run, memory, available=parse_size(job.topology.rank_memory))
    except ConfigError:
        return 0
    return min(slots, pages // pages_for(context))


def _num_nodes(stage: Stage, nodes: Sequence[int]) -> int:
    return len({nodes[rank] for rank in stage.ranks})


def _memory_errors(job: Job, layout: Layout) -> list[str]:
    """The error of every stage whose ranks have too little memory, if the job says how much they have.

    Stages with the same error share one text.
    """
    if job.topology.rank_memory == "auto":
        return []
    available = parse_size(job.topology.rank_memory)
    problems = [_memory_error(job, memory, available) for memory in layout.memory]
    return [
        f"{problem} (stage {', '.join(str(index) for index, other in enumerate(problems) if other == problem)})"
        for problem in dict.fromkeys(problems)
        if problem
    ]


def _memory_error(job: Job, memory: Memory, available: int) -> str:
    try:
        pages = affordable_pages(job.run, memory, available=available)
    except ConfigError as error:
        return str(error)
    needed = memory.held + pages * memory.page * memory.groups
    return f"needs {format_size(needed)}, a rank has {format_size(available)}" if needed > available else ""
