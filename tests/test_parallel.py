"""tests/run.sh runs two processes of pytest at once, which share the files of tests."""

import re
import signal
import sys
import time
from itertools import chain

import pytest

from mpirun import LIMIT_S, ROOT, execute, python, start

PARALLEL = ROOT / "tests/parallel.py"
FILES = ("tests/test_printing.py", "tests/layout/test_schedule.py", "tests/layout/test_topology.py")


def test_what_each_command_wrote_is_whole_and_in_the_order_of_their_ends(tmp_path):
    begun = tmp_path / "begun"
    early, late = (
        f"touch {begun}; echo early; echo error >&2",
        f"until [ -e {begun} ]; do sleep 0.1; done; sleep 1; echo late",
    )
    outcome = execute(*python(PARALLEL, late, early))
    expected = "".join(f"==== writes to FILE until it ends: {command}\n" for command in (late, early))
    expected += f"==== {early}\nearly\nerror\n==== exit code 0 after T s: {early}\n"
    expected += f"==== {late}\nlate\n==== exit code 0 after T s: {late}\n"
    assert re.sub(r"after \d+ s", "after T s", re.sub(r"to \S+", "to FILE", outcome.out)) == expected
    assert (outcome.code, outcome.err) == (0, "")


@pytest.mark.parametrize("failing", ["exit 3", "false; true", "kill -9 $$", "no-such-command"])
def test_one_failure_fails_all_and_the_other_command_ends(failing):
    outcome = execute(*python(PARALLEL, failing, "sleep 0.5; echo whole"))
    assert outcome.code == 1
    assert "\nwhole\n" in outcome.out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_ends_all_commands_and_shows_what_they_wrote(number, tmp_path):
    commands = [f"echo {name}; touch {tmp_path / name}; sleep 100" for name in ("one", "other")]
    process = start(*python(PARALLEL, *commands))
    limit = time.monotonic() + LIMIT_S
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < limit:
        time.sleep(0.01)
    process.send_signal(number)
    out, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert "\none\n" in out
    assert "\nother\n" in out


def test_each_test_runs_in_one_of_the_processes_and_those_that_start_mpirun_run_first(tmp_path):
    half = f"{sys.executable} -m pytest -v -p no:cacheprovider --claims={tmp_path} {' '.join(FILES)}"
    outcome = execute(*python(PARALLEL, half, half))
    assert outcome.code == 0, outcome.out
    of_kind = {marked: collected("-m", marked) for marked in ("mpi", "not mpi")}
    assert all(of_kind.values())
    ran = [re.findall(r"^(tests/\S+::.*) PASSED", written, re.M) for written in outcome.out.split("==== exit code")]
    assert sorted(chain(*ran)) == sorted(chain(*of_kind.values()))
    for of_process in ran:
        kinds = [test in of_kind["not mpi"] for test in of_process]
        assert kinds == sorted(kinds)
    parts = {(marked, test.partition("::")[0]) for marked, tests in of_kind.items() for test in tests}
    assert len(list(tmp_path.glob("*.py"))) == len(parts) > len(FILES)
    assert len(list(tmp_path.glob("*.ended"))) == 2


def collected(*words):
    """The tests of FILES that pytest selects."""
    listed = execute(*python("-m", "pytest", "-q", "--collect-only", *words, *FILES)).out
    return re.findall(r"^tests/\S+::.*", listed, re.MULTILINE)
