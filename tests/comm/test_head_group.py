"""Logits of a divided LM head: all ranks get all rows, and each rank gets the complete logits of its own rows."""

from math import gcd

import numpy as np
import pytest

LENGTH, WIDTH = 11, 4


@pytest.mark.ranks(1, 3, 4)
@pytest.mark.parametrize("most_groups", [1, 2, 12])
@pytest.mark.parametrize(
    "rows_of_rank", [lambda rank: 2, lambda rank: rank, lambda rank: 0, lambda rank: 5 * (rank == 0)]
)
def test_each_rank_gets_complete_logits_of_its_rows(comm, num_ranks, rows_of_rank, most_groups):
    from comm.head_groups import head_group
    from moempi.backend.cpu.backend import NumpyBackend
    from moempi.bench.random_layer import run_to_end
    from moempi.layout.row_split import part_range
    from moempi.layout.schedule import HEAD_COUNTS, HEAD_ROWS, LOGITS

    groups = gcd(num_ranks, most_groups)
    group = head_group(comm, NumpyBackend(precision="float32"), width=WIDTH, groups=groups)
    assert group.size == num_ranks
    expected = np.array([rows_of_rank(rank) for rank in range(num_ranks)]).reshape(groups, -1)
    of_own_group = expected[comm.rank // expected.shape[1]].tolist()
    counts = run_to_end(group.all_gather_counts(of_own_group, HEAD_COUNTS))
    np.testing.assert_array_equal(counts, expected)
    # Row i of rank r holds 100 r + i; its logit v is 100 r + i + v / 16.
    num_own = rows_of_rank(comm.rank)
    own = np.repeat((100 * comm.rank + np.arange(num_own, dtype=np.float32))[:, None], WIDTH, axis=1)
    rows = run_to_end(group.all_gather_rows(own, counts, HEAD_ROWS))
    ranks = np.arange(num_ranks).reshape(groups, -1).T.ravel().tolist()
    np.testing.assert_array_equal(rows[:, 0], [100 * rank + row for rank in ranks for row in range(rows_of_rank(rank))])
    part = part_range(LENGTH, num_ranks, comm.rank).astype(np.float32)
    own_logits = rows[:, :1] + part / 16
    whole = run_to_end(group.exchange_logits(own_logits, counts, vocab_size=LENGTH, point=LOGITS))
    assert whole.shape == (num_own, LENGTH)
    np.testing.assert_array_equal(whole, own[:, :1] + np.arange(LENGTH, dtype=np.float32) / 16)
