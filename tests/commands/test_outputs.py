"""Outputs of the commands: none replaces an input, or what another program wrote."""

import os
import shutil
import tomllib

import h5py
import pytest

from moempi.cli import main
from mpirun import ROOT, execute, python
from storage.test_records import make_request
from storage.test_results import merged

ARCHITECTURE = ROOT / "jobs/arch/ep64.toml"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a checkpoint, its weights, prompts, a job, results and a file of someone else."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "tests/fixtures/qwen3_moe", "hub")
    assert main(["convert", "hub", "weights.h5"]) == 0
    (tmp_path / "prompts.jsonl").write_text('{"tokens": [1, 2]}\n')
    (tmp_path / "job.toml").write_text(
        "[model]\nweights = 'weights.h5'\n[input]\nprompts = 'prompts.jsonl'\n[output]\nresults = 'new/results.h5'\n"
    )
    merged(tmp_path / "results.h5", [make_request(0)], num_requests=1)
    (tmp_path / "topology.json").write_text("{}")
    (tmp_path / "notes").write_text("mine")
    shutil.copy(ARCHITECTURE, "arch.toml")
    return tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("command", "force_helps"),
    [
        ("convert hub hub/model.safetensors", False),
        ("convert hub hub/model.h5", False),
        ("convert hub notes", True),
        ("convert hub results.h5", True),
        ("convert hub hub", False),
        ("init arch.toml arch.toml", False),
        ("init arch.toml notes", True),
        ("export results.h5 results.h5", False),
        ("export results.h5 weights.h5", True),
        ("export results.h5 none/out.jsonl", False),
        ("place results.h5 -o results.h5", False),
        ("place results.h5 --topology topology.json -o topology.json", False),
    ],
)
def test_a_wrong_output_is_one_line_and_nothing_changes(folder, capsys, command, force_helps):
    before = contents(folder)
    for force in [[], ["--force"]][: 1 if force_helps else 2]:
        assert main([*command.split(), *force]) == 74
        assert capsys.readouterr().err.count("\n") == 1
    assert contents(folder) == before
    if force_helps:
        assert main([*command.split(), "--force"]) == 0


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (
            "convert hub new.h5",
            "wrote new.h5: 27 tensors, 45.80 KiB\nhub: holds no tokenizer: prompts for new.h5 are lists of tokens",
        ),
        ("init arch.toml new.h5 --seed 3", "wrote new.h5: random numbers of seed 3, 7.18 MiB, without a tokenizer"),
        ("export results.h5 new.jsonl", "wrote new.jsonl: 1 request"),
    ],
)
def test_a_command_says_what_it_wrote_and_replaces_no_earlier_output(folder, capsys, command, line):
    assert main(command.split()) == 0
    assert capsys.readouterr().out == f"{line}\n"
    new = next(folder.glob("new*"))
    before = new.stat()
    assert main(command.split()) == 74
    assert capsys.readouterr().err == f"moempi: {new.name}: exists; --force replaces it\n"
    assert new.stat() == before
    assert main([*command.split(), "--force"]) == 0


def run_in(folder, *settings, force=False):
    words = [word for setting in settings for word in ("--set", setting)]
    return execute("env", "-C", folder, *python("-m", "moempi", "run", "job.toml", *words, *["--force"] * force))


@pytest.mark.mpi
@pytest.mark.parametrize(
    "settings",
    [
        ["output.results=weights.h5"],
        ["output.results=prompts.jsonl"],
        ["output.results=job.toml"],
        ["output.results=hard"],
        ["output.results=soft"],
        ["output.results=notes"],
        ["output.results=topology.json", "topology.file=topology.json"],
        ["output.results=topology.json", "topology.emulate=topology.json"],
        ["output.results=topology.json", "placement.file=topology.json"],
        ["output.results=arch.toml", "model.architecture=arch.toml"],
        ["output.results=r.h5", "input.prompts=r.h5.run.json"],
        ["output.results=r.h5", "input.prompts=r.h5.parts/deep/prompts.jsonl"],
        ["output.results=r.h5", "input.prompts=r.h5.logs/rank-00000.log"],
        ["output.results=hub"],
        ["output.results=fifo"],
        ["output.results=/dev/null"],
        ["output.results=notes/r.h5"],
        ["output.results=" + "n" * 235 + ".h5"],
    ],
    ids=lambda settings: settings[-1][:40],
)
def test_a_wrong_output_of_a_run_is_one_line_and_nothing_changes(folder, settings):
    os.mkfifo("fifo")
    (folder / "hard").hardlink_to("weights.h5")
    (folder / "soft").symlink_to("prompts.jsonl")
    for name in ("r.h5.run.json", "r.h5.parts/deep/prompts.jsonl", "r.h5.logs/rank-00000.log"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy("prompts.jsonl", name)
    before = contents(folder)
    outcome = run_in(folder, *settings)
    assert (outcome.code, len(outcome.lines)) == (74, 1), outcome.err
    assert contents(folder) == before


@pytest.mark.mpi
def test_results_are_written_through_a_link_and_replaced(folder):
    (folder / "link.h5").symlink_to("target.h5")
    for _ in range(2):
        assert run_in(folder, "output.results=link.h5").code == 0
    assert (folder / "link.h5").is_symlink()
    assert (folder / "target.h5").is_file()
    assert run_in(folder, "output.results=notes", force=True).code == 0


@pytest.mark.mpi
def test_overrides_of_several_lines_are_recorded_as_comments_of_the_job(folder):
    results = "a b\n'*\"$(c)\n=.h5"
    assert run_in(folder, f"output.results={results}", "sampling.stop=[\n'a',\n]").code == 0
    with h5py.File(folder / results) as file:
        job = tomllib.loads(file.attrs["job"].decode())
    assert job == tomllib.loads((folder / "job.toml").read_text())
