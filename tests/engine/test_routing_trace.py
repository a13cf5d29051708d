"""Recorded routing: one row for each computed token, the same in any layout and after a restart."""

import h5py
import numpy as np
import pytest

from moempi.storage.convert import convert
from mpirun import ROOT, mpirun, python

JOB = ROOT / "jobs/abacus.toml"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`run(ranks, name, *options, key=value)` runs the first 40 questions into `<name>.h5`, recording the routing."""
    folder = tmp_path_factory.mktemp("trace")
    convert(ROOT / "weights/abacus", folder / "abacus.h5")
    lines = (ROOT / "jobs/abacus.jsonl").read_text().splitlines()[:40]
    (folder / "prompts.jsonl").write_text("\n".join(lines))

    def run(num_ranks, name, *options, code=0, **settings):
        results = folder / f"{name}.h5"
        named = {
            "model.weights": folder / "abacus.h5",
            "input.prompts": folder / "prompts.jsonl",
            "output.results": results,
            "run.precision": "float32",
            "run.max_sequences": 4,
            "run.batch_tokens": 24,
            "trace.routing": "true",
        }
        words = [word for key, value in (named | settings).items() for word in ("--set", f"{key}={value}")]
        outcome = mpirun(num_ranks, *python("-m", "moempi", "run", JOB, *words, *options))
        assert outcome.code == code, outcome.err
        return results

    return run


@pytest.fixture(scope="module")
def alone(run):
    with h5py.File(run(1, "alone")) as file:
        return {name: file[f"routing/{name}"][:] for name in ("offsets", "layer", "experts", "weights")}


def assert_whole(path, alone, *, within=0.0):
    """Every computed token has its experts and weights, and they are those of one rank.

    Of weights that are equal `within` rounding, either expert may be chosen.
    """
    with h5py.File(path) as file:
        prompts, tokens = np.diff(file["prompt/offsets"][:]), np.diff(file["output/offsets"][:])
        np.testing.assert_array_equal(np.diff(file["routing/offsets"][:]), prompts + tokens - 1)
        for name in ("offsets", "layer"):
            np.testing.assert_array_equal(file[f"routing/{name}"][:], alone[name])
        others = np.mean(file["routing/experts"][:] != alone["experts"])
        assert others <= (0.005 if within else 0.0)
        np.testing.assert_allclose(file["routing/weights"][:], alone["weights"], rtol=0, atol=within)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("num_ranks", "settings", "within"),
    [
        (3, {"run.micro_batches": 3}, 0.0),
        (5, {"parallel.stages": 2, "parallel.stage_layers": "[4,2]", "parallel.stage_ranks": "[2,3]"}, 0.0),
        (4, {"parallel.tensor": 2}, 1e-5),
        (4, {"exchange.hops": 2, "topology.ranks_per_node": 2}, 1e-5),
    ],
)
def test_any_layout_records_the_routing_of_one_rank(run, alone, num_ranks, settings, within):
    results = run(num_ranks, f"layout-{num_ranks}-{len(settings)}-{within}", **settings)
    assert_whole(results, alone, within=within)
    with h5py.File(results) as file:
        layers = file["routing/layer"][:]
        load = [np.bincount(chosen.reshape(-1), minlength=16) for chosen in file["routing/experts"][:].swapaxes(0, 1)]
        assert file["experts/layer"][:].tolist() == layers.tolist()
        np.testing.assert_array_equal(file["experts/load"][:], load)
        assert file["placement/seat"][:].tolist() == list(range(num_ranks))
        # The rows of one rank, step and layer are numbered from 0 on.
        for layer in range(len(layers)):
            keys = np.stack([file["routing/rank"][:, layer], file["routing/step"][:], file["routing/row"][:, layer]])
            keys = keys[:, np.lexsort(keys[::-1])]
            follows = (np.diff(keys[:2], axis=1) == 0).all(axis=0)
            np.testing.assert_array_equal(keys[2, 1:], np.where(follows, keys[2, :-1] + 1, 0))
            stage = file["placement/stage"][:][file["routing/rank"][:, layer]]
            assert len(set(stage.tolist())) == 1


@pytest.mark.mpi
def test_a_resumed_run_has_each_token_once(run, alone):
    for ranks, settings in ((3, {}), (2, {"parallel.stages": 2, "parallel.stage_layers": "[5,1]"})):
        run(ranks, "stopped", "--max-minutes", "0.0005", code=75, **settings)
    results = run(4, "stopped")
    assert_whole(results, alone)


@pytest.mark.mpi
def test_experts_alone_take_a_byte_each_and_no_more(run, alone):
    settings = {"parallel.stages": 2, "parallel.stage_layers": "[4,2]", "trace.routing": "experts"}
    with h5py.File(run(4, "experts", **settings)) as file:
        assert sorted(file["routing"]) == ["experts", "layer", "offsets"]
        assert file["routing/experts"].dtype == np.uint8
        np.testing.assert_array_equal(file["routing/experts"][:], alone["experts"])


@pytest.mark.mpi
def test_no_routing_is_recorded_unless_asked_for(run):
    with h5py.File(run(2, "plain", **{"trace.routing": "false"})) as file:
        assert "routing" not in file
        assert sorted(file["placement/hosted/expert"][:].tolist()) == sorted(list(range(16)) * 3)
