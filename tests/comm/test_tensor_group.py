"""The buffers of a tensor group."""

import numpy as np
import pytest

WIDTH = 4


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
