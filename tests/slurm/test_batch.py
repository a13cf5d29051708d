"""The batch scripts under a real Slurm (tests/slurm/run.sh): whatever disturbs a job, it ends as if nothing had."""

import json
import os
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from moempi.errors import MoempiError
from moempi.storage.convert import convert
from moempi.storage.run_state import RunState, read_state
from mpirun import ROOT

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif("SLURM_CONF" not in os.environ, reason="no Slurm: bash tests/slurm/run.sh starts one"),
]

NUM_PROMPTS = 256
END_S = 300.0  # only what hangs takes longer, also on a busy machine


def output_of(*command: str | Path) -> str:
    return subprocess.run([str(word) for word in command], cwd=ROOT, text=True, capture_output=True, check=True).stdout


def facts(job: str) -> dict[str, str]:
    """What Slurm says of a job, as soon as its controller answers."""
    command = ["scontrol", "show", "--oneliner", "job", job]
    limit = time.monotonic() + END_S
    while (ran := subprocess.run(command, text=True, capture_output=True, check=False)).returncode:
        assert time.monotonic() < limit, ran.stderr
        time.sleep(0.1)
    return dict(word.partition("=")[::2] for word in ran.stdout.split())


def wait_for(true_at_last, *, what: str) -> None:
    limit = time.monotonic() + END_S
    while not true_at_last():
        assert time.monotonic() < limit, f"not within {END_S} s: {what}"
        time.sleep(0.1)


def wait_for_end(job: str) -> dict[str, str]:
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    wait_for(lambda: facts(job)["JobState"] in over, what=f"the end of job {job}")
    return facts(job)


def wait_for_requeue(job: str, restarts: int) -> None:
    wait_for(lambda: facts(job)["Restarts"] == str(restarts), what=f"requeue {restarts} of job {job}")


def record_bytes(results: Path) -> int:
    """The bytes of the records on disk, of files that a run does not remove meanwhile."""
    total = 0
    with suppress(FileNotFoundError):
        for part in Path(f"{results}.parts").rglob("rank-*.part"):
            total += part.stat().st_size
    return total


class Batch:
    """A job file of the tests, submitted to two virtual nodes.

    With few `sequences` at a time it is not finished before it is disturbed.
    """

    def __init__(self, folder: Path, name: str, prompts: Path, *, sequences: int | None = None) -> None:
        self.results = folder / f"{name}.h5"
        self.log = folder / f"{name}.out"
        self.settings = {
            "model.weights": folder / "weights.h5",
            "input.prompts": prompts,
            "output.results": self.results,
            "run.precision": "float32",
        } | ({"run.max_sequences": sequences} if sequences else {})

    def submit(self, *options: str, launcher: str = "srun", **environment: str) -> str:
        where = ["--nodes=2", "--ntasks-per-node=2", "--time=5", f"--output={self.log}", *options]
        settings = [word for key, value in self.settings.items() for word in ("--set", f"{key}={value}")]
        environment = os.environ | {"MOEMPI_LAUNCHER": launcher} | environment
        command = ["sbatch", "--parsable", *where, ROOT / "jobs/moempi.sbatch", ROOT / "jobs/abacus.toml", *settings]
        elsewhere = self.results.parent  # scripts may be submitted from any folder
        ran = subprocess.run(command, cwd=elsewhere, env=environment, text=True, capture_output=True, check=True)
        return ran.stdout.strip()

    def state(self) -> RunState | None:
        try:
            return read_state(self.results)
        except MoempiError:
            return None

    def wait_for_new_records(self) -> None:
        """Until a run has put some more requests to disk than there are now."""

        enough = record_bytes(self.results) + 4000
        wait_for(lambda: record_bytes(self.results) > enough, what=f"records of {self.results}")

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def assert_as(self, undisturbed: "Batch") -> None:
        state = self.state()
        assert state is not None
        assert (state.state, state.finished) == ("finished", NUM_PROMPTS)
        found = output_of("moempi", "compare", undisturbed.results, self.results)
        assert found.strip() == f"{NUM_PROMPTS} requests, 0 differ in tokens; log-probabilities within 0"
        assert not Path(f"{self.results}.parts").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("batch")
    convert(ROOT / "weights/abacus", place / "weights.h5")
    return place


@pytest.fixture(scope="module")
def prompts(folder) -> Path:
    lines = [json.loads(line) for line in (ROOT / "jobs/abacus.jsonl").read_text().splitlines()]
    place = folder / "prompts.jsonl"
    with place.open("w") as file:
        for number in range(NUM_PROMPTS):
            line = lines[number % len(lines)] | {"id": f"question-{number}"}
            if number % 2:
                del line["id"]
            file.write(json.dumps(line) + "\n")
    return place


@pytest.fixture(scope="module")
def undisturbed(folder, prompts) -> Batch:
    """A job over two nodes that nothing disturbs."""
    batch = Batch(folder, "undisturbed", prompts)
    ended = wait_for_end(batch.submit(launcher="mpirun"))
    assert ended["JobState"] == "COMPLETED", batch.said()
    batch.assert_as(batch)
    return batch


def test_two_requeues_in_a_row(folder, prompts, undisturbed):
    batch = Batch(folder, "requeued", prompts, sequences=4)
    job = batch.submit()
    for restarts in (1, 2):
        batch.wait_for_new_records()
        output_of("scancel", "--batch", "--signal=USR1", job)
        wait_for_requeue(job, restarts)
    assert wait_for_end(job)["ExitCode"] == "0:0", batch.said()
    assert batch.said().count("requests are finished; run the same job again to continue") == 2
    batch.assert_as(undisturbed)


def test_a_finished_job_that_is_submitted_again_continues_at_its_time_limit(folder, prompts, undisturbed):
    """Its first requests are fewer than all of the job before, and its results are not those of that one."""
    batch = Batch(folder, "again", prompts, sequences=4)
    assert wait_for_end(batch.submit())["ExitCode"] == "0:0", batch.said()
    job = batch.submit()
    batch.wait_for_new_records()
    output_of("scancel", "--batch", "--signal=USR1", job)
    wait_for_requeue(job, 1)
    assert wait_for_end(job)["ExitCode"] == "0:0", batch.said()
    assert "(0 before), requeueing" in batch.said()
    assert "complete already" not in batch.said()
    batch.assert_as(undisturbed)


def test_a_run_that_is_killed_whole(folder, prompts, undisturbed):
    """Its state says "running", and no rank is left to write another."""
    batch = Batch(folder, "killed", prompts, sequences=4)
    job = batch.submit()
    wait_for(lambda: (state := batch.state()) is not None and state.finished > 0, what="the first finished requests")
    output_of("scancel", "--signal=KILL", f"{job}.0")
    wait_for_requeue(job, 1)
    assert wait_for_end(job)["ExitCode"] == "0:0", batch.said()
    assert batch.said().count("requeueing") == 1
    batch.assert_as(undisturbed)


@pytest.mark.parametrize("ending", ["finished", "requeued", "failed", "cancelled", "killed"])
def test_staged_weights_are_removed_from_the_nodes(folder, prompts, ending):
    scratch = folder / f"scratch of {ending}"
    scratch.mkdir()
    batch = Batch(folder, f"staged-{ending}", prompts if ending != "failed" else folder / "missing.jsonl")
    batch.settings["model.weights"] = folder / "missing.h5"
    stage = {"MOEMPI_STAGE": str(folder / "weights.h5"), "MOEMPI_SCRATCH": str(scratch)}
    job = batch.submit(launcher="mpirun" if ending == "finished" else "srun", **stage)
    wait_for(lambda: list(scratch.iterdir()), what="a copy of the weights")
    if ending in ("requeued", "cancelled", "killed"):
        batch.wait_for_new_records()
    match ending:
        case "requeued":
            output_of("scancel", "--batch", "--signal=USR1", job)
            wait_for_requeue(job, 1)
        case "cancelled":
            output_of("scancel", job)
        case "killed":
            output_of("scancel", "--batch", "--signal=KILL", job)
    ended = wait_for_end(job)
    assert (ended["JobState"] == "COMPLETED") == (ending in ("finished", "requeued")), batch.said()
    wait_for(lambda: not list(scratch.iterdir()), what="the removal of the copies")


def test_a_node_that_goes_down(folder, prompts, undisturbed):
    batch = Batch(folder, "moved", prompts)
    job = batch.submit("--nodelist=n1,n2", launcher="mpirun")
    output_of("scontrol", "update", f"JobId={job}", "ReqNodeList=")
    batch.wait_for_new_records()
    output_of("scontrol", "update", "NodeName=n1", "State=DOWN", "Reason=test")
    try:
        wait_for_requeue(job, 1)
        ended = wait_for_end(job)
    finally:
        output_of("scontrol", "update", "NodeName=n1", "State=RESUME")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), batch.said()
    assert "n1" not in ended["NodeList"]
    batch.assert_as(undisturbed)


def test_an_array_of_which_one_fails(folder, prompts, undisturbed):
    shards = folder / "shards.jsonl"
    shutil.copy(prompts, shards)
    output_of("mkdir", "-p", ROOT / "results")
    names = [ROOT / f"results/shards.{shard}-of-4" for shard in range(4)]
    obstacle = Path(f"{names[2]}.h5.parts")
    obstacle.write_text("not a folder")
    try:
        assert [shard for shard, code in run_array(shards, folder, "0-3").items() if code != "0:0"] == [2]
        obstacle.unlink()
        assert run_array(shards, folder, "2") == {2: "0:0"}
        whole = [line for name in names for line in exported(Path(f"{name}.h5"), folder)]
        assert whole == exported(undisturbed.results, folder)
    finally:
        for left in (ROOT / "results").glob("shards.*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def exported(results: Path, folder: Path) -> list[dict[str, object]]:
    """The requests without their times."""
    output_of("moempi", "export", results, folder / "exported.jsonl", "--force")
    lines = [json.loads(line) for line in (folder / "exported.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith("_s")} for line in lines]


def run_array(prompts: Path, folder: Path, which: str) -> dict[int, str]:
    """The exit codes of an array's tasks."""
    where = ["--nodes=1", "--ntasks-per-node=2", "--time=5", f"--output={folder}/array-%a.out", f"--array={which}"]
    script = ["jobs/array.sbatch", "jobs/abacus.toml", prompts, "4", "--set", "run.precision=float32"]
    script += ["--set", f"model.weights={folder}/weights.h5"]
    job = output_of("sbatch", "--parsable", *where, *script).strip()
    codes = {}
    first, _, last = which.partition("-")
    for shard in range(int(first), int(last or first) + 1):
        codes[shard] = wait_for_end(f"{job}_{shard}")["ExitCode"]
    return codes


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_switches_are_told_apart(folder, launcher):
    log = folder / f"switches-{launcher}.out"
    where = ["--nodes=3", "--ntasks-per-node=1", f"--export=ALL,MOEMPI_LAUNCHER={launcher}", f"--output={log}"]
    assert wait_for_end(output_of("sbatch", "--parsable", *where, "jobs/check.sbatch").strip())["ExitCode"] == "0:0"
    assert "3 ranks on 3 nodes" in log.read_text()
    assert "switches above them: 2" in log.read_text()


def test_the_ranks_of_two_nodes_are_checked(folder):
    log = folder / "check.out"
    job = output_of("sbatch", "--parsable", f"--output={log}", "jobs/check.sbatch").strip()
    assert wait_for_end(job)["ExitCode"] == "0:0", log.read_text()
    assert "4 ranks on 2 nodes" in log.read_text()
