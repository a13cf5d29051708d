"""The number of pages of the key-value cache: what the requests can use, and what the memory of a rank allows."""

from collections.abc import Iterable

from moempi.config.job import RunSection
from moempi.config.size import format_size, parse_size
from moempi.engine.request import Request
from moempi.errors import ConfigError
from moempi.layout.memory import Memory
from moempi.model.kv_cache import pages_for

CACHE_SHARE = 0.8
"""Share of the memory left beside weights and rows; the rest is for MPI, the interpreter and temporary arrays."""


def useful_pages(requests: Iterable[Request], *, slots: int) -> int:
    """Pages that the `slots` longest unfinished requests hold at once."""
    needed = sorted((pages_for(request.capacity) for request in requests if not request.finish), reverse=True)
    return sum(needed[:slots])


def affordable_pages(run: RunSection, memory: Memory, *, available: int) -> int:
    """Pages that a rank with `available` bytes can allocate for each group that it computes for.

    Raises ConfigError, with all sizes, if there is no memory for one page.
    """
    if run.kv_memory == "auto":
        allowed = int((available - memory.weights - memory.rows) * CACHE_SHARE)
    else:
        allowed = parse_size(run.kv_memory)
    pages = allowed // (memory.page * memory.groups)
    if pages < 1:
        raise ConfigError(
            f"no room for the cache: weights {format_size(memory.weights)}, rows {format_size(memory.rows)}, "
            f"a page {format_size(memory.page * memory.groups)}, memory {format_size(available)}, "
            f"run.kv_memory {run.kv_memory}; use more ranks or stages, or lower run.batch_tokens"
        )
    return pages
