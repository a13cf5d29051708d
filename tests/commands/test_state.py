"""`moempi state` for scripts: it takes the arguments of `moempi run` and prints one line."""

from argparse import ArgumentParser

import msgspec
import pytest

from moempi.cli import main
from moempi.commands import run
from moempi.storage.run_state import Loss, write_state
from storage.test_run_state import STOPPED


@pytest.fixture
def job(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(f'model.weights = "w.h5"\ninput.prompts = "p.jsonl"\noutput.results = "{tmp_path}/r.h5"\n')
    return path


def test_every_option_of_run_is_taken(job, tmp_path, capsys):
    write_state(tmp_path / "r.h5", STOPPED)
    parser = ArgumentParser(add_help=False)
    run.add_flags(parser)
    options = [action for action in parser._actions if action.option_strings]
    assert len(options) > 5
    for option in options:
        value = [] if option.nargs == 0 else ["task=score" if option.metavar == "SECTION.KEY=VALUE" else "1"]
        assert main(["state", str(job), option.option_strings[0], *value, "--debug"]) == 0
        assert capsys.readouterr().out == "stopped 4 75 SIGUSR1\n"


def test_a_reason_is_one_line(job, tmp_path, capsys):
    write_state(tmp_path / "r.h5", msgspec.structs.replace(STOPPED, reason="no file\nnamed\tthat"))
    assert main(["state", str(job)]) == 0
    assert capsys.readouterr().out == "stopped 4 75 no file named that\n"


def test_a_run_in_a_slurm_job_is_named_before_lost_hosts(job, tmp_path, capsys):
    state = msgspec.structs.replace(STOPPED, job="17", started="then", loss=Loss(("n3", "n4"), 1.0, 2.0))
    write_state(tmp_path / "r.h5", state)
    assert main(["state", str(job)]) == 0
    assert capsys.readouterr().out == "stopped 4 75 SIGUSR1 run=17@then lost_hosts=n3,n4\n"
