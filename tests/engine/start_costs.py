"""A run of `moempi run` whose calls of MPI are counted: `start_costs.py LIBRARY OUT.json run JOB.toml ...`.

Each rank writes OUT.json.RANK: the calls before the first step, and the modules that it has imported at the end.
"""

import ctypes
import json
import os
import sys
from pathlib import Path

os.environ["SLURMD_NODENAME"] = f"node-{int(os.environ['OMPI_COMM_WORLD_RANK']) // 2}"  # two ranks a node

LIBRARY = ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)


def calls() -> list[int]:
    """Collectives over all ranks, over fewer, communicators made."""
    counts = (ctypes.c_long * 3)()
    LIBRARY.mpi_calls(counts)
    return list(counts)


def main() -> int:
    from moempi.engine.lanes import Lanes

    run, phases = Lanes.run, []

    def counted(lanes, *arguments):
        phases.append(calls())
        return run(lanes, *arguments)

    Lanes.run = counted
    from mpi4py import MPI

    from moempi.cli import main as run_command

    code = run_command(sys.argv[3:])
    Path(f"{sys.argv[2]}.{MPI.COMM_WORLD.rank}").write_text(
        json.dumps({"calls": phases[0], "modules": sorted(sys.modules)})
    )
    return code


if __name__ == "__main__":
    sys.exit(main())
