"""Lines on stdout and stderr, whose text may come from files and from the environment.

No text moves the cursor, changes colours, or hides or reorders other text. A stderr that cannot be written, as of a
terminal that has hung up, takes no line and ends nothing. Tables are printed by `observe.console`, log
files are written by `observe.logs`; both use these functions.
"""

import json
import os
import sys
import traceback
from contextlib import suppress
from io import TextIOWrapper

STDERR = 2
MAX_WORD_LENGTH = 200
MAX_LINE_LENGTH = 1000
"""A longer word or line is cut in its middle, so that the begin and the end of a path, and the reason, remain."""


def printable(text: str) -> str:
    r"""The text with its unprintable characters escaped, as in \n, \x1b, \u202e and \udcff.

    These are control and format characters, line ends, lone surrogates, and all spaces but the usual one.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def printable_json(line: bytes) -> bytes:
    r"""A line of JSON with the characters escaped that `printable` escapes, as \\u202e: it is the same value."""
    text = line.decode().removesuffix("\n")
    if not text.isprintable():
        text = "".join(char if char.isprintable() else _json_escape(char) for char in text)
    return f"{text}\n".encode()


def _json_escape(char: str) -> str:
    return f"\\u{ord(char):04x}" if char.isascii() else json.dumps(char)[1:-1]


def shortened(text: str, length: int) -> str:
    """The text, or if it is longer than `length` characters, its begin and its end."""
    half = (length - len("...")) // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


def one_line(text: str) -> str:
    """The words of the text in one printable line of at most MAX_LINE_LENGTH characters."""
    words = (shortened(printable(word), MAX_WORD_LENGTH) for word in text.split())
    return shortened(" ".join(words), MAX_LINE_LENGTH)


def print_line(text: str) -> None:
    """Print one line on stdout."""
    print(one_line(text))


def print_error(text: str) -> None:
    """Print `moempi: text` as one line on stderr."""
    with suppress(OSError):
        print(f"moempi: {one_line(text)}", file=sys.stderr)


def write_error(text: str, *, on_new_line: bool = False) -> None:
    """Print the line of `print_error` in one write, so that lines of several ranks do not mix; safe from any thread.

    `on_new_line` ends the line of the cursor before.
    """
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    begin = "\n" if on_new_line else ""
    with suppress(OSError):
        os.write(STDERR, f"{begin}moempi: {one_line(text)}\n".encode(encoding, "backslashreplace"))


def write_bytes(descriptor: int, content: bytes) -> None:
    """Write all of what another process of this program has printed to a descriptor; nothing if it is closed."""
    with suppress(OSError):
        while content:
            content = content[os.write(descriptor, content) :]


def print_traceback(error: BaseException) -> None:
    """Print the traceback of an error on stderr."""
    lines = "".join(traceback.format_exception(error)).removesuffix("\n").split("\n")
    with suppress(OSError):
        print(*map(printable, lines), sep="\n", file=sys.stderr)


def escape_unencodable() -> None:
    """Make stdout escape the characters that its encoding lacks, as stderr always does."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
