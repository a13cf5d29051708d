"""Text that would control a terminal, and what to expect of everything printed and of every refusal."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mpirun import LIMIT_S

CONTROLS = "".join(map(chr, [*range(1, 32), *range(127, 160)]))
INVISIBLE = "\u200b\u200d\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"
MARKUP = "[red][/][link=x]:smile:"
HOSTILE = f"a{CONTROLS}{INVISIBLE}{MARKUP}z"
STYLE = re.compile("\x1b\\[[0-9;]*m")

AT_ONCE_S = 5.0  # of a processor; a refusal takes one


def assert_printable(printed: str | bytes) -> None:
    """Fail if anything but a line end is unprintable."""
    text = printed if isinstance(printed, str) else printed.decode()
    found = {char for char in text if not char.isprintable() and char != "\n"}
    assert not found, (found, text[:2000])


@contextmanager
def at_once(processor_s: float = AT_ONCE_S) -> Iterator[None]:
    """Fail if the body takes `processor_s` seconds of a processor, or waits."""
    processor, clock = time.process_time(), time.monotonic()
    yield
    assert time.process_time() - processor < processor_s
    assert time.monotonic() - clock < LIMIT_S / 5
