"""Prints how long the shipped job takes to recover from a killed host: how many times, under srun and mpirun in turn.

Each time the results must be those of an undisturbed job. A time is that from the kill to the first new token.
"""

import statistics
import sys

from cluster import hosts
from cluster.jobs import Job
from cluster.losses import Repairs, assert_as, kill, recover, repair_all, shipped_job

LIMIT_S = 15.0


def main() -> int:
    folder = hosts.SHARED / "recovery"
    folder.mkdir()
    settings = shipped_job(folder)
    undisturbed = Job(folder / "undisturbed", **settings)
    undisturbed.run()
    times = []
    for number in range(int(sys.argv[1])):
        launcher = ("srun", "mpirun")[number % 2]
        job, repairs = Job(folder / f"{number}", **settings), Repairs()
        try:
            seconds = recover(job, kill, repairs, launcher=launcher)
            assert_as(job, undisturbed)
            times.append(seconds)
            print(f"{launcher:<6} {seconds:5.1f} s", flush=True)
        except AssertionError as error:
            print(f"{launcher:<6} {error}", flush=True)
        repair_all(repairs)
    within = sum(seconds < LIMIT_S for seconds in times)
    print(f"{within} of {sys.argv[1]} within {LIMIT_S:.0f} s; median {statistics.median(times):.1f} s")
    return within < int(sys.argv[1])


if __name__ == "__main__":
    sys.exit(main())
