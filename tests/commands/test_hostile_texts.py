"""Hostile texts in what commands print and log: every character shows as itself or as its escape."""

import fcntl
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import msgspec
import pytest

from hostile import HOSTILE, MARKUP, STYLE, assert_printable
from moempi.cli import main
from moempi.storage import hdf5
from moempi.storage.lock import _WHOLE_FILE
from moempi.storage.run_state import RunState, write_state
from mpirun import LIMIT_S, ROOT, python, variables
from storage.test_records import make_request
from storage.test_results import merged

NUL = f"{HOSTILE}\0"
TEXTS = {"id": NUL, "text": NUL, "reference": NUL}
JOB = "[model]\nweights = 'weights.h5'\n[input]\nprompts = 'prompts.jsonl'\n[output]\nresults = 'results.h5'\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with files for every command, whose texts are hostile."""
    path = tmp_path_factory.mktemp("files")
    shutil.copytree(ROOT / "tests/fixtures/qwen3_moe", path / "hub")
    assert main(["convert", str(path / "hub"), str(path / "weights.h5")]) == 0
    (path / "job.toml").write_text(JOB)
    (path / "prompts.jsonl").write_text(json.dumps({"id": NUL, "tokens": [1, 2], "reference": NUL}) + "\n")
    merged(path / "results.h5", [make_request(0, **TEXTS)], num_requests=1)
    machine = (ROOT / "jobs/machines/mission-h100.toml").read_text()
    (path / "machine.toml").write_text(f"name = {json.dumps(NUL)}\n" + machine[machine.index("tflops") :])
    return path


@pytest.fixture
def folder(files, tmp_path, monkeypatch):
    """The current folder: a copy of the files, in a folder whose own name is hostile."""
    path = tmp_path / HOSTILE
    shutil.copytree(files, path)
    monkeypatch.chdir(path)
    monkeypatch.setenv("COLUMNS", "2000")
    return path


@pytest.fixture
def ending(capfdbinary):
    """`ending(words)` is the exit status of a command, and what it printed on stdout and on stderr, both printable."""

    def run(words):
        try:
            code = main(words)
        except SystemExit as exit_:
            code = exit_.code
        out, err = (text.decode() for text in capfdbinary.readouterr())
        assert_printable(out)
        assert_printable(err)
        return code, out, err

    return run


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([HOSTILE], 64),
        (["run", HOSTILE, HOSTILE], 64),
        (["run", "job.toml", "--world", HOSTILE], 64),
        (["run", "job.toml", "--world", "2", "--set", HOSTILE], 78),
        (["run", "job.toml", "--world", "2", "--set", f"run.{HOSTILE}=1"], 78),
        (["run", "job.toml", "--world", "2", "--set", f"{HOSTILE}.a=1"], 78),
        (["run", "job.toml", "--world", "2", "--set", f"run.backend={HOSTILE}"], 78),
        (["run", "job.toml", "--world", "2", "--set", f"model.weights={HOSTILE}"], 66),
        (["run", "job.toml", "--world", "2", "--set", f"placement.file={HOSTILE}"], 66),
        (["run", HOSTILE], 66),
        (["show", "job.toml", "--set", f"input.prompts={HOSTILE}"], 66),
        (["show", "job.toml", "--set", f"output.results={HOSTILE}"], 66),
        (["state", "job.toml", "--set", f"output.results={HOSTILE}"], 66),
        (["inspect", HOSTILE], 66),
        (["compare", HOSTILE, "results.h5"], 66),
        (["export", "results.h5", f"{HOSTILE}/out"], 74),
        (["convert", HOSTILE, "out.h5"], 66),
        (["init", HOSTILE, "out.h5"], 66),
        (["plan", "job.toml", "--machine", HOSTILE, "--ranks", "2"], 66),
        (["place", HOSTILE], 66),
        (["place", "results.h5", "--policy", HOSTILE], 64),
        (["place", "results.h5", "--topology", HOSTILE], 66),
    ],
    ids=lambda value: " ".join(value).replace(HOSTILE, "X") if isinstance(value, list) else str(value),
)
@pytest.mark.parametrize("debug", [False, True])
def test_words_of_the_command_line(folder, ending, words, code, debug):
    found, _, err = ending([*words, *["--debug"] * debug])
    assert found == code
    last = err.splitlines()[-1]
    assert last.startswith("moempi: ")
    assert err.count("\n") == 1 or "Traceback" in err


QUOTED = json.dumps(HOSTILE).encode()


@pytest.mark.parametrize(
    ("name", "content", "command", "code"),
    [
        ("job.toml", JOB.encode() + b"[run]\n" + QUOTED + b" = 1\n", "run job.toml --world 2", 78),
        ("job.toml", JOB.encode() + b"[run]\nbackend = " + QUOTED, "state job.toml", 78),
        ("job.toml", HOSTILE.encode(), "show job.toml", 78),
        ("arch.toml", b"family = " + QUOTED + b"\n" + QUOTED + b" = 1\n", "init arch.toml out.h5", 78),
        ("machine.toml", QUOTED + b" = 1\n", "plan job.toml --machine machine.toml --ranks 2", 78),
        ("hub/config.json", b'{"model_type": ' + QUOTED + b"}", "convert hub out.h5", 65),
        ("hub/config.json", b'{"model_type": "qwen3_moe", "hidden_act": ' + QUOTED + b"}", "convert hub out.h5", 65),
        ("hub/tokenizer.json", b'{"version": ' + QUOTED + b"}", "convert hub out.h5", 65),
        ("results.h5.run.json", b'{"state": ' + QUOTED + b"}", "state job.toml", 65),
        ("results.h5.run.json", HOSTILE.encode(), "state job.toml", 65),
        ("t.json", b'{"version": 2, "levels": [{"name": ' + QUOTED + b"}]}", "place results.h5 --topology t.json", 78),
        ("t.json", b'{"version": 2, ' + QUOTED + b": 1}", "place results.h5 --topology t.json", 78),
        ("p.json", b'{"version": 1, ' + QUOTED + b": 1}", "run job.toml --world 2 --set placement.file=p.json", 78),
    ],
)
def test_texts_of_wrong_files(folder, ending, name, content, command, code):
    Path(name).write_bytes(content)
    found, _, err = ending(command.split())
    assert (found, err.count("\n")) == (code, 1), err


def test_tensor_names_of_a_checkpoint(folder, ending):
    content = Path("hub/model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[NUL] = header.pop(next(name for name in header if name != "__metadata__"))
    changed = json.dumps(header).encode()
    Path("hub/model.safetensors").write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + length :])
    code, _, err = ending(["convert", "hub", "out.h5"])
    assert (code, err.count("\n")) == (65, 1)


def test_inspect(folder, ending):
    Path(HOSTILE).parent.mkdir()
    with h5py.File(HOSTILE, "w") as file:
        hdf5.write_attribute(file, HOSTILE, f"{HOSTILE}\nline 2 of it")
        dataset = hdf5.create_dataset(file, HOSTILE, dtype="float32", shape=(4,))
        hdf5.write_attribute(file, "units", HOSTILE, owner=dataset)
    code, out, _ = ending(["inspect", HOSTILE])
    assert code == 0
    assert out.count(MARKUP) == 5
    assert any(line.split("│")[2].strip() == "line 2 of it" for line in out.splitlines() if "│" in line)
    shutil.copy("weights.h5", "weights[red].h5")
    code, out, _ = ending(["inspect", "weights[red].h5"])
    assert code == 0
    assert "weights[red].h5" in out
    assert ending(["inspect", "results.h5"])[0] == 0


def test_show(folder, ending):
    code, out, _ = ending(["show", "job.toml"])
    assert code == 0
    assert out.count(r"\ufeff" + MARKUP + r"z\x00") == 3
    assert "exact" in out


def test_state(folder, ending):
    state = RunState(
        state="failed", requests=2, exit_code=75, reason=f"{NUL}\n[/]", world_size=1, started="", updated=""
    )
    write_state("results.h5", state)
    code, out, _ = ending(["state", "job.toml"])
    assert code == 0
    assert out.count("\n") == 1
    assert out.startswith(r"failed 0 75 a\x01")
    assert out.endswith("\\x00 [/]\n")


def test_plan(folder, ending):
    code, out, _ = ending(["plan", "job.toml", "--machine", "machine.toml", "--ranks", "2"])
    assert code == 0
    assert MARKUP in out


def test_exported_texts_are_unchanged(folder, ending):
    assert ending(["export", "results.h5", "out.jsonl"])[0] == 0
    lines = Path("out.jsonl").read_bytes()
    assert b"\x1b" not in lines
    assert msgspec.json.decode(lines)["id"] == json.loads(lines)["text"] == NUL


def printed(*command, **environment):
    """The exit status of a command, and what it printed on stdout and on stderr, both printable."""
    outcome = subprocess.run(
        command,
        env=variables(**environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=LIMIT_S,
        check=False,
    )
    out, err = (text.decode() for text in (outcome.stdout, outcome.stderr))
    assert_printable(out)
    assert_printable(err)
    return outcome.returncode, out, err


def test_a_terminal_without_utf8(folder):
    Path("prompts.jsonl").write_text('{"id": "\\u00e9\\ud83e\\uddee", "tokens": [1, 2]}\n')
    code, out, _ = printed(*python("-m", "moempi", "show", "job.toml"), PYTHONIOENCODING="ascii")
    assert code == 0
    assert r"\xe9\U0001f9ee" in out


def on_terminal(*words):
    """The exit status of a command, and what it wrote on its terminal."""
    ours, theirs = pty.openpty()
    environment = variables(TERM="xterm-256color")
    process = subprocess.Popen(
        python("-m", "moempi", *words), env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    read = bytearray()
    try:
        while chunk := os.read(ours, 1 << 16):
            read += chunk
    except OSError:  # the terminal is closed
        pass
    os.close(ours)
    return process.wait(), read.decode().replace("\r\n", "\n")


@pytest.mark.parametrize(
    ("words", "code"),
    [(["show", "job.toml"], 0), (["inspect", "results.h5"], 0), (["inspect", HOSTILE], 66), ([HOSTILE], 64)],
    ids=["show", "inspect", "missing", "usage"],
)
def test_a_terminal_gets_no_escape_but_styles(folder, words, code):
    found, text = on_terminal(*words)
    assert found == code
    assert (STYLE.search(text) is not None) == (code == 0)
    assert_printable(STYLE.sub("", text))


def ranks(num, *words, **environment):
    launcher = Path(sys.executable).with_name("mpirun")
    return printed(launcher, "-n", str(num), *python("-m", "moempi", *words), **environment)


def run_job(*settings, **environment):
    words = [word for setting in ("output.results=new/" + HOSTILE, *settings) for word in ("--set", setting)]
    return ranks(2, "run", "job.toml", *words, **environment)


def logged():
    """What the ranks wrote into their log files."""
    return "".join(path.read_bytes().decode() for path in Path().rglob("*.log"))


@pytest.mark.mpi
def test_a_run(folder):
    surrogate = os.fsdecode(b"\xff")
    code, out, err = run_job(
        SLURM_JOB_ID=HOSTILE + surrogate,
        SLURMD_NODENAME=HOSTILE + surrogate,
        CC=f"/{MARKUP}{HOSTILE.split()[0]}{surrogate}",
        XDG_CACHE_HOME=str(folder / "cache"),
    )
    assert code == 0, err
    assert MARKUP in out
    assert "moempi: compiled kernels are off" in err
    assert_printable(logged())
    state = json.loads(Path("new/" + HOSTILE + ".run.json").read_bytes())
    assert (state["state"], state["job"].endswith("z\\udcff")) == ("finished", True)
    assert main(["inspect", "new/" + HOSTILE]) == 0


@pytest.mark.mpi
def test_the_reason_of_a_failed_run_is_one_line(folder):
    code, _, err = run_job(f"topology.file={HOSTILE}")
    assert code == 66
    assert err.count("moempi: ") == 1
    state = json.loads(Path("new/" + HOSTILE + ".run.json").read_bytes())
    assert_printable(state["reason"])
    assert "\n" not in state["reason"]
    assert MARKUP[:-8] in state["reason"]


@pytest.mark.mpi
def test_the_holder_of_an_output(folder):
    lock = Path(f"new/{HOSTILE}.parts/lock")
    lock.parent.mkdir(parents=True)
    with lock.open("w") as file:
        file.write(NUL)
        file.flush()
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, _WHOLE_FILE)
        code, _, err = run_job()
    assert (code, err.count("moempi: ")) == (74, 1)
    assert r"z\x00); wait for its end" in err


@pytest.mark.mpi
def test_bad_prompts(folder):
    Path("prompts.jsonl").write_text(json.dumps({"id": NUL, HOSTILE: 1}) + "\n")
    assert run_job()[0] == 65
    code, _, err = ranks(2, "run", "job.toml", "--strict", "--debug")
    assert code == 65
    assert "Traceback" in err
    assert err.count("\nmoempi: rank 0: prompts.jsonl:1: unknown key a\\x01") == 1


RENAMED = """
import ctypes, os, socket, sys
if ctypes.CDLL(None).unshare(0x04000000):  # CLONE_NEWUTS
    sys.exit(77)
socket.sethostname(sys.argv[1])
os.execv(sys.executable, [sys.executable, "-m", "moempi", "check"])
"""


@pytest.mark.mpi
def test_check_names_hosts(folder):
    host = "[red][link=x]:smile:\x1b[2J\r\x9b\u202e"  # no slash: MPI names files after the host
    code, out, err = printed(*python("-c", RENAMED, host))
    if code == 77:
        pytest.skip("this user may not rename a host")
    assert (code, err) == (0, "")
    assert r"[red][link=x]:smile:\x1b[2J\r\x9b\u202e" in out
