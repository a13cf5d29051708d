"""What this process may use of the machine: free memory and processors, within the limits of control groups.

A batch system or a container limits both by control groups, of version 1 or 2. The limit of every group on the path to
this process holds. Pages of files that were read lately count as usage, but the kernel frees them on demand.
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


def processors(root: Path = Path("/")) -> float:
    """Seconds of processor time that this process and the others of its groups may use in a second; may be infinite."""
    return min(_group_processors(root), default=float("inf"))


def _system_bytes(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _group_bytes(root: Path) -> Iterator[int]:
    """Bytes that each limited group on the path to this process has left."""
    for group, version in _groups(root, "memory"):
        with suppress(OSError, ValueError):  # no such group here, no limit ("max"), or another format
            yield from _left_bytes(group, *(_V1 if version == 1 else _V2))


def _left_bytes(group: Path, limit_name: str, usage_name: str, reclaimable_name: str) -> Iterator[int]:
    limit = int((group / limit_name).read_text())
    if limit < _UNLIMITED:
        usage = int((group / usage_name).read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        yield max(limit - usage + int(counts.get(reclaimable_name, 0)), 0)


def _group_processors(root: Path) -> Iterator[float]:
    for group, version in _groups(root, "cpu"):
        with suppress(OSError, ValueError):
            if version == 1:
                quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            else:
                quota, period = map(int, (group / "cpu.max").read_text().split())
            if quota > 0 and period > 0:  # a quota of -1 is none
                yield quota / period


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """The groups that limit this process by a controller, innermost first, and the version of their hierarchy."""
    mounted = root / "sys/fs/cgroup"
    for place, version in _places(root, mounted, controller):
        for group in (place, *place.parents):
            if not group.is_relative_to(mounted):
                break
            yield group, version


def _places(root: Path, mounted: Path, controller: str) -> Iterator[tuple[Path, int]]:
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                yield mounted / controller / path.lstrip("/"), 1
            elif not controllers:
                yield mounted / path.lstrip("/"), 2
