"""Memory of freed arrays, which the process keeps for the next ones."""

import ctypes
from contextlib import suppress

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Options of mallopt(3) of the GNU C library."""
LARGEST_KEPT = 32 << 20
"""Arrays beyond have pages of their own, which the system takes back: the most that mallopt takes."""
MOST_KEPT = 64 << 20
"""Free memory that stays at the end of the heap."""


def keep_freed_memory() -> None:
    """Let arrays of this process take memory that others have freed.

    Every verb of a step makes arrays of some MiB. As the C library begins, it returns their memory to the system, which
    clears each page again for the next array: 15 % of the processor time of scoring with fast products. Does nothing
    with another library.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(TRIM_THRESHOLD, MOST_KEPT)
