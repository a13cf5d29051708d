"""Runs a subject on many inputs in worker processes, and judges how each input ends.

An input is accepted, or refused by a MoempiError with an exit code of its kind and a short message that names the file.
Everything else is a finding: another exception, a warning or other text on stderr, the end of the process, LIMIT_S
seconds, or MAX_BYTES of memory more than before. A worker ends after a finding, and another goes on behind it.
"""

import json
import logging
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import chdir
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from fuzz.subject import Subject
from moempi.errors import MoempiError
from moempi.printing import MAX_LINE_LENGTH, one_line
from mpirun import execute, python

LIMIT_S = 60.0
MAX_BYTES = 500 << 20
PACKET_BYTES = 1 << 16
ADDRESS_BYTES = 8 << 30
FILE_BYTES = 64 << 20
STRANGE_SHARE = 0.01
"""The share of inputs that are no regular file."""
TARGETS = ("/dev/zero", "/", "nowhere", "/proc/self/mem", "loop")
MORE_SHARE = 0.4
"""The share of inputs that are used in a second way."""
HEAD = f"{'class':14} {'inputs':>7} accepted findings slowest s         grown MB  refused by exit code"
# What the tokenizers' library writes when it panics, also where the caller makes that a refusal.
PANIC = re.compile(r"\n?thread '[^']*' (?:\(\d+\) )?panicked at [^\n]*\n[^\n]*\n(?:note: [^\n]*\n)?")

# Printed at the end of a run that computed all requests.
FAILED_REQUESTS = "requests ended with an error"

# Read by that library at a process's first panic, which may be an earlier test's.
os.environ["RUST_BACKTRACE"] = "0"


@dataclass(frozen=True, slots=True)
class Ending:
    """How one input ended: the exit codes of its refusals, and what is wrong with it."""

    index: int
    codes: Sequence[int] = ()
    finding: str = ""
    seconds: float = 0.0
    grown_bytes: int = 0


@dataclass(slots=True)
class Score:
    """The endings of one subject's inputs; `codes` counts the first refusal of each refused input."""

    name: str
    inputs: int = 0
    accepted: int = 0
    codes: Counter[int] = field(default_factory=Counter)
    findings: list[Ending] = field(default_factory=list)
    slowest: Ending = Ending(-1)
    grown_bytes: int = 0

    def add(self, ending: Ending) -> None:
        self.inputs += 1
        self.accepted += not ending.codes and not ending.finding
        self.codes.update(ending.codes[:1])
        if ending.finding:
            self.findings.append(ending)
        self.slowest = max(self.slowest, ending, key=lambda one: one.seconds)
        self.grown_bytes = max(self.grown_bytes, ending.grown_bytes)

    @property
    def share(self) -> float:
        """Accepted inputs as a share of all."""
        return self.accepted / max(1, self.inputs)

    def row(self) -> str:
        """A line below HEAD."""
        codes = " ".join(f"{code}:{count}" for code, count in sorted(self.codes.items()))
        slowest = f"{self.slowest.seconds:9.2f} #{self.slowest.index:<6}"
        figures = f"{self.inputs:7} {self.share:8.1%} {len(self.findings):8} {slowest} {self.grown_bytes / 1e6:8.0f}"
        return f"{self.name:14} {figures}  {codes}"


def fuzz(subject: Subject, indices: Sequence[int], *, seed: int, folder: Path, save: Path | None = None) -> Score:
    """Run the inputs with these indices, one after another; each is a function of subject, seed and index alone.

    `folder` is for the inputs' folders; what belongs to a finding is copied to `save`.
    """
    score = Score(subject.name)
    while score.inputs < len(indices):
        for ending in _endings(subject, indices[score.inputs :], seed=seed, folder=folder):
            score.add(ending)
            if ending.finding and save is not None:
                _save(folder, save / f"{subject.name}-{seed}-{ending.index}", ending.finding)
    return score


def fuzz_commands(subject: Subject, indices: Sequence[int], *, seed: int, folder: Path) -> Score:
    """Run the program's command lines of a subject, one after the other, on the inputs with these indices."""
    score = Score(subject.name)
    for index in indices:
        _make_folder(folder)
        with chdir(folder / "input"):
            write(subject, Random(f"{subject.name} {seed} {index}"))
        endings = [_run_command(subject, index, command, folder) for command in subject.commands]
        finding = next((ending.finding for ending in endings if ending.finding), "")
        codes = [code for ending in endings for code in ending.codes]
        score.add(Ending(index, codes, finding, max((ending.seconds for ending in endings), default=0.0)))
    return score


def _run_command(subject: Subject, index: int, command: str, folder: Path) -> Ending:
    """Run one command line: it must end with a documented exit code, and one line or failed requests if it is not 0."""
    try:
        words = python("-m", "moempi", *command.split())
        outcome = execute("env", "-C", folder / "input", *words, limit_s=LIMIT_S, RUST_BACKTRACE="0")
    except AssertionError as error:
        return Ending(index, finding=f"{command}: {error}", seconds=LIMIT_S)
    code, lines = outcome.code, PANIC.sub("", outcome.err).splitlines()
    own = all(line.startswith("moempi: ") and len(line) < 2 * MAX_LINE_LENGTH for line in lines)
    refused = not lines and outcome.out  # a table may say what is refused
    says = code == 0 or len(lines) == 1 or refused or FAILED_REQUESTS in outcome.err
    wrong = code not in (0, *subject.codes) or not own or not says
    finding = f"{command}: exit code {code}, {len(lines)} lines: {outcome.err[-1000:]}" if wrong else ""
    return Ending(index, [code] if code else [], finding, outcome.seconds)


def _endings(subject: Subject, indices: Sequence[int], *, seed: int, folder: Path) -> Iterator[Ending]:
    """The endings of inputs in one worker process, up to the first finding."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    worker = os.fork()
    if not worker:
        ours.close()
        _work(subject, indices, seed=seed, folder=folder, messages=theirs)
    theirs.close()
    ours.settimeout(LIMIT_S)
    begin = time.monotonic()
    with ours:
        for index in indices:  # noqa: B007
            begin = time.monotonic()
            try:
                message = ours.recv(PACKET_BYTES)
            except TimeoutError:
                os.kill(worker, signal.SIGKILL)
                message = b""
            if not message:
                break
            yield Ending(**json.loads(message))
    status = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    if status:
        finding = f"the process ended with {status} after {time.monotonic() - begin:.1f} s {_text(folder)}"
        yield Ending(index, finding=finding, seconds=time.monotonic() - begin)


def _work(subject: Subject, indices: Sequence[int], *, seed: int, folder: Path, messages: socket.socket) -> None:
    """Run inputs and send their endings; ends this process."""
    code = 1
    try:
        stderr = os.open(folder / "stderr", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        _limit(stderr)
        for index in indices:
            ending = _run(subject, index, seed=seed, folder=folder, stderr=stderr)
            messages.send(json.dumps({name: getattr(ending, name) for name in Ending.__slots__}).encode())
            if ending.finding:
                break
        code = 0
    except BaseException:  # of the fuzzer itself
        traceback.print_exc()
    finally:
        os._exit(code)


def _limit(stderr: int) -> None:
    """Limit the memory and the files of this process, and count warnings as text on stderr."""
    os.dup2(stderr, 2)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    warnings.simplefilter("always")
    logging.getLogger("moempi").addHandler(logging.NullHandler())
    for limit, most in (
        (resource.RLIMIT_AS, ADDRESS_BYTES),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (most, most))


def _run(subject: Subject, index: int, *, seed: int, folder: Path, stderr: int) -> Ending:
    """Make one input in a fresh folder and use it."""
    os.chdir(folder)
    _make_folder(folder)
    os.chdir(folder / "input")
    os.ftruncate(stderr, 0)
    os.lseek(stderr, 0, os.SEEK_SET)
    random = Random(f"{subject.name} {seed} {index}")
    known = write(subject, random)
    first, *others = subject.uses(known)
    before, begin = _peak_bytes(), time.monotonic()
    codes, finding = [], ""
    for use in (first, *random.sample(others, min(len(others), random.random() < MORE_SHARE))):
        try:
            code = use()
            if code:
                codes.append(code)
        except MoempiError as error:
            codes.append(error.exit_code)
            finding = finding or _message_finding(subject, error)
        except BaseException as error:
            finding = finding or _exception_finding(error)
    seconds, grown = time.monotonic() - begin, _peak_bytes() - before
    if grown > MAX_BYTES:
        finding = finding or f"{grown >> 20} MB more memory"
    return Ending(index, codes, finding or _text(folder), seconds, grown)


def _make_folder(folder: Path) -> None:
    shutil.rmtree(folder / "input", ignore_errors=True)
    (folder / "input").mkdir()


def write(subject: Subject, random: Random) -> Any:
    """Write an input into the current folder; for some, put something else than a regular file in its place."""
    known = subject.write(random)
    if random.random() < STRANGE_SHARE:
        path = Path(subject.file)
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        random.choice((os.mkfifo, os.mkdir, *(partial(os.symlink, target) for target in TARGETS)))(path)
    return known


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _message_finding(subject: Subject, error: MoempiError) -> str:
    text = one_line(str(error))
    if error.exit_code not in subject.codes:
        return f"exit code {error.exit_code}: {text[:200]}"
    names = subject.named or (subject.file,)
    if not any(name in text for name in names):
        return f"a message that names none of {names}: {text[:200]}"
    return ""


def _exception_finding(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/moempi/" in frame.filename] or frames
    where = f"{Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].name}"
    return f"{type(error).__name__} at {where}: {str(error)[:200]}"


def _text(folder: Path) -> str:
    """What was written to stderr, but for panics of the tokenizers' library, which its caller makes refusals."""
    text = PANIC.sub("", (folder / "stderr").read_bytes().decode(errors="backslashreplace"))
    return f"on stderr: {text[-1000:]}" if text else ""


def _save(folder: Path, place: Path, finding: str) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run(["cp", "-a", folder / "input", place], check=True)
    (place / "FINDING").write_text(f"{finding}\n")
