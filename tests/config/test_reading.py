"""Job files: defaults, overrides, and refusals that name the problem, its location and the nearest known key."""

import json

import pytest

from moempi.config.architecture import Architecture
from moempi.config.job import Job, read_job_file
from moempi.config.reading import HDF5_BEGIN, read_toml, read_tree
from moempi.errors import ConfigError, NoInputError, UsageError
from mpirun import ROOT

SMALLEST = """
[model]
weights = "a.h5"
[input]
prompts = "a.jsonl"
[output]
results = "out.h5"
"""


@pytest.fixture
def job_file(tmp_path):
    def write(text):
        path = tmp_path / "job.toml"
        path.write_text(text)
        return path

    return write


def test_the_smallest_job_has_the_documented_defaults(job_file):
    job = read_toml(job_file(SMALLEST), Job)
    assert (job.task, job.model.weights, job.input.prompts, job.output.results) == (
        "generate",
        "a.h5",
        "a.jsonl",
        "out.h5",
    )
    assert (job.run.backend, job.run.precision, job.run.reproducible) == ("auto", "bfloat16", False)
    assert (job.run.micro_batches, job.run.timeout_s) == (2, 300.0)
    assert (job.sampling.max_tokens, job.sampling.temperature, job.sampling.top_k) == (16, 0.0, 0)
    assert (job.sampling.top_p, job.sampling.seed, job.sampling.stop, job.sampling.ignore_eos) == (1.0, 0, (), False)
    assert (job.score.top_n, job.exchange.transport) == (0, "auto")


@pytest.mark.parametrize(
    ("folder", "job", "results"),
    [
        (".", "jobs/abacus.toml", "results/abacus.h5"),
        ("jobs", "abacus.toml", "../results/abacus.h5"),
        ("tests", "../jobs/abacus.toml", "../results/abacus.h5"),
        ("/", ROOT / "jobs/abacus.toml", f"{ROOT}/results/abacus.h5"),
    ],
)
def test_the_shipped_job_is_the_same_from_any_folder(folder, job, results, monkeypatch):
    monkeypatch.chdir(ROOT / folder)
    assert read_job_file(job).output.results == results


def test_paths_are_relative_to_the_job_file_and_those_of_overrides_to_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "jobs").mkdir()
    job = tmp_path / "jobs/job.toml"
    job.write_text('model = {weights = "/a.h5", architecture = ""}\ninput.prompts = "p/../q"\n[output]\nresults = "r"')
    monkeypatch.chdir(tmp_path)
    read = read_job_file("jobs/job.toml", overrides=["topology.file=t.json", "output.results=r"])
    assert (read.model.weights, read.model.architecture, read.input.prompts) == ("/a.h5", "", "jobs/q")
    assert (read.topology.file, read.output.results) == ("t.json", "r")


def test_stdin_has_no_folder(tmp_path):
    (tmp_path / "job.toml").write_text(SMALLEST.replace('"a.jsonl"', '"-"'))
    assert read_job_file(tmp_path / "job.toml").input.prompts == "-"


def test_dots_behind_a_symbolic_link_keep_their_meaning(tmp_path, monkeypatch):
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "here").symlink_to("far/away")
    (tmp_path / "far/away/job.toml").write_text(SMALLEST.replace("a.h5", "../a.h5").replace("a.jsonl", "./a.jsonl"))
    monkeypatch.chdir(tmp_path)
    read = read_job_file("here/job.toml")
    assert (read.model.weights, read.input.prompts) == ("here/../a.h5", "here/a.jsonl")


def test_an_input_that_only_the_current_folder_has_is_named(tmp_path, monkeypatch):
    """As in a job file whose paths are meant relative to the current folder; an output there says nothing."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/job.toml").write_text(SMALLEST)
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "out.h5").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NoInputError) as refused:
        read_job_file("jobs/job.toml")
    assert str(refused.value) == (
        "jobs/job.toml: input.prompts: no file jobs/a.jsonl; paths are relative to the job file: write '../a.jsonl'"
    )
    (tmp_path / "jobs/a.jsonl").touch()
    assert read_job_file("jobs/job.toml").output.results == "jobs/out.h5"


@pytest.mark.parametrize("path", ["a\0b", "n" * 300, "..", ".", "a/", "~", "é"])
def test_odd_paths_are_read_and_not_opened(tmp_path, path):
    (tmp_path / "job.toml").write_text(SMALLEST.replace('"a.h5"', json.dumps(path)))
    read = read_job_file(tmp_path / "job.toml").model.weights
    assert read.startswith(str(tmp_path.parent))


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("run.micro_batches=4", 4),
        ("run.micro_batches = 4", 4),
        ("run.precision=float32", "float32"),
        ('run.precision="float32"', "float32"),
        ("run.timeout_s=1", 1.0),
        ("run.reproducible=true", True),
        ("run.capture=true", True),
        ("run.kv_memory=1.5 GiB", "1.5 GiB"),
        ("run.kv_memory='''\n1 GiB'''", "1 GiB"),
    ],
)
def test_overrides_take_toml_values_and_bare_words(job_file, override, value):
    job = read_toml(job_file(SMALLEST), Job, overrides=[override])
    key = override.partition("=")[0].strip().removeprefix("run.")
    assert getattr(job.run, key) == value


def test_overrides_may_create_a_section_and_a_list(job_file):
    job = read_toml(job_file(SMALLEST), Job, overrides=["score.top_n=3", 'sampling.stop=["a", "b"]', "task=score"])
    assert (job.task, job.score.top_n, job.sampling.stop) == ("score", 3, ("a", "b"))


@pytest.mark.parametrize("path", ["a b", "a\nb", 'a"b', "a'b", "a#b=c", "*", "$(a)", "1\nx = 2"])
def test_a_path_in_an_override_stays_as_it_is(job_file, path):
    job = read_toml(job_file(SMALLEST), Job, overrides=[f"output.results={path}"])
    assert job.output.results == path


def test_an_override_of_two_keys_is_refused(job_file):
    with pytest.raises(ConfigError, match="micro_batches"):
        read_toml(job_file(SMALLEST), Job, overrides=["run.micro_batches=4\nx = 2"])


@pytest.mark.parametrize("override", ["run.micro_batches", "=4", "run..x=4", "task.name=4", ".a=1"])
def test_malformed_overrides_are_usage_errors(job_file, override):
    with pytest.raises(UsageError, match="--set"):
        read_toml(job_file("task = 'generate'" + SMALLEST), Job, overrides=[override])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[run]\nmicro_batch = 2", ["unknown key run.micro_batch", "run.micro_batches"]),
        ("[sampling]\nqqqqqqqqqq = 2", ["unknown key sampling.qqqqqqqqqq", "known keys are max_tokens"]),
        ("[samplings]\ntop_k = 2", ["unknown key samplings", "did you mean sampling?"]),
        ("[run]\nmicro_batches = '2'", ["run.micro_batches", "'2'"]),
        ("[run]\nmicro_batches = 0", ["run.micro_batches", ">= 1"]),
        ("[run]\nmicro_batches = true", ["run.micro_batches"]),
        ("[run]\nprecision = 'float16'", ["run.precision", "float16"]),
        ("[run]\nkv_memory = '12 parsec'", ["run.kv_memory"]),
        ("[sampling]\ntop_p = 0.0", ["sampling.top_p"]),
        ("[sampling]\ntop_p = 1.5", ["sampling.top_p"]),
        ("[sampling]\nstop = ['']", ["sampling.stop"]),
        ("[sampling]\ntemperature = nan", ["sampling.temperature"]),
        ("[sampling]\ntemperature = inf", ["sampling.temperature"]),
        ("[run]\ntimeout_s = inf", ["run.timeout_s"]),
        ("[balance]\ncapacity = inf", ["balance.capacity"]),
        ("run = 3", ["run", "object"]),
    ],
)
def test_refusals_name_file_key_and_remedy(job_file, text, words):
    path = job_file(f"{text}\n{SMALLEST}")
    with pytest.raises(ConfigError) as refusal:
        read_toml(path, Job)
    for word in [str(path), *words]:
        assert word in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("section", ["model", "input", "output"])
def test_a_missing_section_is_named(job_file, section):
    lines = SMALLEST.strip().splitlines()
    at = lines.index(f"[{section}]")
    with pytest.raises(ConfigError, match=section):
        read_toml(job_file("\n".join(lines[:at] + lines[at + 2 :])), Job)


@pytest.mark.parametrize("text", ["task = ", "[a]\n[a]", "a = 1\na = 2"])
def test_a_file_that_is_not_toml_is_refused(job_file, text):
    with pytest.raises(ConfigError, match="not TOML"):
        read_toml(job_file(text), Job)


def test_an_unreadable_file_is_an_input_error(tmp_path):
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    for name in ("none.toml", "bytes.toml", "."):
        with pytest.raises(NoInputError, match=r"cannot be read|not TOML"):
            read_toml(tmp_path / name, Job)


def test_an_impossible_architecture_names_its_problem():
    tree = {
        "family": "qwen3_moe",
        "vocab_size": 64,
        "width": 32,
        "num_layers": 2,
        "max_positions": 128,
        "attention": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 8},
        "experts": {"num": 4, "width": 16, "router": {"top_k": 2}},
    }
    architecture = read_tree(tree, Architecture, origin="test")
    assert architecture.problem() is None
    assert architecture.moe_layers == (0, 1)
    tree["experts"]["router"]["top_k"] = 5
    assert "top_k" in (read_tree(tree, Architecture, origin="test").problem() or "")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"top_k": 0}, "top_k"),
        ({"head_dim": 3}, "head_dim 3 is less than the rope_dim 4"),
        ({"shared_layers": [2]}, "shared_layers names a layer twice, or beyond num_layers 2"),
        ({"shared_layers": [1, 1]}, "shared_layers names a layer twice, or beyond num_layers 2"),
        ({"shared_layers": [0]}, "shared_layers has layer 0"),
        ({"shared_layers": [1]}, None),
        ({"query_rank": 0}, "indexer needs a query_rank"),
    ],
)
def test_an_impossible_indexer_names_its_problem(changes, words):
    changes = {"query_rank": 6, "num_heads": 2, "head_dim": 5, "top_k": 3} | changes
    latent = {"key_value_rank": 6, "rope_dim": 4, "value_dim": 4, "query_rank": changes.pop("query_rank")}
    tree = {
        "family": "deepseek_v32",
        "vocab_size": 64,
        "width": 32,
        "num_layers": 2,
        "max_positions": 128,
        "attention": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 8, "latent": latent | {"indexer": changes}},
        "experts": {"num": 4, "width": 16, "router": {"top_k": 2}},
    }
    try:
        problem = read_tree(tree, Architecture, origin="test").problem()
    except ConfigError as error:
        problem = str(error)
    assert (problem is None) == (words is None)
    assert (words or "") in (problem or "")


def test_an_hdf5_file_in_the_place_of_a_job_is_called_that(tmp_path):
    path = tmp_path / "results.h5"
    path.write_bytes(HDF5_BEGIN + bytes(64))
    with pytest.raises(NoInputError, match="not TOML: it is an HDF5 file; give a TOML file"):
        read_toml(path, Job)
