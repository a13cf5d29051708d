"""A dry run: what a job would hold where, and what would refuse it, without weights, prompts or ranks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from moempi.config.architecture import Architecture
from moempi.config.job import Job
from moempi.config.placement_file import read_job_placement
from moempi.config.reading import read_toml
from moempi.config.size import format_size, parse_size
from moempi.engine.kv_budget import affordable_pages
from moempi.errors import ConfigError
from moempi.layout.grid import Stage
from moempi.layout.layout import Layout, make_layout
from moempi.layout.memory import Memory
from moempi.layout.placement import Placement
from moempi.observe.run_report import LayoutTable, StageRow
from moempi.storage.weights import WeightFile


def dry_run(job: Job, nodes: Sequence[int]) -> LayoutTable:
    """Lay the job out on ranks whose node is nodes[rank], counted node by node. Not collective.

    Raises the MoempiErrors that the run itself would raise for its layout.
    """
    architecture = architecture_of(job)
    plan = make_layout(job, architecture, nodes, placement=read_job_placement(job), on_gpu=job.run.backend == "cupy")
    title = (
        f"{len(nodes):,} ranks on {len(set(nodes)):,} nodes, {len(plan.grid.stages)} stages, "
        f"tensor groups of {plan.grid.tensor}; "
        f"{sum(map(sum, map(_counts, plan.placements))):,} experts in {len(architecture.moe_layers)} MoE layers, "
        f"{len(architecture.dense_layers)} dense layers"
    )
    rows = [_row(plan, index, nodes) for index in range(len(plan.grid.stages))]
    return LayoutTable(title, rows, refused=_refused(job, plan))


def architecture_of(job: Job) -> Architecture:
    """That of the weight file, or where there is none the job's own description; raises their MoempiErrors."""
    if job.model.architecture and not Path(job.model.weights).exists():
        architecture = read_toml(job.model.architecture, Architecture)
        problem = architecture.problem()
        if problem:
            raise ConfigError(f"{job.model.architecture}: {problem}")
        return architecture
    with WeightFile.open(job.model.weights) as weights:
        return weights.architecture


def _counts(placements: Mapping[int, Placement]) -> list[int]:
    """Experts of each rank and layer of a stage."""
    return [len(experts) for placement in placements.values() for experts in placement.hosted]


def _row(plan: Layout, index: int, nodes: Sequence[int]) -> StageRow:
    stage, memory = plan.grid.stages[index], plan.memory[index]
    counts = _counts(plan.placements[index]) or [0]
    return StageRow(
        layers=len(stage.layers),
        ranks=len(stage.ranks),
        nodes=_num_nodes(stage, nodes),
        groups=plan.grid.num_groups(index),
        experts=f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}",
        memory={
            "weights": memory.weights,
            "rows": memory.rows,
            "cache page": memory.page * memory.groups,
        },
    )


def _num_nodes(stage: Stage, nodes: Sequence[int]) -> int:
    return len({nodes[rank] for rank in stage.ranks})


def _refused(job: Job, plan: Layout) -> list[str]:
    """What the memory of a rank would refuse, where the job says how much that is; once for stages that are alike."""
    if job.topology.rank_memory == "auto":
        return []
    available = parse_size(job.topology.rank_memory)
    problems = [_problem(job, memory, available) for memory in plan.memory]
    return [
        f"{problem} (stage {', '.join(str(index) for index, other in enumerate(problems) if other == problem)})"
        for problem in dict.fromkeys(problems)
        if problem
    ]


def _problem(job: Job, memory: Memory, available: int) -> str:
    try:
        pages = affordable_pages(job, memory, available=available)
    except ConfigError as error:
        return str(error)
    needed = memory.weights + memory.rows + pages * memory.page * memory.groups
    return f"needs {format_size(needed)}, a rank has {format_size(available)}" if needed > available else ""
