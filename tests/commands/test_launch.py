"""`moempi launch`, on a pseudo terminal: what Ctrl-C does in each phase of a run, and what other signals do."""

import os
import pty
import select
import signal
import tempfile
import time
from pathlib import Path

import pytest

import mpirun as launching
from faults.rehearsal import Rehearsal, is_alive
from moempi.commands import launch as launch_command
from moempi.commands.launch import BANNER, WARNING, copy_without_notices
from moempi.storage.run_state import read_state

NUM_PROMPTS = 32
END_S = launching.LIMIT_S
PHASES = {"loading": ("weights", 1), "prefill": ("agree", 1), "decode": ("agree", 9), "merge": ("merge", 1)}
STOPPING = "moempi: stopping at the next step; the same command continues (Ctrl-C again ends at once)"
WRITING = "moempi: writing the results (Ctrl-C again ends at once)"


@pytest.mark.parametrize("size", [1, 7, 80, 1000])
@pytest.mark.parametrize(
    ("written", "passed"),
    [
        (b"", b""),
        (b"a line\nand half", b"a line\nand half"),
        (b"moempi: why\n" + BANNER + b"thus\n" + BANNER[:75], b"moempi: why\n"),
        (BANNER[:100], BANNER[:100]),
        (b"-" * 80 + b"\n", b"-" * 80 + b"\n"),
        (b"-" + BANNER, b"-"),
        (b"a\n" + WARNING + b"MOD\n" + WARNING + b"MOD\nb" + WARNING + b"c\n", b"a\nb" + WARNING + b"c\n"),
        (WARNING + b"MOD(4) on fd 20 failed.\n[warn] another\n[warn] E", b"[warn] another\n[warn] E"),
        (b"moempi: why\n" + WARNING + b"MOD\n" + BANNER + WARNING + b"MOD\n", b"moempi: why\n"),
        (b"a" + BANNER + b"b" * 20_000, b"a"),
        (WARNING + b"without an end" * 1000, WARNING + b"without an end" * 1000),
    ],
)
def test_what_the_ranks_write_passes_and_the_notices_of_mpirun_do_not(tmp_path, monkeypatch, size, written, passed):
    source, target = os.pipe(), os.open(tmp_path / "out", os.O_CREAT | os.O_WRONLY)
    os.write(source[1], written)
    os.close(source[1])
    monkeypatch.setattr(launch_command, "_CHUNK_BYTES", size)
    copy_without_notices(source[0], target)
    os.close(source[0])
    os.close(target)
    assert (tmp_path / "out").read_bytes() == passed


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    return Rehearsal(tmp_path_factory.mktemp("rehearsal"), num_prompts=NUM_PROMPTS)


class Terminal:
    """A command on a terminal of its own; `text` is what it has written."""

    def __init__(self, *command: str | Path, **environment: str) -> None:
        self.text = ""
        self._process, self._terminal = pty.fork()
        if not self._process:
            os.chdir(launching.ROOT)
            os.execvpe(command[0], [str(word) for word in command], launching.variables(**environment))

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def kill(self, number: int) -> None:
        os.kill(self._process, number)

    def read_until(self, ends) -> None:
        """Read what the command writes until `ends()`, or to its end."""
        limit = time.monotonic() + END_S
        while not ends():
            assert time.monotonic() < limit, self.text
            if select.select([self._terminal], [], [], 0.02)[0]:
                try:
                    self.text += os.read(self._terminal, 1 << 16).decode(errors="replace")
                except OSError:  # the last process that had the terminal has closed it
                    return

    def end(self) -> int:
        """Its exit code, when it has ended."""
        self.read_until(lambda: False)
        code = self._exit_code()
        os.close(self._terminal)
        return code

    def hang_up(self) -> int:
        """Close its terminal; its exit code, when it has ended."""
        os.close(self._terminal)
        return self._exit_code()

    def _exit_code(self) -> int:
        limit, ended = time.monotonic() + END_S, (0, 0)
        while not ended[0]:
            assert time.monotonic() < limit, "it does not end"
            time.sleep(0.01)
            ended = os.waitpid(self._process, os.WNOHANG)
        return os.waitstatus_to_exitcode(ended[1])


class Held(Terminal):
    """A run whose rank 0 waits in a phase until it is released."""

    def __init__(self, rehearsal: Rehearsal, results: Path, phase: str, *launch: str) -> None:
        self.notes = results.parent / "notes"
        self.notes.mkdir()
        place, count = PHASES[phase]
        hook = f"from faults import inject_fault\ninject_fault.inject_after_fork({str(self.notes)!r}, 'hold', '0', "
        (self.notes / "sitecustomize.py").write_text(f"{hook}{place!r}, '{count}')\n")
        path = os.pathsep.join([str(self.notes), str(launching.ROOT / "tests")])
        command = [*launch, *rehearsal.command(results, timeout_s=launching.LIMIT_S)]
        super().__init__("jobs/moempi", *command, PYTHONPATH=path)
        self.read_until((self.notes / "0.injected").exists)

    def release(self) -> None:
        (self.notes / "release").touch()

    def ranks(self) -> list[int]:
        return [int(note.read_text()) for note in self.notes.glob("*.pid")]


LAUNCHES = [(), ("launch", "-n", "1"), ("launch", "-n", "2"), ("launch", "-n", "4")]


@pytest.mark.mpi
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda words: "-".join(words) or "alone")
def test_ctrl_c_stops_at_a_step_and_the_same_command_continues(rehearsal, launch, phase):
    results = rehearsal.fresh()
    run = Held(rehearsal, results, phase, *launch)
    run.type("\x03")
    line = WRITING if phase == "merge" else STOPPING
    run.read_until(lambda: line in run.text)
    run.release()
    code, state = run.end(), read_state(results)
    assert "prterun" not in run.text
    assert (run.text.count(line), run.text.count("stopped early")) == (1, phase != "merge"), run.text
    if phase == "merge":
        assert (code, state.state, state.exit_code) == (0, "finished", 0)
    else:
        assert (code, state.state, state.exit_code, state.reason) == (75, "stopped", 75, "SIGINT"), run.text
        assert f"{state.finished} of {NUM_PROMPTS} requests are finished; run the same job again" in run.text
        rehearsal.finish(results, num_ranks=2, compare=False)
    rehearsal.require_equal(results)


SLOW_READS = """
import os, time
from pathlib import Path
from moempi.runtime.monitor import Monitor

def fork_and_slow_down(monitor, fork=Monitor.fork):
    fork(monitor)
    from moempi.storage.weights import WeightFile

    rank = os.environ.get("OMPI_COMM_WORLD_RANK", "0")
    Path({notes!r}, rank + ".pid").write_text(str(os.getpid()))

    def read(file, *arguments, read=WeightFile.read):
        with Path({notes!r}, rank + ".reads").open("a") as reads:
            reads.write(".")
        time.sleep({seconds})
        return read(file, *arguments)

    WeightFile.read = read

Monitor.fork = fork_and_slow_down
"""


class SlowLoad(Terminal):
    """A run whose ranks take so many seconds to read each tensor; ready when rank 0 has read some."""

    def __init__(self, rehearsal: Rehearsal, results: Path, *launch: str, seconds: float) -> None:
        self.notes = Path(tempfile.mkdtemp(prefix="notes", dir=rehearsal.folder))
        (self.notes / "sitecustomize.py").write_text(SLOW_READS.format(notes=str(self.notes), seconds=seconds))
        command = [*launch, *rehearsal.command(results, timeout_s=launching.LIMIT_S)]
        super().__init__("jobs/moempi", *command, PYTHONPATH=str(self.notes))
        self.read_until(lambda: self.num_reads().get(0, 0) > 4)

    def num_reads(self) -> dict[int, int]:
        """Tensors that each rank has begun to read."""
        return {int(note.stem): note.stat().st_size for note in self.notes.glob("*.reads")}


@pytest.mark.mpi
@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda words: "-".join(words) or "alone")
def test_ctrl_c_stops_at_the_next_tensor_while_weights_are_read(rehearsal, launch):
    results = rehearsal.fresh()
    run = SlowLoad(rehearsal, results, *launch, seconds=0.4)
    run.type("\x03")
    code, state = run.end(), read_state(results)
    assert run.text.count(STOPPING) == 1
    assert (code, state.state, state.exit_code, state.reason) == (75, "stopped", 75, "SIGINT"), run.text
    assert f"stopped early (SIGINT), 0 of {NUM_PROMPTS} requests are finished; run the same job again" in run.text
    require_more_reads(run, rehearsal, results, *launch)
    rehearsal.require_equal(results)


def require_more_reads(stopped: SlowLoad, rehearsal: Rehearsal, results: Path, *launch: str) -> None:
    """The same command continues to the end, and all its ranks read more tensors than when they were stopped."""
    whole = SlowLoad(rehearsal, results, *launch, seconds=0)
    assert whole.end() == 0, whole.text
    before = stopped.num_reads()
    assert all(before.get(rank, 0) < count for rank, count in whole.num_reads().items())


@pytest.mark.mpi
@pytest.mark.parametrize("rank", [0, 2])
def test_a_request_to_one_rank_stops_the_loading_of_all(rehearsal, rank):
    results = rehearsal.fresh()
    run = SlowLoad(rehearsal, results, "launch", "-n", "3", seconds=0.1)
    run.read_until((run.notes / f"{rank}.reads").exists)
    os.kill(int((run.notes / f"{rank}.pid").read_text()), signal.SIGUSR1)
    code, state = run.end(), read_state(results)
    assert (code, state.state, state.exit_code, state.reason) == (75, "stopped", 75, "SIGUSR1"), run.text
    require_more_reads(run, rehearsal, results, "launch", "-n", "3")
    rehearsal.require_equal(results)


@pytest.mark.mpi
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("launch", [(), ("launch", "-n", "2")], ids=lambda words: "-".join(words) or "alone")
def test_the_second_ctrl_c_ends_at_once(rehearsal, launch, phase):
    results = rehearsal.fresh()
    run = Held(rehearsal, results, phase, *launch)
    run.type("\x03")
    run.read_until(lambda: "Ctrl-C again ends at once" in run.text)
    run.type("\x03")
    assert run.end() == 130, run.text  # rank 0 is still held
    assert "stopped early" not in run.text
    require_end_of_ranks(run)
    require_ended_by(signal.SIGINT, 130, read_state(results))
    rehearsal.finish(results, num_ranks=2, compare=False)
    rehearsal.require_equal(results)


@pytest.mark.mpi
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_ranks_end_with_their_launcher(rehearsal, number):
    results = rehearsal.fresh()
    run = Held(rehearsal, results, "loading", "launch", "-n", "2")
    run.kill(number)
    code = run.end()
    require_end_of_ranks(run)
    if number == signal.SIGKILL:
        assert code == -number
        limit = time.monotonic() + END_S
        while read_state(results).state == "running":  # a monitor process that ends last has held its lock
            assert time.monotonic() < limit, "the state of a killed run is still running"
            time.sleep(0.01)
        assert read_state(results).state == "failed"
    else:
        require_ended_by(number, code, read_state(results))


def require_end_of_ranks(run: Held) -> None:
    limit = time.monotonic() + END_S
    while any(map(is_alive, run.ranks())):
        assert time.monotonic() < limit, "ranks live on"
        time.sleep(0.01)


def require_ended_by(number, code, state):
    assert (code, state.state, state.exit_code) == (128 + number, "failed", 128 + number)
    assert state.reason == f"ended by {number.name}"


@pytest.mark.mpi
@pytest.mark.parametrize("launch", [(), ("launch", "-n", "2")], ids=lambda words: "-".join(words) or "alone")
def test_a_run_ends_with_its_terminal_and_says_so(rehearsal, launch):
    results = rehearsal.fresh()
    run = Held(rehearsal, results, "decode", *launch)
    code = run.hang_up()  # rank 0 is still held
    require_ended_by(signal.SIGHUP, code, read_state(results))
    rehearsal.finish(results, num_ranks=2, compare=False)
    rehearsal.require_equal(results)


@pytest.mark.mpi
def test_ctrl_z_suspends_a_run_until_it_is_continued(rehearsal):
    results = rehearsal.fresh()
    run = Held(rehearsal, results, "decode", "launch", "-n", "2")
    run.type("\x1a")
    limit = time.monotonic() + END_S
    while not all(is_suspended(rank) for rank in run.ranks()):
        assert time.monotonic() < limit, "ranks run on"
        time.sleep(0.01)
    run.release()
    run.kill(signal.SIGCONT)
    assert run.end() == 0, run.text
    rehearsal.require_equal(results)


def is_suspended(process: int) -> bool:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"
