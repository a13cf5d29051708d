"""Removal of the MPI library's shared-memory files, as soon as all ranks have mapped them.

Open MPI keeps one file per rank in /dev/shm and removes it in MPI_Finalize, which a killed rank never calls. A mapped
file needs no name, so unlinking it early loses nothing.
"""

from contextlib import suppress
from pathlib import Path

MAPS = Path("/proc/self/maps")
FOLDER = "/dev/shm/"
MARK = "sm_segment."


def unlink_segments() -> None:
    """Unlink the segments that this process has mapped; call it when all ranks are connected."""
    if MAPS.exists():
        for path in {line.rpartition(" ")[2] for line in MAPS.read_text().splitlines() if FOLDER + MARK in line}:
            with suppress(OSError):
                Path(path).unlink(missing_ok=True)
