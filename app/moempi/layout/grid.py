"""The grid: pipeline stage, data parallel group and index in the tensor group of each rank. Pure.

Ranks are counted node by node. A stage is a range of ranks and a range of layers. Consecutive ranks of a stage form
tensor groups, and each tensor group is one data parallel group. All ranks of a stage share the experts of a layer.

KV slots are numbered over all data parallel groups of the first stage. `Grid.owner` is the group of any stage that
computes a slot, also if stages have different numbers of groups.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from math import inf
from typing import Literal

import numpy as np
from msgspec import Struct

from moempi.arrays import IntArray
from moempi.config.job import ParallelSection
from moempi.errors import ConfigError


class Stage(Struct, frozen=True):
    """A range of ranks that computes a range of layers."""

    layers: range
    ranks: range


class Coordinates(Struct, frozen=True):
    """Coordinates of a rank: stage, index of its tensor group in the stage, and index in the tensor group."""

    stage: int
    data: int
    tensor: int


@dataclass(frozen=True)
class Grid:
    """Stages of tensor groups; each data parallel group of the first stage has `slots_per_group` KV slots.

    Each tensor group of the last stage divides the LM head, or all ranks of the "stage" divide it.
    """

    stages: tuple[Stage, ...]
    tensor: int
    slots_per_group: int
    head: Literal["tensor", "stage"] = "tensor"

    def coordinates(self, rank: int) -> Coordinates:
        """The coordinates of `rank`."""
        stage = next(index for index, stage in enumerate(self.stages) if rank in stage.ranks)
        data, tensor = divmod(rank - self.stages[stage].ranks.start, self.tensor)
        return Coordinates(stage, data, tensor)

    def rank(self, stage: int, data: int, tensor: int) -> int:
        """The rank at these coordinates."""
        return self.stages[stage].ranks.start + data * self.tensor + tensor

    def num_groups(self, stage: int) -> int:
        """Data parallel groups of a stage."""
        return len(self.stages[stage].ranks) // self.tensor

    @property
    def head_ranks(self) -> int:
        """Ranks that divide the LM head."""
        return len(self.stages[-1].ranks) if self.head == "stage" else self.tensor

    def head_part(self, rank: int) -> int:
        """The part of the LM head of a rank of the last stage."""
        return (rank - self.stages[-1].ranks.start) % self.head_ranks

    @property
    def num_slots(self) -> int:
        """KV slots of all groups."""
        return self.num_groups(0) * self.slots_per_group

    def owner(self, stage: int, slot: int) -> int:
        """The group of `stage` that computes `slot`; groups have equal, contiguous shares of all slots."""
        return slot * self.num_groups(stage) // self.num_slots

    def slots(self, stage: int, data: int) -> range:
        """The slots that a group of `stage` computes."""
        groups = self.num_groups(stage)
        return range(-(-data * self.num_slots // groups), -(-(data + 1) * self.num_slots // groups))

    def peers(self, stage: int, data: int, *, other: int) -> tuple[int, ...]:
        """The groups of stage `other` that compute any slot of this group, ascending."""
        slots = self.slots(stage, data)
        return tuple(range(self.owner(other, slots[0]), self.owner(other, slots[-1]) + 1))

    def most_peers(self, stage: int, *, other: int) -> int:
        """The most `peers` of a group of a stage."""
        groups, slots = self.num_groups(stage), self.num_slots
        bounds = -(-np.arange(groups + 1) * slots // groups)
        first, last = (owned * self.num_groups(other) // slots for owned in (bounds[:-1], bounds[1:] - 1))
        return int((last - first).max()) + 1


def make_grid(
    parallel: ParallelSection,
    *,
    layer_costs: Sequence[float],
    nodes: Sequence[int],
    slots_per_group: int,
    joined: Collection[int] = (),
) -> Grid:
    """The grid of a job on ranks that are counted node by node; nodes[rank] is the node of a rank.

    `layer_costs` (L,) balance the stages if the job gives no layers. A group of the first stage has `slots_per_group`
    KV slots, or more if a later stage has more groups than there would be slots. The `joined` layers are on the stage
    of the layer before. Raises ConfigError, with the required numbers, if ranks or layers cannot be divided as
    requested, or if a tensor group would span nodes.
    """
    stages, tensor = parallel.stages, parallel.tensor
    ranks = parallel.stage_ranks or _even_ranks(len(nodes), stages, tensor)
    layers = parallel.stage_layers or balanced_stages(layer_costs, stages, joined)
    _require(len(ranks) == stages, f"parallel.stage_ranks has {len(ranks)} entries for {stages} stages")
    _require(len(layers) == stages, f"parallel.stage_layers has {len(layers)} entries for {stages} stages")
    _require(sum(ranks) == len(nodes), f"parallel.stage_ranks adds up to {sum(ranks)} ranks, there are {len(nodes)}")
    _require(
        sum(layers) == len(layer_costs),
        f"parallel.stage_layers adds up to {sum(layers)} layers, the model has {len(layer_costs)}",
    )
    for stage in _ranges(layers):
        _require(stage.start not in joined, _begins_wrongly(stage.start, joined))
    for count in ranks:
        _require(count % tensor == 0, f"a stage of {count} ranks cannot form tensor groups of {tensor}")
    for first in range(0, len(nodes), tensor):
        group = nodes[first : first + tensor]
        _require(
            group[0] == group[-1],
            f"ranks {first} to {first + tensor - 1} form a tensor group but are on several nodes; "
            f"use a number of ranks per node that {tensor} divides",
        )
    shares = zip(_ranges(layers), _ranges(ranks), strict=True)
    # Every group of every stage computes at least one slot, so that it takes part in every step.
    slots = max(slots_per_group, *(-(-count // ranks[0]) for count in ranks))
    return Grid(tuple(Stage(own_layers, own_ranks) for own_layers, own_ranks in shares), tensor, slots, parallel.head)


def balanced_stages(costs: Sequence[float], stages: int, joined: Collection[int] = ()) -> tuple[int, ...]:
    """Numbers of layers of `stages` contiguous, non-empty stages that minimize the largest sum of `costs` (L,).

    None begins with a `joined` layer. Raises ConfigError if there are more stages than layers that may begin one.
    """
    _require(stages <= len(costs), f"{stages} stages need at least {stages} layers, the model has {len(costs)}")
    most = len(costs) - len(joined)
    _require(
        stages <= most,
        f"parallel.stages = {stages}: the model forms at most {most} stages, because {len(joined)} of its "
        f"{len(costs)} layers share the positions of an earlier layer's indexer",
    )
    return _balanced_stages(tuple(costs), stages, frozenset(joined))


@lru_cache(maxsize=1 << 10)
def _balanced_stages(costs: tuple[float, ...], stages: int, joined: frozenset[int]) -> tuple[int, ...]:
    num_ends = len(costs) - stages + 1
    sums, is_empty = np.array([0.0, *accumulate(costs)]), np.tri(num_ends, k=-1, dtype=np.bool_)
    may_begin = np.array([layer not in joined for layer in range(len(costs))])
    # The first `count` stages end before layer count + i, i < num_ends: every stage has a layer. greatest[i] is their
    # smallest largest sum, order[i] the place among all i, in ascending order, of the lengths that give it.
    greatest, order = sums[1 : num_ends + 1], np.arange(num_ends)
    begins: list[IntArray] = []
    for count in range(2, stages + 1):
        cuts, ends = slice(count - 1, count - 1 + num_ends), slice(count, count + num_ends)
        largest = np.maximum(greatest[:, None], sums[ends] - sums[cuts, None])
        largest[is_empty | ~may_begin[cuts, None]] = inf
        greatest = largest.min(axis=0)
        chosen = np.where(largest == greatest, order[:, None], num_ends).argmin(axis=0)
        order = (order[chosen] * num_ends + np.arange(num_ends)).argsort().argsort()
        begins.append(chosen + count - 1)
    bounds = [len(costs)]
    for count in range(stages, 1, -1):
        bounds.append(int(begins[count - 2][bounds[-1] - count]))
    return tuple(end - begin for begin, end in pairwise([0, *reversed(bounds)]))


def _begins_wrongly(layer: int, joined: Collection[int]) -> str:
    before = next(one for one in range(layer, -1, -1) if one not in joined)
    return (
        f"parallel.stage_layers: a stage begins with layer {layer}, which shares the positions of the indexer of layer "
        f"{before}; keep both on one stage"
    )


def _even_ranks(ranks: int, stages: int, tensor: int) -> tuple[int, ...]:
    """Ranks of each stage, in whole tensor groups; the first stages have one group more if the division is uneven."""
    _require(ranks % tensor == 0, f"{ranks} ranks cannot form tensor groups of {tensor}")
    groups = ranks // tensor
    _require(
        groups >= stages, f"{stages} stages of tensor groups of {tensor} need {stages * tensor} ranks, not {ranks}"
    )
    return tuple((groups // stages + (stage < groups % stages)) * tensor for stage in range(stages))


def _ranges(counts: Sequence[int]) -> list[range]:
    return [range(first, last) for first, last in pairwise([0, *accumulate(counts)])]


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ConfigError(problem)
