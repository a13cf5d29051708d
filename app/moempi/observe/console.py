"""Where text for a person goes."""

import os
import sys

from rich.console import Console


def console() -> Console:
    """A console on stdout, coloured only where a person watches.

    mpirun hands rank 0 a pseudo terminal as stdout even when its own output is a file, but never one as stderr: so
    stderr decides, unless rich's own TTY_COMPATIBLE says more.
    """
    watched = sys.stderr.isatty() or os.environ.get("TTY_COMPATIBLE") == "1"
    return Console(force_terminal=None if watched else False, highlight=False)


def error_console() -> Console:
    """The same on stderr."""
    return Console(stderr=True, highlight=False)
