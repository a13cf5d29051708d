"""Row splits, batches, placements and the expert order, compared with slow references; no MPI."""

import numpy as np
import pytest

from moempi.comm.batch import Batch
from moempi.comm.route_plan import expert_order
from moempi.layout.placement import linear
from moempi.layout.row_split import RowSplit
from moempi.layout.topology import Topology


@pytest.mark.parametrize("contributions", [(), (0,), (7,), (3, 0, 5), (1, 1, 1, 1)])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_split_has_every_row_once_and_restores_the_order(contributions, parts):
    split = RowSplit(contributions, parts)
    rows = np.arange(sum(contributions)) * 10
    gathered = np.concatenate([rows[index] for index in split.indices])
    assert sorted(gathered) == list(rows)
    np.testing.assert_array_equal(gathered if split.by_row is None else gathered[split.by_row], rows)
    np.testing.assert_array_equal(rows if split.by_part is None else rows[split.by_part], gathered)
    assert split.counts == tuple(map(len, split.indices))


def batch_of(slots, lengths, starts, *, logit_rows, freed=()):
    return Batch(
        tokens=np.arange(sum(lengths)),
        requests=100 + np.array(slots),
        slots=np.array(slots),
        starts=np.array(starts),
        lengths=np.array(lengths),
        capacities=np.array(starts) + np.array(lengths),
        logit_rows=np.array(logit_rows),
        freed=np.array(freed, np.int64),
        prompts=7 + np.array(slots),
        logit_requests=np.array([f"row {row}" for row in logit_rows]),
    )


def test_positions_count_from_the_start_of_each_sequence():
    batch = batch_of([0, 2], [3, 2], [5, 0], logit_rows=[2])
    assert batch.positions.tolist() == [5, 6, 7, 0, 1]


def test_joined_parts_of_a_batch_equal_the_batch():
    whole = batch_of([1, 3, 4, 9], [2, 1, 3, 2], [0, 7, 2, 1], logit_rows=[1, 2, 4, 5, 7], freed=[0, 8])
    parts = [whole.of_slots(slots) for slots in (range(4), range(4, 5), range(5, 10))]
    joined = Batch.join([part for part, _ in parts])
    for field in ("requests", "slots", "starts", "lengths", "capacities", "logit_rows", "freed", "positions"):
        np.testing.assert_array_equal(getattr(joined, field), getattr(whole, field))
    assert list(joined.logit_requests) == list(whole.logit_requests)
    assert np.concatenate([rows for _, rows in parts]).tolist() == list(range(8))
    assert parts[1][0].logit_rows.tolist() == [1, 2]
    assert whole.logit_rows_of_slots(range(3, 5)).tolist() == [1, 2, 3]


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(16, 5), (16, 16), (3, 8), (64, 1), (7, 7)])
def test_linear_placement_hosts_every_expert_once(num_experts, num_ranks):
    placement = linear(num_experts, num_ranks)
    assert [expert for hosted in placement.hosted for expert in hosted] == list(range(num_experts))
    sizes = [len(hosted) for hosted in placement.hosted]
    assert max(sizes) - min(sizes) <= 1
    physical_ids = placement.physical_ids(0, Topology((0,) * num_ranks))
    assert placement.replica_period == 1
    for rank, hosted in enumerate(placement.hosted):
        assert physical_ids[list(hosted)].tolist() == list(range(placement.bounds[rank], placement.bounds[rank + 1]))


def test_expert_order_groups_rows_by_expert_then_source():
    counts = np.array([[2, 0, 1], [1, 3, 0], [0, 0, 2]])
    rows = [(source, expert, i) for source in range(3) for expert in range(3) for i in range(counts[source, expert])]
    by_expert, by_source = expert_order(counts)
    arranged = [rows[index] for index in by_expert]
    assert arranged == sorted(rows, key=lambda row: (row[1], row[0], row[2]))
    assert [arranged[index] for index in by_source] == rows
    assert expert_order(counts[:, :1]) == (None, None)
