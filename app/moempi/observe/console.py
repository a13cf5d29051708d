"""Consoles on stdout and stderr, which print all strings as plain text."""

import os
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from moempi.printing import printable, shortened

MAX_TEXT_LENGTH = 2000
"""A longer string is cut in its middle."""


class PlainConsole(Console):
    """A console for strings, also in tables, that may come from files: unprintable characters are escaped.

    Markup, emoji codes and highlighting are off.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """The string as rich text; rich calls it for every string that it prints or measures."""
        plain = {"markup": False, "emoji": False, "highlight": False}
        return super().render_str(printable(shortened(text, MAX_TEXT_LENGTH)), **(options | plain))


def console() -> Console:
    """A console on stdout, with colours only on a terminal.

    mpirun gives rank 0 a pseudo terminal as stdout even if its own output is a file, but never as stderr. So stderr
    decides, unless rich's variable TTY_COMPATIBLE is 1.
    """
    on_terminal = sys.stderr.isatty() or os.environ.get("TTY_COMPATIBLE") == "1"
    return PlainConsole(force_terminal=None if on_terminal else False)


def error_console() -> Console:
    """A console on stderr."""
    return PlainConsole(stderr=True)
