"""Recorded hidden states: the same rows in any layout, at the positions that a job names."""

import h5py
import numpy as np
import pytest
from mpi4py import MPI

from engine.runs import SMALL, Run, requests_of
from moempi.storage.journal import JournalReader
from moempi.storage.merge import merge
from moempi.storage.records import RequestRecord, TraceRecord
from storage.test_results import PROVENANCE

LENGTHS = (5, 30, 1, 12, 3)
LIMIT = 4
LAYERS = [0, 2, 3]


def traced(folder, comm=MPI.COMM_SELF, *, trace, lengths=LENGTHS, **sections):
    """The results file of a run of SMALL that records; on rank 0 of `comm`."""
    folder.mkdir(exist_ok=True)
    run = Run(folder, requests_of(*lengths, limit=LIMIT), comm=comm, trace=trace, **sections)
    run.lanes.run()
    run.journal.close()
    comm.Barrier()
    results = folder / "r.h5"
    if comm.rank == 0:
        paths = [folder / f"{rank}.part" for rank in range(comm.size)]
        merge(results, paths, num_requests=len(lengths), provenance=PROVENANCE)
    return results


def hidden_of(results):
    """The states of each request, by layer."""
    with h5py.File(results) as file:
        offsets = file["hidden/offsets"][:]
        return file["hidden/first"][:], {
            layer: np.split(file[f"hidden/values/{layer:03}"][:], offsets[1:-1])
            for layer in file["hidden/layer"][:].tolist()
        }


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    "sections",
    [
        {"parallel": {"stages": 2, "stage_layers": [1, 3]}, "exchange": {"immediate": True}},
        {"parallel": {"stages": 2, "stage_layers": [3, 1]}},
        {},
        {"parallel": {"tensor": 2}},
        {"exchange": {"hops": 2}, "topology": {"ranks_per_node": 2}},
    ],
    ids=["immediate", "stages", "ranks", "tensor", "hops"],
)
@pytest.mark.parametrize("sublayer", ["attention", "feed_forward"])
def test_any_layout_records_the_hidden_states_of_one_rank(tmp_path, comm, sections, sublayer):
    trace = {"hidden": LAYERS, "hidden_sublayer": sublayer, "hidden_dtype": "float32", "hidden_norm": True}
    folder = comm.bcast(tmp_path)
    results = traced(folder / "ranks", comm, trace=trace, **sections)
    if comm.rank == 0:
        first, expected = hidden_of(traced(folder / "alone", trace=trace))
        assert first.tolist() == [0] * len(LENGTHS)
        _, found = hidden_of(results)
        assert sorted(found) == LAYERS
        within = 1e-5 if "tensor" in str(sections) or "hops" in str(sections) else 0.0
        for layer in LAYERS:
            for length, own, other in zip(LENGTHS, found[layer], expected[layer], strict=True):
                assert own.shape == (length + LIMIT - 1, SMALL.width)
                np.testing.assert_allclose(own, other, rtol=0, atol=within)


def test_positions_and_types_are_parts_of_all_positions_in_float32(tmp_path):
    _, everything = hidden_of(traced(tmp_path / "all", trace={"hidden": [3], "hidden_dtype": "float32"}))
    for which, rows in (("last", 1), ("output", LIMIT)):
        trace = {"hidden": [3], "hidden_dtype": "bfloat16", "hidden_positions": which}
        first, found = hidden_of(traced(tmp_path / which, trace=trace))
        assert first.tolist() == [length - 1 for length in LENGTHS]
        for length, own, whole in zip(LENGTHS, found[3], everything[3], strict=True):
            np.testing.assert_allclose(own, whole[length - 1 : length - 1 + rows], rtol=2**-8)
            assert len(own) == rows


def test_the_last_position_of_a_scored_prompt_is_the_last_that_is_computed(tmp_path):
    trace = {"hidden": [1], "hidden_positions": "last", "hidden_dtype": "float32"}
    run = Run(tmp_path, requests_of(5, 1, 2, limit=0), task="score", trace=trace)
    run.lanes.run()
    run.journal.close()
    with JournalReader(run.journal.path) as journal:
        records = [record for _, record in journal.records()]
    done, traces = ([record for record in records if isinstance(record, kind)] for kind in (RequestRecord, TraceRecord))
    rows = {record.index: (record.hidden_first, record.hidden_rows) for record in done}
    assert rows == {0: (3, 1), 1: (0, 1), 2: (0, 1)}
    found = [pair for record in traces for pair in zip(record.requests, record.positions, strict=True)]
    assert sorted(found) == [(0, 3), (1, 0), (2, 0)]


def test_the_state_behind_the_last_layer_and_norm_gives_the_logits(tmp_path):
    """The twin: the head's product with a recorded state has the sampled tokens as its maxima."""
    trace = {"hidden": [3], "hidden_dtype": "float32", "hidden_norm": True, "hidden_positions": "output"}
    results = traced(tmp_path, trace=trace)
    (tmp_path / "again").mkdir()
    run = Run(tmp_path / "again")
    _, found = hidden_of(results)
    with h5py.File(results) as file:
        tokens = np.split(file["output/tokens"][:], file["output/offsets"][1:-1])
    for states, own in zip(found[3], tokens, strict=True):
        logits = run.backend.logits(states, run.model.head.matrix)
        assert logits.argmax(axis=1).tolist() == own.tolist()
