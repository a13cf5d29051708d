"""Logits in a tensor group: all ranks get all rows, and each rank gets the complete logits of its own rows."""

import numpy as np
import pytest

LENGTH, WIDTH = 11, 4


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize(
    "rows_of_rank", [lambda rank: 2, lambda rank: rank, lambda rank: 0, lambda rank: 5 * (rank == 0)]
)
def test_each_rank_gets_complete_logits_of_its_rows(comm, num_ranks, rows_of_rank):
    from moempi.backend.cpu.backend import NumpyBackend
    from moempi.comm.tensor_group import TensorGroup
    from moempi.comm.transfers import PendingTransfers, Transfers
    from moempi.layout.row_split import part_range

    backend = NumpyBackend(precision="float32", reproducible=False)
    transfers = Transfers(backend, PendingTransfers(), overlap=True)
    group = TensorGroup(comm, backend, transfers=transfers, width=WIDTH)
    counts = [rows_of_rank(rank) for rank in range(num_ranks)]
    # Row i of rank r holds 100 r + i; its logit v is 100 r + i + v / 16.
    own = np.repeat((100 * comm.rank + np.arange(counts[comm.rank], dtype=np.float32))[:, None], WIDTH, axis=1)
    rows = group.all_gather_rows(own, counts)
    all_rows = [100 * rank + row for rank in range(num_ranks) for row in range(counts[rank])]
    np.testing.assert_array_equal(rows[:, 0], all_rows)
    part = part_range(LENGTH, num_ranks, comm.rank).astype(np.float32)
    whole = group.exchange_logits(rows[:, :1] + part / 16, counts, vocab_size=LENGTH)
    if any(counts):
        assert whole.shape == (counts[comm.rank], LENGTH)
        np.testing.assert_array_equal(whole, own[:, :1] + np.arange(LENGTH, dtype=np.float32) / 16)
    assert len(whole) == counts[comm.rank]
