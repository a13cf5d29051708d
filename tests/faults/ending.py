"""Signals to a run at random moments between its last token and its end, after which state and results must agree."""

import functools
import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import mpirun as launching
from faults.rehearsal import END_S, BrokenError, Rehearsal, is_alive, require, wait_for
from moempi.storage.run_state import read_state

RANKS = 3
TARGETS = ("a rank", "all ranks", "the launcher")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)


def cases(rehearsal: Rehearsal, dice: random.Random, endings: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Each signal to each target in turn, by turns around the moment when the results appear and up to the end."""
    pairs = itertools.cycle((number, target) for number in SIGNALS for target in TARGETS)
    undisturbed = functools.cache(lambda: durations(rehearsal))
    for index, (number, target) in enumerate(itertools.islice(pairs, endings)):
        rank, share = dice.randrange(RANKS), dice.random()

        def check(
            index: int = index,
            number: signal.Signals = number,
            target: str = target,
            rank: int = rank,
            share: float = share,
        ) -> None:
            to_results, to_end = undisturbed()
            delay_s = share * (to_end if index % 2 else 2 * to_results)
            end_early(rehearsal, number, target, rank=rank, delay_s=delay_s)

        yield f"{number.name} to {target} at the end", check


def start(rehearsal: Rehearsal, results: Path) -> "subprocess.Popen[str]":
    """Start a run and wait until it has computed its last token."""
    process = rehearsal.start(results, "none", rank=0, point="record", num_ranks=RANKS, timeout_s=launching.LIMIT_S)
    wait_for(results.parent / "notes" / "0.injected", process)
    return process


def durations(rehearsal: Rehearsal) -> tuple[float, float]:
    """Seconds from the last token to the results and to the end of an undisturbed run."""
    results = rehearsal.fresh()
    process = start(rehearsal, results)
    begin = time.monotonic()
    while not results.exists():
        require(process.poll() is None, "ends without results")
        time.sleep(0.001)
    to_results = time.monotonic() - begin
    process.communicate(timeout=launching.LIMIT_S)
    return to_results, time.monotonic() - begin


def end_early(rehearsal: Rehearsal, number: signal.Signals, target: str, *, rank: int, delay_s: float) -> None:
    results = rehearsal.fresh()
    process = start(rehearsal, results)
    notes = results.parent / "notes"
    ranks = [int((notes / f"{rank}.pid").read_text()) for rank in range(RANKS)]
    time.sleep(delay_s)
    targets = {"a rank": [ranks[rank]], "all ranks": ranks, "the launcher": [process.pid]}[target]
    ended = [not is_alive(each) for each in targets]
    for each in targets:
        with suppress(ProcessLookupError):
            os.kill(each, number)
    limit = time.monotonic() + END_S
    try:
        process.communicate(timeout=END_S)
    except subprocess.TimeoutExpired:
        launching.end(process)
        raise BrokenError("does not end") from None
    while alive := [each for each in ranks if is_alive(each)]:
        require(time.monotonic() < limit, f"ranks {alive} live on")
        time.sleep(0.01)
    # The launcher does not return 0 after a signal to itself, or after SIGKILL to a rank.
    free = not all(ended) and (target == "the launcher" or number == signal.SIGKILL)
    require_agreement(rehearsal, results, number, code=None if free else process.returncode)
    shutil.rmtree(notes)
    rehearsal.finish(results, num_ranks=2)


def require_agreement(rehearsal: Rehearsal, results: Path, number: signal.Signals, *, code: int | None) -> None:
    """Results, state and, unless None, the launcher's exit code say the same; results are whole if there are any."""
    state = read_state(results)
    found = f"state {state.state} {state.finished} {state.exit_code} {state.reason}, exit code {code}"
    if results.exists():
        rehearsal.require_equal(results)
        require((state.state, state.finished, state.exit_code) == ("finished", rehearsal.num_prompts, 0), found)
        require(code in (0, None), found)
    else:
        require(state.state == "failed" and state.exit_code in (os.EX_TEMPFAIL, 128 + number), found)
        require(code != 0, found)
