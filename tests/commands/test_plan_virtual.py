"""`moempi plan` with uneven routing, slow ranks and slow links: its table, and what it refuses."""

import re

import h5py
import numpy as np
import pytest

from moempi.cli import main
from moempi.storage.convert import convert
from mpirun import ROOT, execute, python

MACHINE = ROOT / "jobs/machines/mission-h100.toml"
ARCHITECTURE = "model.architecture=" + str(ROOT / "jobs/arch/ep64.toml")


def plan(*arguments, job=ROOT / "jobs/abacus.toml", ranks="16"):
    words = ["plan", str(job), "--machine", str(MACHINE), "--ranks", ranks, "--prompt", "64", *map(str, arguments)]
    try:
        return main(words)
    except SystemExit as end:  # of the parser
        return end.code


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the shipped model and the recorded routing of a run of it."""
    folder = tmp_path_factory.mktemp("virtual")
    convert(ROOT / "weights/abacus", folder / "abacus.h5")
    (folder / "prompts.jsonl").write_text("\n".join((ROOT / "jobs/abacus.jsonl").read_text().splitlines()[:10]))
    keys = {"input.prompts": folder / "prompts.jsonl", "output.results": folder / "r.h5", "trace.routing": "true"}
    words = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    job, weights = ROOT / "jobs/abacus.toml", f"model.weights={folder / 'abacus.h5'}"
    outcome = execute(*python("-m", "moempi", "run", job, "--set", weights, *words))
    assert outcome.code == 0, outcome.err
    return folder


def rows(text):
    """Token/s of the virtual runs by step and name."""
    lines = text[text.index("virtual time") :].splitlines()
    found = (re.fullmatch(r" (prefill|decode) +(.+?)  +([\d,]+) +([\d.]+%).*", line) for line in lines)
    return {(one[1], one[2]): int(one[3].replace(",", "")) for one in found if one}


def test_each_condition_and_all_of_them_have_a_row_of_80_columns(folder, capsys):
    conditions = ["--slow-rank", "3=2", "--slow-rank", "5=1.5", "--slow-link", "3=100", "--routing", "zipf:1"]
    weights = ["--set", f"model.weights={folder / 'abacus.h5'}", "--context", "64"]
    assert plan(*weights, "--ranks-per-node", "8", "--steps", "30", *conditions) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    found = rows(text)
    for step in ("prefill", "decode"):
        names = [name for kind, name in found if kind == step]
        assert names == ["even", "zipf:1", "2 slow ranks", "slow link 3=100", "all of these"]
        speeds = {name: found[step, name] for name in names}
        assert max(speeds, key=speeds.get) == "even"
        assert min(speeds, key=speeds.get) == "all of these"
    assert "simulated in" in text


def test_recorded_routing_is_as_uneven_as_it_was(folder, capsys):
    weights = ["--set", f"model.weights={folder / 'abacus.h5'}", "--context", "64"]
    for routing in ("uniform", folder / "r.h5"):
        assert plan(*weights, "--steps", "30", "--routing", routing) == 0
    found = [rows(text) for text in capsys.readouterr().out.split("measurement")[:2]]
    assert 0 < found[1]["decode", "r.h5"] <= found[1]["decode", "even"]


def test_what_cannot_be_is_one_line(folder, capsys):
    weights = ["--set", f"model.weights={folder / 'abacus.h5'}", "--context", "64"]
    damaged = folder / "damaged.h5"
    damaged.write_bytes((folder / "r.h5").read_bytes())
    with h5py.File(damaged, "r+") as file:
        file["routing/experts"][0, 0, 0] = 16
    (folder / "cut.h5").write_bytes((folder / "r.h5").read_bytes()[:3000])
    (folder / "text.h5").write_text("not HDF5")
    for arguments, code, words in (
        (["--slow-rank", "99999=2"], 78, "rank 99999 cannot be slow: the job has 16 ranks"),
        (["--slow-link", "16=2"], 78, "rank 16 cannot be slow"),
        (["--slow-rank", "1=0.5"], 64, "0.5 is not a factor from 1"),
        (["--slow-rank", "1=nan"], 64, "nan is not a number"),
        (["--slow-rank", "1"], 64, "is not a number"),
        (["--slow-rank", "-1=2"], 64, "expected one argument"),
        (["--slow-rank", "1=2", "--slow-rank", "1=3"], 64, "--slow-rank names a rank twice"),
        (["--routing", "zipf:x"], 64, "zipf:x: x is not a number"),
        (["--routing", "zipf"], 64, "is not a number"),
        (["--routing", "zipf:11"], 64, "at most 10"),
        (["--routing", folder / "none.h5"], 66, "none.h5"),
        (["--routing", folder / "abacus.h5"], 65, "not a results file"),
        (["--routing", folder / "text.h5"], 65, "text.h5"),
        (["--routing", folder / "cut.h5"], 65, "cut.h5"),
        (["--routing", damaged], 65, "beyond the 16 experts"),
        (["--steps", "0"], 64, "0 is not a whole number from 1"),
        (["--search", "--routing", "uniform"], 64, "--routing does not go with --search"),
        (["--search", "--steps", "5"], 64, "--steps does not go with --search"),
    ):
        assert plan(*weights, *arguments) == code, arguments
        err = capsys.readouterr().err
        assert words in err, (arguments, err)
        assert err.count("\n") == 1


def test_routing_of_another_model_is_refused(folder, capsys):
    other = ["--set", "model.weights=none.h5", "--set", ARCHITECTURE, "--routing", folder / "r.h5"]
    assert plan(*other) == 78
    err = capsys.readouterr().err
    assert re.search(r"r\.h5: is of a model with 16 experts, top-2, in 3 layers; the job's has 64, top-8, in \d+", err)
    with h5py.File(folder / "r.h5") as file:
        assert np.unique(file["routing/experts"]).max() < 16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("tflops = 240.0", "tflops = -1.0"), "tflops"),
        (("tflops = 240.0", "tflops = nan"), "tflops"),
        (("tflops = 240.0", ""), "tflops"),
        (("tflops = 240.0", "tflop = 240.0"), "tflop"),
        (('name = "switch"', 'name = "node"'), "levels are not self, island, node, switch, network"),
        (("memory_gb = 64.0", 'memory_gb = "64GB"'), "memory_gb"),
        (("[[levels]]", "[[levels"), "machine.toml"),
    ],
)
def test_a_wrong_machine_file_is_one_line(folder, capsys, change, words):
    machine = folder / "machine.toml"
    machine.write_text(MACHINE.read_text().replace(*change))
    job, weights = str(ROOT / "jobs/abacus.toml"), f"model.weights={folder / 'abacus.h5'}"
    assert main(["plan", job, "--machine", str(machine), "--ranks", "4", "--set", weights]) == 78
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
