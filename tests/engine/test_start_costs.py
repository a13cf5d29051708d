"""What a run costs at its start: calls of MPI, counted by a library between the program and MPI; imports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import mpirun as launching
from engine.runs import SMALL
from moempi.storage.initialize import initialize

HERE = Path(__file__).parent
PREFIX = Path(sys.prefix)
RANKS = 4
MOST_COLLECTIVES = 12


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The library that counts calls."""
    if not (PREFIX / "include/mpi.h").exists():
        pytest.skip("no mpi.h beside this Python")
    built = tmp_path_factory.mktemp("library") / "mpi_calls.so"
    libraries = [f"-L{PREFIX}/lib", "-l:libmpi.so.40", f"-Wl,-rpath,{PREFIX}/lib"]
    command = ["cc", "-O1", "-shared", "-fPIC", f"-I{PREFIX}/include", HERE / "mpi_calls.c", "-o", built, *libraries]
    subprocess.run(command, check=True)
    return built


def count_calls(mpirun, library, folder, **settings):
    """Of each rank: collectives over all ranks, over fewer, and communicators made before its first step; modules."""
    initialize(SMALL, folder / "weights.h5", seed=1)
    (folder / "prompts.jsonl").write_text("".join(f'{{"tokens": [{token}, 2, 3]}}\n' for token in range(9)))
    keys = {
        "model.weights": "weights.h5",
        "input.prompts": "prompts.jsonl",
        "output.results": "results.h5",
        "run.max_sequences": 64,
        "parallel.stages": 2,
    }
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in (keys | settings).items()]
    (folder / "job.toml").write_text("".join(lines))
    script = launching.python(HERE / "start_costs.py", library, folder / "calls", "run", folder / "job.toml")
    outcome = mpirun(RANKS, *script)
    assert outcome.code == 0, outcome.err
    found = [json.loads((folder / f"calls.{rank}").read_text()) for rank in range(RANKS)]
    return [(*rank["calls"], set(rank["modules"])) for rank in found]


@pytest.mark.parametrize("transport", ["auto", "pairwise"])
def test_few_collectives_are_over_all_ranks_before_the_first_step(mpirun, library, tmp_path, transport):
    counts = count_calls(mpirun, library, tmp_path, **{"exchange.transport": transport})
    assert max(over_all for over_all, *_ in counts) <= MOST_COLLECTIVES
    for rank, (*_, modules) in enumerate(counts):
        assert ("rich" in modules) == (rank == 0)
        assert modules & {"tokenizers", "jinja2", "moempi.backend.cuda.backend"} == set()


def test_communicators_do_not_depend_on_the_number_of_micro_batches(mpirun, library, tmp_path):
    made = []
    for micro_batches in (8, 64):
        counts = count_calls(
            mpirun, library, tmp_path, **{"run.micro_batches": micro_batches, "exchange.transport": "shared"}
        )
        made.append([communicators for _, _, communicators, _ in counts])
        assert max(over_all for over_all, *_ in counts) <= MOST_COLLECTIVES
    assert made[0] == made[1]
