"""Replay: a job is given the experts of its rows. A recorded run replayed is the same run; other experts change it."""

from contextlib import closing
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from mpi4py import MPI
from msgspec import structs

from engine.jobs import make_job
from engine.runs import SMALL, Run, requests_of
from moempi.backend.cpu.backend import NumpyBackend
from moempi.config.job import ReplaySection
from moempi.engine import replay as module
from moempi.engine.replay import LineFiles, Replay, ReplayPolicy, open_replay
from moempi.errors import DataError, NoInputError
from moempi.runtime.waiting import barrier
from moempi.storage import replay_file
from moempi.storage.merge import merge
from moempi.storage.replay_file import NOT_GIVEN, ReplayFile
from storage.test_results import PROVENANCE

LENGTHS = (5, 30, 1, 12, 3)
LIMIT = 4
EXPERTS, TOP_K = SMALL.experts.num, SMALL.experts.router.top_k
LAYERS = len(SMALL.moe_layers)


def named_requests():
    requests = requests_of(*LENGTHS, limit=LIMIT)
    for request in requests:
        request.prompt = structs.replace(request.prompt, id=f"q{request.prompt.index}")
    return requests


PROMPTS = [request.prompt for request in named_requests()]


def opened(section, prompts=PROMPTS, *, folder=".", architecture=SMALL):
    """The replay of prompts of a file in `folder` by a model, as rank 0 opens it."""
    job = SimpleNamespace(replay=section, input=SimpleNamespace(prompts=f"{folder}/prompts.jsonl"))
    world = SimpleNamespace(
        comm=MPI.COMM_SELF, rank=0, local_rank=0, collectively=lambda act: act(), where="", alive=lambda phase: None
    )
    names = dict.fromkeys(prompt.replay for prompt in prompts if prompt.replay)
    return open_replay(job, architecture, world, prompts, names)


def run_with(folder, replay_file=None, *, comm=MPI.COMM_SELF, weights=False, **sections):
    """The results of a run of SMALL that records its routing, and the run; with the routing of a file, if given."""
    folder.mkdir(exist_ok=True)
    replay = opened(ReplaySection(str(replay_file), weights=weights)) if replay_file else None
    requests = named_requests()
    if replay is not None:
        assert not any(map(replay.problem_of, requests))
    run = Run(folder, requests, comm=comm, replay_of=replay, trace={"routing": "weights"}, **sections)
    run.lanes.run()
    run.journal.close()
    if replay is not None:
        replay.close()
    barrier(comm)
    if comm.rank == 0:
        paths = [folder / f"{rank}.part" for rank in range(comm.size)]
        merge(folder / "r.h5", paths, num_requests=len(LENGTHS), provenance=PROVENANCE)
    barrier(comm)
    return folder / "r.h5", [lane.policy for lane in run.lanes.each]


def read(results):
    names = ("output/tokens", "output/logprobs", "routing/experts", "routing/weights", "routing/offsets")
    with h5py.File(results) as file:
        return {name: file[name][:] for name in names}


def counts(policies):
    return sum(policy.replayed for policy in policies), sum(policy.changed for policy in policies)


def rows_of(folder):
    with h5py.File(folder / "r.h5") as file:
        return int(file["routing/offsets"][-1])


@pytest.mark.parametrize("weights", [False, True])
def test_record_replay_record_is_identical(tmp_path, weights):
    recorded, _ = run_with(tmp_path / "one")
    again, policies = run_with(tmp_path / "two", recorded, weights=weights)
    for (name, expected), found in zip(read(recorded).items(), read(again).values(), strict=True):
        np.testing.assert_array_equal(found, expected, err_msg=name)
    assert counts(policies) == (rows_of(tmp_path / "one") * LAYERS, 0)


def shifted_file(path, recorded, *, leave_out=()):
    """A file as trainers may write it: int16 experts, each one further; the requests `leave_out` have none."""
    with h5py.File(recorded) as file, h5py.File(path, "w") as made:
        offsets = file["routing/offsets"][:]
        experts = (file["routing/experts"][:].astype(np.int16) + 1) % EXPERTS
        for request in leave_out:
            experts[offsets[request] : offsets[request + 1]] = -1
        made["offsets"], made["layer"], made["experts"] = offsets, file["routing/layer"][:], experts
    return experts, offsets


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    "sections",
    [{}, {"parallel": {"stages": 2}, "exchange": {"immediate": True}}, {"parallel": {"tensor": 2}}],
    ids=["ranks", "immediate", "tensor"],
)
def test_any_layout_replays_the_routing_that_one_rank_replays(tmp_path, comm, sections):
    folder = comm.bcast(tmp_path)
    given = folder / "given.h5"
    if comm.rank == 0:
        shifted_file(given, run_with(folder / "recorded")[0], leave_out=[1])
    barrier(comm)
    results, policies = run_with(folder / "ranks", given, comm=comm, **sections)
    replayed = comm.allreduce(sum(getattr(policy, "replayed", 0) for policy in policies))
    if comm.rank == 0:
        alone, policies = run_with(folder / "alone", given)
        within = 1e-5 if "tensor" in str(sections) else 0.0
        for name, expected in read(alone).items():
            if name != "routing/experts" or not within:
                np.testing.assert_allclose(read(results)[name], expected, rtol=0, atol=within, err_msg=name)
        assert replayed == counts(policies)[0]


def test_given_experts_are_used_where_there_are_any_and_the_router_chooses_elsewhere(tmp_path):
    recorded, _ = run_with(tmp_path / "recorded")
    experts, offsets = shifted_file(tmp_path / "given.h5", recorded, leave_out=[0])
    results, policies = run_with(tmp_path / "replayed", tmp_path / "given.h5")
    found, plain = read(results), read(recorded)
    np.testing.assert_array_equal(found["routing/experts"][offsets[1] :], experts[offsets[1] :])
    for name in ("routing/experts", "routing/weights"):
        np.testing.assert_array_equal(found[name][: offsets[1]], plain[name][: offsets[1]])
    replayed, changed = counts(policies)
    assert replayed == (offsets[-1] - offsets[1]) * LAYERS
    assert 0 < changed <= replayed


def test_the_policy_gives_the_experts_and_the_routers_weights_for_them():
    """The twin: softmax of the logits, renormalized over the given experts."""
    backend, random = NumpyBackend(precision="float32"), np.random.default_rng(2)
    logits, router = random.standard_normal((3, EXPERTS)).astype(np.float32), SMALL.experts.router
    given = np.array([[[3, 1]], [[NOT_GIVEN] * 2], [[0, 2]]], np.int32)

    class File:
        top_k = TOP_K

        def read(self, request, start, stop, layers):
            return given[start:stop], None

    policy = ReplayPolicy(Replay([File()], np.array([[0, 0]]), weights=False), [SMALL.moe_layers[0]], 0)
    policy.begin_step(np.zeros(3, np.int64), np.arange(3))
    experts, weights = policy.choose(backend, SMALL.moe_layers[0], logits, router, None)
    scores = np.exp(logits.astype(np.float64))
    scores /= scores.sum(axis=1, keepdims=True)
    own = np.argsort(-logits, axis=1)[:, :TOP_K]
    expected = np.where(given[:, 0] == NOT_GIVEN, own, given[:, 0])
    assert experts.tolist() == expected.tolist()
    chosen = np.take_along_axis(scores, expected, axis=1)
    chosen /= chosen.sum(axis=1, keepdims=True) if router.renormalize else 1
    np.testing.assert_allclose(weights, chosen, rtol=1e-5)
    assert policy.replayed == 2


# Files that do not fit


def made(path, **changes):
    """A file of two requests, of 2 and 1 positions."""
    experts = np.tile(np.arange(TOP_K, dtype=np.int16), (3, LAYERS, 1))
    layers = np.array(SMALL.moe_layers, np.int32)
    with h5py.File(path, "w") as file:
        for name, values in ({"offsets": np.array([0, 2, 3]), "layer": layers, "experts": experts} | changes).items():
            if values is not None:
                file[name] = values
    return path


def experts_with(place, value):
    experts = np.tile(np.arange(TOP_K, dtype=np.int16), (3, LAYERS, 1))
    experts[place] = value
    return experts


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experts": None}, "has no experts"),
        ({"experts": np.zeros((3, LAYERS, TOP_K), np.float32)}, "experts: is float32"),
        ({"experts": np.zeros((3, LAYERS, TOP_K + 1), np.int16)}, f"top-{TOP_K + 1} of {LAYERS} layers"),
        ({"layer": np.arange(LAYERS, dtype=np.int32) + 9}, "the model top-2"),
        ({"offsets": np.array([0, 2, 4])}, "do not divide"),
        ({"offsets": np.array([0, 4, 3])}, "do not divide"),
        ({"weights": np.zeros((2, LAYERS, TOP_K), np.float32)}, "weights are"),
        ({"id": np.array([b"a", b"a"])}, "not unique"),
        ({"id": np.array([b"a"])}, "not one for each request"),
        ({"id": np.array([b"\xff", b"a"])}, "damaged or not as written"),
        ({"id": np.array([1, 2])}, "not fixed-length strings"),
        ({"id": np.array([b"x", b"y"])}, "none of the 5 requests"),
        ({}, "2 requests without ids, the job 5"),
        ({"experts": experts_with((2, 1, 0), EXPERTS)}, "request 1, position 0, layer"),
        ({"experts": experts_with((1, 0, 0), 1)}, "request 0, position 1"),
        ({"experts": experts_with((0, 0, 0), -1)}, "request 0, position 0"),
        ({"experts": experts_with((0, 0, 0), -7)}, "request 0, position 0"),
        ({"experts": experts_with((0, 0, 0), 0).astype(np.int64) + 2**40}, "request 0, position 0"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path, changes, words):
    path = made(tmp_path / "given.h5", **changes)
    with pytest.raises(DataError, match=words) as error:
        opened(ReplaySection(str(path)))
    assert str(path) in str(error.value)


def test_ids_are_read_where_they_are_looked_up_alone(tmp_path):
    path = made(tmp_path / "given.h5", id=np.array([b"a", b"a"]))
    with ReplayFile(path, SMALL) as file:  # as a rank that looks up nothing
        assert file.read(0, 0, 2, slice(0, 1))[0].shape == (2, 1, TOP_K)
        with pytest.raises(DataError, match="not unique"):
            file.read_ids()


def weights_with(place, value):
    weights = np.full((3, LAYERS, TOP_K), 0.5, np.float32)
    weights[place] = value
    return weights


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5])
def test_weights_that_are_no_weights_are_refused_if_they_are_used(tmp_path, value, monkeypatch):
    monkeypatch.setattr(replay_file, "BLOCK_ROWS", 2)
    names = np.array([PROMPTS[1].id.encode(), PROMPTS[2].id.encode()])
    path = made(tmp_path / "given.h5", id=names, weights=weights_with((2, 1, 0), value))
    words = rf"request 1, position 0, layer {SMALL.moe_layers[1]}, weights .*{value}.*: negative or not finite"
    with pytest.raises(DataError, match=words):
        opened(ReplaySection(str(path), weights=True))
    assert opened(ReplaySection(str(path))).files[0].has_weights


def test_weights_of_rows_that_are_routed_as_usual_are_not_looked_at(tmp_path):
    names = np.array([PROMPTS[1].id.encode(), PROMPTS[2].id.encode()])
    changes = {"experts": experts_with(2, -1), "weights": weights_with(2, np.nan)}
    path = made(tmp_path / "given.h5", id=names, **changes)
    assert opened(ReplaySection(str(path), weights=True)).weights


def test_each_block_that_is_read_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(replay_file, "BLOCK_ROWS", 2)
    blocks = []
    with ReplayFile(made(tmp_path / "given.h5"), SMALL) as file:
        file.require_valid(weights=False, on_block=lambda: blocks.append(1))
    assert len(blocks) == 2


def test_results_of_another_layout_and_models_without_moe_layers_are_refused(tmp_path):
    path = made(tmp_path / "given.h5")
    dense = structs.replace(SMALL, dense_layers=tuple(range(SMALL.num_layers)))
    with pytest.raises(DataError, match="has routing, the model no MoE layers"):
        ReplayFile(path, dense)
    recorded, _ = run_with(tmp_path / "recorded")
    with h5py.File(recorded, "a") as file:
        file.attrs["version"] = 2
    with pytest.raises(DataError, match="not a results file of layout 1: it says 2"):
        ReplayFile(recorded, SMALL)


def test_more_positions_than_the_job_computes_and_missing_weights_are_refused(tmp_path):
    names = np.array([PROMPTS[2].id.encode(), b"another"])
    offsets = np.array([0, LIMIT + 1, LIMIT + 1])
    experts = np.tile(np.arange(TOP_K, dtype=np.int16), (LIMIT + 1, LAYERS, 1))
    path = made(tmp_path / "given.h5", id=names, offsets=offsets, experts=experts)
    replay = opened(ReplaySection(str(path)))
    with pytest.raises(DataError, match=f"{LIMIT + 1} positions, the job computes at most {LIMIT}"):
        replay.problem_of(named_requests()[2])
    with pytest.raises(DataError, match="has no weights"):
        opened(ReplaySection(str(path), weights=True))


def test_a_file_that_is_missing_or_no_hdf5_is_refused(tmp_path):
    with pytest.raises(NoInputError):
        ReplayFile(tmp_path / "none.h5", SMALL)
    (tmp_path / "text.h5").write_text("x" * 100)
    with pytest.raises(DataError):
        ReplayFile(tmp_path / "text.h5", SMALL)


def with_lines(folder, *paths, **sections):
    """PROMPTS that name files of routing, None for none, as a job in the folder has them, and the job."""
    job = make_job(folder, **sections)
    prompts = [structs.replace(prompt, replay=path) for prompt, path in zip(PROMPTS, paths, strict=True)]
    with LineFiles(job, SMALL, on_block=lambda: None) as files:
        return [files.check(prompt) for prompt in prompts], job


def test_a_prompt_line_names_its_own_file_which_comes_before_the_jobs(tmp_path):
    recorded, _ = run_with(tmp_path / "recorded")
    shifted_file(tmp_path / "of_job.h5", recorded)
    experts, offsets = shifted_file(tmp_path / "plain.h5", recorded)
    with h5py.File(tmp_path / "of_line.h5", "w") as file:  # of one request, without ids
        own = (experts[offsets[1] : offsets[2]] + 1) % EXPERTS
        file["offsets"], file["layer"], file["experts"] = [0, len(own)], np.int32(SMALL.moe_layers), own
    prompts, _ = with_lines(tmp_path, None, "of_line.h5", None, "recorded/r.h5", None)
    assert not any(prompt.error for prompt in prompts)
    requests = named_requests()
    for request, prompt in zip(requests, prompts, strict=True):
        request.prompt = prompt
    replay = opened(ReplaySection(str(tmp_path / "of_job.h5")), prompts, folder=tmp_path)
    with closing(replay):
        run = Run(tmp_path, requests, replay_of=replay, trace={"routing": "weights"})
        run.lanes.run()
    run.journal.close()
    merge(tmp_path / "r.h5", [tmp_path / "0.part"], num_requests=len(LENGTHS), provenance=PROVENANCE)
    found, plain = read(tmp_path / "r.h5")["routing/experts"], read(recorded)["routing/experts"]
    for request in range(len(LENGTHS)):
        rows = slice(offsets[request], offsets[request + 1])
        expected = {1: own, 3: plain[rows]}.get(request, experts[rows])
        np.testing.assert_array_equal(found[rows], expected)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("none.h5", "cannot be read"),
        ("text.h5", "text.h5"),
        ("other.h5", "no routing of request"),
        ("few.h5", "top-1"),
        ("plain.h5", "plain.h5: has routing of 5 requests without ids, a line needs 1"),
    ],
)
def test_a_line_whose_file_does_not_fit_fails_alone(tmp_path, path, words):
    (tmp_path / "text.h5").write_text("x" * 100)
    recorded, _ = run_with(tmp_path / "recorded")
    experts, _ = shifted_file(tmp_path / "plain.h5", recorded)
    for name, shape in (("other.h5", experts[:3]), ("few.h5", experts[:3, :, :1])):
        with h5py.File(tmp_path / name, "w") as file:
            file["offsets"], file["layer"], file["experts"] = [0, 3], np.int32(SMALL.moe_layers), shape
            file["id"] = np.array([b"another"])
    prompts, _ = with_lines(tmp_path, None, path, path, "recorded/r.h5", None)
    assert [bool(prompt.error) for prompt in prompts] == [False, True, True, False, False]
    for prompt in prompts[1:3]:
        assert prompt.error.startswith("replay: ")
        assert words in prompt.error
        assert (prompt.text, prompt.tokens, prompt.replay) == (None, None, None)


def test_a_line_goes_without_balancing_and_not_with_the_output_of_the_job(tmp_path):
    run_with(tmp_path / "recorded")
    (refused, *_), _ = with_lines(tmp_path, "recorded/r.h5", *[None] * 4, balance={"mode": "bias"})
    assert "goes with balance.mode" in refused.error
    output = {"results": str(tmp_path / "recorded/r.h5")}
    (refused, *_), _ = with_lines(tmp_path, "recorded/r.h5", *[None] * 4, output=output)
    assert "is the output of the job" in refused.error


def test_a_line_with_more_positions_than_the_job_computes_fails_alone(tmp_path):
    experts = np.tile(np.arange(TOP_K, dtype=np.int16), (LIMIT + 1, LAYERS, 1))
    made(tmp_path / "given.h5", offsets=np.array([0, LIMIT + 1]), experts=experts)
    prompts, _ = with_lines(tmp_path, None, None, "given.h5", None, None)
    requests = named_requests()
    requests[2].prompt = prompts[2]
    replay = opened(ReplaySection(), prompts, folder=tmp_path)
    with closing(replay):
        problems = list(map(replay.problem_of, requests))
    assert [bool(problem) for problem in problems] == [False, False, True, False, False]
    assert f"{LIMIT + 1} positions, the job computes at most {LIMIT}" in problems[2]


def test_a_file_more_than_can_be_open_fails_its_lines(tmp_path, monkeypatch):
    run_with(tmp_path / "recorded")
    (tmp_path / "again.h5").write_bytes((tmp_path / "recorded/r.h5").read_bytes())
    monkeypatch.setattr(module, "MOST_FILES", 1)
    prompts, _ = with_lines(tmp_path, "recorded/r.h5", "again.h5", "recorded/r.h5", None, None)
    assert [bool(prompt.error) for prompt in prompts] == [False, True, False, False, False]


def test_samples_of_a_prompt_use_its_routing(tmp_path):
    run_with(tmp_path / "recorded")
    prompts = [*PROMPTS, structs.replace(PROMPTS[1], index=5, id="q1#1", prompt_id="q1", replay="recorded/r.h5")]
    with LineFiles(make_job(tmp_path), SMALL, on_block=lambda: None) as files:
        checked = [files.check(prompt) for prompt in prompts]
    assert not checked[5].error
    replay = opened(ReplaySection(), checked, folder=tmp_path)
    with closing(replay):
        assert replay.requests.tolist() == [[-1, -1]] * 5 + [[0, 1]]
