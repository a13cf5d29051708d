"""Scripts with an LLM end together, whatever ends them, and never hang."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from api.models import write_model
from mpirun import execute, mpirun, python

SCRIPT = Path(__file__).with_name("endings.py")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.mark.mpi
@pytest.mark.parametrize("ending", ["good", "closed"])
def test_a_script_ends_well_on_one_process_and_on_ranks_closed_or_not(weights, ending):
    alone = execute(*python(SCRIPT, weights, ending))
    assert (alone.code, alone.out, alone.err) == (0, "0 143\n", "")
    together = mpirun(3, *python(SCRIPT, weights, ending))
    assert (together.code, sorted(together.out.splitlines()), together.err) == (0, ["0 143", "1 143", "2 143"], "")


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("ending", "code", "line"),
    [
        ("exception", 70, "moempi: rank 1: ValueError: a bad value"),
        ("inside", 70, "moempi: rank 1: ValueError: in the middle of a call"),
        ("all", 70, "moempi: rank 0: ValueError: all ranks have it"),
        ("different", 64, "moempi: rank 1: this rank makes another call than rank 0"),
        ("exit", 64, "the end of the script"),
    ],
)
def test_what_ends_one_rank_ends_all_with_a_line_that_names_it(weights, ending, code, line):
    outcome = mpirun(3, *python(SCRIPT, weights, ending))
    assert outcome.code == code, outcome.err
    assert line in outcome.lines[0]
    assert len(outcome.lines) == 1
    assert "Traceback" in outcome.err


@pytest.mark.mpi
def test_a_killed_rank_ends_all(weights):
    outcome = mpirun(3, *python(SCRIPT, weights, "kill"))
    assert outcome.code != 0
    assert "moempi: rank 0: rank 1 is gone: its process" in outcome.lines[0]


def test_importing_the_package_imports_nothing_that_a_command_would_wait_for():
    code = "import moempi, sys; sys.exit(any(name in sys.modules for name in ('numpy', 'mpi4py', 'msgspec')))"
    assert execute(*python("-c", code)).code == 0
    wrong = execute(*python("-c", "import moempi; moempi.nothing"))
    assert "module 'moempi' has no attribute 'nothing'" in wrong.err


@pytest.mark.mpi
@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-evaluation-harness is installed")
@pytest.mark.parametrize("ranks", [1, 3])
def test_the_command_of_the_harness_says_what_it_lacks(ranks):
    outcome = mpirun(ranks, *python("-m", "moempi.api.evaluate", "run"))
    assert outcome.code == 64
    assert outcome.lines == ["moempi: lm-evaluation-harness is not installed: bash jobs/setup.sh eval"]
