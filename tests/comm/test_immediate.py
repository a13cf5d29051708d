"""Immediate routing: the same bits as with the combine on the home ranks, on grids of several stages."""

import numpy as np
import pytest
from msgspec import structs

from moempi.comm.immediate import ImmediateHeader, batch_order, output_rows_of
from moempi.config.architecture import Architecture, AttentionShape, Experts, Router
from moempi.config.job import Job
from moempi.config.reading import read_tree
from moempi.engine.run import run_job
from moempi.errors import ConfigError
from moempi.layout.layout import make_layout
from moempi.runtime.stop import Stop
from moempi.runtime.waiting import barrier
from moempi.runtime.world import World
from moempi.storage.compare import compare
from moempi.storage.initialize import initialize

PLAIN = Architecture(
    family="random",
    vocab_size=40,
    width=16,
    num_layers=4,
    max_positions=160,
    attention=AttentionShape(num_heads=2, num_kv_heads=2, head_dim=8),
    experts=Experts(num=7, width=8, router=Router(top_k=3)),
    dense_layers=(3,),
    dense_width=12,
)
SHARED = structs.replace(PLAIN, experts=structs.replace(PLAIN.experts, shared_width=8, shared_gate=True))

# Ranks of each stage and tensor parallelism; the last grid has a stage whose last layer is dense.
GRIDS = [((2, 2, 2), 1), ((1, 3), 1), ((4, 1, 1), 1), ((2, 4), 2), ((4, 2), 2), ((1, 1, 1, 1), 1)]


def tree_of(folder, model, grid, *, immediate, precision):
    ranks, tensor = grid
    return {
        "model": {"weights": str(folder / f"{model}.h5")},
        "input": {"prompts": str(folder / "prompts.jsonl")},
        "output": {"results": str(folder / f"{immediate}.h5")},
        "run": {"precision": precision, "reproducible": True, "micro_batches": 2, "max_sequences": 3},
        "sampling": {"max_tokens": 3, "ignore_eos": True},
        "exchange": {"immediate": immediate},
        "parallel": {"stages": len(ranks), "stage_ranks": list(ranks), "tensor": tensor},
    }


@pytest.mark.ranks(6)
def test_results_are_equal_with_and_without_immediate_routing(comm, tmp_path):
    folder = comm.bcast(tmp_path)
    if comm.rank == 0:
        initialize(PLAIN, folder / "plain.h5", seed=2)
        initialize(SHARED, folder / "shared.h5", seed=3)
        lines = [f'{{"tokens": {list(range(1, length))}}}' for length in (2, 30, 9, 5, 2, 17, 4)]
        (folder / "prompts.jsonl").write_text("\n".join(lines))
    barrier(comm)
    for index, grid in enumerate(GRIDS):
        num_ranks = sum(grid[0])
        own = comm.Split(int(comm.rank >= num_ranks), comm.rank)
        model, precision = ("plain", "shared")[index % 2], ("float32", "bfloat16")[index // 2 % 2]
        for immediate in (False, True):
            job = read_tree(tree_of(folder, model, grid, immediate=immediate, precision=precision), Job, origin="test")
            if comm.rank < num_ranks:
                assert run_job(job, job_text="", world=World(own), stop=Stop(), strict=True) == 0
        barrier(comm)
        if comm.rank == 0:
            found = compare(folder / "True.h5", folder / "False.h5")
            assert (found.requests, found.different, found.largest) == (7, 0, 0.0), grid
            for name in ("True", "False"):
                (folder / f"{name}.h5").unlink()
        own.Free()


def test_immediate_stages_end_with_a_moe_layer_and_are_not_the_last(tmp_path):
    tree = tree_of(tmp_path, "plain", ((1, 1, 1, 1), 1), immediate=True, precision="float32")
    job = read_tree(tree, Job, origin="test")
    assert make_layout(job, structs.replace(PLAIN, dense_layers=(1,)), [0] * 4).immediate_stages == (0, 2)
    off = read_tree({**tree, "exchange": {"immediate": False}}, Job, origin="test")
    assert make_layout(off, PLAIN, [0] * 4).immediate_stages == ()


def test_two_hops_and_immediate_routing_exclude_each_other(tmp_path):
    tree = tree_of(tmp_path, "plain", ((1, 1, 1, 1), 1), immediate=True, precision="float32")
    job = read_tree({**tree, "exchange": {"immediate": True, "hops": 2}}, Job, origin="test")
    with pytest.raises(ConfigError, match=r"exchange\.hops = 1"):
        make_layout(job, PLAIN, [0] * 4)


def random_choices(random, num_rows, num_ranks, top_k):
    """Choices of a home rank: expert rank (n, K), index of the choice in rank order (n, K), choices for each rank."""
    ranks = random.integers(num_ranks, size=(num_rows, top_k))
    order = np.argsort(ranks.reshape(-1), kind="stable")
    output_rows = np.empty(ranks.size, np.int64)
    output_rows[order] = np.arange(ranks.size)
    return ranks, output_rows.reshape(ranks.shape), np.bincount(ranks.reshape(-1), minlength=num_ranks)


@pytest.mark.parametrize("seed", range(20))
def test_outputs_are_received_in_the_order_in_which_experts_send_them(seed):
    random = np.random.default_rng(seed)
    num_ranks, top_k = random.integers(1, 6), 3
    choices = [random_choices(random, random.integers(0, 9), num_ranks, top_k) for _ in range(random.integers(1, 4))]
    # Some rows of each home rank belong to this owner. An output is named by home rank, row and slot.
    kept = [np.flatnonzero(random.random(len(ranks)) < 0.6) for ranks, _, _ in choices]
    outputs = []
    for rank in range(num_ranks):
        for home, ((ranks, order, _), rows) in enumerate(zip(choices, kept, strict=True)):
            named = [(order[row, k], (home, row, k)) for row in rows for k in range(top_k) if ranks[row, k] == rank]
            outputs.extend(name for _, name in sorted(named))
    headers = [
        ImmediateHeader(None, rows, order[rows], np.zeros((len(rows), top_k), np.float32), counts, shared=False)
        for (_, order, counts), rows in zip(choices, kept, strict=True)
    ]
    output_rows, counts = output_rows_of(headers)
    names = [(home, row, k) for home, rows in enumerate(kept) for row in rows for k in range(top_k)]
    assert [outputs[row] for row in output_rows.reshape(-1)] == names
    ranks_of_kept = [ranks[rows].reshape(-1) for (ranks, _, _), rows in zip(choices, kept, strict=True)]
    assert counts.tolist() == np.bincount(np.concatenate(ranks_of_kept), minlength=num_ranks).tolist()


def test_rows_of_several_home_ranks_are_ordered_as_the_batch():
    def header(*rows):
        return ImmediateHeader(None, np.array(rows, np.int64), None, None, None, shared=False)

    assert batch_order([header(0, 3), header(1, 2), header(1), header(0)], 2).tolist() == [0, 2, 3, 1, 5, 4]
