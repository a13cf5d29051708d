"""How many cache pages a run has: what its requests can use, and what every rank can hold."""

from collections.abc import Iterable

from moempi.config.job import Job
from moempi.config.size import format_size, parse_size
from moempi.engine.request import Request
from moempi.errors import ConfigError
from moempi.layout.memory import Memory
from moempi.model.kv_cache import pages_for

CACHE_SHARE = 0.8
"""Of the memory that is left beside weights and rows; the rest is for MPI, the interpreter and what is not counted."""


def useful_pages(requests: Iterable[Request], *, slots: int) -> int:
    """Pages that the longest `slots` unfinished sequences hold at once."""
    wanted = sorted((pages_for(sequence.capacity) for sequence in requests if not sequence.finish), reverse=True)
    return sum(wanted[:slots])


def affordable_pages(job: Job, memory: Memory, *, available: int) -> int:
    """Pages that a rank with `available` bytes can give to each group that it computes for.

    Raises ConfigError, with the numbers, when that is not even one.
    """
    if job.run.kv_memory == "auto":
        allowed = int((available - memory.weights - memory.rows) * CACHE_SHARE)
    else:
        allowed = parse_size(job.run.kv_memory)
    pages = allowed // (memory.page * memory.groups)
    if pages < 1:
        raise ConfigError(
            f"no room for the cache: weights {format_size(memory.weights)}, rows {format_size(memory.rows)}, "
            f"a page {format_size(memory.page * memory.groups)}, memory {format_size(available)}, "
            f"run.kv_memory {job.run.kv_memory}; use more ranks or stages, or lower run.batch_tokens"
        )
    return pages
