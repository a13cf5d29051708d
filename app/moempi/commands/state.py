"""`moempi state`: how a job's last run ended, as one line for scripts."""

from argparse import ArgumentParser, Namespace

from moempi.commands import run as run_command
from moempi.commands.flags import read_job
from moempi.printing import print_line
from moempi.storage.run_state import read_state


def add_flags(parser: ArgumentParser) -> None:
    """The flags of `moempi run`, so that scripts can pass the same arguments to both; only the job counts."""
    run_command.add_flags(parser)


def run(chosen: Namespace) -> int:
    """Print state, number of finished requests, exit code, reason, and number of errors if there are any."""
    state = read_state(read_job(chosen).output.results)
    errors = f"errors {state.errors}" if state.errors else ""
    words = (state.state, str(state.finished), str(state.exit_code), *state.reason.split(), *errors.split())
    print_line(" ".join(words))
    return 0
