"""Balanced gating in real runs: what it keeps to, what it reports, and that it is the same on all ranks."""

import h5py
import numpy as np
import pytest
from msgspec import structs

from moempi.config.architecture import Architecture, AttentionShape, Experts, Router
from moempi.config.job import Job
from moempi.config.reading import read_tree
from moempi.config.tensors import PAGE_ROWS
from moempi.engine.run import run_job
from moempi.errors import ConfigError
from moempi.layout.layout import make_layout
from moempi.model import router_balance as gating
from moempi.model.capacity import capacity
from moempi.runtime.stop import Stop
from moempi.runtime.waiting import barrier
from moempi.runtime.world import World
from moempi.storage.compare import compare
from moempi.storage.initialize import initialize

EXPERTS, TOP_K = 8, 2
ARCHITECTURE = Architecture(
    family="random",
    vocab_size=40,
    width=16,
    num_layers=3,
    max_positions=160,
    attention=AttentionShape(num_heads=2, num_kv_heads=2, head_dim=8),
    experts=Experts(num=EXPERTS, width=8, router=Router(top_k=TOP_K, num_groups=4, kept_groups=2)),
    dense_layers=(1,),
    dense_width=12,
)
GRIDS = [
    (1, {}),
    (2, {"run": {"micro_batches": 1}}),
    (4, {"parallel": {"stages": 2}}),
    (4, {"parallel": {"tensor": 2}, "exchange": {"hops": 2}, "topology": {"ranks_per_node": 2}}),
    (4, {"parallel": {"stages": 2, "stage_ranks": [1, 3]}, "exchange": {"immediate": True}}),
]


def job_of(folder, name, mode, changes):
    run = {"precision": "float32", "micro_batches": 2, "batch_tokens": 24} | changes.get("run", {})
    tree = {
        "model": {"weights": str(folder / "weights.h5")},
        "input": {"prompts": str(folder / "prompts.jsonl")},
        "output": {"results": str(folder / f"{name}.h5")},
        "sampling": {"max_tokens": 6, "ignore_eos": True},
        "balance": {"mode": mode, "rate": 0.5, "sample": 3},
    }
    return read_tree({**tree, **changes, "run": run}, Job, origin="test")


@pytest.mark.ranks(4)
def test_every_grid_balances(comm, tmp_path, monkeypatch):
    folder = comm.bcast(tmp_path)
    if comm.rank == 0:
        initialize(ARCHITECTURE, folder / "weights.h5", seed=4)
        lines = [f'{{"tokens": {[1 + length % 3] * length}}}' for length in (3, 20, 9, 30, 2, 17, 4, 25, 6)]
        (folder / "prompts.jsonl").write_text("\n".join(lines))
    barrier(comm)
    steps = watch_steps(monkeypatch)
    for number, (members, changes) in enumerate(GRIDS):
        own = comm.Split(int(comm.rank >= members), comm.rank)
        for mode in ("off", "bias", "capacity", "again"):
            job = job_of(folder, f"{number}-{mode}", "bias" if mode == "again" else mode, changes)
            steps.clear()
            if comm.rank < members:
                assert run_job(job, job_text="", world=World(own), stop=Stop(), strict=True) == 0
            if mode == "capacity" and members < 4:
                check_capacity(own, steps if comm.rank < members else [])
            barrier(comm)
        own.Free()
        if comm.rank == 0:
            check_results(folder, number)


@pytest.mark.ranks(1)
def test_a_sample_that_fills_its_pages_is_scored_again_in_them(comm, tmp_path):
    initialize(ARCHITECTURE, tmp_path / "weights.h5", seed=4)
    (tmp_path / "prompts.jsonl").write_text(f'{{"tokens": {[1] * (PAGE_ROWS - 5)}}}')  # and 6 tokens, the last in none
    job = job_of(tmp_path, "full", "bias", {})
    assert run_job(job, job_text="", world=World(comm), stop=Stop(), strict=True) == 0
    with h5py.File(job.output.results) as results:
        assert np.isfinite(results["balance/logprob_change"][...]).all()


def watch_steps(monkeypatch):
    """What LimitedGating let each expert take, layer by layer."""
    steps, choose = [], gating.CapacityPolicy.choose

    def watched(self, backend, layer, logits, router, correction):
        experts, weights = choose(self, backend, layer, logits, router, correction)
        steps.append((len(experts), np.bincount(experts.reshape(-1), minlength=EXPERTS)))
        return experts, weights

    monkeypatch.setattr(gating.CapacityPolicy, "choose", watched)
    return steps


def check_capacity(comm, steps):
    """Of each layer in each step, on all ranks together."""
    for taken in zip(*comm.allgather(steps), strict=True):
        rows = sum(count for count, _ in taken)
        limit = capacity(rows, top_k=TOP_K, num_experts=EXPERTS, factor=1.25)
        assert sum(load for _, load in taken).max() <= limit


def check_results(folder, number):
    with h5py.File(folder / f"{number}-off.h5") as off:
        assert "asked_load" not in off["experts"]
        load = off["experts/load"][...]
    for mode in ("bias", "capacity"):
        with h5py.File(folder / f"{number}-{mode}.h5") as results:
            assert results["experts/load"][...].sum() == load.sum()
            assert results["experts/asked_load"][...].sum() == load.sum()
            moved = results["balance/moved_choices"][...].sum()
            assert 0 < moved < load.sum()
            assert np.isfinite(results["balance/logprob_change"][...]).all()
            shift = results["experts/shift"][...]
            assert np.abs(shift).max() <= 0.5
            assert results["experts/layer"][...].tolist() == [0, 2]  # layer 1 is dense
            assert (shift != 0).any(axis=1).all() == (mode == "bias")
            busiest = results["experts/load"][...].max(axis=1)
        assert (busiest < load.max(axis=1)).all()
    found = compare(folder / f"{number}-bias.h5", folder / f"{number}-again.h5")
    assert (found.different, found.largest) == (0, 0.0)


def test_a_router_that_weighs_only_its_own_choice_is_refused(tmp_path):
    sparse = structs.replace(ARCHITECTURE.experts, router=Router(top_k=2, scoring="sparsemixer"))
    with pytest.raises(ConfigError, match=r'balance\.mode = "bias".*use "off"'):
        make_layout(job_of(tmp_path, "x", "bias", {}), structs.replace(ARCHITECTURE, experts=sparse), [0])


def test_shifts_rise_for_idle_experts_and_fall_for_busy_ones_within_their_bound():
    shifts = gating.ExpertBias([3], 4, rate=0.1, bound=0.25)
    shifts.update(np.array([[0, 4, 12, 0]]))
    np.testing.assert_allclose(shifts.values, [[0.1, 0.0, -0.1, 0.1]], rtol=1e-6)
    for _ in range(9):
        shifts.update(np.array([[0, 4, 12, 0]]))
    np.testing.assert_allclose(shifts.values, [[0.25, 0.0, -0.25, 0.25]], rtol=1e-6)
    shifts.update(np.zeros((1, 4), np.int64))
    np.testing.assert_allclose(shifts.values, [[0.25, 0.0, -0.25, 0.25]], rtol=1e-6)
