"""A program with every ending, run by test_world.py: python endings.py ENDING FOLDER RANK.

Each rank writes its process id to FOLDER, and RANK.ready when it is inside its guard. RANK is the rank that ends. No
rank has a monitor process.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from mpi4py import MPI

from moempi.errors import ConfigError, DataError
from moempi.runtime.monitor import Monitor
from moempi.runtime.world import World


def end_by(ending: str) -> None:
    match ending:
        case "exception" | "debug":
            raise ValueError("a bad\nvalue")
        case "moempi-error":
            raise DataError("line 3: no prompt")
        case "memory":
            raise MemoryError
        case "keyboard":
            raise KeyboardInterrupt
        case "exit-0":
            sys.exit(0)
        case "exit-3":
            sys.exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "late":
            time.sleep(60)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)


def finish_while_aborting(world: World) -> None:
    aborting, finished = threading.Event(), threading.Event()

    def write(cause: str, code: int) -> int:
        aborting.set()
        finished.wait()
        return code

    world.on_failure(write)
    threading.Thread(target=world.abort, args=[KeyboardInterrupt()], daemon=True).start()
    aborting.wait()  # its line is printed, and the abort follows
    world.finish(65)
    world.on_failure(None)
    finished.set()
    time.sleep(60)


def interrupt_at_start(rank: int) -> None:
    """This rank gets a signal while it waits in MPI for the others: Python raises it when they have come."""
    if MPI.COMM_WORLD.rank != rank:
        time.sleep(6)
    else:
        threading.Timer(3.0, os.kill, [os.getpid(), signal.SIGINT]).start()


def work(world: World, ending: str, rank: int) -> None:
    if ending == "good":
        return
    if ending == "busy":  # longer than the watchdog's patience, but never silent for so long
        for step in range(25):
            world.alive(f"step {step}")
            time.sleep(0.2)
    elif world.rank == rank and ending == "finish":
        finish_while_aborting(world)
    elif world.rank == rank and ending != "waiting":
        end_by(ending)
    else:
        if ending == "late":
            world.alive("step 8")
        world.comm.recv(tag=99)  # never sent: blocked inside MPI


def main(ending: str, folder: str, rank: int) -> None:
    place = Path(folder, str(MPI.COMM_WORLD.rank))
    place.with_suffix(".pid").write_text(str(os.getpid()))
    if ending == "interrupt":
        interrupt_at_start(rank)
    world = World.start(Monitor(), debug=ending == "debug")
    with world.guard():
        world.raise_together(ConfigError("no room") if ending == "disagree" and world.rank > 0 else None)
        world.watch(300.0 if ending == "waiting" else 4.0, group=0)
        world.alive("step 7")
        place.with_suffix(".ready").touch()
        work(world, ending, rank)


main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
