"""Runs on every simulated device have NumPy's tokens: host or device buffers, any number of lanes, graphs or none.

Each value of one is in a run with each value of another.
"""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from msgspec import structs

from engine.runs import SMALL, Run, requests_of, tokens_of
from moempi.backend.cuda.backend import CudaBackend
from simt.simulated import NAMES, simulated

LENGTHS = (5, 3, 7, 4, 6, 2, 1, 4)  # a request of each of 4 lanes on 2 ranks
LIMIT = 4
TWO_LAYERS = structs.replace(SMALL, num_layers=2, dense_layers=())
LANES = (1, 2, 4)
RUNS = [
    (name, pinned, capture, LANES[(number + pinned + capture) % len(LANES)])
    for number, name in enumerate(NAMES)
    for pinned in (True, False)
    for capture in (True, False)
]


@cache
def tokens_on_numpy():
    """The tokens of each request, by one rank and one lane."""
    requests = requests_of(*LENGTHS, limit=LIMIT)
    with TemporaryDirectory() as folder:
        run = Run(Path(folder), requests, architecture=TWO_LAYERS, run={"micro_batches": 1})
        run.lanes.run()
        run.journal.close()
    return tokens_of(requests)


@pytest.mark.ranks(2)
@pytest.mark.parametrize(("name", "pinned", "capture", "lanes"), RUNS)
def test_tokens_are_numpys(comm, tmp_path, monkeypatch, name, pinned, capture, lanes):
    device = simulated(name, monkeypatch, pinned=pinned, finds_races=False)
    queues, launch = set(), device.launch_graph
    monkeypatch.setattr(device, "launch_graph", lambda graph: (queues.add(device.queue), launch(graph)))

    def make_backend(progress):
        return CudaBackend(device, precision="float32", reproducible=False, capture=capture, progress=progress)

    run = Run(
        comm.bcast(tmp_path),
        requests_of(*LENGTHS, limit=LIMIT),
        comm=comm,
        architecture=TWO_LAYERS,
        make_backend=make_backend,
        run={"micro_batches": lanes, "lanes": lanes},
    )
    run.lanes.run()
    run.journal.close()
    assert len(run.lanes.each) == lanes
    assert len(queues) == (lanes if capture else 0)
    assert tokens_of(run.requests) == [tokens_on_numpy()[request.prompt.index] for request in run.requests]
