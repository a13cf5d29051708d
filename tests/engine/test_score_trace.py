"""The likeliest tokens at every position of scored prompts: written as they are computed, in memory that is bounded."""

import tracemalloc

import h5py
import numpy as np
import pytest
from mpi4py import MPI

from engine.runs import SMALL, Run, requests_of
from moempi.backend.cpu.backend import NumpyBackend
from moempi.storage.journal import JournalReader
from moempi.storage.merge import merge
from moempi.storage.records import RequestRecord, TraceRecord
from moempi.storage.results import ResultFile
from storage.test_results import PROVENANCE

LENGTHS = (5, 30, 1, 12, 3)


def scored(folder, comm=MPI.COMM_SELF, *, score, **sections):
    """The results file of a run of SMALL that scores; on rank 0 of `comm`."""
    folder.mkdir(exist_ok=True)
    run = Run(folder, requests_of(*LENGTHS, limit=0), comm=comm, task="score", score=score, **sections)
    run.lanes.run()
    run.journal.close()
    comm.Barrier()
    if comm.rank == 0:
        paths = [folder / f"{rank}.part" for rank in range(comm.size)]
        merge(folder / "r.h5", paths, num_requests=len(LENGTHS), provenance=PROVENANCE)
    return folder / "r.h5"


def read(results):
    with h5py.File(results) as file:
        return {name: file[f"score/{name}"][:] for name in ("logprobs", "top_tokens", "top_logprobs")}


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    "sections",
    [{}, {"parallel": {"stages": 2}}, {"parallel": {"tensor": 2, "stages": 2}}],
    ids=["ranks", "stages", "tensor"],
)
def test_any_layout_records_the_likeliest_tokens_of_one_rank(tmp_path, comm, sections):
    folder = comm.bcast(tmp_path)
    results = scored(folder / "ranks", comm, score={"top_n": 7}, **sections)
    if comm.rank == 0:
        found, alone = read(results), read(scored(folder / "alone", score={"top_n": 7}))
        within = 1e-5 if "tensor" in str(sections) else 0.0
        for name in ("logprobs", "top_logprobs"):
            np.testing.assert_allclose(found[name], alone[name], rtol=0, atol=within)
        assert np.mean(found["top_tokens"] != alone["top_tokens"]) <= (0.02 if within else 0.0)


def test_they_are_all_tokens_in_order_and_the_first_of_them_if_fewer_are_requested(tmp_path):
    whole = read(scored(tmp_path / "all", score={"top_n": SMALL.vocab_size}))
    first = np.cumsum([0, *LENGTHS[:-1]])
    others = np.setdiff1d(np.arange(sum(LENGTHS)), first)
    assert (whole["top_tokens"][first] == -1).all()
    assert np.isnan(whole["top_logprobs"][first]).all()
    assert (np.sort(whole["top_tokens"][others]) == np.arange(SMALL.vocab_size)).all()
    assert (np.diff(whole["top_logprobs"][others], axis=1) <= 0).all()
    np.testing.assert_allclose(np.exp(whole["top_logprobs"][others].astype(np.float64)).sum(axis=1), 1, atol=1e-5)
    for row in others.tolist():
        request = int(np.searchsorted(first, row, side="right")) - 1
        target = 2 + (3 * request + row - first[request]) % 38
        (place,) = np.flatnonzero(whole["top_tokens"][row] == target)
        assert whole["logprobs"][row] == whole["top_logprobs"][row, place]
    few = read(scored(tmp_path / "few", score={"top_n": 3, "dtype": "float16"}))
    np.testing.assert_array_equal(few["top_tokens"], whole["top_tokens"][:, :3])
    np.testing.assert_array_equal(few["top_logprobs"], whole["top_logprobs"][:, :3].astype(np.float16))


def test_a_request_holds_none_of_them_and_its_rows_are_written_with_the_steps(tmp_path):
    results = scored(tmp_path, score={"top_n": 2, "dtype": "float16"})
    with JournalReader(tmp_path / "0.part") as journal:
        records = [record for _, record in journal.records()]
    done, traces = ([record for record in records if isinstance(record, kind)] for kind in (RequestRecord, TraceRecord))
    assert [record.score_top_tokens.size for record in done] == [0] * len(LENGTHS)
    pairs = [pair for record in traces for pair in zip(record.requests, record.positions, strict=True)]
    assert sorted(pairs) == [(i, p) for i, length in enumerate(LENGTHS) for p in range(1, length)]
    with ResultFile(results) as file:
        found = list(file.requests())
    assert [record.score_top_tokens.shape for record in found] == [(n, 2) if n > 1 else (0, 0) for n in LENGTHS]
    assert found[0].score_top_logprobs.dtype == np.float32


def test_scoring_100_of_262144_tokens_takes_little_more_memory_than_scoring_none():
    backend = NumpyBackend(precision="float32")
    logits = np.random.default_rng(1).standard_normal((64, 262_144), np.float32)
    targets = np.arange(64)

    def peak(top):
        tracemalloc.start()
        found = backend.score(logits, targets, top=top)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return found, most

    (found, most), (_, least) = peak(100), peak(0)
    assert most - least < 64 << 20
    expected = np.argsort(-logits[:2], axis=1, kind="stable")[:, :100]
    np.testing.assert_array_equal(found.top_tokens[:2], expected)
