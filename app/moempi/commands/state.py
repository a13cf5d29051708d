"""`moempi state`: how a job's last run ended, as one line for scripts."""

from argparse import ArgumentParser, Namespace

from moempi.commands import run as run_command
from moempi.commands.flags import read_job
from moempi.printing import print_line
from moempi.storage.run_state import read_state, wait_for_end


def add_flags(parser: ArgumentParser) -> None:
    """The flags of `moempi run`, so that scripts can pass the same arguments to both; only the job counts."""
    run_command.add_flags(parser)
    parser.add_argument("--wait", action="store_true", help="until the next run, or the one that runs now, has ended")


def run(chosen: Namespace) -> int:
    """Print state, number of finished requests, exit code, reason; errors, slow and lost hosts if there are any.

    Of a run in a Slurm job, `run=JOB@TIME` too, which no other run of the job file has.
    """
    results = read_job(chosen).output.results
    state = wait_for_end(results) if chosen.wait else read_state(results)
    errors = f"errors {state.errors}" if state.errors else ""
    of_run = [f"run={state.job}@{state.started}"] if state.job else []
    slow = [f"slow_hosts={','.join(state.slow_hosts)}"] if state.slow_hosts else []
    lost = [f"lost_hosts={','.join(state.loss.hosts)}"] if state.loss else []
    words = (state.state, str(state.finished), str(state.exit_code), *state.reason.split(), *errors.split())
    print_line(" ".join((*words, *of_run, *slow, *lost)))
    return 0
