"""Runs shell commands at once, and prints what each wrote when it ends: python3 tests/parallel.py COMMAND...

Ends with 1 if a command failed. SIGINT, SIGTERM and SIGHUP interrupt all of them, and then it ends with 130.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
END_S = 30.0


class Running:
    """A command in a process group of its own that writes to a file in `folder`."""

    def __init__(self, command: str, folder: Path, name: str) -> None:
        self.command = command
        self.begin = time.monotonic()
        self.path = folder / name
        print(f"==== writes to {self.path} until it ends: {command}", flush=True)
        words = ["bash", "-euo", "pipefail", "-c", command]
        with self.path.open("wb") as written:
            self.process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=written, stderr=subprocess.STDOUT, process_group=0
            )

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all processes of the group."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def show(self) -> None:
        seconds = time.monotonic() - self.begin
        print(f"==== {self.command}", flush=True)
        with self.path.open("rb") as written:
            shutil.copyfileobj(written, sys.stdout.buffer)
        print(f"==== exit code {self.process.returncode} after {seconds:.0f} s: {self.command}", flush=True)


def interrupt(running: Sequence[Running]) -> None:
    """Interrupt all commands, as Ctrl-C does, and kill those that do not end."""
    for one in running:
        one.send(signal.SIGINT)
    limit = time.monotonic() + END_S
    while any(one.process.poll() is None for one in running) and time.monotonic() < limit:
        time.sleep(0.1)
    for one in running:
        if one.process.poll() is None:
            one.send(signal.SIGKILL)
            one.process.wait()


def main(folder: Path) -> int:
    """1 if a command failed, 130 if they were interrupted."""
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)
    left: list[Running] = []
    failed = False
    try:
        for number, command in enumerate(sys.argv[1:]):
            left.append(Running(command, folder, f"{number}.txt"))
        while left:
            for ended in [one for one in left if one.process.poll() is not None]:
                left.remove(ended)
                ended.show()
                failed |= ended.process.returncode != 0
            time.sleep(0.1)
    except KeyboardInterrupt:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        interrupt(left)
        for one in left:
            one.show()
        return 130
    return int(failed)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="moempi-parallel.") as own:
        sys.exit(main(Path(own)))
