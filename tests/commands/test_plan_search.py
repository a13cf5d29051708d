"""`moempi plan --search`: what it prints, the job file that it writes, and what it refuses."""

import re
import tomllib

import pytest

from moempi.cli import main
from moempi.commands.plan import forecast_job
from moempi.config.job import read_job_file
from moempi.config.machine_file import read_machine
from moempi.layout.topology import virtual
from mpirun import ROOT

MACHINE = ROOT / "jobs/machines/mission-h100.toml"
RANKS = ["--ranks", "16", "--ranks-per-node", "8"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a job of the model ep64 and a folder for the job that is found."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "best").mkdir()
    (tmp_path / "arch.toml").write_text((ROOT / "jobs/arch/ep64.toml").read_text())
    (tmp_path / "job.toml").write_text(
        "[model]\nweights = 'none.h5'\narchitecture = 'arch.toml'\n[input]\nprompts = 'prompts.jsonl'\n"
        "[output]\nresults = 'new/results.h5'\n[run]\nbackend = 'cupy'\ntimeout_s = 77.0\n"
        "[sampling]\nstop = ['\\n', 'a\"b']\nlogit_bias = {5 = -1.0}\n[topology]\nrank_memory = '0.1GB'\n"
        "[chat]\ntemplate_kwargs = {a = [1, {b = true}]}\n"
    )
    return tmp_path


def is_head_of_parts(line):
    return line.startswith(" slowest stage ")


def plan(*arguments, job="job.toml"):
    return main(["plan", str(job), "--machine", str(MACHINE), *RANKS, *arguments])


def test_the_job_file_works_where_it_lies_and_keeps_what_the_search_does_not_decide(folder, capsys):
    assert plan("--search", "--context", "128", "-o", "best/best.toml") == 0
    printed = capsys.readouterr().out
    found, given = read_job_file("best/best.toml"), read_job_file("job.toml")
    for section in ("model", "input", "output", "task", "sampling", "chat", "topology"):
        assert getattr(found, section) == getattr(given, section)
    assert found.run.timeout_s == 77.0
    text = (folder / "best/best.toml").read_text()
    assert tomllib.loads(text)["model"]["architecture"] == "../arch.toml"
    assert "A model's forecast, not a measurement" in text
    replicas, ranks = (int(number) for number in re.search(r"# (\d+) x this job on (\d+) ranks", text).groups())
    assert replicas * ranks == 16
    sizes = ["--ranks", str(ranks), "--ranks-per-node", str(min(ranks, 8))]
    assert main(["plan", "best/best.toml", "--machine", str(MACHINE), "--context", "128", *sizes]) == 0
    topology, machine = virtual(ranks, min(ranks, 8)), read_machine(MACHINE)
    forecast = forecast_job(found, machine, topology, context=128, prompt=64)[-1]
    searched = float(re.search(r"\n (\d[\d,]+)  ", printed)[1].replace(",", ""))
    assert replicas * forecast.tokens_per_s(overlap=True) == pytest.approx(searched, rel=1e-3)
    assert main(["run", "best/best.toml", "--dry-run", "--world", *sizes[1:2], *sizes[2:], "--context", "128"]) == 0


@pytest.mark.parametrize(
    ("goal", "heads"),
    [("decode", ["ms a token"]), ("prefill", ["first s"]), ("mixed", ["ms a token", "first s"])],
)
def test_a_search_prints_tables_of_80_columns(folder, capsys, goal, heads):
    assert plan("--search", "--explain", "--for", goal, "--prompt", "64", "--context", "128") == 0
    lines = capsys.readouterr().out.splitlines()
    parts = [line.split() for line in lines[lines.index(next(filter(is_head_of_parts, lines))) + 2 :][:2]]
    for *_, step_ms, arithmetic, memory, link, _host, idle in parts:
        busy = max(float(arithmetic), float(memory), float(link)) / float(step_ms)
        assert 0 < busy <= 1.001
        assert float(idle.rstrip("%")) <= 100 * (1 - busy) + 3  # milliseconds of this small model have few digits
    assert max(map(len, lines)) <= 80
    front, conventional = (line for line in lines if "token/s " in line)
    for head in ["token/s", *heads]:
        assert head in front
        assert head in conventional
    for name in ("TP8 x PP", "EP in a node", "EP16, no stages"):
        assert any(line.strip().startswith(name) for line in lines)
    text = " ".join(" ".join(lines).split())
    assert "faster than the best of another shape" in text
    assert "A model's forecasts, not measurements" in text


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--set", "topology.rank_memory=1MB"], 78, r"no layout fits: .* MiB on each of 16 ranks, which has .* KiB"),
        (["--set", "parallel.experts_per_rank=1"], 78, r"parallel.experts_per_rank = 1: .* it needs 64 ranks"),
        (["--token-ms", "0.001"], 78, r"no layout keeps --token-ms 0\.001: the soonest needs 0\.\d+"),
        (["--for", "prefill", "--first-token-s", "0"], 78, r"no layout keeps --first-token-s 0: the soonest needs"),
        (["--for", "prefill", "--token-ms", "5"], 64, "--token-ms does not go with --for prefill"),
        (["--first-token-s", "5"], 64, "--first-token-s does not go with --for decode"),
        (["--search-s", "0"], 78, r"ended at its limit, --search-s 0: (\d+) of \1 shapes were not tried"),
        (["--output-tokens", "5"], 64, "--output-tokens goes with --for mixed"),
        (["--set", "task=score", "--for", "decode"], 64, "generates nothing"),
        (["--set", "placement.file=arch.toml"], 78, "placement.file"),
        (["-o", "job.toml", "--force"], 74, "same file"),
        (["-o", "none/best.toml"], 74, "cannot be written"),
    ],
)
def test_what_cannot_be_is_one_line(folder, capsys, arguments, code, words):
    assert plan("--search", "--context", "128", *arguments) == code
    err = capsys.readouterr().err
    assert re.search(words, err)
    assert err.count("\n") == 1


@pytest.mark.parametrize("flag", [["--for", "decode"], ["--token-ms", "5"], ["-o", "best.toml"], ["--search-s", "9"]])
def test_flags_of_the_search_without_it_are_refused(folder, capsys, flag):
    assert plan(*flag) == 64
    assert "goes with --search" in capsys.readouterr().err


def test_a_machine_without_memory_is_refused_if_the_job_states_none(folder, capsys):
    machine = folder / "machine.toml"
    machine.write_text(MACHINE.read_text().replace("memory_gb = 64.0", "memory_gb = 0.0"))
    job = ["plan", "job.toml", "--machine", str(machine), *RANKS, "--search"]
    assert main([*job, "--set", "topology.rank_memory=auto"]) == 78
    assert "topology.rank_memory, or memory_gb" in capsys.readouterr().err


def test_an_earlier_file_is_replaced_only_with_force(folder, capsys):
    (folder / "best.toml").write_text("mine")
    assert plan("--search", "--context", "128", "-o", "best.toml") == 74
    assert capsys.readouterr().err == "moempi: best.toml: exists; --force replaces it\n"
    assert (folder / "best.toml").read_text() == "mine"
    assert plan("--search", "--context", "128", "-o", "best.toml", "--force") == 0
    assert read_job_file("best.toml").output.results == "new/results.h5"
