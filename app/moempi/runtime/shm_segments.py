"""The files through which ranks of a host share memory: where the MPI library puts them, and their early removal.

Open MPI keeps one file of SEGMENT_BYTES for each rank in /dev/shm. A container's is often too small for them, and when
it is full, ranks end without a word or die of SIGBUS. MPI_Finalize removes the file, which a killed rank never calls. A
mapped file needs no name, so unlinking it early loses nothing.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from moempi.config.size import format_size
from moempi.errors import ConfigError
from moempi.printing import print_error
from moempi.runtime.launcher import GRACE_S, launched_first_of_host, ranks_of_host

MAPS = Path("/proc/self/maps")
FOLDER = Path("/dev/shm")
MARK = "/sm_segment."
SEGMENT_BYTES = 16 << 20
"""The default of Open MPI's btl_sm_segment_size."""
PLACES = ("OMPI_MCA_btl_sm_backing_directory", "OMPI_MCA_osc_sm_backing_directory")
"""The variables that name Open MPI's folders for shared memory."""


def choose_segment_folder() -> None:
    """Make MPI share memory through files in the folder for temporary files if FOLDER is too small for all ranks.

    Call it before MPI starts. If both are too small, raises ConfigError on the first rank of the host, SystemExit with
    its exit code on the others. Does nothing if MPI uses no such files, or if
    the user chose their folder.
    """
    ranks, environment = ranks_of_host(os.environ), os.environ
    if ranks < 2 or not _uses_segments(environment) or not FOLDER.is_dir():
        return
    needed, free = ranks * SEGMENT_BYTES, shutil.disk_usage(FOLDER).free
    if free >= needed:
        return
    other = Path(tempfile.gettempdir())
    short = f"{FOLDER} has {format_size(free)} free, MPI needs {format_size(needed)} for {ranks} ranks"
    advice = "enlarge it (docker run --shm-size=1g)"
    first = launched_first_of_host(environment)
    if shutil.disk_usage(other).free < needed:
        if not first:
            time.sleep(GRACE_S)  # exiting earlier would make the launcher kill the first before it has printed
            raise SystemExit(ConfigError.exit_code)
        raise ConfigError(f"{short}: {advice}, or set TMPDIR to a folder with that much space")
    for name in PLACES:
        environment[name] = str(other)
    if first:
        print_error(f"{short}: it uses {other} instead; to be faster, {advice}")


def unlink_segments() -> None:
    """Unlink the segments that this process has mapped; call it when all ranks are connected."""
    if MAPS.exists():
        for path in {line.rpartition(" ")[2] for line in MAPS.read_text().splitlines() if MARK in line}:
            with suppress(OSError):
                Path(path).unlink(missing_ok=True)


def _uses_segments(environment: Mapping[str, str]) -> bool:
    transports = environment.get("OMPI_MCA_btl", "sm")
    excluded = transports.startswith("^")
    named = "sm" in transports.lstrip("^").split(",")
    return environment.get("OMPI_MCA_pml") != "ucx" and named != excluded and PLACES[0] not in environment
