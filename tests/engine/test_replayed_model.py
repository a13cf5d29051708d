"""Permuted routing changes exactly what it changes in a slow reference model that is given the same experts."""

import h5py
import numpy as np
import pytest
from mpi4py import MPI
from msgspec import structs

from engine.reference import Reference
from engine.runs import SMALL, Run, numpy_backend, requests_of
from engine.test_replay import counts, opened
from engine.test_traces_on_gpu import on_gpu
from moempi.config.architecture import Experts, Router
from moempi.config.job import ReplaySection
from moempi.runtime.waiting import barrier
from moempi.storage.merge import merge
from storage.test_results import PROVENANCE

LENGTHS, LIMIT, WITHIN = (5, 19, 1, 12), 4, 5e-5
EXPERTS = 8
ROUTED = structs.replace(
    SMALL,
    experts=Experts(num=EXPERTS, width=8, router=Router(top_k=3, renormalize=True), shared_width=6),
)
TRACE = {"routing": "weights", "hidden": list(range(ROUTED.num_layers)), "hidden_dtype": "float32"}
SCORE = {"task": "score", "score": {"top_n": ROUTED.vocab_size}}


def named_requests(limit):
    requests = requests_of(*LENGTHS, limit=limit)
    for request in requests:
        request.prompt = structs.replace(request.prompt, id=f"q{request.prompt.index}")
    return requests


def run_with(folder, routing=None, comm=MPI.COMM_SELF, *, limit=LIMIT, make_backend=numpy_backend, **sections):
    """The results of a run that records, with the routing of a file if given, and its (replayed, changed) routes."""
    folder.mkdir(exist_ok=True)
    requests = named_requests(limit)
    prompts = [request.prompt for request in requests]
    replay = opened(ReplaySection(str(routing)), prompts, architecture=ROUTED) if routing else None
    run = Run(
        folder,
        requests,
        comm=comm,
        architecture=ROUTED,
        make_backend=make_backend,
        replay_of=replay,
        trace=TRACE,
        **sections,
    )
    run.lanes.run()
    run.journal.close()
    if replay is not None:
        replay.close()
    barrier(comm)
    if comm.rank == 0:
        paths = [folder / f"{rank}.part" for rank in range(comm.size)]
        merge(folder / "r.h5", paths, num_requests=len(LENGTHS), provenance=PROVENANCE)
    replayed = counts([lane.policy for lane in run.lanes.each]) if replay else (0, 0)
    return folder / "r.h5", tuple(comm.allreduce(count) for count in replayed)


def permute(path, recorded, *, without):
    """Write a file in which each row and layer has the recorded experts under a permutation of its own.

    The share `without` of rows and layers has no route, and the second request has none. Returns the experts.
    """
    random = np.random.default_rng(5)
    with h5py.File(recorded) as file, h5py.File(path, "w") as made:
        offsets, experts = file["routing/offsets"][:], file["routing/experts"][:].astype(np.int32)
        permutations = random.permuted(np.tile(np.arange(EXPERTS), (*experts.shape[:2], 1)), axis=2)
        experts = np.take_along_axis(permutations, experts, axis=2).astype(np.int32)
        if without:
            experts[random.random(experts.shape[:2]) < without] = -1
            experts[offsets[1] : offsets[2]] = -1
        made["offsets"], made["layer"], made["experts"] = offsets, file["routing/layer"][:], experts
    return experts


def requests_in(results):
    """Tokens, routing and states (L, T, D) of each request, and the log-probabilities of its tokens, NaN if none."""
    with h5py.File(results) as file:
        of_request = {
            name: np.split(file[path][:], file[f"{path.split('/')[0]}/offsets"][1:-1])
            for name, path in (
                ("prompt", "prompt/tokens"),
                ("tokens", "output/tokens"),
                ("logprobs", "output/logprobs"),
                ("experts", "routing/experts"),
                ("weights", "routing/weights"),
            )
        }
        bounds = file["hidden/offsets"][1:-1]
        layers = [np.split(file[f"hidden/values/{layer:03}"][:], bounds) for layer in TRACE["hidden"]]
        of_request["states"] = [np.stack(states) for states in zip(*layers, strict=True)]
        return [dict(zip(of_request, values, strict=True)) for values in zip(*of_request.values(), strict=True)]


def assert_follows(results, reference, given, recorded):
    """The results are the reference's with the experts that are given, and not with the recorded ones."""
    offsets, differences = np.cumsum([0, *(length + LIMIT - 1 for length in LENGTHS)]), []
    for request, found in enumerate(requests_in(results)):
        own = slice(offsets[request], offsets[request + 1])
        tokens = np.concatenate([found["prompt"], found["tokens"]])
        expected = reference.forward(tokens[:-1], given[own])
        np.testing.assert_array_equal(found["experts"], expected.experts)
        np.testing.assert_allclose(found["weights"], expected.weights, rtol=0, atol=WITHIN)
        np.testing.assert_allclose(found["states"], expected.states, rtol=0, atol=WITHIN)
        rows = np.arange(len(found["prompt"]) - 1, len(tokens) - 1)
        np.testing.assert_allclose(found["logprobs"], expected.logprobs[rows, found["tokens"]], rtol=0, atol=WITHIN)
        plain = reference.forward(tokens[:-1], recorded[own])
        differences.append(np.abs(plain.states - expected.states).max())
    assert max(differences) > 0.1


CASES = {
    "one rank": {},
    "ranks": {"comm": 4},
    "stages": {"comm": 4, "parallel": {"stages": 2}},
    "immediate": {"comm": 4, "parallel": {"stages": 2}, "exchange": {"immediate": True}},
    "tensor": {"comm": 4, "parallel": {"tensor": 2}},
    "hops": {"comm": 4, "exchange": {"hops": 2}, "topology": {"ranks_per_node": 2}},
}


@pytest.mark.ranks(4)
@pytest.mark.parametrize("without", [0.0, 0.4], ids=["whole", "partial"])
@pytest.mark.parametrize("case", CASES)
def test_permuted_routing_gives_the_reference_with_that_routing(tmp_path, comm, case, without):
    sections = dict(CASES[case])
    folder, own = comm.bcast(tmp_path), comm if sections.pop("comm", 1) > 1 else MPI.COMM_SELF
    if comm.rank == 0:
        given = permute(folder / "given.h5", run_with(folder / "recorded")[0], without=without)
    barrier(comm)
    if own.size > comm.rank:
        results, (replayed, changed) = run_with(folder / "replayed", folder / "given.h5", own, **sections)
    if comm.rank == 0:
        assert replayed == (given >= 0).all(axis=2).sum()
        assert 0 < changed <= replayed
        recorded = read_experts(folder / "recorded/r.h5")
        assert_follows(results, Reference(folder / "recorded/0.h5"), given, recorded)


@pytest.mark.parametrize("without", [0.0, 0.4], ids=["whole", "partial"])
def test_a_gpu_gives_the_reference_with_permuted_routing(tmp_path, without):
    given = permute(tmp_path / "given.h5", run_with(tmp_path / "recorded")[0], without=without)
    results, _ = run_with(tmp_path / "replayed", tmp_path / "given.h5", make_backend=on_gpu("float32"))
    recorded = read_experts(tmp_path / "recorded/r.h5")
    assert_follows(results, Reference(tmp_path / "recorded/0.h5"), given, recorded)


@pytest.mark.parametrize("make_backend", [numpy_backend, on_gpu("float32")], ids=["cpu", "gpu"])
def test_all_log_probabilities_of_scored_prompts_are_the_references(tmp_path, make_backend):
    recorded, _ = run_with(tmp_path / "recorded", limit=0, **SCORE)
    given = permute(tmp_path / "given.h5", recorded, without=0.3)
    results, _ = run_with(tmp_path / "replayed", tmp_path / "given.h5", limit=0, make_backend=make_backend, **SCORE)
    reference = Reference(tmp_path / "recorded/0.h5")
    with h5py.File(results) as file:
        names = ("prompt/tokens", "score/top_tokens", "score/top_logprobs")
        columns = [np.split(file[name][:], file["prompt/offsets"][1:-1]) for name in names]
        bounds = file["routing/offsets"][:]
    for request, (tokens, top_tokens, top_logprobs) in enumerate(zip(*columns, strict=True)):
        expected = reference.forward(
            tokens[: bounds[request + 1] - bounds[request]], given[slice(*bounds[request : request + 2])]
        )
        found = np.take_along_axis(expected.logprobs[: len(tokens) - 1], top_tokens[1:], axis=1)
        np.testing.assert_allclose(top_logprobs[1:], found, rtol=0, atol=WITHIN)


def read_experts(results):
    with h5py.File(results) as file:
        return file["routing/experts"][:].astype(np.int32)
