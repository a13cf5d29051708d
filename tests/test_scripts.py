"""The shell scripts are free of what shellcheck knows."""

import shutil
import subprocess

import pytest

from mpirun import ROOT


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_is_silent():
    scripts = [*ROOT.glob("jobs/*.sh"), *ROOT.glob("jobs/*.sbatch"), *ROOT.glob("tests/**/*.sh"), ROOT / ".ci/run"]
    assert len(scripts) > 10
    checked = subprocess.run(
        ["shellcheck", "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout) == (0, "")
