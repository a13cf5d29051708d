"""The layout of a job on given ranks: grid, placement of experts, memory. Pure."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from moempi.config.architecture import Architecture
from moempi.config.job import Job
from moempi.config.placement_file import PlacementFile
from moempi.config.tensors import Share, layer_tensors
from moempi.errors import ConfigError
from moempi.layout.grid import Grid, Stage, make_grid
from moempi.layout.memory import Memory, StageRank, rank_memory
from moempi.layout.placement import Placement, linear
from moempi.layout.row_buffers import ipc_obstacle


class Layout(Struct, frozen=True):
    """The grid, and per stage the placement of each MoE layer and the memory of the rank that needs most.

    Rows leave the `immediate_stages` by immediate routing.
    """

    grid: Grid
    placements: tuple[Mapping[int, Placement], ...]
    memory: tuple[Memory, ...]
    immediate_stages: tuple[int, ...]


def make_layout(
    job: Job,
    architecture: Architecture,
    nodes: Sequence[int],
    *,
    placement: PlacementFile | None = None,
    on_gpu: bool = False,
    widened: bool = False,
) -> Layout:
    """Lay a job out on ranks that are counted node by node; nodes[rank] is the node of a rank.

    Without `placement`, experts are placed in even shares in ascending order. `on_gpu` and `widened` size the memory,
    as in `rank_memory`. Raises ConfigError, with the required numbers, if the model or the job
    cannot be divided as requested.
    """
    _require_divisible(job, architecture)
    _require_balanceable(job, architecture)
    _require_traceable(job, architecture)
    grid = make_grid(
        job.parallel,
        layer_costs=layer_costs(architecture),
        nodes=nodes,
        slots_per_group=max(job.run.max_sequences, job.num_micro_batches),
        joined=architecture.joined_layers,
    )
    _require_tokens(grid, architecture)
    if placement is None:
        placements = tuple(_linear_placements(architecture, stage) for stage in grid.stages)
    else:
        _require_same_model(placement, architecture)
        placements = tuple(_placements_of_file(placement, stage) for stage in grid.stages)
    for stage, stage_placements in zip(grid.stages, placements, strict=True):
        _require_slots(job, architecture, stage, stage_placements)
    stage_nodes = [tuple(nodes[rank] for rank in stage.ranks) for stage in grid.stages]
    may_read_peers = on_gpu and job.exchange.transport in ("auto", "cuda_ipc")
    reads_peers = may_read_peers and not ipc_obstacle(job.exchange, stage_nodes)
    memory = []
    for index, stage in enumerate(grid.stages):
        hosted, groups = _most_hosted(placements[index]), grid.most_peers(index, other=0)
        rank = StageRank(stage.layers, hosted, groups, stage_nodes[index], reads_peers)
        of_rank = rank_memory(job, architecture, rank, on_gpu=on_gpu, widened=widened)
        memory.append(replace(of_rank, slots=-(-grid.num_slots // grid.num_groups(index))))
    _require_home_sums(job, architecture)
    return Layout(grid, placements, tuple(memory), immediate_stages(job, architecture, grid))


def _linear_placements(architecture: Architecture, stage: Stage) -> Mapping[int, Placement]:
    even = linear(architecture.experts.num, len(stage.ranks))
    return dict.fromkeys((layer for layer in stage.layers if architecture.is_moe(layer)), even)


def _placements_of_file(file: PlacementFile, stage: Stage) -> Mapping[int, Placement]:
    """The placement of each layer of a stage in the file."""
    placements = {}
    for entry in file.layers:
        if entry.layer in stage.layers:
            if len(entry.hosted) != len(stage.ranks):
                raise ConfigError(
                    f"placement.file: layer {entry.layer} is placed on {len(entry.hosted)} ranks, "
                    f"its stage has {len(stage.ranks)}; place it for this layout"
                )
            placements[entry.layer] = Placement(entry.hosted)
    return placements


def _most_hosted(placements: Mapping[int, Placement]) -> float:
    """Experts per layer, as the mean over layers, on the rank with the most."""
    per_rank = np.mean([placement.counts for placement in placements.values()], axis=0) if placements else np.zeros(1)
    return float(per_rank.max())


@lru_cache(maxsize=16)
def layer_costs(architecture: Architecture) -> tuple[float, ...]:
    """Bytes of weights that one token uses in each layer, a measure of its time."""
    used = architecture.experts.router.top_k / architecture.experts.num
    return tuple(
        sum(
            tensor.num_bytes * (used if tensor.share is Share.EXPERTS else 1)
            for tensor in layer_tensors(architecture, layer)
        )
        for layer in range(architecture.num_layers)
    )


def immediate_stages(job: Job, architecture: Architecture, grid: Grid) -> tuple[int, ...]:
    """The stages that send expert outputs directly to the next stage: all but the last that end with a MoE layer.

    Outputs of latent experts return to their home ranks. Raises ConfigError if the job has immediate routing in two
    hops.
    """
    if job.exchange.immediate and job.exchange.hops > 1:
        raise ConfigError("exchange.immediate = true goes with one hop only; use exchange.hops = 1")
    ends = [stage.layers[-1] for stage in grid.stages[:-1]] if job.exchange.immediate else []
    if architecture.experts.latent_width:
        return ()
    return tuple(index for index, layer in enumerate(ends) if architecture.is_moe(layer))


def _require_divisible(job: Job, architecture: Architecture) -> None:
    """Heads and hidden sizes must be multiples of the tensor group's size, and each of its ranks has tokens.

    A norm over all heads cannot be divided.
    """
    heads, tensor = architecture.attention, job.parallel.tensor
    if tensor > 1 and heads.qk_norm == "vector":
        raise ConfigError(
            f"parallel.tensor = {tensor}: the model normalizes queries over all heads, which cannot be divided; use 1"
        )
    if tensor > architecture.vocab_size:
        most = f"use at most the model's vocab_size of {architecture.vocab_size}"
        raise ConfigError(f"parallel.tensor = {tensor} is more ranks than there are tokens; {most}")
    divided = {"num_heads": heads.num_heads, "num_kv_heads": heads.num_kv_heads}
    if architecture.delta_rule:
        divided["delta_rule.num_key_heads"] = architecture.delta_rule.num_key_heads
    if architecture.state_space:
        divided["state_space.num_groups"] = architecture.state_space.num_groups
    if architecture.dense_layers:
        divided["dense_width"] = architecture.dense_width
    for name, size in divided.items():
        if size % tensor:
            raise ConfigError(f"parallel.tensor = {tensor} does not divide the model's {name} of {size}")


def _require_tokens(grid: Grid, architecture: Architecture) -> None:
    """Each rank that divides the LM head has tokens."""
    if grid.head_ranks > architecture.vocab_size:
        raise ConfigError(
            f'parallel.head = "{grid.head}": the last stage has {grid.head_ranks} ranks, the model\'s vocab_size is '
            f'{architecture.vocab_size}; use "tensor" or fewer ranks'
        )


def _require_home_sums(job: Job, architecture: Architecture) -> None:
    """The home rank of a token maps the sum of its latent experts' outputs back to the model's width."""
    if job.exchange.immediate and architecture.experts.latent_width:
        raise ConfigError("exchange.immediate = true: outputs of the model's latent experts return home; use false")


def _require_same_model(file: PlacementFile, architecture: Architecture) -> None:
    layers = tuple(entry.layer for entry in file.layers)
    if (file.num_experts, layers) != (architecture.experts.num, architecture.moe_layers):
        raise ConfigError(
            f"placement.file: places {file.num_experts} experts of {len(layers)} layers, the model has "
            f"{architecture.experts.num} in {len(architecture.moe_layers)} MoE layers, or others; "
            "place from a run of this model"
        )


def _require_balanceable(job: Job, architecture: Architecture) -> None:
    """SparseMixer defines weights for its own choices only; either a policy or a file moves choices."""
    if job.replay.routing:
        require_replayable(job, architecture, what="replay.routing")
    if job.balance.mode != "off" and architecture.experts.router.scoring == "sparsemixer":
        raise ConfigError(
            f'balance.mode = "{job.balance.mode}": the {architecture.family} router gives no weights to experts '
            'that it did not choose itself; use "off"'
        )


def require_replayable(job: Job, architecture: Architecture, *, what: str) -> None:
    """Raise ConfigError, about `what`, unless the job can use the experts of a file."""
    if job.balance.mode != "off":
        raise ConfigError(f'{what}: goes with balance.mode = "off" only, which moves no choices')
    if architecture.experts.router.scoring == "sparsemixer" and not job.replay.weights:
        raise ConfigError(
            f"{what}: the {architecture.family} router gives no weights to experts that it did not choose "
            "itself; record weights and set replay.weights = true"
        )


def _require_traceable(job: Job, architecture: Architecture) -> None:
    """Hidden states are of layers of the model; only generation has positions that predict an output."""
    trace = job.trace
    if max(trace.hidden, default=0) >= architecture.num_layers:
        found = f"the model has no layer {max(trace.hidden)}, its {architecture.num_layers} layers count from 0"
        raise ConfigError(f"trace.hidden: {found}")
    if trace.hidden and trace.hidden_positions == "output" and job.task == "score":
        raise ConfigError('trace.hidden_positions = "output": a scored prompt has no output; use "all" or "last"')


def _require_slots(job: Job, architecture: Architecture, stage: Stage, placements: Mapping[int, Placement]) -> None:
    allowed = job.parallel.experts_per_rank
    most = max((placement.most for placement in placements.values()), default=0)
    if allowed and most > allowed:
        needed = -(-architecture.experts.num // allowed)
        raise ConfigError(
            f"parallel.experts_per_rank = {allowed}: the stage of layers {stage.layers.start} to "
            f"{stage.layers.stop - 1} has {len(stage.ranks)} ranks for {architecture.experts.num} experts, "
            f"{most} on a rank; it needs {needed} ranks"
        )
