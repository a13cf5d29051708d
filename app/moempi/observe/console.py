"""Consoles on stdout and stderr."""

import os
import sys

from rich.console import Console


def console() -> Console:
    """A console on stdout, with colours only on a terminal.

    mpirun gives rank 0 a pseudo terminal as stdout even if its own output is a file, but never as stderr. So stderr
    decides, unless rich's variable TTY_COMPATIBLE is 1.
    """
    on_terminal = sys.stderr.isatty() or os.environ.get("TTY_COMPATIBLE") == "1"
    return Console(force_terminal=None if on_terminal else False, highlight=False)


def error_console() -> Console:
    """A console on stderr."""
    return Console(stderr=True, highlight=False)
