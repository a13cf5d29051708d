"""Readers of files refuse what is hostile in one line, with the right error, at once."""

import os

import pytest

from hostile import at_once
from moempi.config.architecture import Architecture, read_architecture_file
from moempi.config.job import Job
from moempi.config.machine_file import read_machine
from moempi.config.placement_file import read_placement
from moempi.config.reading import MAX_JSON_BYTES, MAX_TOML_BYTES, read_toml
from moempi.config.size import parse_size
from moempi.config.topology_file import read_topology
from moempi.errors import ConfigError, NoInputError, UsageError
from mpirun import ROOT

JOB = "[model]\nweights = 'w'\n[input]\nprompts = 'p'\n[output]\nresults = 'r'\n"


def read_job(path):
    return read_toml(path, Job)


def assert_refused(read, errors):
    with at_once(), pytest.raises(errors) as refusal:
        read()
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 1000


TOML_READERS = [read_job, read_machine, read_architecture_file]
JSON_READERS = [read_placement, read_topology]
ANY = [*TOML_READERS, *JSON_READERS]


@pytest.mark.parametrize("read", ANY)
@pytest.mark.parametrize("name", ["fifo", "folder", "missing", "/dev/zero", "/dev/null/x", "\0", "n" * 300, "loop"])
def test_only_regular_files_are_opened(tmp_path, read, name):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    assert_refused(lambda: read(tmp_path / name), NoInputError)


@pytest.mark.parametrize("read", TOML_READERS)
@pytest.mark.parametrize(
    "content",
    [
        b"a = " + b"[" * 100_000,
        b"a = " + b"{ a = " * 30_000,
        b"[" + b"a." * 100_000 + b"a]",
        b"a." * 100_000 + b"a = 1",
        b" a . " * 20 + b"a = 1",
        b'"a\\"b".' * 30_000 + b"a = 1",
        b"'a'." * 30_000 + b"a = 1",
        b"x = { " + b"a." * 100_000 + b"a = 1 }",
        b"x = { y = 1, " + b"a." * 100_000 + b"a = 1 }",
        b"a" * 200_000 + b" = 1",
        b"a = " + b"9" * 5000,
        b"a = 0x" + b"f" * 200_000,
        b"a = '\xff'",
        b"\0",
        b"",
        b"#" * (MAX_TOML_BYTES + 1),
        b"\n" * MAX_TOML_BYTES,
        b"\t\n" * 100_000 + b"a" + b" " * 50_000,
    ],
    ids=lambda content: content[:12].decode(errors="replace"),
)
def test_hostile_toml(tmp_path, read, content):
    (tmp_path / "file").write_bytes(content)
    assert_refused(lambda: read(tmp_path / "file"), (ConfigError, NoInputError))


@pytest.mark.parametrize("read", JSON_READERS)
@pytest.mark.parametrize(
    "content",
    [
        b"[" * 1_000_000,
        b'{"a":' * 500_000,
        b'{"version":' + b"9" * 5000 + b"}",
        b'{"version":' + b"9" * 300 + b"}",
        b'{"x\xff":1}',
        b'{"version":"\xff"}',
        b'{"' + b"x" * 1_000_000 + b'":1}',
        b'{"version":1e999}',
        b'{"version":NaN}',
        b"\xef\xbb\xbf{}",
        b"",
        b" " * (MAX_JSON_BYTES + 1),
        b'{"version":1,"num_experts":99999999999,"layers":[{"layer":0,"hosted":[[0]]}]}',
        b'{"version":1,"num_experts":2147483647,"layers":[{"layer":0,"hosted":[[0]]}]}',
        b'{"version":1,"num_experts":1,"layers":[{"layer":99999999999999999999,"hosted":[[0]]}]}',
        b'{"version":1,"num_experts":2,"layers":[{"layer":0,"hosted":[[0,18446744073709551616]]}]}',
        b'{"version":2,"levels":[],"nodes":[0]}',
        b'{"version":2,"levels":[],"nodes":[0],"islands":[99999999999999999999]}',
    ],
    ids=lambda content: content[:12].decode(errors="replace"),
)
def test_hostile_json(tmp_path, read, content):
    (tmp_path / "file").write_bytes(content)
    assert_refused(lambda: read(tmp_path / "file"), ConfigError)


NUMBERS = [
    "run.micro_batches",
    "run.max_sequences",
    "run.batch_tokens",
    "run.timeout_s",
    "parallel.stages",
    "parallel.tensor",
    "parallel.stage_ranks",
    "parallel.experts_per_rank",
    "topology.ranks_per_node",
    "sampling.max_tokens",
    "sampling.top_k",
    "sampling.seed",
    "sampling.top_logprobs",
    "score.top_n",
    "balance.rate",
    "balance.bound",
    "balance.capacity",
    "balance.sample",
]


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", ["-1", "nan", "inf", "1" + "0" * 30, "9" * 5000, "-" + "9" * 400, "'1'", "[[]]"])
def test_numbers_of_a_job_have_bounds(tmp_path, key, value):
    (tmp_path / "job.toml").write_text(JOB)
    assert_refused(lambda: read_toml(tmp_path / "job.toml", Job, overrides=[f"{key}={value}"]), ConfigError)


@pytest.mark.parametrize("value", ["1e-9", "1", "nan", "inf", "-inf", "-10000.1", "-" + "9" * 400, "'-1'", "[[]]"])
def test_a_threshold_is_a_log_probability(tmp_path, value):
    (tmp_path / "job.toml").write_text(JOB)
    assert_refused(lambda: read_toml(tmp_path / "job.toml", Job, overrides=[f"score.threshold={value}"]), ConfigError)


@pytest.mark.parametrize(
    "override", ["a." * 50_000 + "a=1", "run." * 50_000 + "a=1", "." * 1000 + "=1", "run=" + "[" * 60_000]
)
def test_hostile_overrides(tmp_path, override):
    (tmp_path / "job.toml").write_text(JOB)
    assert_refused(lambda: read_toml(tmp_path / "job.toml", Job, overrides=[override]), (ConfigError, UsageError))


@pytest.mark.parametrize(
    "size", ["9" * 400 + "B", "1." + "9" * 400 + "GB", "-1B", "1e9B", "nanB", "1" + " " * 50 + "B", "١B"]
)
def test_hostile_sizes(tmp_path, size):
    (tmp_path / "job.toml").write_text(JOB)
    for override in (f"run.kv_memory={size}", f"topology.rank_memory={size}"):
        overrides = [override]
        assert_refused(
            lambda overrides=overrides: read_toml(tmp_path / "job.toml", Job, overrides=overrides), ConfigError
        )


def test_the_largest_size_can_be_computed():
    assert parse_size("9" * 15 + "." + "9" * 15 + " TiB") > 10**27


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("num_layers = 4", "num_layers = 1001"),
        ("num_layers = 4", "num_layers = 1000000000000"),
        ("vocab_size = 64", "vocab_size = 10000000000000000000000"),
        ("top_k = 2", "top_k = 100"),
        ("num_layers = 4", "num_layers = 4\ndense_layers = [" + "1," * 2000 + "]"),
        ("num_layers = 4", "num_layers = 4\nnorm_eps = nan"),
    ],
)
def test_impossible_architectures(tmp_path, old, new):
    text = (
        "family = 'x'\nvocab_size = 64\nwidth = 32\nnum_layers = 4\nmax_positions = 128\n"
        "[attention]\nnum_heads = 4\nnum_kv_heads = 4\nhead_dim = 8\n"
        "[experts]\nnum = 4\nwidth = 16\n[experts.router]\ntop_k = 2\n"
    )
    (tmp_path / "arch.toml").write_text(text)
    assert isinstance(read_architecture_file(tmp_path / "arch.toml"), Architecture)
    (tmp_path / "arch.toml").write_text(text.replace(old, new))
    assert_refused(lambda: read_architecture_file(tmp_path / "arch.toml"), ConfigError)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (key, value)
        for key in ("tflops", "memory_gb_s", "turn_us", "latency_us", "bandwidth_gb_s")
        for value in ("nan", "inf", "-1.0", "1e300", "'fast'")
    ]
    + [(key, value) for key in ("tflops", "memory_gb_s", "bandwidth_gb_s") for value in ("0.0", "1e-300")],
)
def test_impossible_machines(tmp_path, key, value):
    lines = (ROOT / "jobs/machines/mission-h100.toml").read_text().splitlines()
    lines.insert(0, "turn_us = 0.0")
    at = next(i for i, line in enumerate(lines) if line.startswith(f"{key} ="))
    lines[at] = f"{key} = {value}"
    (tmp_path / "machine.toml").write_text("\n".join(lines))
    assert_refused(lambda: read_machine(tmp_path / "machine.toml"), ConfigError)
