"""The grid's arithmetic, exhaustively for small worlds."""

from itertools import accumulate, combinations, product
from math import inf
from random import Random

import pytest

from moempi.config.job import ParallelSection
from moempi.errors import ConfigError
from moempi.layout.grid import balanced_stages, make_grid

STAGE_RANKS = [(1, 1), (3, 5), (5, 3), (1, 4), (4, 1), (2, 6)]


def grid_of(num_ranks, *, layers=4, slots=3, nodes=None, **parallel):
    section = ParallelSection(**parallel)
    return make_grid(section, layer_costs=[1.0] * layers, nodes=nodes or [0] * num_ranks, slots_per_group=slots)


@pytest.mark.parametrize(("num_ranks", "stages", "tensor"), list(product(range(1, 13), (1, 2, 3, 4), (1, 2, 3))))
def test_every_rank_has_distinct_coordinates_and_every_layer_a_stage(num_ranks, stages, tensor):
    if num_ranks % tensor or num_ranks // tensor < stages:
        with pytest.raises(ConfigError):
            grid_of(num_ranks, stages=stages, tensor=tensor)
        return
    grid = grid_of(num_ranks, stages=stages, tensor=tensor)
    assert [layer for stage in grid.stages for layer in stage.layers] == list(range(4))
    coordinates = [grid.coordinates(rank) for rank in range(num_ranks)]
    assert len(set(coordinates)) == num_ranks
    assert [grid.rank(at.stage, at.data, at.tensor) for at in coordinates] == list(range(num_ranks))


@pytest.mark.parametrize(("ranks", "slots"), list(product(STAGE_RANKS, (1, 2, 7))))
def test_every_slot_has_one_owner_in_every_stage(ranks, slots):
    grid = grid_of(sum(ranks), stages=2, stage_ranks=ranks, slots=slots)
    for stage in range(2):
        owners = [grid.owner(stage, slot) for slot in range(grid.num_slots)]
        assert owners == sorted(owners)
        for data in range(grid.num_groups(stage)):
            assert len(grid.slots(stage, data)) > 0
            assert list(grid.slots(stage, data)) == [slot for slot, owner in enumerate(owners) if owner == data]
            for other in range(2):
                expected = sorted({grid.owner(other, slot) for slot in grid.slots(stage, data)})
                assert list(grid.peers(stage, data, other=other)) == expected


def test_the_mission_is_61_stages_of_8_whole_nodes():
    nodes = [rank // 8 for rank in range(3904)]
    grid = make_grid(
        ParallelSection(stages=61, tensor=8), layer_costs=[1.2] * 3 + [1.0] * 58, nodes=nodes, slots_per_group=64
    )
    for index, stage in enumerate(grid.stages):
        assert stage.layers == range(index, index + 1)
        assert len({nodes[rank] for rank in stage.ranks}) == 8
        assert len(stage.ranks) == 64


def test_a_tensor_group_never_spans_nodes():
    with pytest.raises(ConfigError, match="ranks 2 to 3 form a tensor group"):
        grid_of(6, nodes=[0, 0, 0, 1, 1, 1], tensor=2)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"stages": 2, "stage_ranks": (1, 2)}, "adds up to 3 ranks, there are 4"),
        ({"stages": 2, "stage_layers": (1, 2)}, "adds up to 3 layers, the model has 4"),
        ({"stages": 2, "stage_layers": (1, 2, 1)}, "has 3 entries for 2 stages"),
        ({"stages": 5}, "need 5 ranks"),
    ],
)
def test_refusals_name_the_numbers(wrong, words):
    with pytest.raises(ConfigError, match=words):
        grid_of(4, **wrong)


def test_stages_are_balanced_optimally_by_cost():
    costs = [3.0, 1.0, 1.0, 5.0, 1.0, 2.0, 2.0]
    for stages in range(1, 8):
        lengths = balanced_stages(costs, stages)
        assert len(lengths) == stages
        assert min(lengths) >= 1
        assert greatest(costs, lengths) == min(
            greatest(costs, [end - begin for begin, end in zip((0, *cuts), (*cuts, 7), strict=True)])
            for cuts in combinations(range(1, 7), stages - 1)
        )


def test_no_stage_begins_with_a_joined_layer():
    costs, joined = [3.0, 1.0, 1.0, 5.0, 1.0, 2.0, 2.0], (1, 2, 5)
    for stages in range(1, 5):
        lengths = balanced_stages(costs, stages, joined)
        assert len(lengths) == stages
        assert greatest(costs, lengths) == min(
            greatest(costs, [end - begin for begin, end in zip((0, *cuts), (*cuts, 7), strict=True)])
            for cuts in combinations([3, 4, 6], stages - 1)
        )
    with pytest.raises(ConfigError, match=r"parallel.stages = 5: the model forms at most 4 stages, because 3 of its 7"):
        balanced_stages(costs, 5, joined)


def test_of_equally_good_divisions_the_one_of_the_slow_twin_is_chosen():
    random = Random(1)
    for _ in range(300):
        costs = [random.choice((0.0, 0.1, 0.3, 1.0, 1.5)) for _ in range(random.randint(1, 14))]
        joined = frozenset(layer for layer in range(1, len(costs)) if random.random() < 0.2)
        for stages in range(1, len(costs) - len(joined) + 1):
            assert balanced_stages(costs, stages, joined) == slowly_balanced_stages(costs, stages, joined)


def slowly_balanced_stages(costs, stages, joined):
    """best[end] are, for the first `end` layers, the smallest largest sum and the lengths that give it."""
    sums = [0.0, *accumulate(costs)]
    best = [(total, (end,)) for end, total in enumerate(sums)]
    for count in range(2, stages + 1):
        cuts = [cut for cut in range(count - 1, len(costs)) if cut not in joined]
        best = [
            min(
                ((max(best[cut][0], sums[end] - sums[cut]), (*best[cut][1], end - cut)) for cut in cuts if cut < end),
                default=(inf, ()),
            )
            for end in range(len(sums))
        ]
    return best[-1][1]


def test_given_stages_that_begin_with_a_joined_layer_are_refused():
    parallel = ParallelSection(stages=2, stage_layers=(2, 2))
    options = {"layer_costs": [1.0] * 4, "nodes": [0, 0], "slots_per_group": 1}
    with pytest.raises(ConfigError, match=r"begins with layer 2, which shares the positions of the indexer of layer 0"):
        make_grid(parallel, **options, joined=(1, 2))
    assert len(make_grid(parallel, **options, joined=(1, 3)).stages) == 2


def greatest(costs, lengths):
    """The largest sum of costs of contiguous stages with these lengths."""
    ends = [sum(lengths[: stage + 1]) for stage in range(len(lengths))]
    return max(sum(costs[end - length : end]) for end, length in zip(ends, lengths, strict=True))


def test_peers_are_the_owners_of_every_slot():
    for ranks in ([1, 3], [4, 6, 1], [5, 2, 7]):
        parallel = ParallelSection(stages=len(ranks), stage_ranks=tuple(ranks), stage_layers=(1,) * len(ranks))
        grid = make_grid(parallel, layer_costs=[1.0] * len(ranks), nodes=[0] * sum(ranks), slots_per_group=3)
        for stage, other in product(range(len(ranks)), repeat=2):
            for data in range(grid.num_groups(stage)):
                owners = {grid.owner(other, slot) for slot in grid.slots(stage, data)}
                assert grid.peers(stage, data, other=other) == tuple(sorted(owners))
            numbers = [len(grid.peers(stage, data, other=other)) for data in range(grid.num_groups(stage))]
            assert grid.most_peers(stage, other=other) == max(numbers)
