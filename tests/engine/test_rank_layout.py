"""The coordinates of each rank and what it holds, for every rank of whole layouts."""

from math import prod
from types import SimpleNamespace

import msgspec
import pytest

from engine.jobs import make_job
from moempi.config.architecture import Architecture
from moempi.config.reading import read_toml
from moempi.config.tensors import catalogue
from moempi.engine import rank_layout
from moempi.engine.rank_layout import RankLayout, available_bytes, lay_out_rank, rank_threads
from moempi.errors import ConfigError
from moempi.layout.layout import make_layout
from moempi.layout.topology import virtual
from moempi.runtime.world import AgreedExit, World
from mpirun import ROOT
from storage.models import SMALL

MODEL = msgspec.structs.replace(SMALL, num_layers=4)  # layers 1 to 3 have three experts each


def lay_out(num_ranks, **parallel):
    """The layouts of all ranks, made as `lay_out_rank` makes the layout of one."""
    layout = make_layout(make_job(parallel=parallel), MODEL, [0] * num_ranks)
    topology = virtual(num_ranks, num_ranks)
    return [
        RankLayout(SimpleNamespace(rank=rank), topology, layout, layout.grid.coordinates(rank))
        for rank in range(num_ranks)
    ]


@pytest.mark.parametrize(
    ("num_ranks", "parallel"),
    [
        (1, {}),
        (5, {}),
        (4, {"tensor": 2}),
        (6, {"stages": 2, "stage_ranks": [2, 4], "stage_layers": [3, 1]}),
        (8, {"stages": 2, "tensor": 2}),
    ],
)
def test_each_expert_of_each_layer_is_hosted_by_one_rank_of_its_stage(num_ranks, parallel):
    hosts = {(layer, expert): [] for layer in MODEL.moe_layers for expert in range(MODEL.experts.num)}
    for number, rank in enumerate(lay_out(num_ranks, **parallel)):
        assert number in rank.stage.ranks
        assert set(rank.hosted) == {layer for layer in rank.stage.layers if MODEL.is_moe(layer)}
        for layer, experts in rank.hosted.items():
            for expert in experts:
                hosts[layer, expert].append(number)
    assert all(len(ranks) == 1 for ranks in hosts.values())


def test_experts_are_counted_from_the_first_rank_of_the_stage():
    ranks = lay_out(5, stages=2, stage_ranks=[2, 3], stage_layers=[2, 2])
    assert [dict(rank.hosted) for rank in ranks] == [
        {1: (0,)},
        {1: (1, 2)},
        {2: (0,), 3: (0,)},
        {2: (1,), 3: (1,)},
        {2: (2,), 3: (2,)},
    ]


def test_the_first_stage_decides_steps_and_the_first_of_its_tensor_groups_write_records():
    ranks = lay_out(8, stages=2, tensor=2)
    assert [rank.is_first_stage for rank in ranks] == [True] * 4 + [False] * 4
    assert [rank.writes_records for rank in ranks] == [True, False, True, False, *[False] * 4]


def test_the_mission_makes_a_journal_for_each_group_of_its_first_stage():
    job = make_job(parallel={"stages": 61, "tensor": 8}, run={"max_sequences": 3456})
    layout = make_layout(job, read_toml(ROOT / "jobs/arch/mission.toml", Architecture), [0] * 3904)
    topology = virtual(3904, 8)
    ranks = (
        RankLayout(SimpleNamespace(rank=rank), topology, layout, layout.grid.coordinates(rank)) for rank in range(3904)
    )
    assert sum(rank.writes_records for rank in ranks) == 8


@pytest.mark.parametrize(
    ("stage_ranks", "num_groups"),
    [([2, 2], [1, 1, 1, 1]), ([3, 1], [1, 1, 1, 3]), ([1, 3], [1, 1, 1, 1]), ([2, 1], [1, 1, 2])],
)
def test_a_smaller_later_stage_computes_for_several_groups_of_the_first(stage_ranks, num_groups):
    ranks = lay_out(sum(stage_ranks), stages=2, stage_ranks=stage_ranks)
    assert [rank.num_groups for rank in ranks] == num_groups


def memory(memory_id, num_bytes=900):
    return SimpleNamespace(memory_id=memory_id, available_bytes=lambda: num_bytes)


def world_on(node, nodes, values):
    """A world on one of the `nodes`, whose ranks gather their values."""
    of_node = [value for other, value in zip(nodes, values, strict=True) if other == node]
    return SimpleNamespace(node=SimpleNamespace(allgather=lambda _: of_node))


@pytest.mark.parametrize(
    ("nodes", "memory_ids", "shares"),
    [
        ((0,), ["host"], [900]),
        ((0, 0, 0, 1), ["host"] * 4, [300, 300, 300, 900]),
        ((0, 1), ["host"] * 2, [900] * 2),
        ((0, 0, 1, 1), ["01:00", "02:00"] * 2, [900] * 4),
        ((0, 0, 0), ["01:00", "02:00", "01:00"], [450, 900, 450]),
        ((0, 0), ["01:00", "host"], [900, 900]),
    ],
)
def test_the_ranks_of_a_node_share_each_of_its_memories(nodes, memory_ids, shares):
    worlds = [world_on(node, nodes, memory_ids) for node in nodes]
    backends = map(memory, memory_ids)
    found = [available_bytes(make_job().topology, *pair) for pair in zip(worlds, backends, strict=True)]
    assert found == shares


def test_the_memory_that_the_job_states_counts_alone():
    job = make_job(topology={"rank_memory": "2KiB"})
    assert available_bytes(job.topology, world_on(0, (0, 0), "ab"), memory("host")) == 2048


def test_the_forecast_of_memory_counts_numbers_as_the_backend_holds_them():
    def memory_of(precision, **backend):
        job = make_job(run={"precision": precision})
        return make_layout(job, MODEL, [0], **backend).memory[0]

    compiled, in_float32 = memory_of("bfloat16"), memory_of("float32")
    widened, on_gpu = memory_of("bfloat16", widened=True), memory_of("bfloat16", on_gpu=True)
    stored = sum(tensor.num_bytes for tensor in catalogue(MODEL))
    assert compiled.weights == in_float32.weights == stored
    assert widened.weights == 4 * sum(prod(tensor.shape) for tensor in catalogue(MODEL))
    assert (compiled.page, in_float32.page, widened.page) == (on_gpu.page, 2 * on_gpu.page, 2 * on_gpu.page)
    assert in_float32.rows == 2 * on_gpu.rows
    assert on_gpu.rows < compiled.rows == widened.rows < in_float32.rows  # float32 values, buffers of bfloat16


@pytest.mark.parametrize(
    ("stated", "cores", "threads"),
    [
        ("auto", ["0,1,2,3"] * 4, [1] * 4),
        ("auto", ["0,1,2,3,4,5,6,7"] * 3, [2, 2, 2]),
        ("auto", ["0", "1", "2,3"], [1, 1, 2]),
        ("auto", ["0"] * 3, [1] * 3),
        (5, ["0"] * 2, [5, 5]),
    ],
)
def test_the_ranks_of_a_node_share_its_cores(monkeypatch, stated, cores, threads):
    for rank, expected in enumerate(threads):
        monkeypatch.setattr(rank_layout, "usable_cores", lambda own=cores[rank]: own)
        world = world_on(0, [0] * len(cores), cores)
        assert rank_threads(make_job(run={"threads": stated}).run, world) == expected


@pytest.mark.ranks(4)
def test_all_ranks_of_a_world_lay_themselves_out_alike(comm):
    world = World(comm)
    job = make_job(parallel={"stages": 2}, topology={"ranks_per_node": 2})
    own = lay_out_rank(job, world, MODEL, on_gpu=False)
    layout = make_layout(job, MODEL, [rank // 2 for rank in range(comm.size)])
    assert own.ranks.rank == comm.rank
    assert own.topology == virtual(comm.size, 2)
    assert own.grid == layout.grid
    assert own.coords == layout.grid.coordinates(comm.rank)
    assert own.placements == layout.placements[own.coords.stage]
    assert own.memory == layout.memory[own.coords.stage]
    assert available_bytes(job.topology, world, memory("host", 400)) == 100
    assert available_bytes(job.topology, world, memory(f"GPU {comm.rank // 2}", 400)) == 200


@pytest.mark.ranks(4)
def test_a_layout_that_does_not_fit_ends_all_ranks_alike(comm, capfd):
    job = make_job(parallel={"tensor": 3})
    with pytest.raises(AgreedExit) as end:
        lay_out_rank(job, World(comm), MODEL, on_gpu=False)
    assert end.value.code == ConfigError.exit_code
    line = "moempi: rank 0: parallel.tensor = 3 does not divide the model's num_heads of 4\n"
    assert capfd.readouterr().err == (line if comm.rank == 0 else "")
