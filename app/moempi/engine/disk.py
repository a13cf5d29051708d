"""The disk that recorded values take, which a run needs before it begins."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from moempi.config.architecture import Architecture
from moempi.config.job import Job
from moempi.config.size import format_size
from moempi.config.traces import least_recorded_bytes
from moempi.engine.request import Request
from moempi.errors import StorageError
from moempi.runtime.world import World


def require_disk(job: Job, world: World, architecture: Architecture, requests: Iterable[Request]) -> None:
    """End all ranks with a StorageError if the disk has no space for what is recorded of the prompts alone; collective.

    `requests` are those that this rank records and that no other does. Values are on disk twice, in the journals and in
    the results.
    """
    if not least_recorded_bytes(job, architecture):
        return
    needed = 2 * world.comm.allreduce(_prompt_bytes(job, architecture, requests))
    world.collectively(lambda: _require_free(job.output.results, needed) if needed and world.rank == 0 else None)


def _prompt_bytes(job: Job, architecture: Architecture, requests: Iterable[Request]) -> int:
    """The least bytes that are recorded of requests: of the computed tokens of their prompts."""
    tables = least_recorded_bytes(job, architecture)
    tokens = num_requests = 0
    for request in requests:
        if not request.finish:
            num_requests += 1
            tokens += min(len(request.prompt_tokens), request.capacity)
    hidden = tokens if job.trace.hidden_positions == "all" else num_requests
    return sum(num_bytes * (hidden if table == "hidden" else tokens) for table, num_bytes in tables.items())


def _require_free(results: str, needed: int) -> None:
    folder = Path(results).resolve().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(
            f"{results}: what the job records of its prompts takes {format_size(needed)} with its parts, "
            f"{folder} has {format_size(free)} free; record less ([trace], [score]) or choose another disk"
        )
