"""A run allocates as many comm buffers for many steps as for few."""

import pytest

from engine.runs import Run, requests_of
from moempi.backend.cuda.backend import CudaBackend
from moempi.runtime.waiting import barrier
from simt.device import SimtDevice


class CountingBackend(CudaBackend):
    allocated = 0

    def comm_buffer(self, rows, width):
        self.allocated += 1
        return super().comm_buffer(rows, width)


def make_backend(progress):
    return CountingBackend(
        SimtDevice(pinned=False, finds_races=False), precision="float32", reproducible=True, progress=progress
    )


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("parallel", "immediate"),
    [({"stages": 2}, False), ({"stages": 2}, True), ({"stages": 2, "tensor": 2}, False), ({"tensor": 2}, False)],
)
def test_buffers_do_not_grow_with_steps(comm, tmp_path, parallel, immediate):
    folder, allocated = comm.bcast(tmp_path), []
    for limit in (3, 9):
        run = Run(
            folder,
            requests_of(5, 4, 6, 5, limit=limit),
            comm=comm,
            make_backend=make_backend,
            parallel=parallel,
            exchange={"immediate": immediate},
        )
        run.lanes.run()
        run.journal.close()
        (folder / f"{comm.rank}.part").unlink()
        barrier(comm)
        allocated.append(run.backend.allocated)
    assert allocated[0] == allocated[1]
