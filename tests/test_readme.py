"""A new user's walk through README.md: every block marked `run`, in order, each in a fresh shell without settings."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from mpirun import ROOT

BLOCKS = re.findall(r"^```bash run\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
NOBODY = 65534
LIMIT_S = 600


@dataclass(frozen=True)
class User:
    """A user with a copy of this checkout in `folder`, and with the packages of these tests in its `.venv`."""

    folder: Path
    number: int

    def execute(self, script: str, *, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a script in a fresh shell, in the root of the copy or in another folder."""
        # The environment names the checkout that it was made for; PYTHONPATH names the copy instead.
        settings = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(self.folder / "home")}
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=folder or self.folder / "moempi",
            env=settings | {"PYTHONPATH": str(self.folder / "moempi/app")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            **as_user(self.number),
            check=False,
        )


def is_set_up() -> bool:
    """Whether jobs/setup.sh made this environment, and has nothing to install."""
    stamp = Path(sys.prefix, "installed.txt")
    sums = subprocess.run(
        "cat pyproject.toml jobs/lock/*.txt | cksum; echo unlocked $(cksum <pyproject.toml)",
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return stamp.exists() and stamp.read_text().splitlines()[0] in sums.stdout.splitlines()


def as_user(number: int) -> dict[str, object]:
    """Arguments of subprocess.run; only root can become another user."""
    return {} if number == os.geteuid() else {"user": number, "group": number, "extra_groups": []}


def python_of(user: int) -> Path | None:
    """A Python of this version that the user may execute."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for python in (Path(sys.base_prefix, "bin", name), Path("/usr/bin", name), Path("/usr/local/bin", name)):
        try:
            if subprocess.run([python, "-c", ""], check=False, **as_user(user)).returncode == 0:
                return python
        except OSError:
            continue
    return None


def make_environment(folder: Path, python: Path) -> None:
    """A `.venv` with links to the packages of these tests, and this Python."""
    (folder / "bin").mkdir(parents=True)
    for entry in Path(sys.prefix).iterdir():
        if entry.name == "pyvenv.cfg":
            lines = [line for line in entry.read_text().splitlines() if not line.startswith(("home", "executable"))]
            (folder / entry.name).write_text("\n".join([f"home = {python.parent}", *lines, ""]))
        elif entry.name != "bin":
            (folder / entry.name).symlink_to(entry)
    for command in Path(sys.prefix, "bin").iterdir():
        if command.is_file() and not command.name.startswith("python"):
            shutil.copy(command, folder / "bin")
    (folder / "bin/python").symlink_to(python)
    (folder / "bin/python3").symlink_to("python")
    program = folder / "bin/moempi"
    program.write_text("\n".join([f"#!{folder}/bin/python", *program.read_text().splitlines()[1:], ""]))


@pytest.fixture(scope="module", params=["this user", "another user"])
def user(request):
    number = os.geteuid() if request.param == "this user" else NOBODY
    if not is_set_up():
        pytest.skip("jobs/setup.sh would change the environment of these tests")
    if number != os.geteuid() != 0:
        pytest.skip("only root can become another user")
    if (python := python_of(number)) is None:
        pytest.skip("another user may execute no Python of this version")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    with tempfile.TemporaryDirectory(prefix="moempi-walk-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        for file in filter(None, names):
            if (ROOT / file).is_file():
                (folder / "moempi" / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / file, folder / "moempi" / file)
        make_environment(folder / "moempi/.venv", python)
        (folder / "home").mkdir()
        for path in (folder, *folder.rglob("*")):
            os.chown(path, number, -1, follow_symlinks=False)
        yield User(folder, number)


def messages(outcome: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines on stderr that are not the program's own."""
    return [line for line in outcome.stderr.splitlines() if not line.startswith("moempi: ")]


@pytest.mark.mpi
def test_every_block_of_the_readme_runs_in_a_fresh_shell(user):
    assert len(BLOCKS) >= 10
    for block in BLOCKS:
        outcome = user.execute(block)
        assert outcome.returncode == 0, f"{block}\n{outcome.stdout}\n{outcome.stderr}"
        assert not messages(outcome), block
    assert "143" in user.execute("jobs/moempi show myjob/job.toml").stdout


@pytest.mark.mpi
@pytest.mark.parametrize("num_ranks", [1, 7])
def test_a_job_runs_the_same_from_any_folder_on_any_number_of_ranks(user, num_ranks):
    elsewhere, checkout = user.folder / "else where", user.folder / "moempi"
    made = user.execute("""
        mkdir -p "../else where"
        ln -sf "$PWD/jobs/moempi" "$HOME/moempi"
        [ -f weights/abacus.h5 ] || jobs/moempi convert weights/abacus weights/abacus.h5
    """)
    assert made.returncode == 0, made.stderr
    results = f"r{num_ranks}.h5"
    sets = "--set run.precision=float32 --set sampling.max_tokens=2"
    run = f"launch -n {num_ranks} run {checkout}/jobs/abacus.toml {sets}"
    outcome = user.execute(f'"$HOME/moempi" {run} --set output.results={results}', folder=elsewhere)
    assert (outcome.returncode, messages(outcome)) == (0, []), outcome.stderr
    assert (elsewhere / results).exists()
    outcome = user.execute(f"cd jobs && ./moempi {run}")  # the results beside the job, as the job file says
    assert (outcome.returncode, messages(outcome)) == (0, []), outcome.stderr
    assert not (checkout / "jobs/results").exists()
    compared = user.execute(f"jobs/moempi compare results/abacus.h5 '{elsewhere}/{results}'")
    assert compared.stdout == "256 requests, 0 differ in tokens; log-probabilities within 0\n"


@pytest.mark.mpi
def test_an_error_on_ranks_is_one_line(user):
    outcome = user.execute("jobs/moempi launch -n 3 run jobs/none.toml")
    assert (outcome.returncode, messages(outcome), outcome.stdout) == (66, [], "")
    assert len(outcome.stderr.splitlines()) == 1
    outcome = user.execute("jobs/moempi launch -n 3 convert a b")
    assert outcome.returncode == 64
    assert outcome.stderr == ("moempi: launch -n 3 is followed by a command that runs on ranks: run, check, bench\n")


def test_a_checkout_without_an_environment_says_how_to_make_one(tmp_path):
    (tmp_path / "jobs").mkdir()
    shutil.copy(ROOT / "jobs/moempi", tmp_path / "jobs")
    outcome = subprocess.run([tmp_path / "jobs/moempi", "--help"], capture_output=True, text=True, check=False)
    assert outcome.returncode == 64
    assert outcome.stderr == f"moempi: {tmp_path}/.venv has no moempi; first run: bash {tmp_path}/jobs/setup.sh\n"
