"""`moempi state`: how a job's last run ended, as one line for scripts."""

from argparse import ArgumentParser, Namespace

from moempi.commands.flags import add_job_flags, read_job
from moempi.printing import print_line
from moempi.storage.run_state import read_state


def add_flags(parser: ArgumentParser) -> None:
    """The job."""
    add_job_flags(parser)


def run(chosen: Namespace) -> int:
    """Print state, number of finished requests, exit code and reason."""
    state = read_state(read_job(chosen).output.results)
    print_line(f"{state.state} {state.finished} {state.exit_code} {state.reason}")
    return 0
