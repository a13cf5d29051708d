"""The parser of the command line: it loads the file of the chosen command and maps errors to exit codes."""

import os
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from moempi import __version__
from moempi.errors import MoempiError, UsageError
from moempi.observe.logs import log_to_stderr
from moempi.printing import escape_unencodable, print_error, print_traceback
from moempi.runtime.launcher import GRACE_S, launched_first

COMMANDS = {
    "run": "Run a job on all ranks",
    "launch": "Run a command on ranks, started with mpirun",
    "convert": "Convert a checkpoint folder into one weight file",
    "init": "Write random weights for an architecture",
    "inspect": "Print what a weight or results file holds",
    "export": "Write a results file as JSON lines",
    "show": "Print the first outputs of a finished job",
    "state": "Print the state, finished requests and exit code of a job's last run",
    "compare": "Compare two results files of the same requests",
    "plan": "Forecast a job on a machine described by a file, or find its best layout there",
    "place": "Choose the ranks of experts from the recorded routing of a run",
    "check": "Measure the exchange between ranks, with --measure also their links",
    "bench": "Run a benchmark",
    "completion": "Print a script of bash that completes commands and options",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status (sysexits.h); an error is one line on stderr.

    Exits with the status of a usage error if the arguments are wrong.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    chosen = Namespace(debug="--debug" in words)
    escape_unencodable()
    log_to_stderr()
    try:
        _refuse_not_utf8(words)
        _parser(words).parse_args(words, chosen)
        code: int = chosen.run(chosen)
        return code
    except MoempiError as error:
        return _fail(str(error), error.exit_code, debug=chosen.debug, once=isinstance(error, UsageError))
    except KeyboardInterrupt:
        return _fail("interrupted", 130, debug=chosen.debug)
    except Exception as error:
        return _fail(f"{type(error).__name__}: {error}", MoempiError.exit_code, debug=chosen.debug)


def _refuse_not_utf8(words: Sequence[str]) -> None:
    """Bytes of an argument that are not UTF-8 arrive as half surrogates, which no file or table can hold."""
    for word in words:
        if any("\ud800" <= character <= "\udfff" for character in word):
            raise UsageError(f"{word!a}: is not UTF-8 text")


class _Parser(ArgumentParser):
    """A parser whose errors are one line with the exit code of a usage error."""

    def error(self, message: str) -> NoReturn:
        self.exit(_fail(f"{message}; see {self.prog} --help", UsageError.exit_code, once=True))


def _parser(words: Sequence[str]) -> ArgumentParser:
    """The parser of all commands. Only the command that `words` begin with is imported and has flags."""
    parser = _Parser(prog="moempi", description="Mixture-of-Experts inference over MPI.")
    parser.add_argument("--version", action="version", version=f"moempi {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary)
        if name in words[:1]:
            command = _load(name)
            sub.add_argument("--debug", action="store_true", help="print the traceback of an error")
            command.add_flags(sub)
            sub.set_defaults(run=command.run, commands=tuple(COMMANDS))
    return parser


def _load(name: str) -> Any:
    """The module of a command, with `add_flags(parser)` and `run(chosen)`, which returns the exit status."""
    return import_module("moempi.bench" if name == "bench" else f"moempi.commands.{name}")


def _fail(text: str, code: int, *, debug: bool = False, once: bool = False) -> int:
    if once and not launched_first(os.environ):
        time.sleep(GRACE_S)  # exiting earlier would make the launcher kill rank 0 before it has printed
        return code
    if debug and (error := sys.exception()):
        print_traceback(error)
    print_error(text)
    return code
