"""Who this process is among all processes of the job, and how they end together."""

import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TypeVar

from mpi4py import MPI

from moempi.config.job import TopologySection
from moempi.config.topology_file import read_topology
from moempi.errors import ConfigError, MoempiError, UsageError
from moempi.layout.topology import Topology, arrange, from_file, virtual
from moempi.runtime.abort_channel import AbortChannel
from moempi.runtime.hang import explain, is_hang
from moempi.runtime.launcher import GRACE_S, launch_problem
from moempi.runtime.monitor import WITNESS
from moempi.runtime.shm_cleanup import unlink_segments
from moempi.runtime.watchdog import HangError, Watchdog

T = TypeVar("T")

# The time that a last line needs from this rank's pipe to the launcher before the launcher kills its readers.
LINE_TRAVEL_S = 0.2
# How long a rank waits for others to say where they stand, at least; and as a share of the job's own patience.
QUERY_S = 1.5
QUERY_SHARE = 0.1


class AgreedExit(SystemExit):
    """The exit that all ranks take together after `World.agree`: MPI is finalised as after a good run."""


class World:
    """All ranks of the job as seen from one: `comm` a communicator of our own, `nodes` the node index of every rank.

    `local_rank` counts the ranks of this node below this one. `split_agrees` is false when MPI finds other
    shared-memory groups than the host names say, as happens with some launchers.
    """

    def __init__(self, comm: MPI.Intracomm, *, debug: bool = False) -> None:
        self.comm = comm
        self.rank = comm.rank
        self.size = comm.size
        self.host = MPI.Get_processor_name()
        names, processes = zip(*comm.allgather((_node_name(self.host), _process_name())), strict=True)
        order = {name: index for index, name in enumerate(dict.fromkeys(names))}
        self.nodes = tuple(order[name] for name in names)
        self.local_rank = self.nodes[: self.rank].count(self.nodes[self.rank])
        self.split_matches_nodes = _split_matches_nodes(comm, self.nodes)
        self._debug = debug
        peers = _peers(self.rank, self.nodes, processes)
        self._watchdog = Watchdog(
            self.abort,
            self._on_hang,
            self._reply,
            rank=self.rank,
            peers=peers,
            grace_s=0.0 if self.rank == 0 else GRACE_S,
        )
        self._ending = threading.Lock()
        self._abort_channel = AbortChannel(comm, peers, self._watchdog.position)
        self._on_failure: Callable[[str, int], object] = lambda cause, code: None

    @classmethod
    def start(cls, *, debug: bool = False) -> "World":
        """Join the job's processes; collective.

        Raises UsageError when the launcher started a different number of processes than MPI connected.
        """
        problem = launch_problem(os.environ, MPI.COMM_WORLD.size)
        if problem is not None:
            unlink_segments()
            raise UsageError(problem)
        try:
            comm = MPI.COMM_WORLD.Dup()
            comm.Barrier()
            unlink_segments()
            return cls(comm, debug=debug)
        except BaseException as error:
            time.sleep(0.0 if MPI.COMM_WORLD.rank == 0 else GRACE_S)
            line = f"moempi: rank {MPI.COMM_WORLD.rank}: MPI does not connect the ranks: {_cause(error)}\n"
            if WITNESS.acquire_report_right():
                os.write(2, line.encode(errors="replace"))
            MPI.COMM_WORLD.Abort(_exit_code(error))
            raise

    @property
    def num_nodes(self) -> int:
        """Number of nodes that the ranks run on."""
        return max(self.nodes) + 1

    def by_node(self, section: TopologySection, *, island: str = "") -> tuple[Topology, MPI.Intracomm]:
        """Where ranks stand when they are counted switch by switch and node by node, and a communicator in that order.

        Collective; `island` is this rank's in its node. Virtual nodes of `ranks_per_node` ranks are taken in the order
        of the ranks; a file says of the ranks in their found order where they are to be taken to stand. A file that
        does not fit ends all ranks alike.
        """
        if section.ranks_per_node:
            order, topology = list(range(self.size)), virtual(self.size, section.ranks_per_node)
        else:
            nodes = [str(node) for node in self.nodes]
            islands, switches = zip(*self.comm.allgather((island, _switch())), strict=True)
            order, topology = arrange(nodes, islands, switches)
        if section.file:
            topology = self.collectively(lambda: _stated(section, self.size))
        return topology, MPI.Intracomm(self.comm.Split(0, order.index(self.rank)))

    def raise_together(self, error: MoempiError | None) -> None:
        """End the program on all ranks if any rank has an `error`, else return; collective, blocks.

        The lowest failing rank prints its line; all ranks raise AgreedExit with its exit code.
        """
        first = self.comm.allreduce(self.rank if error is not None else self.size, op=MPI.MIN)
        if first == self.size:
            return
        code = self.comm.bcast(error.exit_code if error is not None else 0, root=first)
        if error is not None and self.rank == first:
            self._print_error(error, str(error))
            self._on_failure(str(error), code)
        raise AgreedExit(code)

    def collectively(self, action: Callable[[], T]) -> T:
        """Do `action` on every rank and return its value, or `agree` on the MoempiErrors it raised; collective."""
        self.alive(self.where)
        value: list[T] = []
        refusal = None
        try:
            value.append(action())
        except MoempiError as error:
            refusal = error
        self.raise_together(refusal)
        return value[0]

    def abort(self, error: BaseException) -> NoReturn:
        """Print one line that names this rank and `error`, and end all ranks at once; safe from any thread."""
        if not self._ending.acquire(blocking=False):
            time.sleep(60)  # the other thread of this rank is ending the program
        code, cause = _exit_code(error), _cause(error)
        if not self._abort_channel.announced():
            if WITNESS.acquire_report_right():
                self._print_error(error, cause)
            self._abort_channel.announce()
            self._on_failure(cause, code)
            time.sleep(LINE_TRAVEL_S)
        MPI.COMM_WORLD.Abort(code)
        os._exit(code)

    def on_failure(self, write: Callable[[str, int], object]) -> None:
        """From now on, the rank that tells the cause of a failure also calls `tell(cause, exit code)`, from any thread.

        It must return within a second or so: the other ranks wait for their end.
        """
        self._on_failure = write

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Around everything between `start` and the end: whatever leaves the block on one rank ends all ranks.

        An AgreedExit passes. SIGINT and SIGTERM end the program with one line, also inside a blocked MPI call.
        Collective at the end of a good block: the ranks leave together.
        """
        self._watchdog.start()
        if self.num_nodes > 1:
            WITNESS.release()  # a right to tell is one node's; from here on the ranks know of each other
        try:
            yield
            self.comm.Barrier()
        except AgreedExit:
            raise
        except BaseException as error:
            self.abort(error)
        finally:
            self._watchdog.stop()

    def watch(self, timeout_s: float, *, group: int | None = None) -> None:
        """From now on, inside `guard`, ranks that stand still for `timeout_s` seconds end the program.

        `group`: see `Position`; ranks of one group come to the same places, so the late one among them can be named.
        """
        self._watchdog.limit(timeout_s, group=group)

    def alive(self, where: str) -> None:
        """Tell the watchdog that this rank has come to `where`, a short phrase for a person."""
        self._watchdog.alive(where)

    @property
    def where(self) -> str:
        """The place of which `alive` was told last."""
        return self._watchdog.where

    def _on_hang(self, timeout_s: float) -> None:
        """End the program if nothing moves. The lowest rank that answers is in charge. From the watchdog's thread."""
        patience_s = max(QUERY_S, QUERY_SHARE * timeout_s)
        if self.rank and self._abort_channel.query_positions(range(min(self.rank, 2)), patience_s=patience_s):
            return
        others = [rank for rank in range(self.size) if rank != self.rank]
        positions = self._abort_channel.query_positions(others, patience_s=patience_s) | {
            self.rank: self._watchdog.position()
        }
        if is_hang(positions, self.size, timeout_s=timeout_s):
            reason = explain(positions, self.size)
            self.abort(HangError(f"no progress for {timeout_s:g} s: {reason}; see run.timeout_s"))

    def _reply(self) -> None:
        self._abort_channel.reply()

    def _print_error(self, error: BaseException, cause: str) -> None:
        if self._debug:
            traceback.print_exception(error)
        place = f"rank {self.rank}: " if self.size > 1 else ""
        # One write: lines of several ranks do not mix.
        os.write(2, f"moempi: {place}{' '.join(cause.split())}\n".encode(errors="replace"))


def _node_name(host: str) -> str:
    slurm_name = os.environ.get("SLURMD_NODENAME")
    if slurm_name:
        return slurm_name
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{host} {boot.read_text().strip() if boot.exists() else ''}"


def _switch() -> str:
    """The names of the switches that lead to this node, from the top, as Slurm's topology has them; "" without one."""
    address, node = (os.environ.get(name, "") for name in ("SLURM_TOPOLOGY_ADDR", "SLURMD_NODENAME"))
    return address.removesuffix(f".{node}") if address.endswith(f".{node}") else ""


def _stated(section: TopologySection, size: int) -> Topology:
    """The topology of the file, of so many ranks; raises NoInputError or ConfigError."""
    if section.ranks_per_node:
        raise ConfigError("topology.ranks_per_node and topology.file both say where ranks stand; keep one")
    topology = from_file(read_topology(section.file))
    if len(topology.nodes) != size:
        raise ConfigError(f"topology.file = {section.file!r} places {len(topology.nodes)} ranks, there are {size}")
    return topology


def _process_name() -> tuple[str, int]:
    """The name space of process numbers, and this process's number in it."""
    space = Path("/proc/self/ns/pid")
    return str(space.readlink()) if space.is_symlink() else "", os.getpid()


def _peers(rank: int, nodes: tuple[int, ...], processes: tuple[tuple[str, int], ...]) -> dict[int, int]:
    """The processes of the other ranks that this one can watch: on its node and in its name space."""
    space = processes[rank][0]
    return {
        other: number
        for other, (other_space, number) in enumerate(processes)
        if other != rank and nodes[other] == nodes[rank] and other_space == space
    }


def _split_matches_nodes(comm: MPI.Intracomm, nodes: tuple[int, ...]) -> bool:
    shared = comm.Split_type(MPI.COMM_TYPE_SHARED)
    agrees = shared.size == nodes.count(nodes[comm.rank])
    shared.Free()
    return bool(comm.allreduce(agrees, op=MPI.LAND))


def _cause(error: BaseException) -> str:
    match error:
        case MoempiError():
            return str(error)
        case KeyboardInterrupt():
            return "interrupted"
        case MemoryError():
            return f"out of memory: {error}" if str(error) else "out of memory"
        case SystemExit():
            return f"left with exit status {error.code} in the middle of the run"
    return f"{type(error).__name__}: {error}"


def _exit_code(error: BaseException) -> int:
    match error:
        case MoempiError():
            return error.exit_code
        case KeyboardInterrupt():
            return 130
        case SystemExit(code=int(code)) if code:
            return code
    return MoempiError.exit_code
