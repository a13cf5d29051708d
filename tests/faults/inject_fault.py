"""The real program with a fault in it: python inject_fault.py NOTES FAULT RANK PLACE COUNT run JOB.toml ...

FAULT is injected at the COUNT-th time that RANK comes to PLACE; RANK -1 is none. Each rank leaves its process id in
the folder NOTES, with the names of the shared-memory files that it has mapped, and when the fault was injected.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FAULTS = ("exception", "exit", "memory", "SIGKILL", "SIGSEGV", "SIGSTOP")
POINTS = ("counts", "dispatch", "combine", "agree")
CALLS = {
    "prompts": ("moempi.storage.prompts", "read_prompts"),
    "weights": ("moempi.engine.load", "load_model"),
    "merge": ("moempi.storage.merge", "merge"),
    "remove": ("moempi.storage.journal", "remove_journals"),
}


def inject(fault: str) -> None:
    match fault:
        case "exception":
            raise ValueError("injected")
        case "exit":
            sys.exit(3)
        case "memory":
            raise MemoryError
    os.kill(os.getpid(), signal.Signals[fault])
    if fault != "SIGUSR1":
        time.sleep(1 if fault == "SIGSTOP" else 60)  # a signal may arrive a moment later


def before(action: Callable[..., Any], hook: Callable[..., None]) -> Callable[..., Any]:
    def both(*arguments: Any, **named: Any) -> Any:
        hook(*arguments)
        return action(*arguments, **named)

    return both


def main(notes: str, fault: str, rank: str, place: str, count: str, *arguments: str) -> int:
    from moempi.cli import main as moempi
    from moempi.runtime.monitor import Monitor

    fork = Monitor.fork

    def fork_and_prepare(monitor: Monitor) -> None:
        fork(monitor)  # before anything imports MPI
        prepare(notes, fault, rank, place, count)

    Monitor.fork = fork_and_prepare
    return moempi(arguments)


def prepare(notes: str, fault: str, rank: str, place: str, count: str) -> None:
    """Note the process id, and make the program inject the fault when it comes to the place."""
    own_rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
    note = Path(notes, str(own_rank))
    note.with_suffix(".pid").write_text(str(os.getpid()))
    left = [int(count)]

    def come(*_: object) -> None:
        left[0] -= 1
        if left[0] == 0 and own_rank == int(rank):
            maps = Path("/proc/self/maps").read_text().splitlines()
            note.with_suffix(".shm").write_text("\n".join(line.split()[5] for line in maps if "/dev/shm/" in line))
            note.with_suffix(".injected").write_text(str(time.time()))
            inject(fault)

    from importlib import import_module

    from moempi.runtime.world import World
    from moempi.storage.journal import JournalWriter

    if place in CALLS:
        module = import_module(CALLS[place][0])
        setattr(module, CALLS[place][1], before(getattr(module, CALLS[place][1]), come))
    elif place == "append":
        JournalWriter.append = before(JournalWriter.append, come)
    elif place == "finish":
        World.finish = before(World.finish, come)
    else:
        alive = World.alive

        def come_to_point(world: World, where: str) -> None:
            alive(world, where)
            if place in where:
                come()

        World.alive = come_to_point


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
