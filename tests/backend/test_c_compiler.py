"""Compiled kernels: what is kept, what is loaded, and how a run continues without them."""

import ctypes
import logging
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moempi.backend import c_compiler, kept_files
from moempi.backend.c_compiler import load_kernel

needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
HANG = '#!/bin/sh\nsleep 400 & echo $! >> "{pids}"; wait\n'


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    kept_files.warn_once.cache_clear()
    c_compiler._unending.cache_clear()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "seven.c"
    path.write_text("int seven(void) { return 7; }\n")
    return path


@pytest.fixture
def no_compiling(monkeypatch):
    def refuse(*_):
        raise AssertionError("compiled again")

    return lambda: monkeypatch.setattr(c_compiler, "_compile", refuse)


def kept(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "cache" / "moempi").glob("*.so")
    return path


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@needs_compiler
def test_a_library_is_kept_private_and_loaded_again(source, tmp_path, no_compiling, caplog):
    assert load_kernel(source).seven() == 7
    path = kept(tmp_path)
    assert os.uname().machine in path.name
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path]
    no_compiling()
    assert load_kernel(source).seven() == 7
    assert warnings(caplog) == []


@needs_compiler
@pytest.mark.parametrize(
    "damage", ["empty", "one byte", "cut", "no hash", "one bit", "other", "longer", "folder", "fifo"]
)
def test_a_damaged_library_is_compiled_again(damage, source, tmp_path):
    load_kernel(source)
    path = kept(tmp_path)
    whole = path.read_bytes()
    match damage:
        case "folder" | "fifo":
            path.unlink()
            path.mkdir() if damage == "folder" else os.mkfifo(path)
        case _:
            flipped = bytearray(whole)
            flipped[5000] ^= 4
            contents = {"empty": b"", "one byte": whole[:1], "cut": whole[:8192], "no hash": whole[:-16]}
            contents |= {"one bit": bytes(flipped), "other": b"\x7fELF" * 4000, "longer": whole + b"\0"}
            path.write_bytes(contents[damage])
    assert load_kernel(source).seven() == 7
    if damage != "folder":
        assert path.read_bytes() == whole


@needs_compiler
def test_a_loaded_library_survives_a_cut_file(source, tmp_path):
    library = load_kernel(source)
    os.truncate(kept(tmp_path), 0)
    assert library.seven() == 7


@needs_compiler
def test_libraries_of_two_sources_are_not_confused(source, tmp_path):
    other = tmp_path / "eight.c"
    other.write_text("int eight(void) { return 8; }\n")
    for _ in range(2):
        assert (load_kernel(source).seven(), load_kernel(other).eight()) == (7, 8)
    source.write_text("int seven(void) { return 70; }\n")
    assert load_kernel(source).seven() == 70


@needs_compiler
def test_another_compiler_compiles_again(source, tmp_path, monkeypatch):
    load_kernel(source)
    monkeypatch.setenv("CC", "cc -g")
    load_kernel(source)
    assert len(list((tmp_path / "cache" / "moempi").glob("*.so"))) == 2


@needs_compiler
@pytest.mark.parametrize("compiler", ["no-such-compiler", None])
def test_a_kept_library_needs_no_compiler(compiler, source, monkeypatch, caplog):
    load_kernel(source)
    if compiler:
        monkeypatch.setenv("CC", compiler)
    else:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    assert load_kernel(source).seven() == 7
    assert warnings(caplog) == []


@needs_compiler
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_may_write_is_not_used(mode, source, tmp_path, caplog):
    folder = tmp_path / "cache" / "moempi"
    folder.mkdir(parents=True)
    folder.chmod(mode)
    for _ in range(2):
        assert load_kernel(source).seven() == 7
    assert warnings(caplog) == [f"{folder}: not used for compiled kernels: other users may write to it"]
    assert list(folder.iterdir()) == []


@needs_compiler
@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("given", ["folder", "file"])
def test_nothing_of_another_user_is_loaded(given, source, tmp_path, monkeypatch, caplog):
    load_kernel(source)
    path = kept(tmp_path)
    os.chown(path.parent if given == "folder" else path, 12345, -1)
    loaded = []
    monkeypatch.setattr(c_compiler, "_compile", lambda *_: loaded.append("compiled") or b"")
    assert load_kernel(source) is None
    assert loaded == ["compiled"]
    assert "it belongs to user 12345" in warnings(caplog)[0]


@needs_compiler
def test_a_file_that_others_may_write_is_compiled_again(source, tmp_path, caplog):
    load_kernel(source)
    kept(tmp_path).chmod(0o666)
    assert load_kernel(source).seven() == 7
    assert "not loaded: other users may write to it" in warnings(caplog)[0]
    assert stat.S_IMODE(kept(tmp_path).stat().st_mode) == 0o600


@needs_compiler
@pytest.mark.parametrize("home", ["relative", "/dev/null", "/proc/none"])
def test_without_a_cache_folder_each_process_compiles(home, source, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    assert load_kernel(source).seven() == 7
    assert warnings(caplog) == []
    assert not Path(home, "moempi").exists()


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler -x", "no-such-compiler cannot be started: there is no such program"),
        ("true", "true does not compile seven.c: "),
        ("false", "false does not compile seven.c: "),
        ("/dev/null", "/dev/null cannot be started: there is no such program"),
    ],
)
def test_without_a_library_one_line_has_the_reason(compiler, reason, source, monkeypatch, caplog):
    monkeypatch.setenv("CC", compiler)
    assert load_kernel(source) is None
    assert load_kernel(source) is None
    assert warnings(caplog) == [f"compiled kernels are off, the run is slower: {reason.strip()}"]


@needs_compiler
def test_a_source_with_an_error_is_one_line(source, caplog):
    source.write_text("int seven(void) {\n")
    assert load_kernel(source) is None
    (line,) = warnings(caplog)
    assert "does not compile seven.c: " in line
    assert "\n" not in line


@pytest.mark.parametrize("folder", ["usable", "not usable"])
def test_a_compiler_that_hangs_is_ended_with_its_children_and_left_alone(folder, source, tmp_path, monkeypatch, caplog):
    pids = tmp_path / "pids"
    compiler = tmp_path / "hang.sh"
    compiler.write_text(HANG.format(pids=pids))
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setattr(c_compiler, "COMPILE_LIMIT_S", 2.0)
    if folder == "not usable":
        monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert load_kernel(source) is None
    assert load_kernel(source) is None
    c_compiler._unending.cache_clear()
    if folder == "usable":
        assert load_kernel(source) is None  # as in another process, by the marker
    (child,) = pids.read_text().split()  # it was started once
    assert has_ended(int(child))
    assert warnings(caplog) == [
        f"compiled kernels are off, the run is slower: {compiler} did not end within 2 s; "
        "it is started again after a day"
    ]
    if folder == "usable":
        (marker,) = (tmp_path / "cache" / "moempi").glob("*.unending")
        os.utime(marker, (time.time() - 2 * c_compiler.RETRY_S,) * 2)
        assert load_kernel(source) is None
        assert len(pids.read_text().split()) == 2


def has_ended(pid: int) -> bool:
    """Whether a killed process is gone, or goes soon."""
    end = time.monotonic() + 20.0
    while running(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not running(pid)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_source_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(OSError):
        load_kernel(tmp_path / "none.c")


@needs_compiler
def test_no_space_to_keep_a_library_is_no_loss(source, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    library = load_kernel(source)
    assert isinstance(library, ctypes.CDLL)
    assert library.seven() == 7
    assert warnings(caplog) == []


@needs_compiler
def test_of_processes_that_start_together_one_compiles(source, tmp_path, monkeypatch):
    calls, compiler = tmp_path / "calls", tmp_path / "slow.sh"
    compiler.write_text(f'#!/bin/sh\necho x >> "{calls}"; sleep 1; exec cc "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    program = "import sys, pathlib; from moempi.backend.c_compiler import load_kernel; "
    program += "load_kernel(pathlib.Path(sys.argv[1])).seven()"
    started = [subprocess.Popen([sys.executable, "-c", program, str(source)]) for _ in range(3)]
    assert [process.wait(60) for process in started] == [0, 0, 0]
    assert calls.read_text() == "x\n"


@needs_compiler
def test_a_folder_of_sources_is_one_library_that_its_files_and_flags_identify(tmp_path):
    folder = tmp_path / "two"
    folder.mkdir()
    (folder / "value.h").write_text("#ifndef VALUE\n#define VALUE 3\n#endif\nint three(void);\n")
    (folder / "three.c").write_text('#include "value.h"\nint three(void) { return VALUE; }\n')
    (folder / "six.c").write_text('#include "value.h"\nint six(void) { return 2 * three(); }\n')
    assert load_kernel(folder).six() == 6
    assert load_kernel(folder, ("-DVALUE=4",)).six() == 8
    (folder / "value.h").write_text("#define VALUE 5\nint three(void);\n")
    assert load_kernel(folder).six() == 10


@needs_compiler
def test_the_first_flags_that_the_compiler_takes_are_used_without_a_warning(source, caplog):
    assert load_kernel(source, ("-mno-such-processor",), ()).seven() == 7
    assert not caplog.records
    assert load_kernel(source, ("-mno-such-processor",), ("-mno-other",)) is None
    assert "no-such-processor" in caplog.text
