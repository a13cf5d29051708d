"""Memory that this process can still allocate: what the system has free, and what the control groups above it allow.

A batch system or a container limits memory by control groups, of version 1 or 2. The limit of every group on the path
to this process holds. Pages of files that were read lately count as usage, but the kernel frees them on demand.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_UNLIMITED = 1 << 60
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process can allocate without swapping or reaching a limit; `root` is where /proc and /sys are."""
    return min([_system_bytes(root), *_group_bytes(root)])


def _system_bytes(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _group_bytes(root: Path) -> Iterator[int]:
    """Bytes that each limited group on the path to this process has left."""
    mounted = root / "sys/fs/cgroup"
    for place, names in _hierarchies(root, mounted):
        for group in (place, *place.parents):
            if not group.is_relative_to(mounted):
                break
            with suppress(OSError, ValueError):  # no such group here, no limit ("max"), or another format
                yield from _left_bytes(group, *names)


def _hierarchies(root: Path, mounted: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The groups of this process that may limit memory, and the names of their files."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                yield mounted / "memory" / path.lstrip("/"), _V1
            elif not controllers:
                yield mounted / path.lstrip("/"), _V2


def _left_bytes(group: Path, limit_name: str, usage_name: str, reclaimable_name: str) -> Iterator[int]:
    limit = int((group / limit_name).read_text())
    if limit < _UNLIMITED:
        usage = int((group / usage_name).read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        yield max(limit - usage + int(counts.get(reclaimable_name, 0)), 0)
