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
    from moempi.bench.random_layer import run_to_end
    from moempi.comm.tensor_group import TensorGroup
    from moempi.comm.transfers import PendingTransfers, Transfers
    from moempi.layout.row_split import part_range
    from moempi.layout.schedule import HEAD_COUNTS, HEAD_ROWS, LOGITS

    backend = NumpyBackend(precision="float32")
    transfers = Transfers(backend, PendingTransfers())
    group = TensorGroup(comm, backend, transfers=transfers, width=WIDTH)
    counts = [rows_of_rank(rank) for rank in range(num_ranks)]
    # Row i of rank r holds 100 r + i; its logit v is 100 r + i + v / 16.
    own = np.repeat((100 * comm.rank + np.arange(counts[comm.rank], dtype=np.float32))[:, None], WIDTH, axis=1)
    assert run_to_end(group.all_gather_counts(counts[comm.rank], HEAD_COUNTS)) == counts
    rows = run_to_end(group.all_gather_rows(own, counts, HEAD_ROWS))
    all_rows = [100 * rank + row for rank in range(num_ranks) for row in range(counts[rank])]
    np.testing.assert_array_equal(rows[:, 0], all_rows)
    part = part_range(LENGTH, num_ranks, comm.rank).astype(np.float32)
    own_logits = rows[:, :1] + part / 16
    whole = run_to_end(group.exchange_logits(own_logits, counts, vocab_size=LENGTH, point=LOGITS))
    assert whole.shape == (counts[comm.rank], LENGTH)
    np.testing.assert_array_equal(whole, own[:, :1] + np.arange(LENGTH, dtype=np.float32) / 16)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("pinned", [True, False])
def test_steps_of_equal_size_allocate_no_comm_buffer(comm, num_ranks, pinned):
    """The buffers are reused, and the rows of a step are not those of an earlier one."""
    from moempi.backend.cuda.backend import CudaBackend
    from moempi.bench.random_layer import run_to_end
    from moempi.comm.tensor_group import TensorGroup
    from moempi.comm.transfers import PendingTransfers, Transfers
    from moempi.layout.row_split import RowSplit
    from moempi.layout.schedule import Point
    from simt.device import SimtDevice

    class CountingBackend(CudaBackend):
        allocated = 0

        def comm_buffer(self, rows, width):
            CountingBackend.allocated += 1
            return super().comm_buffer(rows, width)

    pending = PendingTransfers()
    backend = CountingBackend(
        SimtDevice(pinned=pinned), precision="float32", reproducible=True, progress=pending.progress
    )
    group = TensorGroup(comm, backend, transfers=Transfers(backend, pending), width=WIDTH)
    allocated = []
    for step in range(5):
        rows = 7 if step < 4 else 5
        split = RowSplit((rows, 2), num_ranks)
        whole = np.arange(rows + 2, dtype=np.float32)[:, None] + np.full(WIDTH, 100.0 * step, np.float32)
        own = split.indices[comm.rank]
        gathered = run_to_end(group.all_gather(backend.tensor(whole[own]), split, Point(0, "gather")))
        np.testing.assert_array_equal(backend.download(gathered), whole)
        summed = run_to_end(group.reduce_scatter(backend.tensor(whole * (1 + comm.rank)), split, Point(0, "scatter")))
        np.testing.assert_array_equal(backend.download(summed), 3 * whole[own])
        allocated.append(CountingBackend.allocated)
    assert allocated[1:] == allocated[1:2] * 4
