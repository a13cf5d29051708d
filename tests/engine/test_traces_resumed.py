"""The real program records, is stopped, goes on in other layouts, and exports: each position once."""

import h5py
import numpy as np
import pytest

from moempi import Results
from moempi.storage.convert import convert
from mpirun import ROOT, execute, python


@pytest.fixture(scope="module")
def run(tmp_path_factory, runner):
    """`run(ranks, name, *options, key=value)` scores the first 40 questions into `<name>.h5` and records."""
    folder = tmp_path_factory.mktemp("resumed")
    convert(ROOT / "weights/abacus", folder / "abacus.h5")
    lines = (ROOT / "jobs/abacus.jsonl").read_text().splitlines()[:40]
    (folder / "prompts.jsonl").write_text("\n".join(lines))

    def run(num_ranks, name, *options, code=0, **settings):
        named = {
            "model.weights": folder / "abacus.h5",
            "input.prompts": folder / "prompts.jsonl",
            "output.results": folder / f"{name}.h5",
            "task": "score",
            "score.top_n": 3,
            "score.threshold": -4.0,
            "run.precision": "float32",
            "run.max_sequences": 2,
            "run.batch_tokens": 8,
            "trace.routing": "experts",
            "trace.hidden": "[0,5]",
        } | settings
        words = [word for key, value in named.items() for word in ("--set", f"{key}={value}")]
        outcome = runner(num_ranks).run("run", ROOT / "jobs/abacus.toml", *words, *options)
        assert outcome.code == code, outcome.err
        return folder / f"{name}.h5"

    return run


def read(path):
    found = {}
    with h5py.File(path) as file:
        for name in ("logprobs", "top_tokens", "top_logprobs", "above/offsets", "above/tokens", "above/logprobs"):
            found[name] = file[f"score/{name}"][:]
        for name in ("routing/experts", "hidden/offsets"):
            found[name] = file[name][:]
        for layer in ("000", "005"):
            found[f"hidden {layer}"] = file[f"hidden/values/{layer}"][:]
    return found


@pytest.mark.mpi
def test_a_resumed_run_has_each_value_of_each_position_once(run):
    expected = read(run(1, "alone"))
    for ranks, settings in ((2, {}), (4, {"parallel.stages": 2, "exchange.immediate": "true"})):
        run(ranks, "stopped", "--max-minutes", "0.0005", code=75, **settings)
    for name, values in read(run(3, "stopped")).items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


@pytest.mark.mpi
def test_the_dry_run_and_the_export_agree_with_the_results(run, tmp_path):
    path = run(2, "exported")
    words = ["--set", f"model.weights={path.parent / 'abacus.h5'}", "--set", f"output.results={tmp_path / 'r.h5'}"]
    words += ["--set", "trace.routing=experts", "--set", "trace.hidden=[0,5]", "--dry-run", "--world", "2"]
    dry = execute(*python("-m", "moempi", "run", ROOT / "jobs/abacus.toml", *words))
    with h5py.File(path) as file:
        tokens = len(file["routing/experts"])
        per_layer = file["hidden/values/000"].id.get_storage_size() // tokens
        per_token = [file["routing/experts"].nbytes // tokens, 2 * per_layer]
    assert f"recorded bytes of a token in the results: routing {per_token[0]:,}, hidden {per_token[1]:,}" in dry.out
    exported = execute(*python("-m", "moempi", "export", "--format", "npz", path, tmp_path / "out.npz"))
    assert exported.code == 0, exported.err
    with np.load(tmp_path / "out.npz") as found, Results(path) as results:
        np.testing.assert_array_equal(found["3.routing"], results[3].routing)
        np.testing.assert_array_equal(found["3.hidden.5"], results[3].hidden(5))
    refused = execute(*python("-m", "moempi", "export", "--format", "npz", path, "-"))
    assert (refused.code, "writes a file" in refused.err) == (64, True)


@pytest.mark.mpi
def test_a_replayed_job_says_so_and_a_file_that_does_not_fit_is_refused(run, tmp_path):
    recorded = run(2, "recorded", **{"trace.routing": "weights"})
    expected = read(recorded)
    again = run(3, "replayed", **{"trace.routing": "weights", "replay.routing": recorded})
    for name, values in read(again).items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)
    with h5py.File(again) as file:
        experts = file["routing/experts"].shape
        assert file["replay/routes"][:].sum() == experts[0] * experts[1]
        assert file["replay/changed"][:].sum() == 0
    with h5py.File(recorded, "a") as file:
        file["routing/experts"][0, 0, 0] = 99
    run(2, "refused", code=65, **{"replay.routing": recorded})
