"""jobs/setup.sh installs what jobs/lock/ records, and the lock has all that pyproject.toml requires."""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mpirun import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
LOCK = ROOT / "jobs" / "lock"
ONE_FOR_EACH_CUDA = {"cuda-toolkit"}


def locked(file):
    """The version and hashes of each package in a file of the lock, by its name."""
    entries = {}
    for entry in re.sub(r"\\\n|#.*", "", (LOCK / f"{file}.txt").read_text()).splitlines():
        if entry.strip():
            requirement, *hashes = entry.split(" --hash=")
            required = Requirement(requirement)
            (pin,) = required.specifier
            assert pin.operator == "==", entry
            entries[canonicalize_name(required.name)] = pin.version, [text.strip() for text in hashes]
    return entries


def test_each_extra_has_a_file():
    assert {path.stem for path in LOCK.iterdir()} == {"moempi", *EXTRAS}


@pytest.mark.parametrize("extra", [None, *EXTRAS])
def test_the_lock_satisfies_pyproject(extra):
    required = PROJECT["project"]["dependencies"] + PROJECT["build-system"]["requires"]
    versions = locked("moempi")
    if extra:
        required, versions = EXTRAS[extra], versions | locked(extra)
    for text in required:
        requirement = Requirement(text)
        version, _ = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{text}, not {version}: bash jobs/lock.sh"


@pytest.mark.parametrize("file", ["moempi", *EXTRAS])
def test_every_locked_package_has_hashes(file):
    for name, (_, hashes) in locked(file).items():
        assert hashes, name
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", text) for text in hashes), name


def test_a_package_has_one_version_in_all_files():
    found = {}
    for file in ("moempi", *EXTRAS):
        for name, (version, _) in locked(file).items():
            if name not in ONE_FOR_EACH_CUDA:
                assert found.setdefault(name, version) == version, f"{file}: {name}"


def write_wheel(folder, version, text="value = 1\n"):
    """A wheel of one module; returns its line in a lock."""
    folder.mkdir(exist_ok=True)
    path = folder / f"locked_example-{version}-py3-none-any.whl"
    about = f"locked_example-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("locked_example.py", text)
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: locked-example\nVersion: {version}\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    return f"locked-example=={version} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


@pytest.fixture
def project(tmp_path):
    """A project with setup.sh, an extra of one package and its lock, and an environment that has pip and hatchling."""
    for path in ("jobs/setup.sh", "pyproject.toml", "README.md", "LICENSE", "app/moempi/__init__.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    text = (tmp_path / "pyproject.toml").read_text().replace('name = "moempi"', 'name = "setup-example"')
    text = re.sub(r"dependencies = \[.*?\n\]", "dependencies = []", text, count=1, flags=re.DOTALL)
    extra = "[project.optional-dependencies]\n"
    (tmp_path / "pyproject.toml").write_text(text.replace(extra, extra + 'example = ["locked-example"]\n'))
    (tmp_path / "jobs" / "lock").mkdir()
    (tmp_path / "jobs" / "lock" / "moempi.txt").touch()
    (tmp_path / "jobs" / "lock" / "example.txt").write_text(write_wheel(tmp_path / "wheels", "1.0"))
    venv.create(tmp_path / ".venv", with_pip=False)
    (packages,) = tmp_path.glob(".venv/lib/*/site-packages")
    (packages / "tools.pth").write_text(sysconfig.get_path("purelib"))
    return tmp_path


def set_up(project, *arguments):
    environment = {
        "PATH": os.environ["PATH"],
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(project / "wheels"),
        "PIP_NO_BUILD_ISOLATION": "0",  # pip's spelling of: do not isolate the build, which would need an index
    }
    command = ["bash", project / "jobs" / "setup.sh", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def installed_version(project):
    (path,) = (project / ".venv").glob("lib/*/site-packages/locked_example-*.dist-info")
    return path.stem.split("-")[1]


def test_setup_installs_the_locked_version_until_the_lock_changes(project):
    newer = write_wheel(project / "wheels", "2.0")
    assert (set_up(project, "example").returncode, installed_version(project)) == (0, "1.0")
    again = set_up(project, "example")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    (project / "jobs" / "lock" / "example.txt").write_text(newer)
    assert (set_up(project, "example").returncode, installed_version(project)) == (0, "2.0")


def test_setup_compiles_bytecode_that_is_missing_or_outdated(project):
    module = project / "app" / "moempi" / "__init__.py"
    bytecode = Path(importlib.util.cache_from_source(module))
    set_up(project, "example")
    before = bytecode.read_bytes()
    module.write_text("value = 1\n")
    set_up(project, "example")
    assert bytecode.read_bytes() != before
    bytecode.unlink()
    set_up(project, "example")
    assert bytecode.exists()


def test_setup_refuses_a_wheel_with_another_hash(project):
    write_wheel(project / "wheels", "1.0", "value = 2\n")
    ended = set_up(project, "example")
    assert ended.returncode != 0
    assert "DO NOT MATCH THE HASHES" in ended.stderr
    assert not (project / ".venv" / "installed.txt").exists()


def test_an_unlocked_environment_stays_unlocked(project):
    write_wheel(project / "wheels", "2.0")
    assert (set_up(project, "--unlocked", "example").returncode, installed_version(project)) == (0, "2.0")
    (project / "jobs" / "lock" / "example.txt").write_text("locked-example==3.0\n")
    again = set_up(project, "example")
    assert (again.returncode, again.stdout, installed_version(project)) == (0, "", "2.0")


def test_setup_refuses_an_unknown_extra(project):
    ended = set_up(project, "exmple")
    assert (ended.returncode, ended.stderr) == (64, "setup: pyproject.toml has no extra exmple\n")
