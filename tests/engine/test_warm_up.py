"""After the warm-up, a run launches no kernel for the first time, and its tokens are those without a warm-up."""

from collections import Counter

import pytest
from msgspec import structs

from engine.runs import LATENT_EXPERTS, SMALL, SPACES, STATEFUL, Run, requests_of, tokens_of
from moempi.backend.cuda.backend import CudaBackend
from moempi.config.architecture import AttentionShape, Indexer, Latent
from moempi.engine.warm_up import warm_up
from moempi.layout.placement import Placement
from simt.device import SimtDevice

TILED = structs.replace(SMALL, attention=AttentionShape(num_heads=4, num_kv_heads=2, head_dim=16, qk_norm="head"))
LATENT = structs.replace(
    SMALL,
    attention=AttentionShape(
        num_heads=2,
        num_kv_heads=2,
        head_dim=12,
        latent=Latent(key_value_rank=16, rope_dim=4, value_dim=8, query_rank=8),
    ),
    experts=structs.replace(SMALL.experts, shared_width=8, shared_gate=True),
)
INDEXED = structs.replace(
    LATENT,
    attention=structs.replace(
        LATENT.attention,
        latent=structs.replace(
            LATENT.attention.latent, indexer=Indexer(num_heads=3, head_dim=8, top_k=8, shared_layers=(2,))
        ),
    ),
)
PANELS = structs.replace(SMALL, width=64, experts=structs.replace(SMALL.experts, width=64))


class WatchedDevice(SimtDevice):
    """A SIMT device with the kernels that were launched."""

    def __init__(self):
        super().__init__(finds_races=False)
        self.kernels = set()

    def launch(self, kernel, grid, threads, arguments, **options):
        self.kernels.add(kernel)
        super().launch(kernel, grid, threads, arguments, **options)


@pytest.mark.parametrize(
    "architecture",
    [SMALL, TILED, LATENT, INDEXED, PANELS, STATEFUL, SPACES, LATENT_EXPERTS],
    ids=["small", "tiled", "latent", "indexed", "panels", "stateful", "spaces", "latent_experts"],
)
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_run_launches_no_kernel_for_the_first_time(tmp_path, architecture, precision):
    device = WatchedDevice()

    def make_backend(progress):
        return CudaBackend(device, precision=precision, reproducible=False, progress=progress)

    tokens = []
    for is_warm in (True, False):
        requests = requests_of(20, 3, 17)
        run = Run(tmp_path, requests, architecture=architecture, make_backend=make_backend, run={"micro_batches": 2})
        if is_warm:
            warm_up(run.model, run.world, placements=run.rank_layout.placements, lanes=2)
        warm = set(device.kernels)
        run.lanes.run()
        run.journal.close()
        (tmp_path / "0.part").unlink()
        assert device.kernels == warm
        tokens.append(tokens_of(requests))
    assert tokens[0] == tokens[1]
    assert all(tokens[0])


@pytest.mark.ranks(2)
def test_two_hops_launch_no_kernel_for_the_first_time_before_a_dense_layer(comm, tmp_path):
    device = WatchedDevice()
    run = Run(
        comm.bcast(tmp_path),
        requests_of(20, 3),
        comm=comm,
        architecture=structs.replace(SMALL, num_layers=3, dense_layers=(2,)),
        make_backend=lambda progress: CudaBackend(device, precision="bfloat16", reproducible=False, progress=progress),
        exchange={"hops": 2, "transport": "pairwise"},
        topology={"ranks_per_node": 1},
    )
    warm_up(run.model, run.world, placements=run.rank_layout.placements, lanes=1)
    warm = set(device.kernels)
    run.lanes.run()
    assert device.kernels == warm


@pytest.mark.parametrize("group_size", [1, 2])
def test_the_warm_up_records_the_attention_of_one_row(tmp_path, group_size):
    """In each layer and queue, unless the rank is in a tensor group, whose attention is not fused."""
    device, found = WatchedDevice(), Counter()
    capture, launch_graph = device.capture, device.launch_graph
    device.capture = lambda submit: found.update(["captures"]) or capture(submit)
    device.launch_graph = lambda graph: found.update(["launches"]) or launch_graph(graph)

    def make_backend(progress):
        return CudaBackend(device, precision="bfloat16", reproducible=False, capture=True, progress=progress)

    run = Run(tmp_path, requests_of(3), architecture=SMALL, make_backend=make_backend)
    warm_up(run.model, run.world, placements=run.rank_layout.placements, lanes=2, group_size=group_size)
    graphs = 2 * SMALL.num_layers if group_size == 1 else 0
    assert (found["captures"], found["launches"]) == (graphs, 2 * graphs)


def test_a_capture_that_the_device_refuses_ends_the_warm_up(tmp_path):
    device = WatchedDevice()

    def make_backend(progress):
        return CudaBackend(device, precision="bfloat16", reproducible=False, capture=True, progress=progress)

    def refuse(submit):
        raise RuntimeError("operation not supported")

    device.capture = refuse
    run = Run(tmp_path, requests_of(3), architecture=SMALL, make_backend=make_backend)
    with pytest.raises(RuntimeError, match="operation not supported"):
        warm_up(run.model, run.world, placements=run.rank_layout.placements, lanes=1)


def test_the_cpu_backend_needs_no_warm_up(tmp_path):
    run = Run(tmp_path, requests_of(4))
    run.backend.tensor = None
    warm_up(run.model, run.world, placements=run.rank_layout.placements, lanes=1)


@pytest.mark.parametrize(
    ("num_replicas", "constants"),
    [
        (0, {"group": {"IDS": 64}}),
        (1, {"group": {"IDS": 64}, "pick_replicas": {"IDS": 64}}),
        (30, {"group": {"IDS": 128}, "pick_replicas": {"IDS": 64}}),
    ],
)
def test_the_warm_up_groups_by_as_many_ids_as_a_run(tmp_path, num_replicas, constants):
    device, placement = WatchedDevice(), Placement((tuple(range(40)), tuple(range(num_replicas))))

    def make_backend(progress):
        return CudaBackend(device, precision="bfloat16", reproducible=False, progress=progress)

    architecture = structs.replace(SMALL, experts=structs.replace(SMALL.experts, num=40))
    run = Run(tmp_path, architecture=architecture, make_backend=make_backend)
    warm_up(run.model, run.world, placements=dict.fromkeys(run.rank_layout.placements, placement), lanes=1)
    found = {kernel.name: dict(kernel.constants) for kernel in device.kernels if kernel.file == "grouping.cu"}
    assert found == constants


def test_the_warm_up_computes_experts_of_every_number_of_rows(tmp_path):
    """The kernels of few rows have a constant for the rows of the largest expert; more rows are the library's."""
    device = WatchedDevice()

    def make_backend(progress):
        return CudaBackend(device, precision="bfloat16", reproducible=False, progress=progress)

    run = Run(tmp_path, requests_of(3), architecture=PANELS, make_backend=make_backend)
    warm_up(run.model, run.world, placements=run.rank_layout.placements, lanes=1)
    few = {(kernel.name, kernel.constants) for kernel in device.kernels if kernel.file == "few_rows.cu"}
    names = ("gate_up_few", "multiply_few")
    assert few == {(name, (("ROWS", rows),)) for name in names for rows in (16, 32, 64)}
    assert "swiglu" in {kernel.name for kernel in device.kernels}
