"""The real program with a fault in it: python inject_fault.py NOTES FAULT RANK PLACE COUNT run JOB.toml ...

FAULT is injected at the COUNT-th time that RANK comes to PLACE; RANK -1 is none. Each rank leaves its process id in
the folder NOTES, with the names of the shared-memory files that it has mapped, and when the fault was injected. Two
faults disturb nothing: "none" only notes when RANK came to PLACE, "hold" waits there for the file RELEASE in NOTES.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FAULTS = ("exception", "exit", "memory", "SIGKILL", "SIGSEGV", "SIGSTOP")
POINTS = ("dispatch", "combine", "agree")
RELEASE = "release"
"""The file in NOTES that ends the fault "hold"."""
CALLS = {
    "prompts": ("moempi.engine.inputs", "PromptFile"),
    "weights": ("moempi.engine.load", "load_model"),
    "record": ("moempi.engine.summary", "rank_record"),  # after the last token
    "merge": ("moempi.storage.merge", "merge"),
    "remove": ("moempi.storage.journal", "remove_journals"),
}


def inject(fault: str, notes: Path) -> None:
    match fault:
        case "none":
            return
        case "hold":
            while not (notes / RELEASE).exists():
                time.sleep(0.01)
            return
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

    inject_after_fork(notes, fault, rank, place, count)
    return moempi(arguments)


def inject_after_fork(notes: str, fault: str, rank: str, place: str, count: str) -> None:
    """Make this process prepare the fault when it forks its monitor, before anything imports MPI."""
    from moempi.runtime.monitor import Monitor

    fork = Monitor.fork

    def fork_and_prepare(monitor: Monitor) -> None:
        fork(monitor)
        prepare(notes, fault, rank, place, count)

    Monitor.fork = fork_and_prepare


def prepare(notes: str, fault: str, rank: str, place: str, count: str) -> None:
    """Note the process id, and make the program inject the fault when it comes to the place."""
    own_rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
    note = Path(notes, str(own_rank))
    note.with_suffix(".pid").write_text(str(os.getpid()))
    left = [int(count)]

    def come(*_: object) -> None:
        left[0] -= 1
        if left[0] == 0 and own_rank == int(rank):
            maps = Path("/proc/self/maps").read_text().splitlines()
            note.with_suffix(".shm").write_text("\n".join(line.split()[5] for line in maps if "/dev/shm/" in line))
            note.with_suffix(".injected").write_text(str(time.time()))
            inject(fault, note.parent)

    from importlib import import_module

    from moempi.runtime.abort_channel import AbortChannel
    from moempi.runtime.world import World
    from moempi.storage.journal import JournalWriter

    if place in CALLS:
        module = import_module(CALLS[place][0])
        setattr(module, CALLS[place][1], before(getattr(module, CALLS[place][1]), come))
    elif place == "append":
        JournalWriter.append = before(JournalWriter.append, come)
    elif place == "rename":  # of the complete results file; "hold" ends there when a rank announces its error line
        World.wait_if_aborting = before(World.wait_if_aborting, come)
        AbortChannel.announce = before(AbortChannel.announce, lambda _: note.with_name(RELEASE).touch())
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
