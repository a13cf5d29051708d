"""Requests that end with an error are seen: counted, named, and in the exit code. Prompts from stdin."""

import json
import shutil
import struct
import subprocess

import pytest

from engine.runs import SMALL
from moempi.storage.convert import convert
from moempi.storage.initialize import initialize
from moempi.storage.results import ResultFile
from moempi.storage.run_state import read_state
from mpirun import LIMIT_S, ROOT, Outcome, execute, mpirun, python, variables

GOOD = [{"id": f"good-{number}", "tokens": [number + 1, 2]} for number in range(3)]
BAD = [{"id": f"bad-{number}", "tokens": [99 + number]} for number in range(7)]


@pytest.fixture
def folder(tmp_path):
    initialize(SMALL, tmp_path / "w.h5", seed=1)
    return tmp_path


def job(folder, lines):
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = f'model.weights = "{folder}/w.h5"\ninput.prompts = "{folder}/p.jsonl"\noutput.results = "{folder}/r.h5"\n'
    (folder / "job.toml").write_text(text + "sampling.max_tokens = 2\n")
    return folder / "job.toml"


def run_job(folder, lines, *options, ranks=1):
    return mpirun(ranks, *python("-m", "moempi", "run", job(folder, lines), *options))


def moempi(*words):
    return execute(*python("-m", "moempi", *words))


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [1, 3])
def test_the_first_errors_are_printed_and_all_are_counted(folder, ranks):
    outcome = run_job(folder, [*GOOD, *BAD], ranks=ranks)
    assert outcome.code == 0
    begin = outcome.lines.index("moempi: 7 of 10 requests ended with an error, the first 5:")
    reasons = [f"bad-{number}: token {99 + number} is beyond the model's vocabulary of 40" for number in range(5)]
    assert outcome.lines[begin + 1 : begin + 6] == [f"moempi: {reason}" for reason in reasons]
    for words in ("error 7, length 3", "error 5 of 7", "bad-0: token 99 is beyond"):
        assert words in outcome.out
    assert read_state(folder / "r.h5").errors == 7
    assert moempi("state", folder / "job.toml").out == "finished 10 0 errors 7\n"
    shown = moempi("show", folder / "job.toml").out
    assert "7 of 10 requests ended with an error" in shown
    assert "token 99 is beyond" in shown


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("lines", "options", "code"),
    [
        (BAD, [], 65),
        ([*GOOD, *BAD], ["--max-errors", "6"], 65),
        ([*GOOD, *BAD], ["--max-errors", "7"], 0),
        (GOOD, ["--max-errors", "0"], 0),
    ],
)
def test_too_many_errors_are_in_the_exit_code_and_the_state_and_the_results_are_whole(folder, lines, options, code):
    assert run_job(folder, lines, *options, ranks=2).code == code
    state = read_state(folder / "r.h5")
    assert (state.state, state.exit_code) == ("finished", code)
    with ResultFile(folder / "r.h5") as results:
        assert results.num_requests == len(lines)


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("lines", "options", "code", "errors"),
    [
        (BAD, [], 65, 7),
        ([*GOOD, *BAD], ["--max-errors", "6"], 65, 7),
        ([*GOOD, *BAD], ["--max-errors", "7"], 0, 7),
        (GOOD, ["--max-errors", "0"], 0, 0),
    ],
)
def test_the_state_of_a_run_that_is_killed_after_its_results_has_their_exit_code(
    folder, ranks, lines, options, code, errors
):
    (folder / "notes").mkdir()
    fault = [ROOT / "tests/faults/inject_fault.py", folder / "notes", "SIGKILL", "0", "finish", "1"]
    assert mpirun(ranks, *python(*fault, "run", job(folder, lines), *options)).code not in (0, 65)
    state = read_state(folder / "r.h5")
    assert (state.state, state.finished, state.exit_code, state.errors) == ("finished", len(lines), code, errors)
    written = json.loads((folder / "r.h5.run.json").read_text())["state"]
    assert (written == "finished") == (ranks == 2)  # a rank that lives on writes it


@pytest.mark.mpi
def test_a_file_without_prompts_is_one_line(folder):
    outcome = run_job(folder, [])
    assert (outcome.code, outcome.lines) == (65, [f"moempi: {folder}/p.jsonl: has no prompts"])


@pytest.mark.mpi
def test_scores_are_summed_up_by_show_export_and_the_closing_table(folder):
    outcome = run_job(folder, [{"id": "one", "tokens": [3]}, *GOOD, *BAD], "--set", "task=score")
    with ResultFile(folder / "r.h5") as results:
        total = sum(record.score[1:].sum(dtype=float) for record in results.requests())
    assert f"(sum {total:,.3f} of 3 tokens)" in outcome.out
    shown = moempi("show", folder / "job.toml", "--set", "task=score").out
    assert "perplexity" in shown
    assert moempi("export", folder / "r.h5", folder / "r.jsonl").code == 0
    one, *good = [json.loads(line) for line in (folder / "r.jsonl").open()][:4]
    assert (one["score_sum"], one["score_mean"], one["perplexity"]) == (0.0, None, None)
    assert sum(line["score_sum"] for line in good) == pytest.approx(total)


def run_on_stdin(folder, text, *options):
    """Run the job with prompts on the stdin of one process."""
    command = [*python("-m", "moempi", "run", folder / "job.toml"), *options, "--set", "input.prompts=-"]
    begin = {"input": text, "env": variables(), "capture_output": True, "text": True, "timeout": LIMIT_S}
    ended = subprocess.run(list(map(str, command)), check=False, **begin)
    return Outcome(ended.returncode, ended.stdout, ended.stderr, 0.0)


@pytest.mark.mpi
def test_prompts_from_stdin_reach_a_restart_and_all_its_ranks(folder):
    job(folder, [])
    lines, others = "\n".join(map(json.dumps, GOOD)), json.dumps(BAD[0])
    on_ranks = python("-m", "moempi", "run", folder / "job.toml", "--set", "input.prompts=-")
    refused = mpirun(2, *on_ranks)
    assert refused.code == 66
    assert "mpirun passes neither its end" in refused.lines[0]
    assert run_on_stdin(folder, lines, "--max-minutes", "0").code == 75
    refused = run_on_stdin(folder, others)
    assert refused.code == 74
    assert "stdin: differs from" in refused.lines[0]
    for again in (lines, ""):
        assert run_on_stdin(folder, again, "--max-minutes", "0").code == 75
    outcome = mpirun(2, *on_ranks)
    assert outcome.code == 0, outcome.err
    assert "3 requests, JSON lines" in outcome.err
    with ResultFile(folder / "r.h5") as results:
        assert [record.id for record in results.requests()] == [line["id"] for line in GOOD]
    assert not (folder / "r.h5.parts").exists()
    assert "good-1" in moempi("show", folder / "job.toml", "--set", "input.prompts=-").out
    assert run_on_stdin(folder, "").code == 65
    assert run_on_stdin(folder, "a question").code == 65  # a line of text, and no tokenizer


@pytest.mark.mpi
def test_launch_passes_the_prompts_of_stdin_to_all_ranks(folder):
    job(folder, [])
    command = python("-m", "moempi", "launch", "-n", "2", "run", folder / "job.toml", "--set", "input.prompts=-")
    text = "\n".join(json.dumps({"id": f"{number}", "tokens": [number % 40]}) for number in range(5000))
    ended = subprocess.run(
        [*map(str, command), "--set", "sampling.max_tokens=1"],
        input=text,
        env=variables(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    with ResultFile(folder / "r.h5") as results:
        assert [record.id for record in results.requests()] == [f"{number}" for number in range(5000)]


@pytest.mark.mpi
def test_an_export_on_stdout_is_json_of_printable_characters(folder):
    run_job(folder, [{"id": "\u202e\x1b[2Jé\U0001f9ee\x7f", "tokens": [3], "metadata": {"a": 1}}], ranks=1)
    outcome = execute(*python("-m", "moempi", "export", folder / "r.h5", "-"), PYTHONIOENCODING="ascii")
    assert outcome.code == 0
    assert outcome.out.removesuffix("\n").isprintable()
    line = json.loads(outcome.out)
    assert (line["id"], line["metadata"]) == ("\u202e\x1b[2Jé\U0001f9ee\x7f", {"a": 1})


RULES = [{}, {"temperature": 0.7}, {"temperature": 1e-300, "top_p": 0.5}, {"presence_penalty": 1.0}, {"min_tokens": 2}]


@pytest.mark.mpi
@pytest.mark.parametrize("settings", [{}, {"task": "score"}, {"parallel.stages": 2}], ids=["one", "score", "stages"])
def test_numbers_that_are_not_numbers_are_an_error_of_each_request_whatever_its_sampling(tmp_path, settings):
    """The output matrix holds the largest numbers of both signs, whose products with any row are no numbers."""
    shutil.copytree(ROOT / "tests/fixtures/qwen3_moe", tmp_path / "hub")
    path = tmp_path / "hub/model.safetensors"
    content = bytearray(path.read_bytes())
    (head_bytes,) = struct.unpack("<Q", content[:8])
    begin, end = json.loads(content[8 : 8 + head_bytes])["lm_head.weight"]["data_offsets"]
    content[8 + head_bytes + begin : 8 + head_bytes + end] = struct.pack("<HH", 0x7F7F, 0xFF7F) * ((end - begin) // 4)
    path.write_bytes(content)
    convert(tmp_path / "hub", tmp_path / "w.h5")
    options = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    outcome = run_job(tmp_path, [{"tokens": [7, 5, 3]} | rule for rule in RULES], *options, ranks=2)
    assert outcome.code == 65, outcome.err
    with ResultFile(tmp_path / "r.h5") as results:
        assert {record.error for record in results.requests()} == {"the model's logits are not numbers"}
