"""The command line: exit codes and one line for every refusal."""

import pytest

import mpirun as launching
from moempi import __version__, cli
from moempi.commands import inspect
from moempi.errors import DataError


def moempi(*arguments):
    return launching.execute(*launching.python("-m", "moempi", *arguments))


def test_help_and_version():
    outcome = moempi("--help")
    assert outcome.code == 0
    for command in ("run", "convert", "init", "inspect", "export", "show", "plan", "place", "check", "bench"):
        assert f"\n    {command} " in outcome.out
    assert moempi("--version").out.strip() == f"moempi {__version__}"


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["run"], ["convert", "one"], ["run", "job.toml", "--nonsense"]], ids=" ".join
)
def test_usage_errors_are_one_line_and_64(arguments, capsys):
    with pytest.raises(SystemExit) as ending:
        cli.main(arguments)
    assert ending.value.code == 64
    err = capsys.readouterr().err
    assert err.startswith("moempi: ")
    assert err.count("\n") == 1


@pytest.fixture
def failing(monkeypatch):
    """`failing(error)` makes the command `inspect` raise it."""

    def make(error):
        def run(_chosen):
            raise error

        monkeypatch.setattr(inspect, "run", run)

    return make


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("line 3\n is torn"), 65, "moempi: line 3 is torn\n"),
        (ValueError("x < 0"), 70, "moempi: ValueError: x < 0\n"),
        (KeyboardInterrupt(), 130, "moempi: interrupted\n"),
    ],
)
def test_errors_are_one_line(error, code, line, capsys, failing):
    failing(error)
    assert cli.main(["inspect", "some.h5"]) == code
    assert capsys.readouterr().err == line


def test_debug_prints_the_traceback(capsys, failing):
    failing(ValueError("x < 0"))
    assert cli.main(["inspect", "some.h5", "--debug"]) == 70
    assert "Traceback" in capsys.readouterr().err


def test_commands_without_ranks_start_no_mpi(tmp_path):
    program = f"""
import sys
from moempi import cli
assert cli.main(["inspect", {str(tmp_path / "none.h5")!r}]) == 66
assert "mpi4py" not in sys.modules
"""
    assert launching.execute(*launching.python("-c", program)).code == 0


def test_the_parser_imports_no_command():
    program = """
import sys
from moempi import cli
try:
    cli.main(["--help"])
except SystemExit as ending:
    assert ending.code == 0
assert not {"numpy", "h5py", "rich", "msgspec", "mpi4py"} & sys.modules.keys()
"""
    outcome = launching.execute(*launching.python("-c", program))
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_without_mpi(name):
    program = f"""
import sys
from moempi import cli
try:
    cli.main([{name!r}, "--help"])
except SystemExit as ending:
    assert ending.code == 0
assert "mpi4py" not in sys.modules
"""
    outcome = launching.execute(*launching.python("-c", program))
    assert outcome.code == 0, outcome.err
    assert f"usage: moempi {name} " in outcome.out


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        (None, 66, "cannot be read"),
        ("task = ", 78, "not TOML"),
        ("[model]\nweight = 'a.h5'", 78, "did you mean model.weights?"),
    ],
)
def test_a_bad_job_is_one_line_from_all_ranks(text, code, words, tmp_path, mpirun):
    job = tmp_path / "job.toml"
    if text is not None:
        job.write_text(text)
    outcome = mpirun(2, *launching.python("-m", "moempi", "run", job))
    assert outcome.code == code
    assert len(outcome.lines) == 1
    assert words in outcome.lines[0]
    assert "Traceback" not in outcome.err


def test_usage_errors_under_mpirun_are_one_line(mpirun):
    outcome = mpirun(3, *launching.python("-m", "moempi", "run"))
    assert outcome.code == 64
    assert len(outcome.lines) == 1


def test_check_prints_ranks_and_exchange(mpirun):
    outcome = mpirun(2, *launching.python("-m", "moempi", "check"))
    assert outcome.code == 0
    assert any(line.startswith("2 ranks on 1 nodes") for line in outcome.out.splitlines())
    assert max(map(len, outcome.out.splitlines())) <= 80
    assert "1,048,576" in outcome.out
    assert "\x1b[" not in outcome.out
    for transport in ("alltoallv", "pairwise", "shared"):
        assert f" {transport} " in outcome.out
    assert "job file: exchange.transport = " in outcome.out


def test_plan_forecasts_the_mission_and_refuses_impossible_layouts():
    plan = ("plan", "jobs/mission.toml", "--machine", "jobs/machines/mission-h100.toml", "--ranks-per-node", "8")
    outcome = moempi(*plan, "--ranks", "3904")
    assert outcome.code == 0, outcome.err
    assert "3 to 59" in outcome.out
    assert "A model's forecast, not a measurement" in outcome.out
    refused = moempi(*plan, "--ranks", "3900")
    assert (refused.code, len(refused.lines)) == (78, 1)
    missing = moempi("plan", "jobs/mission.toml", "--machine", "nothing.toml", "--ranks", "8")
    assert (missing.code, len(missing.lines)) == (66, 1)
    too_many = moempi(*plan, "--ranks", "3904", "--set", "run.max_sequences=32768")
    assert (too_many.code, len(too_many.lines)) == (78, 1)


def test_a_dry_run_says_what_fits_and_forecasts_in_80_columns():
    dry = ("run", "jobs/mission.toml", "--dry-run", "--world", "3904", "--ranks-per-node", "8", "--context", "4096")
    dry += ("--set", "run.max_sequences=84", "--set", "run.kv_memory=auto")  # a sequence of each micro-batch
    roomy = moempi(*dry, "--machine", "jobs/machines/mission-h100.toml")
    assert roomy.code == 0, roomy.err
    lines = roomy.out.splitlines()
    assert max(map(len, lines[:-2])) <= 80
    assert "sequences of 4,096 tokens" in roomy.out
    assert [line.partition(":")[0] for line in lines[-2:]] == ["prefill", "decode"]
    assert all("tokens/s, a forecast for H100" in line for line in lines[-2:])
    rows = [line.split() for line in lines if "8.00 KiB" in line]
    assert len(rows) == 4
    assert {row[-3] for row in rows} == {"84"}
    tight = moempi(*dry, "--set", "topology.rank_memory=3.5GB")
    assert tight.code == 0, tight.err
    first, *others = [int(line.split()[-3]) for line in tight.out.splitlines() if "8.00 KiB" in line]
    assert 0 < first < min(others) <= max(others) < int(rows[0][-3])
