"""The program within the limits of a container: the memory of a control group, and a small /dev/shm.

The limits are real and need root: a control group of the version that this machine has, and a mount namespace.
"""

import json
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mpirun import ROOT, Outcome, execute, python

MIB = 1 << 20
LIMIT_BYTES = 400 * MIB
GROUPS = {
    "v1": (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    "v2": (Path("/sys/fs/cgroup"), "memory.max", "memory.peak"),
}
MPIRUN = Path(sys.executable).with_name("mpirun")
# A sequence takes 12 MiB of cache, all of them 384 MiB.
ARCHITECTURE = """
family = "mission"
vocab_size = 512
width = 64
num_layers = 4
max_positions = 256
dense_layers = []
dense_width = 64
attention = {num_heads = 32, num_kv_heads = 32, head_dim = 64}
experts = {num = 4, width = 64, router = {top_k = 2, renormalize = true}}
"""
JOB = """
model.weights = "model.h5"
input.prompts = "prompts.jsonl"
output.results = "results.h5"
run = {max_sequences = 32, batch_tokens = 256, precision = "float32"}
sampling = {max_tokens = 20, ignore_eos = true}
"""


@pytest.fixture(params=GROUPS)
def group(request) -> Iterator[Path]:
    """A control group whose processes together have LIMIT_BYTES."""
    mounted, limit_name, _ = GROUPS[request.param]
    if not (mounted / "cgroup.procs").exists():
        pytest.skip(f"no control groups of {request.param} for memory on this machine")
    folder = mounted / f"moempi-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group of {request.param} can be made: {error}")
    try:
        if not (folder / limit_name).exists():
            pytest.skip(f"control groups of {request.param} limit no memory on this machine")
        (folder / limit_name).write_text(f"{LIMIT_BYTES}\n")
        yield folder
    finally:
        remove(folder)


def remove(group: Path) -> None:
    """Remove a control group, after the processes that are left in it are back in the one above."""
    end = time.monotonic() + 20
    while group.exists() and time.monotonic() < end:
        with suppress(OSError):  # a process has ended, or is just ending
            for process in (group / "cgroup.procs").read_text().split():
                (group.parent / "cgroup.procs").write_text(process)
            group.rmdir()
        time.sleep(0.02)


def run_in(group: Path, *command: str | Path) -> Outcome:
    """Run a command in a control group."""
    return execute("bash", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', group, *command)


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """A job whose cache has more memory than a group if it takes all that it can use."""
    folder: Path = tmp_path_factory.mktemp("job")
    (folder / "architecture.toml").write_text(ARCHITECTURE)
    (folder / "job.toml").write_text(JOB)
    dice = random.Random(1)
    prompts = [{"tokens": [dice.randrange(512) for _ in range(120)]} for _ in range(32)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    outcome = execute(*python("-m", "moempi", "init", folder / "architecture.toml", folder / "model.h5", "--seed", "1"))
    assert outcome.code == 0, outcome.err
    return folder / "job.toml"


def test_free_memory_is_what_the_control_group_leaves(group):
    count = "from moempi.backend.cpu.control_groups import available_bytes; print(available_bytes())"
    outcome = run_in(group, *python("-c", count))
    assert outcome.code == 0, outcome.err
    assert LIMIT_BYTES * 0.8 < int(outcome.out) < LIMIT_BYTES


@pytest.mark.mpi
def test_the_cache_of_all_ranks_fits_the_control_group(group, job):
    """With a cache for the memory of the machine, the kernel kills the ranks."""
    run = (MPIRUN, "-n", "2", *python("-m", "moempi", "run", job))
    before = execute(*run, "--set", "output.results=before.h5")  # else the group pays for the files that it reads first
    assert before.code == 0, before.err
    outcome = run_in(group, *run)
    assert outcome.code == 0, outcome.err
    _, _, peak_name = GROUPS["v1" if group.is_relative_to(GROUPS["v1"][0]) else "v2"]
    assert int((group / peak_name).read_text()) < LIMIT_BYTES
    killed = run_in(group, *run, "--set", "topology.rank_memory=4GB")
    assert killed.code != 0
    assert "was killed or crashed" in killed.lines[-1]


@pytest.fixture
def small_memory() -> tuple[str, ...]:
    """The beginning of a command that runs the rest where /dev/shm has 64 MiB, as in Docker."""
    mount = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
    prefix = ("unshare", "--mount", "bash", "-c", mount, "_")
    if execute(*prefix, "true").code:
        pytest.skip("no mount namespace can be made")
    return prefix


@pytest.mark.mpi
def test_16_ranks_run_with_docker_s_shared_memory(small_memory, tmp_path):
    """One line says what they use instead."""
    weights, results = tmp_path / "weights.h5", tmp_path / "results.h5"
    converted = execute(*python("-m", "moempi", "convert", ROOT / "weights/abacus", weights))
    assert converted.code == 0, converted.err
    settings = (f"model.weights={weights}", f"output.results={results}", "sampling.max_tokens=2")
    options = [word for setting in settings for word in ("--set", setting)]
    run = python("-m", "moempi", "run", ROOT / "jobs/abacus.toml", *options)
    outcome = execute(*small_memory, MPIRUN, "-n", "16", *run, TMPDIR=str(tmp_path))
    assert outcome.code == 0, outcome.err
    said = [line for line in outcome.lines if "/dev/shm" in line]
    assert len(said) == 1
    assert said[0].startswith("moempi: /dev/shm has 64.00 MiB free, MPI needs 256.00 MiB for 16 ranks: it uses ")
    assert said[0].endswith("to be faster, enlarge it (docker run --shm-size=1g)")


@pytest.mark.mpi
def test_16_ranks_are_refused_where_all_folders_are_small(small_memory, tmp_path):
    """One line names /dev/shm and what to do."""
    run = python("-m", "moempi", "run", ROOT / "jobs/abacus.toml")
    outcome = execute(*small_memory, MPIRUN, "-n", "16", *run, TMPDIR="/dev/shm")
    assert outcome.code == 78, outcome.err
    (line,) = outcome.lines
    assert line.startswith("moempi: /dev/shm has ")
    assert "for 16 ranks: enlarge it (docker run --shm-size=1g), or set TMPDIR" in line
