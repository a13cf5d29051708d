"""Runs shell commands at once, and prints what each wrote when it ends: python3 tests/parallel.py COMMAND...

Ends with 1 if a command failed. Ctrl-C interrupts all of them.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress

END_S = 30.0


class Running:
    """A command in a process group of its own that writes to a file."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.begin = time.monotonic()
        self.written = tempfile.TemporaryFile()  # noqa: SIM115
        words = ["bash", "-euo", "pipefail", "-c", command]
        self.process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=self.written, stderr=subprocess.STDOUT, process_group=0
        )

    def interrupt(self) -> None:
        """Interrupt the processes of the group, as Ctrl-C does, and kill those that do not end."""
        for number, limit_s in ((signal.SIGINT, END_S), (signal.SIGKILL, END_S)):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self.process.pid, number)
                self.process.wait(limit_s)

    def show(self) -> None:
        seconds = time.monotonic() - self.begin
        print(f"==== {self.command}", flush=True)
        self.written.seek(0)
        shutil.copyfileobj(self.written, sys.stdout.buffer)
        print(f"==== exit code {self.process.returncode} after {seconds:.0f} s: {self.command}", flush=True)


def main() -> int:
    """1 if a command failed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    running = [Running(command) for command in sys.argv[1:]]
    left = list(running)
    try:
        while left:
            for ended in [one for one in left if one.process.poll() is not None]:
                left.remove(ended)
                ended.show()
            time.sleep(0.1)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for one in left:
            one.interrupt()
            one.show()
        return 130
    return int(any(one.process.returncode for one in running))


if __name__ == "__main__":
    sys.exit(main())
