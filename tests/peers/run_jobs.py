"""Runs the program on one job file after another, in the ranks of one mpirun: run_jobs.py JOB.toml..."""

import sys

from moempi.cli import main

for job in sys.argv[1:]:
    status = main(["run", job])
    if status:
        sys.exit(status)
