"""The shared-memory files of the MPI library: removed as soon as all ranks have mapped them.

Open MPI keeps one file per rank under /dev/shm until the rank leaves well; of a rank that is killed it would stay. A
file that is mapped needs no name.
"""

from contextlib import suppress
from pathlib import Path

MAPS = Path("/proc/self/maps")
FOLDER = "/dev/shm/"
MARK = "sm_segment."


def unlink_segments() -> None:
    """Remove the names of the segments that this process has mapped; call it when all ranks are connected."""
    if MAPS.exists():
        for path in {line.rpartition(" ")[2] for line in MAPS.read_text().splitlines() if FOLDER + MARK in line}:
            with suppress(OSError):
                Path(path).unlink(missing_ok=True)
