"""Work of two queues whose order is missing is found, and runs of two lanes have none."""

from itertools import product

import numpy as np
import pytest

from engine.runs import SMALL, STATEFUL, Run, requests_of, tokens_of
from engine.test_warm_up import INDEXED, LATENT, PANELS, TILED
from moempi.backend.cuda.backend import CudaBackend
from moempi.backend.cuda.captured_attention import CapturedAttention
from moempi.backend.cuda.device import ExpertTable, find_kernel
from moempi.backend.cuda.launches import Launches
from moempi.backend.values import Cache
from simt.device import SimtDevice
from simt.queue_order import QueueOrder, uses_of


@pytest.fixture
def backend():
    return CudaBackend(SimtDevice(order=QueueOrder(), finds_races=False), precision="bfloat16", reproducible=False)


def test_work_of_another_queue_must_wait_for_what_it_reads(backend):
    rows = backend.tensor(np.zeros((4, 8), np.uint16))
    with (
        backend.on_queue(1),
        pytest.raises(AssertionError, match="add of queue 1 reads memory that upload of queue 0 writes"),
    ):
        backend.add(rows, rows)
    backend.record_event().synchronize()
    with backend.on_queue(1):
        backend.add(rows, rows)


def test_work_of_another_queue_must_wait_for_what_it_writes(backend):
    rows, buffer = backend.tensor(np.zeros((4, 8), np.uint16)), backend.comm_buffer(4, 8)
    backend.pack(rows, None, buffer)
    read = backend.unpack(buffer, backend.upload(np.arange(4)))
    with backend.on_queue(1):
        others = backend.tensor(np.ones((4, 8), np.uint16))
        with pytest.raises(AssertionError, match="of queue 1 writes memory that"):
            backend.pack(others, None, buffer)
        backend.add(others, others)
    assert not backend.download(read).any()
    with backend.on_queue(1):
        backend.pack(others, None, buffer)


def test_the_uses_of_a_launch_are_those_of_its_source():
    arrays = [np.zeros(3, np.uint16) for _ in range(4)]
    table = ExpertTable(arrays[:2], [None, arrays[2]], [0], [0], [0])
    kernel = find_kernel("few_rows.cu", "multiply_few", (("ROWS", 16),))
    found = list(uses_of(kernel, (arrays[3], arrays[0], arrays[1], arrays[2], table, 1, 2, 3, 4)))
    assert [is_write for _, is_write in found] == [False, True, True, True, False, False, False]
    assert found[0][0] is arrays[3]
    assert found[-1][0] is arrays[2]


def run_lanes(folder, architecture, lanes=2, *, capture=False, limit=3, **settings):
    """A run of several lanes, whose sequences use different pages and slots."""
    order = QueueOrder()
    device = SimtDevice(order=order, pinned=False, finds_races=False)

    def make_backend(progress):
        return CudaBackend(device, precision="bfloat16", reproducible=False, capture=capture, progress=progress)

    settings = {"micro_batches": lanes, "precision": "bfloat16"} | settings
    run = Run(
        folder,
        requests_of(20, 3, 17, 9, limit=limit),
        architecture=architecture,
        make_backend=make_backend,
        run=settings,
    )
    for kept in run.model.layer_caches:
        for values in (kept.keys, kept.values) if isinstance(kept, Cache) else (kept.tail, kept.memory):
            order.divide(values)
        if getattr(kept, "index", None) is not None:
            order.divide(kept.index.keys)
    run.lanes.run()
    run.journal.close()
    return run


ARCHITECTURES = {
    "small": SMALL, "tiled": TILED, "latent": LATENT, "indexed": INDEXED, "panels": PANELS, "stateful": STATEFUL
}  # fmt: skip


@pytest.mark.parametrize(("name", "lanes"), [*product(ARCHITECTURES, (2,)), ("small", 4)])
def test_lanes_order_all_their_work(tmp_path, name, lanes):
    run = run_lanes(tmp_path, ARCHITECTURES[name], lanes)
    assert all(request.tokens for request in run.requests)


@pytest.mark.parametrize(("name", "lanes"), [("small", 2), ("small", 4), ("tiled", 2), ("latent", 2)])
def test_graphs_of_lanes_order_all_their_work(tmp_path, name, lanes):
    """A graph uses the memory of all its work."""
    run = run_lanes(tmp_path, ARCHITECTURES[name], lanes, capture=True, limit=8)
    assert len(run.backend._graph_memories) == lanes
    (tmp_path / "verbs").mkdir()
    verbs = run_lanes(tmp_path / "verbs", ARCHITECTURES[name], lanes, limit=8)
    assert tokens_of(run.requests) == tokens_of(verbs.requests)


def test_inputs_of_graphs_that_two_queues_share_are_found(tmp_path, monkeypatch):
    """The planted fault: the graphs of all lanes read their inputs from the memory of one."""
    memory, memories = CapturedAttention._memory, []

    def shared(self, inputs, cache):
        memories.append(memory(self, inputs, cache))
        return memories[0]

    monkeypatch.setattr(CapturedAttention, "_memory", shared)
    with pytest.raises(AssertionError, match="which is not done"):
        run_lanes(tmp_path, SMALL, capture=True, limit=8)


def test_counters_of_one_queue_that_another_uses_are_found(tmp_path, monkeypatch):
    """The planted fault: all queues count in the counters of one."""
    counters = Launches.counters

    def shared(self, needed):
        self._counters = dict.fromkeys(range(4), next(iter(self._counters.values()))) if self._counters else {}
        return counters(self, needed)

    monkeypatch.setattr(Launches, "counters", shared)
    with pytest.raises(AssertionError, match="which is not done"):
        run_lanes(tmp_path, PANELS)
