"""The virtual hosts of tests/cluster/up.sh: what they send, and how they and their links fail."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("MOEMPI_CLUSTER", "/nonexistent"))
SHARED = FOLDER / "shared"
MARKS = [
    pytest.mark.cluster,
    pytest.mark.skipif("MOEMPI_CLUSTER" not in os.environ, reason="no hosts: bash tests/cluster/run.sh starts some"),
]
HOSTS = ("n1", "n2", "n3", "n4")
HERE = Path(__file__).resolve().parent
BURST = "256kb"  # above the 64 KB packets that veth hands over


def run(*command: str | Path) -> str:
    """The output of a command, which must succeed."""
    words = [str(word) for word in command]
    ran = subprocess.run(words, text=True, capture_output=True, check=False, cwd=HERE.parent.parent)
    assert ran.returncode == 0, f"{' '.join(words)}: {ran.stdout}{ran.stderr}"
    return ran.stdout


def on(host: str, *command: str | Path) -> str:
    """The output of a command on a host."""
    return run(FOLDER / "on", host, *command)


def sent_bytes() -> int:
    """Bytes that all hosts have sent, as the kernel counts what comes out of their links."""
    counts = [Path(f"/sys/class/net/mh-{host}/statistics/rx_bytes").read_text() for host in HOSTS]
    return sum(map(int, counts))


def processes(host: str) -> list[int]:
    """The numbers of all processes of a host."""
    space = Path(f"/proc/{first_process(host)}/ns/pid").readlink()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if (entry / "ns/pid").readlink() == space:
                found.append(int(entry.name))
    return found


def first_process(host: str) -> int:
    return int((FOLDER / "host" / host / "pid").read_text())


def set_link(host: str, state: str) -> None:
    """Cut a host off ("down"), or connect it again ("up"); neither side gets a word of it."""
    run("ip", "link", "set", f"mh-{host}", state)


def kill(host: str) -> None:
    """End all processes of a host at once; their connections are closed."""
    os.kill(first_process(host), signal.SIGKILL)


def cut_power(host: str) -> None:
    """End all processes of a host at once, as a failure of its power does: no packet says so."""
    set_link(host, "down")
    kill(host)


def revive(host: str) -> None:
    """Start a host that was killed, and let Slurm use it."""
    run("bash", HERE / "host.sh", FOLDER, host[1:])
    on(host, "slurmd", "-f", FOLDER / "slurm.conf", "-N", host)


def send_all(host: str, number: signal.Signals) -> None:
    """Send a signal to all processes of a host: SIGSTOP freezes it, SIGCONT lets it go on."""
    for process in processes(host):
        with suppress(ProcessLookupError):
            os.kill(process, number)


def mount_read_only(host: str) -> None:
    """From now on a host cannot write new files on the shared file system."""
    on(host, "mount", "--bind", SHARED, SHARED)
    on(host, "mount", "-o", "remount,bind,ro", SHARED)


def unmount(host: str, folder: str | Path) -> None:
    """Take away what was mounted last on a folder of a host."""
    on(host, "umount", "--lazy", folder)


@contextmanager
def shaped(rate: str, *hosts: str) -> Iterator[None]:
    """The links of these hosts carry at most `rate` in each direction, as "100mbit"."""
    ends = [(host, end) for host in hosts for end in ((str(FOLDER / "on"), host), ())]
    for host, prefix in ends:
        device = "eth0" if prefix else f"mh-{host}"
        shape = ("tbf", "rate", rate, "burst", BURST, "latency", "400ms")
        run(*prefix, "tc", "qdisc", "replace", "dev", device, "root", *shape)
    try:
        yield
    finally:
        for host, prefix in ends:
            run(*prefix, "tc", "qdisc", "delete", "dev", "eth0" if prefix else f"mh-{host}", "root")
