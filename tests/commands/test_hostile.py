"""Every command refuses hostile inputs and options in one line, with the right exit code, at once."""

import os
import resource
import shutil

import pytest

from hostile import AT_ONCE_S, at_once
from moempi.cli import main
from moempi.printing import MAX_LINE_LENGTH
from moempi.storage.results import ResultFile
from mpirun import ROOT, execute, python
from storage.models import write_model
from storage.test_records import make_request
from storage.test_results import merged


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a checkpoint, its weights, prompts, a job, results, and a FIFO."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "tests/fixtures/qwen3_moe", "hub")
    assert main(["convert", "hub", "weights.h5"]) == 0
    (tmp_path / "prompts.jsonl").write_text('{"tokens": [1, 2]}\n')
    (tmp_path / "job.toml").write_text(
        "[model]\nweights = 'weights.h5'\n[input]\nprompts = 'prompts.jsonl'\n[output]\nresults = 'results.h5'\n"
    )
    merged(tmp_path / "results.h5", [make_request(0), make_request(1)], num_requests=2)
    shutil.copy(ROOT / "jobs/machines/mission-h100.toml", "machine.toml")
    os.mkfifo("fifo")
    return tmp_path


def ending(words, capsys):
    """The exit status of a command; fails unless there is one line."""
    with at_once():
        try:
            code = main(words)
        except SystemExit as exit_:
            code = exit_.code
    err = capsys.readouterr().err
    assert err.count("\n") == (1 if code else 0), err
    assert len(err) <= len("moempi: \n") + MAX_LINE_LENGTH
    return code


LONG, DIGITS, NOT_UTF8 = "n" * 300, "9" * 5000, "b\udcff"


@pytest.mark.parametrize("place", ["fifo", "/dev/zero", LONG, "missing", "."])
@pytest.mark.parametrize(
    "command",
    [
        "run {} --world 2",
        "run job.toml --world 2 --set model.weights={}",
        "run job.toml --world 2 --set model.weights=none --set model.architecture={}",
        "run job.toml --world 2 --set placement.file={}",
        "show {}",
        "show job.toml --set input.prompts={}",
        "show job.toml --set output.results={}",
        "state {}",
        "inspect {}",
        "compare {} results.h5",
        "compare results.h5 {}",
        "export {} out.jsonl",
        "convert {} out.h5",
        "init {} out.h5",
        "plan {} --machine machine.toml --ranks 2",
        "plan job.toml --machine {} --ranks 2",
        "place {}",
        "place results.h5 --topology {}",
    ],
)
def test_inputs_that_are_no_regular_files(folder, capsys, command, place):
    assert ending([word.format(place) for word in command.split()], capsys) in (65, 66, 74)


@pytest.mark.parametrize(
    "file",
    ["config.json", "tokenizer.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"],
)
@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "link to nowhere"])
def test_checkpoint_files_that_are_no_regular_files(folder, capsys, file, kind):
    path = folder / "hub" / file
    path.unlink(missing_ok=True)
    if kind in ("fifo", "folder"):
        (os.mkfifo if kind == "fifo" else os.mkdir)(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    assert ending(["convert", "hub", "out.h5"], capsys) == 66


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"num_hidden_layers":' + b"9" * 5000 + b"}",
        b'{"x":"\xff"}',
        b"",
        b"[]",
        b'{"weight_map":{"a":"\\u0000"}}',
    ],
)
def test_hostile_checkpoint_texts(folder, capsys, name, content):
    (folder / "hub" / name).write_bytes(content)
    assert ending(["convert", "hub", "out.h5"], capsys) in (0, 65, 66)


@pytest.mark.parametrize("value", ["1000000000000", "-1", "1e400", "9" * 400, "9" * 4000])
@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "num_local_experts", "rms_norm_eps", "rope_theta", "vocab_size", "hidden_size"]
)
def test_hostile_checkpoint_numbers(folder, capsys, key, value):
    text = (folder / "hub/config.json").read_text()
    lines = [f'"{key}": {value},' if f'"{key}":' in line else line for line in text.splitlines()]
    (folder / "hub/config.json").write_text("\n".join(lines))
    assert ending(["convert", "hub", "out.h5"], capsys) in (0, 65)


@pytest.mark.parametrize(
    ("command", "values"),
    [
        ("compare results.h5 results.h5 --within={}", ["nan", "-1", "-0.1", "inf", "x", "", LONG]),
        ("show job.toml --first={}", ["-1", "nan", "1.5", DIGITS, "x", ""]),
        ("init arch.toml out.h5 --seed={}", ["-1", "nan", DIGITS, "1e3"]),
        ("run job.toml --max-minutes={}", ["nan", "-1", "inf", "1e300", DIGITS]),
        ("run job.toml --world={}", ["-1", "1000000000", DIGITS, "nan"]),
        ("run job.toml --world=2 --ranks-per-node={}", ["-1", DIGITS]),
        ("plan job.toml --machine machine.toml --ranks={}", ["0", "-1", "1000000000", DIGITS]),
        ("plan job.toml --machine machine.toml --ranks=2 --context={}", ["0", "-1", DIGITS, "9" * 400]),
        ("plan job.toml --machine machine.toml --ranks=2 --prompt={}", ["0", "-1", DIGITS, "9" * 400]),
        ("place results.h5 --row-us={}", ["nan", "-1", "inf", DIGITS]),
        ("place results.h5 --replicas={}", ["nan", "-1", "inf", "9"]),
        ("place results.h5 --ranks={}", ["0", "-1", "1000000000", DIGITS]),
        ("place results.h5 --tokens={}", ["0", "-1", DIGITS]),
        ("check --ranks-per-node={}", ["-1", DIGITS]),
        ("inspect {}", [NOT_UTF8]),
        ("run job.toml --set output.results={}", [NOT_UTF8]),
        ("run job.toml --world=2 --set {}", ["", "=", "run", LONG, "." * 5000]),
    ],
)
def test_hostile_options(folder, capsys, command, values):
    for value in values:
        assert ending([word.format(value) for word in command.split()], capsys) == 64


@pytest.mark.parametrize("setting", ["run.max_sequences=1000000", "run.micro_batches=4096", "parallel.stages=1000"])
def test_the_largest_layouts_are_quick(folder, setting):
    before = children_s()
    outcome = execute(
        "env", "-C", folder, *python("-m", "moempi", "run", "job.toml", "--world", "1000", "--set", setting)
    )
    assert outcome.code in (0, 78), outcome.err
    assert children_s() - before < 2 * AT_ONCE_S


def children_s():
    """Seconds of a processor that all processes took which this one has started, and which have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_results_of_other_prompts_are_not_shown(folder, capsys):
    assert ending(["show", "job.toml"], capsys) == 65


@pytest.mark.mpi
def test_weights_whose_products_overflow_end_requests_without_warnings(folder):
    (folder / "weights.h5").unlink()
    write_model(folder / "weights.h5", tokenizer="")  # any bits as numbers, up to 1e38
    outcome = execute("env", "-C", folder, *python("-m", "moempi", "run", "job.toml", "--force"))
    assert outcome.code == 65, outcome.err
    assert outcome.lines == outcome.err.splitlines()
    with ResultFile(folder / "results.h5") as results:
        assert [record.error for record in results.requests()] == ["the model's logits are not numbers"]


@pytest.mark.mpi
@pytest.mark.parametrize(
    "words", ["overlap --tokens -1", "plan --repeats 0", "placement --replicas nan", "exchange --rows 0"]
)
def test_hostile_options_of_benchmarks(words):
    outcome = execute(*python("-m", "moempi", "bench", *words.split()))
    assert (outcome.code, len(outcome.lines)) == (64, 1), outcome.err
