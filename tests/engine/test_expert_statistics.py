"""Statistics of experts by prompt group: the sums that a loop over the recorded positions makes, in any layout."""

import tracemalloc
from itertools import pairwise

import h5py
import numpy as np
import pytest
from mpi4py import MPI
from msgspec import structs

from engine.jobs import make_job
from engine.runs import SMALL, Run, requests_of
from moempi.config.traces import recorded_bytes
from moempi.engine.summary import _expert_load
from moempi.storage import expert_statistics, journal_index
from moempi.storage.expert_statistics import write_statistics
from moempi.storage.journal_index import JournalIndex
from moempi.storage.merge import merge
from moempi.storage.records import RankRecord
from moempi.storage.results_columns import create_scale
from storage.test_reader import trace_of
from storage.test_records import make_request
from storage.test_results import PROVENANCE

LENGTHS = (5, 30, 1, 12, 3)
GROUPS = ("math", None, "code", "math", None)
LIMIT = 4
TRACE = {
    "statistics": True,
    "hidden": list(SMALL.moe_layers),
    "hidden_sublayer": "attention",
    "hidden_dtype": "float32",
}


def run_with(folder, comm=MPI.COMM_SELF, **sections):
    """The results of a run of SMALL with statistics, and the run."""
    folder.mkdir(exist_ok=True)
    requests = requests_of(*LENGTHS, limit=LIMIT)
    for request, group in zip(requests, GROUPS, strict=True):
        request.prompt = structs.replace(request.prompt, group=group)
    run = Run(folder, requests, comm=comm, trace=TRACE, **sections)
    run.lanes.run()
    load = _expert_load(run.lanes.each, run.model.architecture)
    run.journal.append(RankRecord(rank=comm.rank, host="n", expert_load=load, seconds={}, steps=1, tokens=1))
    run.journal.close()
    comm.Barrier()
    if comm.rank == 0:
        paths = [folder / f"{rank}.part" for rank in range(comm.size)]
        merge(folder / "r.h5", paths, num_requests=len(LENGTHS), provenance=PROVENANCE)
    return folder / "r.h5", run


def read(results):
    with h5py.File(results) as file:
        tables = {name: dataset[:] for name, dataset in file["statistics"].items() if name != "group"}
        return file["statistics/group"].asstr()[:].tolist(), tables


def twin(results):
    """The same sums, position by position."""
    names = ["", "code", "math"]
    with h5py.File(results) as file:
        offsets, (experts, gates, norms) = (
            file["routing/offsets"][:],
            (file[f"routing/{name}"][:] for name in ("experts", "weights", "norms")),
        )
    shape = (len(names), len(SMALL.moe_layers), SMALL.experts.num)
    sums = {name: np.zeros(shape) for name in ("tokens", "gates", "gated_norms")} | {
        "pairs": np.zeros((*shape, shape[2]))
    }
    for request, (start, stop) in enumerate(pairwise(offsets.tolist())):
        group = names.index(GROUPS[request] or "")
        for row in range(start, stop):
            for layer in range(shape[1]):
                for slot, expert in enumerate(experts[row, layer].tolist()):
                    gate, norm = float(gates[row, layer, slot]), float(norms[row, layer, slot])
                    for name, value in (("tokens", 1), ("gates", gate), ("gated_norms", gate * norm)):
                        sums[name][group, layer, expert] += value
                    for other in experts[row, layer].tolist():
                        sums["pairs"][group, layer, expert, other] += 1
    return sums


def test_they_are_the_sums_over_the_recorded_positions_of_each_group(tmp_path, monkeypatch):
    monkeypatch.setattr(expert_statistics, "BLOCK_ROWS", 7)
    results, _ = run_with(tmp_path)
    groups, found = read(results)
    assert groups == ["", "code", "math"]
    for name, expected in twin(results).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-12, err_msg=name)
    with h5py.File(results) as file:
        np.testing.assert_array_equal(found["tokens"].sum(axis=0), file["experts/load"][:][list(SMALL.moe_layers)])
        assert file["requests/group"].asstr()[:].tolist() == ["math", "", "code", "math", ""]


def test_norms_are_those_of_the_chosen_experts_outputs(tmp_path):
    results, run = run_with(tmp_path)
    with h5py.File(results) as file:
        for number, layer in enumerate(SMALL.moe_layers):
            states, experts = file[f"hidden/values/{layer:03}"][:], file["routing/experts"][:, number]
            own = run.model.layers[layer]
            rows = own.feed_forward_norm(run.backend, states)
            for row in range(0, len(rows), 5):
                for slot, expert in enumerate(experts[row].tolist()):
                    x, expert_of = rows[row : row + 1], own.feed_forward.experts[expert]
                    output = run.backend.expert_mlp(x, [expert_of], np.array([1]))
                    np.testing.assert_allclose(
                        file["routing/norms"][row, number, slot], np.linalg.norm(output), rtol=1e-5
                    )


def test_memory_holds_a_block_of_rows_whatever_their_number(tmp_path):
    """A million rows in ten requests, of which every other one has none; int64 of all rows would be 8 MiB."""
    num_rows = 1 << 20
    index = JournalIndex(np.zeros(10, journal_index._ENTRY))
    index.add_rank(RankRecord(rank=0, host="n", expert_load=np.ones((1, 4), np.int64), seconds={}, steps=1, tokens=1))
    for i in range(10):
        own = (i % 2) * num_rows // 5
        done = make_request(i, num_prompt=own, computed=own, group="odd" if i % 4 == 1 else None)
        index.add_request(done, journal=0, offset=0)
    routed = {"experts": np.zeros((1, 1, 1), np.uint8)}
    routed |= {name: np.ones((1, 1, 1), np.float32) for name in ("weights", "norms")}
    index.add_trace(trace_of("routing", routed, requests=[1], positions=[0], layers=(0,)), journal=0, offset=0)
    with h5py.File(tmp_path / "r.h5", "w") as file:
        for name, size in index.sizes().items():
            create_scale(file, name, size)
        for name, kind in (("experts", np.uint8), ("weights", np.float32), ("norms", np.float32)):
            file.create_dataset(f"routing/{name}", (num_rows // 5 * 5, 1, 1), kind)
        tracemalloc.start()
        write_statistics(file, index, lambda: None)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        tokens = file["statistics/tokens"][:, 0, 0].tolist()
    assert (index.groups, tokens) == (["", "odd"], [num_rows // 5 * 2, num_rows // 5 * 3])
    assert most < 4 << 20


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"parallel": {"stages": 2}},
        {"parallel": {"tensor": 2}},
        {"parallel": {"stages": 2}, "exchange": {"immediate": True}},
        {"parallel": {"stages": 2}, "exchange": {"immediate": True}, "run": {"micro_batches": 4, "batch_tokens": 7}},
        {"topology": {"ranks_per_node": 2}, "exchange": {"hops": 2}},
        {"topology": {"ranks_per_node": 1}, "exchange": {"hops": 2}},
        {"topology": {"ranks_per_node": 2}, "exchange": {"hops": 2}, "parallel": {"tensor": 2}},
    ],
    ids=["ranks", "stages", "tensor", "immediate", "lanes", "hops", "nodes", "both"],
)
def test_any_layout_has_the_sums_of_one_rank(tmp_path, comm, sections):
    folder = comm.bcast(tmp_path)
    results, _ = run_with(folder / "ranks", comm, **sections)
    if comm.rank == 0:
        alone = run_with(folder / "alone")[0]
        (groups, found), (expected_groups, expected) = read(results), read(alone)
        is_exact = "tensor" not in str(sections) and "hops" not in str(sections)
        assert groups == expected_groups
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=0 if is_exact else 1e-5, err_msg=name)
        with h5py.File(results) as file, h5py.File(alone) as other:
            ours, theirs = (one["routing/norms"][:] for one in (file, other))
            np.testing.assert_allclose(ours, theirs, rtol=0 if is_exact else 1e-4)


def test_bytes_of_a_position_are_the_bytes_of_the_file(tmp_path):
    results, _ = run_with(tmp_path)
    predicted = recorded_bytes(make_job(trace=structs.asdict(make_job(trace=TRACE).trace)), SMALL)
    with h5py.File(results) as file:
        rows = int(file["routing/offsets"][-1])
        tables = {"routing": ("experts", "weights", "norms"), "hidden": ("values",)}
        for table, columns in tables.items():
            datasets = [file[f"{table}/{name}"] for name in columns]
            flat = [d for one in datasets for d in (one.values() if isinstance(one, h5py.Group) else [one])]
            assert sum(dataset.nbytes for dataset in flat) == rows * predicted[table]
