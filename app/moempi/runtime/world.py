"""This process's rank among all processes of the job, and how the ranks end together."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn, Self, TypeVar

import numpy as np
from mpi4py import MPI

from moempi.config.job import TopologySection
from moempi.config.topology_file import read_topology
from moempi.errors import ConfigError, MoempiError, UsageError
from moempi.layout.topology import Topology, arrange, from_file, virtual
from moempi.printing import print_traceback, write_error
from moempi.runtime.abort_channel import AbortChannel
from moempi.runtime.hang import Position, above, explain, rank_names, seconds_to_hang
from moempi.runtime.launcher import GRACE_S, launch_problem
from moempi.runtime.messages import restrict_messages
from moempi.runtime.monitor import Monitor
from moempi.runtime.shm_segments import unlink_segments
from moempi.runtime.slow_hosts import LoadReport, SlowHosts
from moempi.runtime.waiting import barrier, wait
from moempi.runtime.watchdog import HangError, InterruptedByError, Watchdog
from moempi.storage.run_state import Loss

T = TypeVar("T")

# How long the launcher may take to forward an error line before MPI_Abort makes it kill the ranks, and how long the
# announcement may take to reach rank 0.
LINE_TRAVEL_S = 0.2
# How long the rank that has announced its error line may take to abort with its exit code.
ANNOUNCER_LIMIT_S = 2.0
# How long an abort may take: the terminal, the disk or MPI may block it.
ABORT_LIMIT_S = 15.0
# How long a rank waits for the positions of others: at least QUERY_S, or this share of the timeout.
QUERY_S = 1.0
QUERY_SHARE = 0.1
# The same at a signal, after which the launcher may kill all ranks within a second.
SIGNAL_QUERY_S = 0.4


MOST = int(np.iinfo(np.int64).max)
"""The number of a rank that has none to say in `World.collectively_least`."""


class AgreedExit(SystemExit):
    """The exit of all ranks together in `World.raise_together`.

    A SystemExit, because the error line is printed: the interpreter exits with the code and no traceback, no
    `except Exception` catches it, and MPI is finalised as after a good run.
    """


class World:
    """All ranks of the job, on one of them: `comm` their communicator, `nodes` the node index of every rank (R,).

    `hosts` are the names of every rank's host (R,), as Slurm names it if there is one. `loss` is the loss of
    hosts that ends the run, known when its failure is reported.
    `node` is a communicator of the ranks of this node, `local_rank` this rank's number in it. `monitor` is this
    rank's, if the program forked one. Making a World is collective.
    """

    restricts_messages = True
    """Whether objects from other ranks may be of a few kinds only: see `restrict_messages`."""

    def __init__(self, comm: MPI.Intracomm, monitor: Monitor | None = None, *, debug: bool = False) -> None:
        if self.restricts_messages:
            restrict_messages()
        self.comm = comm
        self.rank = comm.rank
        self.size = comm.size
        self.host = MPI.Get_processor_name()
        own_names = _node_name(self.host), os.environ.get("SLURMD_NODENAME", self.host)
        names, hosts = zip(*comm.allgather(own_names), strict=True)
        order = {name: index for index, name in enumerate(dict.fromkeys(names))}
        self.nodes = tuple(order[name] for name in names)
        each_host = {host: host for host in hosts}
        self.hosts = tuple(each_host[host] for host in hosts)  # without a text for each rank
        self.node = MPI.Intracomm(comm.Split(self.nodes[self.rank], self.rank))
        self.local_rank = self.node.rank
        self._monitor = Monitor() if monitor is None else monitor
        self._debug = debug
        peers = _peers(self.node, self.rank)
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
        self._on_failure: Callable[[str, int], int] = _same_code
        self._before_failure: Callable[[], None] = _nothing
        self._final_code: int | None = None
        self.loss: Loss | None = None
        self._load: LoadReport | None = None
        self._slow_hosts = SlowHosts(self.hosts)

    @classmethod
    def start(cls, monitor: Monitor, *, debug: bool = False) -> Self:
        """Connect the job's processes; collective, blocks. `debug` adds the traceback to an error line.

        Raises UsageError if the launcher started another number of processes than MPI connects. If MPI does not connect
        the ranks, or a rank is interrupted, one of them prints the error line and all are aborted.
        """
        problem = launch_problem(os.environ, MPI.COMM_WORLD.size)
        if problem is not None:
            unlink_segments()
            raise UsageError(problem)
        try:
            world = cls(MPI.COMM_WORLD.Dup(), monitor, debug=debug)
            unlink_segments()
            return world
        except BaseException as error:
            time.sleep(0.0 if MPI.COMM_WORLD.rank == 0 else GRACE_S)
            if monitor.acquire_report_right():
                reason = "" if isinstance(error, KeyboardInterrupt) else "MPI does not connect the ranks: "
                write_error(f"rank {MPI.COMM_WORLD.rank}: {reason}{_cause(error)}")
            MPI.COMM_WORLD.Abort(_exit_code(error))
            raise

    @property
    def num_nodes(self) -> int:
        """Number of nodes on which ranks run."""
        return max(self.nodes) + 1

    def by_node(self, section: TopologySection, *, domain: str = "") -> tuple[Topology, MPI.Intracomm]:
        """The topology with its ranks ordered by switch, then by node, and a communicator in that order; collective.

        `domain` names this rank's domain in its node, "" if unknown. With `ranks_per_node` the order is that of `comm`
        and each node is virtual. With a file, the file's topology replaces the found one and the order stays. Ends all
        ranks with NoInputError or ConfigError for a file that cannot be read or does not fit.
        """
        if section.ranks_per_node:
            order, topology = list(range(self.size)), virtual(self.size, section.ranks_per_node)
        else:
            nodes = [str(node) for node in self.nodes]
            domains, switches = zip(*self.comm.allgather((domain, _switch())), strict=True)
            order, topology = arrange(nodes, domains, switches)
        if section.file:
            topology = self.collectively(lambda: _topology_from_file(section, self.size))
        return topology, MPI.Intracomm(self.comm.Split(0, order.index(self.rank)))

    def raise_together(self, error: MoempiError | None) -> None:
        """Raise AgreedExit on all ranks if any rank has an `error`; collective, blocks.

        The lowest rank with an error prints its line, and its exit code is that of all ranks.
        """
        self._agree(error, ())

    def _agree(self, error: MoempiError | None, numbers: Sequence[int]) -> list[int]:
        """The least of each of the `numbers` over all ranks; as `raise_together` if any rank has an error."""
        own = np.array([self.rank if error is not None else self.size, *numbers], np.int64)
        least = np.empty_like(own)
        wait(self.comm.Iallreduce(own, least, MPI.MIN))
        if least[0] < self.size:
            self._raise_agreed(error, int(least[0]))
        return [int(number) for number in least[1:]]

    def _raise_agreed(self, error: MoempiError | None, first: int) -> NoReturn:
        """End with the error of rank `first`, the lowest that has one; collective."""
        self._before_failure()  # on all ranks, before one of them writes
        is_first = error is not None and self.rank == first
        code = int(self.comm.allreduce(error.exit_code if error is not None and is_first else 0))
        if error is not None and is_first:
            self._print_error(error, str(error))
            self._on_failure(str(error), code)
        raise AgreedExit(code)

    def collectively(self, action: Callable[[], T]) -> T:
        """Call `action` on every rank and return its value; collective, blocks.

        If it raises a MoempiError on any rank, all ranks raise AgreedExit: see `raise_together`.
        """
        return self.collectively_least(lambda: (action(), ()), num=0)[0]

    def collectively_least(self, action: Callable[[], tuple[T, Sequence[int]]], *, num: int) -> tuple[T, Sequence[int]]:
        """Like `collectively`, for an action that also returns `num` numbers: the least of each over all ranks.

        One collective finds out whether all ranks succeeded, and what they have to know of each other to continue.
        """
        self.alive(self.where)
        done: list[T] = []
        failure, numbers = None, [MOST] * num
        try:
            value, numbers[:] = action()
            done.append(value)
        except MoempiError as error:
            failure = error
        least = self._agree(failure, numbers)
        return done[0], least

    def split_matches_nodes(self) -> bool:
        """Whether MPI's shared-memory groups are the groups of equal host names; collective, blocks.

        Some launchers hide ranks of a node from each other.
        """
        shared = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
        agrees = shared.size == self.node.size
        shared.Free()
        return bool(self.comm.allreduce(agrees, MPI.LAND))

    def abort(self, error: BaseException) -> NoReturn:
        """Print one line with this rank and `error`, and abort all ranks; safe from any thread. Does not return."""
        if not self._ending.acquire(blocking=False):
            time.sleep(60)  # another thread of this rank aborts the program
        if isinstance(error, InterruptedByError) and self.rank == 0 and self.num_nodes > 1:
            error = self._loss_behind(error)
        code, cause = _exit_code(error), _cause(error)
        _exit_after(ABORT_LIMIT_S, code if self._final_code is None else self._final_code)
        if self._final_code is None:
            if self._abort_channel.announced():
                time.sleep(ANNOUNCER_LIMIT_S)
            else:
                if self._monitor.acquire_report_right():
                    self._print_error(error, cause)
                self._abort_channel.announce()
                time.sleep(LINE_TRAVEL_S)
                code = code if self._is_cut_off() else self._on_failure(cause, code)
        if self._final_code is not None:  # the work may have been done meanwhile
            code = self._final_code
        MPI.COMM_WORLD.Abort(code)
        os._exit(code)

    def wait_if_aborting(self) -> None:
        """Block if a rank is about to abort all ranks, so that nothing happens after `on_failure` has looked.

        Main thread only; call it before a step of less than LINE_TRAVEL_S that no failure may follow.
        """
        if self._ending.locked() or self._abort_channel.announced():
            time.sleep(ABORT_LIMIT_S)

    def on_failure(self, write: Callable[[str, int], int] | None, *, before: Callable[[], None] | None = None) -> None:
        """From now on, the rank that reports a failure also calls `write(cause, exit code)`, from any thread.

        If all ranks agree on a failure, each has called `before` by then. A rank that is cut off from rank 0 does not
        write, because rank 0's side reports as well. `write` returns the exit code to use; None stands for nothing to
        call. Both must return within a second or so, because the other ranks are aborted after them.
        """
        self._on_failure = write or _same_code
        self._before_failure = before or _nothing

    def request_stop(self) -> None:
        """Send to all ranks that the run is to stop; each knows it after at most 2 log2(ranks) watchdog periods."""
        self._abort_channel.request_stop()

    @property
    def stop_requested(self) -> bool:
        """Whether a rank has called `request_stop`, as far as this rank knows."""
        return self._abort_channel.stop_requested

    def finish(self, exit_code: int) -> None:
        """The process has done its work: until its end no failure changes its exit code, and signals are ignored.

        Main thread only.
        """
        self._final_code = exit_code
        self._watchdog.ignore_signals()
        self._monitor.release()

    @contextmanager
    def guard(self, *, accept: Callable[[int], bool] | None = None) -> Iterator[None]:
        """Run everything after `start` in this block: an exception that leaves it on one rank aborts all ranks.

        An AgreedExit passes. SIGINT, SIGTERM and SIGHUP abort with one line, also during a blocked MPI call, unless
        `accept(number)` is true; it is called on another thread. Collective at the end of the block, where all ranks
        wait for each other.
        """
        self._watchdog.start(accept)
        if self.num_nodes > 1:
            self._monitor.release()  # its report right holds on one node only; the abort channel reaches all nodes
        try:
            yield
            barrier(self.comm)
        except AgreedExit:
            raise
        except BaseException as error:
            self.abort(error)
        finally:
            self._watchdog.stop()

    def watch(self, timeout_s: float, *, group: int | None = None, busy_s: Callable[[], float] | None = None) -> None:
        """From now on, inside `guard`, abort if the ranks hang: none calls `alive` for `timeout_s` seconds.

        Ranks of one `group` pass the same points in the same order, so that the report can name the late one. With
        `busy_s`, the seconds that this rank has computed so far, rank 0 looks for slow hosts among those of a group. It
        is called on another thread.
        """
        self._watchdog.limit(timeout_s, group=group)
        self._load = None if busy_s is None or group is None else LoadReport(busy_s, group, size=self.size)

    @property
    def slow_hosts(self) -> tuple[str, ...]:
        """The hosts that were found slow so far; known to rank 0."""
        return self._slow_hosts.found

    def end_watch(self) -> None:
        """From now on, until the next `watch`, a rank may take any time."""
        self._watchdog.limit(None, group=None)

    def alive(self, where: str) -> None:
        """Record that this rank has passed the point `where`, a short phrase for a hang report."""
        self._watchdog.alive(where)

    @property
    def where(self) -> str:
        """The argument of the last call of `alive`."""
        return self._watchdog.where

    def _on_hang(self, timeout_s: float) -> float:
        """Abort if the ranks hang, else return the seconds after which they do if none passes a point meanwhile.

        A rank decides if neither a rank above it in the tree nor rank 1 replies; the others return the timeout. Runs on
        the watchdog's thread.
        """
        patience_s = max(QUERY_S, QUERY_SHARE * timeout_s)
        if self.rank and self._is_led(patience_s):
            return timeout_s
        others, queried_at = [rank for rank in range(self.size) if rank != self.rank], time.time()
        positions = self._abort_channel.query_positions(others, patience_s=patience_s) | {
            self.rank: self._watchdog.position()
        }
        left_s = seconds_to_hang(positions, self.size, timeout_s=timeout_s)
        if left_s <= 0:
            self.loss = self._loss(positions, queried_at=queried_at)
            reason = explain(positions, self.hosts)
            self.abort(HangError(f"no progress for {timeout_s:g} s: {reason}; see run.timeout_s"))
        return left_s

    def _is_led(self, patience_s: float) -> bool:
        """Whether a rank above this one in the tree, or rank 1, replies; blocks for up to 2 `patience_s`.

        For a rank other than 0. It asks the rank directly above it, and only if that is silent the others above and
        rank 1: no rank is asked by more than two others while all reply.
        """
        first, *others = above(self.rank)
        if self._abort_channel.query_positions([first], patience_s=patience_s):
            return True
        others += [1] if self.rank > 1 else []
        return bool(self._abort_channel.query_positions(others, patience_s=patience_s))

    def _is_cut_off(self) -> bool:
        """Whether rank 0 is on another host and does not answer; blocks for up to QUERY_S."""
        if self.nodes[self.rank] == self.nodes[0]:
            return False
        return not self._abort_channel.query_positions([0], patience_s=QUERY_S)

    def _loss_behind(self, error: InterruptedByError) -> MoempiError:
        """The loss of a host if there is one, else `error`: a launcher that loses a host ends the other ranks.

        Blocks for up to SIGNAL_QUERY_S. For rank 0, while the others wait before they report the signal.
        """
        positions, queried_at = {0: self._watchdog.position()}, time.time()
        positions |= self._abort_channel.query_positions(range(1, self.size), patience_s=SIGNAL_QUERY_S)
        self.loss = self._loss(positions, queried_at=queried_at)
        return HangError(f"{explain(positions, self.hosts)}; {error}") if self.loss else error

    def _loss(self, positions: Mapping[int, Position], *, queried_at: float) -> Loss | None:
        """The loss of the hosts none of whose ranks has a position; None if there are none."""
        answering = {self.hosts[rank] for rank in positions}
        hosts = tuple(host for host in dict.fromkeys(self.hosts) if host not in answering)
        progress_at = queried_at - min(position.since_s for position in positions.values())
        return Loss(hosts, progress_at, time.time()) if hosts else None

    def _reply(self) -> None:
        """Everything that the watchdog's thread sends in a period."""
        self._abort_channel.reply()
        self._abort_channel.forward_stop()
        if self.num_nodes > 1 and self._load is not None and (load := self._load.due()) is not None:
            self._abort_channel.send_load(load)
        if self.rank == 0:
            self._slow_hosts.add(self._abort_channel.received_loads())

    def _print_error(self, error: BaseException, cause: str) -> None:
        if self._debug:
            print_traceback(error)
        place = f"{rank_names([self.rank], self.hosts)}: " if self.size > 1 else ""
        write_error(f"{place}{cause}")


def _node_name(host: str) -> str:
    slurm_name = os.environ.get("SLURMD_NODENAME")
    if slurm_name:
        return slurm_name
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{host} {boot.read_text().strip() if boot.exists() else ''}"


def _switch() -> str:
    """The switches above this node, from the top, as Slurm names them; "" if Slurm knows no topology."""
    address, node = (os.environ.get(name, "") for name in ("SLURM_TOPOLOGY_ADDR", "SLURMD_NODENAME"))
    return address.removesuffix(f".{node}") if address.endswith(f".{node}") else ""


def _topology_from_file(section: TopologySection, size: int) -> Topology:
    """The file's topology, which must have `size` ranks; raises NoInputError or ConfigError."""
    if section.ranks_per_node:
        raise ConfigError("topology.ranks_per_node and topology.file both say where ranks stand; keep one")
    topology = from_file(read_topology(section.file))
    if len(topology.nodes) != size:
        raise ConfigError(f"topology.file = {section.file!r} places {len(topology.nodes)} ranks, there are {size}")
    return topology


def _process_name() -> tuple[str, int]:
    """The namespace of process numbers, and this process's number in it."""
    space = Path("/proc/self/ns/pid")
    return str(space.readlink()) if space.is_symlink() else "", os.getpid()


def _peers(node: MPI.Intracomm, rank: int) -> dict[int, int]:
    """The process numbers of the other ranks on this node and in this namespace, by rank; collective over the node."""
    own_space, own_number = _process_name()
    processes = node.allgather((rank, own_space, own_number))
    return {other: number for other, space, number in processes if other != rank and space == own_space}


def _same_code(_cause: str, code: int) -> int:
    return code


def _nothing() -> None:
    pass


def _exit_after(limit_s: float, code: int) -> None:
    """Exit with `code` after `limit_s`, whatever the other threads wait for."""
    timer = threading.Timer(limit_s, os._exit, [code])
    timer.daemon = True
    with suppress(RuntimeError):  # no more threads
        timer.start()


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
