"""The shell scripts: no finding of shellcheck; words stay whole; endings are told apart.

Small commands stand for Slurm's; tests/slurm runs the batch scripts under a real Slurm.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from mpirun import ROOT

COMMANDS = {
    # moempi state prints the next line of STATES, the last one again and again; moempi run notes its arguments.
    "moempi": """
        if [ "$1" = state ] && [ "${!#}" = --wait ]; then
            exec tail -f /dev/null
        elif [ "$1" = state ]; then
            state=$(head -n 1 "$STATES")
            [ "$(wc -l <"$STATES")" = 1 ] || sed -i 1d "$STATES"
            echo "$state"
            printf '%s\\0' "${@:2}" >"$NOTES/state"
        else
            printf '%s\\0' "${@:2}" >"$NOTES/run"
            if [ -n "${STOPPED:-}" ]; then trap : USR1; kill -USR1 $PPID; fi # and the script sends it back
            [[ " $* " = *" --dry-run "* ]] || exit "$CODE"
            world=$(sed 's/.*--world //; s/ .*//' <<<"$*")
            exit "$((FITTING % world != 0))"
        fi""",
    "srun": """
        echo "$@" >>"$NOTES/srun"
        while [ "${1:0:1}" = - ]; do shift; done
        exec "$@" """,
    "sbcast": 'cp "$2" "$3"',
    # scontrol show prints the script that was submitted, as Slurm does.
    "scontrol": """
        if [ "$2" = hostnames ]; then
            printf '%s\\n' n1 n2 n3 n4
        elif [ "$1" = update ]; then
            echo "$@" >"$NOTES/update"
        elif [ "$1" = show ]; then
            printf 'JobId=17\\n   Command=%s\\n   WorkDir=/\\n' "${COMMAND:-}"
        else
            echo "$@" >"$NOTES/scontrol"
        fi""",
    "sleep": 'echo "$@" >>"$NOTES/sleep"',
}
AWKWARD = ["a b", "a\nb", 'a"b', "a'b", "*", "$(a)", "-a", " a ", ""]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_is_silent():
    scripts = [
        ROOT / "jobs" / "moempi",
        *ROOT.glob("jobs/*.sh"),
        *ROOT.glob("jobs/*.sbatch"),
        *ROOT.glob("tests/**/*.sh"),
        ROOT / ".ci/run",
    ]
    assert len(scripts) > 10
    checked = subprocess.run(
        ["shellcheck", "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout) == (0, "")


class Script:
    """A script that sources batch.sh, run with COMMANDS; `notes` are the files that they wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.notes = folder, folder / "notes"
        self.notes.mkdir()
        for name, text in COMMANDS.items():
            command = folder / "bin" / name
            command.parent.mkdir(exist_ok=True)
            command.write_text(f"#!/usr/bin/env bash\n{text}\n")
            command.chmod(0o755)

    def run(
        self,
        *words: str,
        states: str,
        code: int = 0,
        script: str = 'source "$ROOT/jobs/batch.sh"; run_job "$@"',
        **given,
    ) -> subprocess.CompletedProcess[str]:
        """Run the script in its folder; the job has each of the `states` in turn, its run ends with `code`."""
        (self.folder / "states").write_text(states)
        environment = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "ROOT": str(ROOT),
            "NOTES": str(self.notes),
            "STATES": str(self.folder / "states"),
            "CODE": str(code),
            "SLURM_JOB_ID": "17",
            "SLURM_NTASKS": "4",
            "SLURM_JOB_NUM_NODES": "2",
        }
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script, "script", *words],
            cwd=self.folder,
            env=environment | given,
            capture_output=True,
            text=True,
            check=False,
        )

    def words(self, name: str) -> list[str]:
        return (self.notes / name).read_text().split("\0")[:-1]


@pytest.fixture
def script(tmp_path):
    return Script(tmp_path)


def test_a_batch_job_passes_its_words_on_unchanged(script):
    words = ["job.toml", *(word for value in AWKWARD for word in ("--set", f"output.results={value}"))]
    outcome = script.run(*words, states="none 0 0\nfinished 1 0\n")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert script.words("state") == words
    assert script.words("run") == words


@pytest.mark.parametrize("scratch", ["a b", "a\nb", "*"])
def test_staged_weights_may_have_any_name(script, scratch):
    (script.folder / scratch).mkdir()
    (script.folder / 'w "1".h5').write_text("weights")
    outcome = script.run(
        "job.toml",
        states="none 0 0\nfinished 1 0\n",
        MOEMPI_STAGE='w "1".h5',
        MOEMPI_SCRATCH=str(script.folder / scratch),
    )
    assert outcome.returncode == 0, outcome.stderr
    copy = script.folder / scratch / '17-w "1".h5'
    assert script.words("run") == ["job.toml", "--set", f"model.weights={copy}"]
    assert copy.read_text() == "weights"
    subprocess.run([ROOT / "jobs/unstage.sh"], env={**os.environ, "MOEMPI_STAGED": str(copy)}, check=True)
    assert not copy.exists()


@pytest.mark.parametrize(
    ("states", "code", "ends_with", "requeued", "waits"),
    [
        ("none 0 0\nfailed 5 75 killed: process 1 on n1\n", 137, 75, True, 0),
        ("running 3 0\nrunning 5 0\nrunning 5 0\nfailed 5 75 killed\n", 137, 75, True, 2),
        ("running 5 0\nrunning 5 0\nfinished 9 0\n", 137, 137, False, 1),
        ("failed 5 75 killed\nfailed 5 75 killed\n", 137, 137, False, 0),
        ("failed 5 75 killed\nfailed 5 70 ValueError\n", 70, 70, False, 0),
        ("running 5 0\n", 74, 74, False, 0),  # another run holds the output
        ("failed 5 75 killed\nfinished 9 0\n", 0, 0, False, 0),
        # submitted again after another job has finished it
        ("finished 9 0 run=16@1\nstopped 5 75 SIGUSR1 run=17@2\n", 75, 75, True, 0),
        ("finished 9 0 run=16@1\nstopped 0 75 SIGUSR1 run=17@2\n", 75, 75, False, 0),
        ("finished 9 0 run=16@1\nfinished 9 0 run=17@2\n", 0, 0, False, 0),
        ("finished 9 0\nfinished 9 0 run=17@2\n", 0, 0, False, 0),
        ("none 0 0\nfinished 9 65 errors 9 run=17@2\n", 0, 65, False, 0),  # mpirun lost a node at the end
        ("finished 9 0 run=16@1\n", 0, 75, False, 0),  # mpirun lost a node before the run began
        ("none 0 0\nrunning 5 0\nfailed 5 75 killed\n", 0, 75, True, 1),  # mpirun lost a node
    ],
)
def test_a_batch_job_continues_a_run_that_was_killed(script, states, code, ends_with, requeued, waits):
    """Also if it counts as running for a while; not if no request was finished since the start."""
    outcome = script.run("job.toml", states=states, code=code, SLURM_RESTART_COUNT="1")
    assert outcome.returncode == ends_with, outcome.stderr
    assert (script.notes / "scontrol").exists() == requeued
    slept = script.notes / "sleep"
    pauses = slept.read_text().splitlines() if slept.exists() else []
    assert len([pause for pause in pauses if pause in ("0.2", "0.5")]) == waits


LOSS = "failed 5 75 rank 4 does not answer lost_hosts=n3\n"


@pytest.mark.parametrize(
    ("fitting", "spare", "ranks"),
    [("6", "0", "--ntasks=6"), ("5", "0", "--ntasks=5"), ("6", "1", "--ntasks=6")],
)
def test_a_batch_job_goes_on_without_a_lost_node(script, fitting, spare, ranks):
    """With the most ranks that fit the job, and on a spare node if there is one."""
    states = f"none 0 0\n{LOSS}finished 9 0\n"
    given = {"SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "n[1-4]", "FITTING": fitting, "MOEMPI_SPARE_NODES": spare}
    outcome = script.run("job.toml", states=states, code=143, **given)
    assert "batch: lost n3, 5 requests are finished (0 before), going on with" in outcome.stdout, outcome.stderr
    assert not (script.notes / "scontrol").exists()
    assert (script.notes / "update").read_text() == "update JobId=17 NodeList=n1,n2,n4\n"
    first, second = (line.split() for line in (script.notes / "srun").read_text().splitlines())
    assert ("--nodelist=n1,n2,n3" in first) == (spare == "1")
    assert {"--overlap", "--nodes=3", "--nodelist=n1,n2,n4", ranks} <= set(second)


def test_a_lost_host_may_have_a_domain(script):
    states = f"none 0 0\n{LOSS.replace('n3', 'n3.cluster.org')}finished 9 0\n"
    given = {"SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "n[1-4]", "FITTING": "6"}
    outcome = script.run("job.toml", states=states, code=143, **given)
    assert "batch: lost n3, 5 requests are finished" in outcome.stdout, outcome.stderr
    assert (script.notes / "update").read_text() == "update JobId=17 NodeList=n1,n2,n4\n"


@pytest.mark.parametrize(("hosts", "starts"), [("elsewhere", 1), ("n", 1), ("n33", 1), ("n3", 2), ("n3,n4", 2)])
def test_a_job_that_loses_no_other_node_of_its_allocation_is_requeued(script, hosts, starts):
    """Each time that it goes on, it has fewer nodes than before."""
    given = {"SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "n[1-4]", "FITTING": "12"}
    outcome = script.run("job.toml", states=f"none 0 0\n{LOSS.replace('n3', hosts)}", code=75, **given)
    assert outcome.returncode == 75
    assert (script.notes / "scontrol").read_text() == "requeue 17\n"
    runs = [line for line in (script.notes / "srun").read_text().splitlines() if "moempi run" in line]
    assert len(runs) == starts


def test_a_job_that_does_not_fit_without_the_spare_nodes_runs_on_all(script):
    given = {"SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "n[1-4]", "FITTING": "7", "MOEMPI_SPARE_NODES": "1"}
    outcome = script.run("job.toml", states="none 0 0\nfinished 9 0\n", **given)
    assert (outcome.returncode, outcome.stderr.count("running on all")) == (0, 1)
    (line,) = (script.notes / "srun").read_text().splitlines()
    assert "--ntasks=8" in line
    assert "--nodelist" not in line


def test_a_request_to_stop_before_the_launcher_can_be_sent_it_is_sent_then(script):
    text = 'source "$ROOT/jobs/batch.sh"; launch() { exec /bin/sleep 60; }; state=none asked_early=1; start; exit $code'
    begin = time.monotonic()
    outcome = script.run("job.toml", states="none 0 0\n", script=text)
    assert outcome.returncode == 128 + signal.SIGUSR1, outcome.stderr
    assert time.monotonic() - begin < 30


FAILED = "ended with the launcher's code 250 and no new state of the run"


@pytest.mark.parametrize(
    ("states", "ends_with", "starts", "requeued"),
    [
        ("none 0 0\nnone 0 0\nfinished 9 0\n", 250, 2, False),  # finished, then its launcher failed
        ("none 0 0\n", 250, 2, False),
        (f"none 0 0\n{LOSS}", 75, 3, True),
        ("failed 5 75 killed\n", 250, 2, False),
    ],
)
def test_a_launcher_that_fails_before_the_run_begins_is_started_once_more(script, states, ends_with, starts, requeued):
    """After that the job fails, or is requeued if it has finished requests before it lost a node."""
    given = {"SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "n[1-4]", "FITTING": "6"}
    outcome = script.run("job.toml", states=states, code=250, **given)
    assert outcome.returncode == ends_with, outcome.stderr
    assert len((script.notes / "srun").read_text().splitlines()) == starts
    assert outcome.stderr.count(FAILED) == (1 if "finished" in states else 2)
    assert (script.notes / "scontrol").exists() == requeued


def test_a_job_that_is_stopped_again_without_progress_is_given_up(script):
    states = "stopped 5 75 SIGUSR1\nstopped 5 75 SIGUSR1\n"
    outcome = script.run("job.toml", states=states, code=75, STOPPED="1", SLURM_RESTART_COUNT="1")
    assert (outcome.returncode, FAILED in outcome.stderr) == (75, False)
    assert "giving up" in outcome.stderr
    assert not (script.notes / "scontrol").exists()


def test_a_job_that_is_refused_on_the_nodes_that_are_left_is_requeued_at_once(script):
    given = {"SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "n[1-4]", "FITTING": "6"}
    outcome = script.run("job.toml", states=f"none 0 0\n{LOSS}", code=78, **given)
    assert (outcome.returncode, FAILED in outcome.stderr) == (75, False)
    assert len((script.notes / "srun").read_text().splitlines()) == 2
    assert (script.notes / "scontrol").read_text() == "requeue 17\n"


def test_a_batch_job_that_does_not_fit_the_nodes_that_are_left_is_requeued(script):
    given = {"SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "n[1-4]", "FITTING": "7"}
    outcome = script.run("job.toml", states=f"none 0 0\n{LOSS}", code=143, **given)
    assert outcome.returncode == 75
    assert (script.notes / "scontrol").read_text() == "requeue 17\n"


@pytest.mark.parametrize(("ending", "code"), [("9 0", 0), ("9 65 errors 9", 65)])
def test_a_requeued_job_whose_results_are_complete_does_not_run_again(script, ending, code):
    outcome = script.run("job.toml", states=f"finished {ending} run=17@then\n", SLURM_RESTART_COUNT="1")
    assert outcome.returncode == code
    assert not (script.notes / "run").exists()


def test_the_last_run_that_counts_as_running_for_a_while_is_not_the_one_that_begins(script):
    states = "running 5 0 run=17@1\nfailed 5 75 killed: process 1 on n1 run=17@1\nfinished 9 0 run=17@2\n"
    outcome = script.run("job.toml", states=states, code=250, SLURM_RESTART_COUNT="1")
    assert "start 1 ended with the launcher's code 250 and no new state" in outcome.stderr
    assert "giving up" not in outcome.stderr


@pytest.mark.parametrize("old", ["finished 9 0", "finished 9 0 run=1@then", "finished 9 0 run=170@then"])
def test_a_job_that_was_requeued_before_its_start_runs_though_another_has_finished(script, old):
    outcome = script.run("job.toml", states=f"{old}\nfinished 9 0 run=17@now\n", SLURM_RESTART_COUNT="1")
    assert (outcome.returncode, "complete already" in outcome.stdout) == (0, False)
    assert (script.notes / "run").exists()


@pytest.mark.parametrize("text", ["{1}\n\n{3}\n{4}\n{5}\n{6}\n{7}\n{8}", "{1}\n", "{1}\n{2}\n{3}\n"])
@pytest.mark.parametrize(("original", "jobs"), [("my jobs/array.sbatch", "my jobs"), ("own.sbatch", "jobs")])
def test_shards_of_an_array_keep_the_numbers_of_lines(script, text, original, jobs):
    """Each shard begins with a blank line for each line before; its own lines follow.

    The scripts beside it are found from the path of the original; for a copy, in the folder where it was submitted.
    """
    (script.folder / "-my prompts.jsonl").write_text(text)
    (script.folder / jobs).mkdir()
    (script.folder / jobs / "batch.sh").symlink_to(ROOT / "jobs/batch.sh")
    (script.folder / jobs / "env.sh").touch()
    lines = {}
    for shard in range(3):
        outcome = script.run(
            "job.toml",
            "./-my prompts.jsonl",
            "3",
            states="none 0 0\nfinished 1 0\n",
            script=(ROOT / "jobs/array.sbatch").read_text(),
            COMMAND=f"{script.folder}/{original} job.toml ./-my prompts.jsonl 3",
            SLURM_SUBMIT_DIR=str(script.folder),
            SLURM_ARRAY_JOB_ID="16",
            SLURM_ARRAY_TASK_ID=str(shard),
        )
        assert outcome.returncode == 0, outcome.stderr
        name = f"results/-my prompts.{shard}-of-3"
        assert script.words("run")[1:] == ["--set", f"input.prompts={name}.jsonl", "--set", f"output.results={name}.h5"]
        for number, line in enumerate((script.folder / f"{name}.jsonl").read_text().splitlines()):
            if line:
                assert number not in lines
                lines[number] = line
    assert lines == {number: line for number, line in enumerate(text.splitlines()) if line}
