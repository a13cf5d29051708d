"""A run that was stopped or killed goes on where it was; requests that are not numbers end alone."""

import json
import os
import re
import shlex
import shutil
import signal
import time

import numpy as np
import pytest

from moempi.cli import main
from moempi.config.tensors import catalogue
from moempi.storage.compare import compare
from moempi.storage.convert import convert
from moempi.storage.journal import JournalReader, journal_paths, journals_folder
from moempi.storage.results import ResultFile
from moempi.storage.run_state import read_state, state_path
from moempi.storage.weights import WeightFile, write_weights
from mpirun import LIMIT_S, ROOT, end, execute, mpirun, python, start

JOB = ROOT / "jobs/abacus.toml"
NOT_A_NUMBER = 0x7FC0


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "abacus.h5"
    convert(ROOT / "weights/abacus", path)
    return path


@pytest.fixture(scope="module")
def whole(weights):
    """The results of the 256 questions of a run that nothing disturbed."""
    path = weights.with_name("whole.h5")
    words = [f"model.weights={weights}", f"output.results={path}", "run.precision=float32"]
    options = [word for setting in words for word in ("--set", setting)]
    assert mpirun(2, *python("-m", "moempi", "run", JOB, *options)).code == 0
    return path


@pytest.fixture
def run(weights, tmp_path):
    """`run(ranks, name, *options, key=value)` runs the 256 questions into `<name>.h5` and tells how it ended."""

    def run(num_ranks, name, *options, **settings):
        named = {"model.weights": weights, "output.results": tmp_path / f"{name}.h5", "run.precision": "float32"}
        words = [word for key, value in (named | settings).items() for word in ("--set", f"{key}={value}")]
        return mpirun(num_ranks, *python("-m", "moempi", "run", JOB, *words, *options))

    return run


def command_with_fault(weights, results, folder, *, fault, rank, place, count):
    """The command of a run with a fault when `rank` reaches `place` for the `count`-th time."""
    (folder / "notes").mkdir()
    settings = {"model.weights": weights, "output.results": results, "run.precision": "float32"}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = [ROOT / "tests/faults/inject_fault.py", folder / "notes", fault, str(rank), place, str(count)]
    return python(*command, "run", JOB, *words)


def run_with_fault(*given, **fault):
    return mpirun(2, *command_with_fault(*given, **fault))


def start_with_fault(*given, **fault):
    """Start a run on one rank; the caller ends it."""
    return start("mpirun", "-n", "1", *command_with_fault(*given, rank=0, **fault))


@pytest.mark.mpi
def test_a_run_whose_time_is_over_goes_on_with_other_ranks(run, whole, tmp_path):
    results = tmp_path / "stopped.h5"
    for ranks in (3, 1):
        outcome = run(ranks, "stopped", "--max-minutes", "0.001")
        assert outcome.code == 75
        assert "stopped early (--max-minutes 0.001)" in outcome.lines[-1]
        assert not results.exists()
    state = read_state(results)
    assert (state.state, state.exit_code, state.requests) == ("stopped", 75, 256)
    assert run(5, "stopped").code == 0
    found = compare(whole, results)
    assert (found.requests, found.different, found.largest) == (256, 0, 0.0)
    assert not journal_paths(results)
    assert read_state(results).state == "finished"


@pytest.mark.mpi
@pytest.mark.parametrize(("rank", "place", "time"), [(0, "agree", 10), (3, "dispatch", 30)])
def test_any_rank_may_be_asked_to_stop(weights, run, whole, tmp_path, rank, place, time):
    """SIGUSR1 to one rank of either stage ends all at a step border; the next run goes on."""
    (tmp_path / "notes").mkdir()
    settings = {"model.weights": weights, "output.results": tmp_path / "asked.h5", "run.precision": "float32"}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    # when it comes there for that time it asks itself
    command = [ROOT / "tests/faults/inject_fault.py", tmp_path / "notes", "SIGUSR1", str(rank), place, str(time)]
    outcome = mpirun(4, *python(*command, "run", JOB, *words, "--set", "parallel.stages=2"))
    assert outcome.code == 75, outcome.err
    assert "stopped early (SIGUSR1)" in outcome.lines[-1]
    assert 0 < int(re.search(r"(\d+) of 256 requests are finished", outcome.err)[1]) < 256
    assert run(3, "asked").code == 0
    found = compare(whole, tmp_path / "asked.h5")
    assert (found.requests, found.different, found.largest) == (256, 0, 0.0)


@pytest.mark.mpi
def test_a_request_too_long_for_the_cache_is_tried_again_with_a_larger_one(run, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"tokens": [5] * length, "max_tokens": 2}) for length in (3, 100)))
    settings = {"input.prompts": prompts, "sampling.ignore_eos": "true"}
    small = {"run.kv_memory": "400KB"}  # one page, of 64 positions
    assert run(1, "r", "--max-minutes", "0", **settings, **small).code == 75
    assert run(1, "r", **settings).code == 0
    with ResultFile(tmp_path / "r.h5") as results:
        assert [record.finish for record in results.requests()] == ["length", "length"]
    assert run(1, "small", **settings, **small).code == 0
    with ResultFile(tmp_path / "small.h5") as results:
        assert [record.finish for record in results.requests()] == ["length", "error"]


@pytest.mark.mpi
def test_what_earlier_runs_finished_is_counted_but_not_run_again(run, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": "12+30=", "reference": "42"}), "not a prompt"] * 3
    prompts.write_text("\n".join(lines))
    assert run(3, "bad", "--max-minutes", "0", **{"input.prompts": prompts}).code == 75
    assert read_state(tmp_path / "bad.h5").finished == 3  # the errors
    outcome = run(2, "bad", **{"input.prompts": prompts})
    assert outcome.code == 0
    assert "3 requests, 0 tokens" in outcome.out
    assert "error 3, stop 3" in outcome.out
    assert "3 of 3  (100.0%)" in outcome.out


@pytest.mark.mpi
@pytest.mark.parametrize("changed", [{"sampling.max_tokens": 3}, {"balance.mode": "bias"}, {"exchange.hops": 2}])
def test_parts_of_other_settings_are_refused_and_kept(run, tmp_path, changed):
    assert run(2, "r", "--max-minutes", "0").code == 75
    before = [path.read_bytes() for path in journal_paths(tmp_path / "r.h5")]
    outcome = run(3, "r", **changed)
    assert outcome.code == 74
    assert len(outcome.lines) == 1
    assert "belongs to an unfinished run with other weights, prompts or settings" in outcome.lines[0]
    assert [path.read_bytes() for path in journal_paths(tmp_path / "r.h5")][: len(before)] == before


@pytest.mark.mpi
@pytest.mark.parametrize("place", ["length", "checksum", "payload"])
def test_a_flipped_bit_loses_one_request_and_the_next_attempt_computes_it(weights, run, whole, tmp_path, place):
    """The damage is named once, also if the attempts have other numbers of ranks, and the damaged bytes are kept."""
    results = tmp_path / "r.h5"
    stopped = run_with_fault(weights, results, tmp_path, fault="SIGUSR1", rank=0, place="append", count=20)
    assert stopped.code == 75
    path = journal_paths(results)[0]
    with JournalReader(path) as journal:
        offset = [offset for offset, _ in journal.records()][2]
    damaged = bytearray(path.read_bytes())
    damaged[offset + {"length": 1, "checksum": 9, "payload": 40}[place]] ^= 1
    path.write_bytes(damaged)
    before = read_state(results).finished
    outcome = run(3, "r", "--max-minutes", "0")
    assert outcome.code == 75
    warnings = [line for line in outcome.lines if "damaged" in line]
    assert warnings == [
        f"moempi: {path} is damaged at byte {offset}, the records behind it are kept; "
        "its lost requests are computed again"
    ]
    assert read_state(results).finished == before - 1
    assert path.read_bytes().startswith(damaged)
    assert run(1, "r").code == 0
    found = compare(whole, results)
    assert (found.requests, found.different, found.largest) == (256, 0, 0.0)


@pytest.mark.mpi
def test_a_damaged_header_is_refused(run, tmp_path):
    assert run(2, "r", "--max-minutes", "0").code == 75
    path = journal_paths(tmp_path / "r.h5")[1]
    damaged = bytearray(path.read_bytes())
    damaged[20] ^= 1
    path.write_bytes(damaged)
    outcome = run(2, "r")
    assert outcome.code == 74
    assert outcome.lines == [f"moempi: rank 1: {path}: its header is damaged; {JournalReader.REMEDY}"]
    path.unlink()
    assert run(2, "r").code == 0


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("fault", "rank", "place"),
    [("SIGKILL", 0, "finish"), ("SIGTERM", 0, "finish"), ("SIGKILL", 1, "finish"), ("SIGKILL", 0, "remove")],
)
def test_a_fault_after_the_results_are_in_place_leaves_a_finished_run(
    weights, run, whole, tmp_path, fault, rank, place
):
    """Between the results' appearance and the state, on another rank, and before the journals are removed."""
    results = tmp_path / "r.h5"
    outcome = run_with_fault(weights, results, tmp_path, fault=fault, rank=rank, place=place, count=1)
    if fault == "SIGTERM":
        assert outcome.code == 0
    state = read_state(results)
    assert (state.state, state.exit_code, state.finished, state.reason) == ("finished", 0, 256, "")
    assert run(3, "r").code == 0
    found = compare(whole, results)
    assert (found.requests, found.different, found.largest) == (256, 0, 0.0)
    assert not journal_paths(results)


@pytest.mark.mpi
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_while_the_results_are_put_in_place_leaves_all_of_the_end_or_nothing(weights, tmp_path, rank):
    """Rank 0 goes on in the moment between the error line and the end of the ranks."""
    results, notes = tmp_path / "r.h5", tmp_path / "notes"
    notes.mkdir()
    settings = {"model.weights": weights, "output.results": results, "run.precision": "float32"}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = [ROOT / "tests/faults/inject_fault.py", notes, "hold", "0", "rename", "1", "run", JOB, *words]
    process = start("mpirun", "-n", "2", *python(*command))
    try:
        while not (notes / "0.injected").exists():
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(int((notes / f"{rank}.pid").read_text()), signal.SIGTERM)
        _, err = process.communicate(timeout=LIMIT_S)
    finally:
        end(process)
    assert "ended by SIGTERM" in err
    state = read_state(results)
    expected = (0, "finished") if results.exists() else (143, "failed")
    assert (process.returncode, state.exit_code, state.state) == (expected[0], *expected)


@pytest.mark.mpi
@pytest.mark.parametrize(("ranks", "stdout"), [(1, "> /dev/full"), (1, ">&-"), (1, "| true"), (2, "> /dev/full")])
def test_results_are_whole_even_if_stdout_cannot_be_written(weights, tmp_path, ranks, stdout):
    results = tmp_path / "r.h5"
    settings = {"model.weights": weights, "output.results": results}
    words = [str(word) for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = shlex.join(map(str, python("-m", "moempi", "run", JOB, *words)))
    launch = f"mpirun -n {ranks} " if ranks > 1 else ""
    outcome = execute("bash", "-c", f"set -o pipefail; {launch}{command} {stdout}")
    assert outcome.code == 0, outcome.err
    assert read_state(results).state == "finished"
    with ResultFile(results) as file:
        assert len(list(file.requests())) == 256


@pytest.mark.mpi
def test_a_run_that_is_killed_whole_has_failed_and_continues(weights, run, whole, tmp_path, capfd):
    results = tmp_path / "r.h5"
    settings = {"model.weights": weights, "output.results": results, "run.precision": "float32"}
    settings |= {"run.max_sequences": 1, "run.micro_batches": 1}  # it takes seconds
    words = [str(word) for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    process = start(*python("-m", "moempi", "run", JOB, *words))
    try:
        while not state_path(results).exists() or read_state(results).finished == 0:
            assert process.poll() is None
            time.sleep(0.05)
        assert read_state(results).state == "running"
        process.kill()
    finally:
        end(process)
    finished = read_state(results).finished
    assert 0 < finished < 256
    assert main(["state", str(JOB), *words]) == 0
    found = capfd.readouterr().out
    assert found.startswith(
        f"failed {finished} 75 killed: process {process.pid} on {os.uname().nodename} was last alive"
    )
    assert run(3, "r").code == 0
    found = compare(whole, results)
    assert (found.requests, found.different, found.largest) == (256, 0, 0.0)


@pytest.mark.mpi
@pytest.mark.parametrize(("place", "count"), [("append", 20), ("merge", 1)])
def test_a_run_that_lost_its_output_to_another_run_replaces_nothing(weights, run, tmp_path, place, count):
    """Its parts are removed while it is stopped by a signal, and another run finishes, before the first goes on."""
    results, notes = tmp_path / "r.h5", tmp_path / "notes"
    first = start_with_fault(weights, results, tmp_path, fault="SIGSTOP", place=place, count=count)
    while not (notes / "0.injected").exists():
        assert first.poll() is None
        time.sleep(0.01)
    shutil.rmtree(journals_folder(results))
    assert run(2, "r", **{"sampling.max_tokens": 1}).code == 0
    os.kill(int((notes / "0.pid").read_text()), signal.SIGCONT)
    _, err = first.communicate(timeout=LIMIT_S)
    assert first.returncode == 74, err
    assert read_state(results).state == "finished"
    with ResultFile(results) as file:
        assert max(len(record.tokens) for record in file.requests()) == 1
    assert [path.name for path in tmp_path.glob(".*")] == []


@pytest.mark.mpi
def test_a_finished_run_runs_anew(run, tmp_path):
    assert run(1, "r").code == 0
    before = (tmp_path / "r.h5").stat().st_ino
    assert run(2, "r", **{"sampling.max_tokens": 1}).code == 0
    assert (tmp_path / "r.h5").stat().st_ino != before
    with ResultFile(tmp_path / "r.h5") as file:
        assert max(len(record.tokens) for record in file.requests()) == 1


@pytest.mark.mpi
@pytest.mark.parametrize("task", ["generate", "score"])
def test_logits_that_are_not_numbers_end_one_request_alone(run, weights, tmp_path, task):
    broken, token = tmp_path / "broken-weights.h5", "z"
    with WeightFile.open(weights) as file:
        number = json.loads(file.tokenizer)["model"]["vocab"][token]
        embedding = file.read("embedding")
        embedding[number] = NOT_A_NUMBER
        pieces = [
            (t, [embedding if t.name == "embedding" else file.read(t.name)]) for t in catalogue(file.architecture)
        ]
        write_weights(broken, file.architecture, tokenizer=file.tokenizer, tensors=pieces)
    prompts = tmp_path / "prompts.jsonl"
    questions = ["12+30=", "reverse lazy=", "84-15=", "reverse zoo=", "33+33="]
    prompts.write_text("\n".join(json.dumps({"prompt": question}) for question in questions))
    settings = {"input.prompts": prompts, "task": task}
    assert run(3, "sound", **settings).code == 0
    assert run(3, "broken", **settings, **{"model.weights": broken}).code == 0
    with ResultFile(tmp_path / "sound.h5") as sound, ResultFile(tmp_path / "broken.h5") as damaged:
        for question, one, other in zip(questions, sound.requests(), damaged.requests(), strict=True):
            if token in question:
                assert (other.finish, other.error) == ("error", "the model's logits are not numbers")
            else:
                assert one.finish == other.finish != "error"
                np.testing.assert_array_equal(one.tokens, other.tokens)
                np.testing.assert_array_equal(one.logprobs, other.logprobs)
                np.testing.assert_array_equal(one.score, other.score)
