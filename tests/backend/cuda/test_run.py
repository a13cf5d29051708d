"""Whole runs on the CUDA kernels: the tokens of the CPU backend, and the same bits with any transport and buffers."""

import json
import os

import h5py
import numpy as np
import pytest

from moempi.config.architecture import Architecture, AttentionShape, DeltaRule, Experts, Latent, Router, StateSpace
from moempi.storage.compare import compare
from moempi.storage.convert import convert
from moempi.storage.initialize import initialize
from moempi.storage.results import ResultFile
from mpirun import ROOT, mpirun, python

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def run(tmp_path_factory, runner):
    """Run 12 questions on `num_ranks` ranks, by default on the SIMT device; returns the path of the results file."""
    folder = tmp_path_factory.mktemp("runs")
    convert(ROOT / "weights/abacus", folder / "abacus.h5")
    questions = (ROOT / "jobs/abacus.jsonl").read_text().splitlines()[:12]
    (folder / "some.jsonl").write_text("\n".join(questions))

    def run(num_ranks, name, *, buffers="host", module="simt.run", **settings):
        named = {
            "model.weights": folder / "abacus.h5",
            "input.prompts": folder / "some.jsonl",
            "output.results": folder / f"{name}.h5",
            "run.batch_tokens": 48,
            "run.max_sequences": 4,
            "sampling.top_logprobs": 2,
            "run.timeout_s": 60,
            "exchange.transport": "alltoallv",
            "exchange.buffers": "auto" if buffers == "device" else "host",
        } | settings
        options = [word for key, value in named.items() for word in ("--set", f"{key}={value}")]
        ranks = runner(num_ranks, module=module, MOEMPI_SIMT_BUFFERS=buffers)
        outcome = ranks.run("run", ROOT / "jobs/abacus.toml", *options)
        assert outcome.code == 0, outcome.err
        return folder / f"{name}.h5"

    return run


@pytest.fixture(scope="module")
def two_ranks(run):
    return run(2, "two ranks")


@pytest.fixture(scope="module")
def alone(run):
    return run(1, "alone", **{"run.precision": "float32"})


def test_tokens_are_the_same_as_on_the_cpu(run, two_ranks):
    on_numpy = run(1, "numpy", module="moempi.cli", **{"run.backend": "numpy"})
    difference = compare(on_numpy, two_ranks)
    assert difference.requests == 12
    assert difference.different == num_ties(on_numpy, two_ranks, within=0.05)
    assert difference.largest < 0.05


def num_ties(first, second, *, within):
    """Requests whose first different token is in both runs the likeliest but for `within` in log-probability."""
    ties = 0
    with ResultFile(first) as ours, ResultFile(second) as theirs:
        for one, other in zip(ours.requests(), theirs.requests(), strict=True):
            different = np.flatnonzero(one.tokens[: len(other.tokens)] != other.tokens[: len(one.tokens)])
            if len(different):
                row = different[0]
                runner_up = dict(zip(one.top_tokens[row].tolist(), one.top_logprobs[row].tolist(), strict=True))
                ties += runner_up.get(int(other.tokens[row]), -np.inf) > one.logprobs[row] - within
    return ties


@pytest.mark.parametrize(
    ("buffers", "settings"),
    [
        ("device", {}),
        ("device", {"exchange.transport": "pairwise"}),
        ("host", {"exchange.transport": "shared", "exchange.verify": "true"}),
        ("host", {"exchange.transport": "pairwise", "run.overlap": "false"}),
        ("host", {"exchange.transport": "cuda_ipc", "exchange.buffers": "auto"}),
        ("device", {"exchange.transport": "cuda_ipc", "run.overlap": "false"}),
    ],
)
def test_transport_and_buffers_change_no_bit(run, two_ranks, buffers, settings):
    name = "_".join([buffers, *map(str, settings.values())])
    difference = compare(two_ranks, run(2, name, buffers=buffers, **settings))
    assert (difference.different, difference.largest) == (0, 0.0)


@pytest.mark.parametrize(
    ("num_ranks", "settings", "within"),
    [
        (3, {"exchange.transport": "shared"}, 0.0),
        (4, {"parallel.stages": 2, "exchange.immediate": "true"}, 0.0),
        (4, {"parallel.stages": 2, "parallel.tensor": 2}, 1e-4),
        (3, {"parallel.head": "stage"}, 0.0),
        (4, {"parallel.head": "stage", "parallel.tensor": 2}, 1e-4),
        (4, {"exchange.hops": 2, "topology.ranks_per_node": 2}, 1e-4),
        (4, {"exchange.hops": 2, "topology.ranks_per_node": 2, "exchange.transport": "cuda_ipc"}, 1e-4),
        (2, {"balance.mode": "capacity", "balance.capacity": 100, "balance.sample": 0}, 0.0),
    ],
)
def test_float32_results_are_the_same_on_any_grid(run, alone, num_ranks, settings, within):
    name = "_".join([str(num_ranks), *map(str, settings.values())])
    difference = compare(alone, run(num_ranks, name, buffers="device", **{"run.precision": "float32"}, **settings))
    assert difference.different == 0
    assert difference.largest <= within


def test_reproducible_bits_do_not_depend_on_the_number_of_lanes(run):
    """Each lane computes on a stream of its own, at the same time as the others."""
    first, *others = [
        run(1, f"{lanes} lanes", **{"run.reproducible": "true", "run.micro_batches": lanes}) for lanes in (1, 2, 4)
    ]
    for other in others:
        difference = compare(first, other)
        assert (difference.different, difference.largest) == (0, 0.0)


CAPTURED = {"run.capture": "true"}


@pytest.mark.parametrize("buffers", ["host", "device"])
def test_capture_changes_no_bit_in_bfloat16(run, two_ranks, buffers):
    difference = compare(two_ranks, run(2, f"captured {buffers}", buffers=buffers, **CAPTURED))
    assert (difference.different, difference.largest) == (0, 0.0)


@pytest.mark.parametrize(
    ("num_ranks", "buffers", "settings"),
    [
        (2, "host", {"run.micro_batches": 1}),
        (2, "device", {"run.micro_batches": 2, "exchange.transport": "cuda_ipc"}),
        (1, "device", {"run.micro_batches": 4}),
        (4, "host", {"run.micro_batches": 4, "parallel.stages": 2, "exchange.immediate": "true"}),
        (2, "device", {"run.micro_batches": 3, "parallel.stages": 2, "exchange.immediate": "true"}),
    ],
)
def test_capture_changes_no_bit_on_any_grid_and_with_any_number_of_lanes(run, alone, num_ranks, buffers, settings):
    name = "_".join(["captured", str(num_ranks), *map(str, settings.values())])
    settings = {"run.precision": "float32"} | settings
    difference = compare(alone, run(num_ranks, name, buffers=buffers, **settings, **CAPTURED))
    assert (difference.different, difference.largest) == (0, 0.0)


def test_capture_changes_no_bit_that_is_recorded(run):
    """The states behind an attention are in memory that the graph of the next layer writes."""
    trace = {"trace.hidden": [0, 1, 3], "trace.hidden_sublayer": "attention", "trace.routing": "true"}
    without, captured = (run(1, name, **trace, **more) for name, more in (("traced", {}), ("captured", CAPTURED)))
    with h5py.File(without) as one, h5py.File(captured) as other:
        names = []
        one.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        recorded = [name for name in names if name.startswith(("hidden/", "routing/"))]
        assert len(recorded) > 5
        for name in recorded:
            np.testing.assert_array_equal(other[name][:], one[name][:], err_msg=name)


@pytest.mark.skipif(os.environ.get("MOEMPI_TEST_DEVICE") == "cuda", reason="the fault is one of the SIMT device")
def test_a_kernel_s_fault_ends_all_ranks_at_once(alone, tmp_path):
    named = {
        "model.weights": alone.with_name("abacus.h5"),
        "output.results": tmp_path / "none.h5",
        "run.timeout_s": 300,
    }
    options = [word for key, value in named.items() for word in ("--set", f"{key}={value}")]
    command = python("tests/simt/run.py", "run", ROOT / "jobs/abacus.toml", *options)
    outcome = mpirun(2, *command, PYTHONPATH="tests", MOEMPI_SIMT_FAULT="1:300")
    assert outcome.code not in (0, 75)
    assert "moempi: rank 1: " in outcome.err
    assert "illegal memory access" in outcome.err
    assert not (tmp_path / "none.h5").exists()


def test_a_missing_gpu_is_reported_in_one_line(alone, tmp_path):
    named = {
        "run.backend": "cupy",
        "model.weights": alone.with_name("abacus.h5"),
        "output.results": tmp_path / "none.h5",
    }
    options = [word for key, value in named.items() for word in ("--set", f"{key}={value}")]
    outcome = mpirun(2, *python("-m", "moempi", "run", ROOT / "jobs/abacus.toml", *options), CUDA_VISIBLE_DEVICES="")
    assert outcome.code == 78
    (line,) = outcome.lines
    assert 'run.backend = "cupy"' in line
    assert not (tmp_path / "none.h5").exists()


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize(("batch_tokens", "transport"), [(64, "auto"), (256, "auto"), (256, "cuda_ipc")])
def test_device_memory_equals_the_forecast(tmp_path, precision, batch_tokens, transport):
    """Weights and cache are exact to the byte; the peak is at most a tenth below, or with few rows 3 % above."""
    lines = [{"tokens": [7] * length, "max_tokens": 4, "ignore_eos": True} for length in (3, 60, 120) * 8]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, lines)))
    named = {
        "model.weights": tmp_path / "abacus.h5",
        "input.prompts": tmp_path / "long.jsonl",
        "output.results": tmp_path / "out.h5",
        "run.precision": precision,
        "run.batch_tokens": batch_tokens,
        "exchange.transport": transport,
    }
    convert(ROOT / "weights/abacus", tmp_path / "abacus.h5")
    options = [word for key, value in named.items() for word in ("--set", f"{key}={value}")]
    outcome = mpirun(1, *python("tests/simt/peak.py", "run", ROOT / "jobs/abacus.toml", *options), PYTHONPATH="tests")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out.splitlines()[-1])
    assert found["loaded"] == found["held"]
    assert 0.9 <= found["peak"] / found["forecast"] <= (1.03 if batch_tokens == 64 else 1)


DELTA_RULE = {"delta_rule": DeltaRule(16, 16, 16, 16, taps=4), "delta_layers": (0, 1, 3)}
STATE_SPACE = {
    "num_layers": 6, "state_space": StateSpace(16, 16, num_groups=4, state_dim=16, taps=4),
    "state_space_layers": (0, 2, 4), "without_attention": (1, 5), "without_feed_forward": (0, 2, 3, 4),
    "activation": "relu2",
}  # fmt: skip
EXPERTS = Experts(num=4, width=32, router=Router(top_k=2))
LATENT = {"experts": Experts(num=4, width=32, router=Router(top_k=2), latent_width=48)}
OF_QUERIES = Latent(key_value_rank=64, rope_dim=8, value_dim=16, query_rank=48)
STATES = {
    "delta_rule": DELTA_RULE,
    "state_space": STATE_SPACE,
    "latent_experts": STATE_SPACE | LATENT,
    "latent_attention": {"attention": AttentionShape(8, 8, 24, latent=OF_QUERIES)},
}


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("states", STATES.values(), ids=STATES)
def test_device_memory_of_states_equals_the_forecast(tmp_path, states, precision):
    """The rows with states, of wide latent experts or of latent attention take the most; the fullest rank counts."""
    sizes = {"vocab_size": 64, "width": 64, "num_layers": 4, "max_positions": 256, "experts": EXPERTS}
    model = Architecture(family="random", **{"attention": AttentionShape(4, 2, 16), **sizes, **states})
    initialize(model, tmp_path / "weights.h5", seed=1)
    lines = [
        {"tokens": [(7 * row + length) % 64 for row in range(length)], "max_tokens": 4, "ignore_eos": True}
        for length in (3, 60, 120) * 8
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    values = {
        "model.weights": "weights.h5", "input.prompts": "prompts.jsonl", "output.results": "out.h5",
        "run.precision": precision, "run.batch_tokens": 256, "run.max_sequences": 8, "run.lanes": 1,
        "run.micro_batches": 1,
    }  # fmt: skip
    (tmp_path / "job.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    program = python("tests/simt/peak.py", "run", tmp_path / "job.toml")
    outcome = mpirun(2, *program, PYTHONPATH="tests")
    assert outcome.code == 0, outcome.err
    ranks = [json.loads(line) for line in outcome.out.splitlines() if line.startswith('{"')]
    assert len(ranks) == 2
    assert all(found["loaded"] == found["held"] for found in ranks)
    assert 0.8 <= max(found["peak"] / found["forecast"] for found in ranks) <= 1


IPC = {"exchange.transport": "cuda_ipc"}
TWO_HOPS = {"exchange.hops": 2, "topology.ranks_per_node": 2}
MESSAGES = {"exchange.transport": "alltoallv", "exchange.buffers": "device"}


@pytest.mark.parametrize(
    ("num_ranks", "settings"),
    [
        (1, {}),
        (2, IPC),
        (2, MESSAGES),
        (2, IPC | {"parallel.tensor": 2}),
        (4, IPC),
        (4, IPC | TWO_HOPS),
        (4, MESSAGES | TWO_HOPS),
    ],
    ids=["one", "ipc", "messages", "tensor", "four", "hops", "hops, messages"],
)
def test_rows_take_no_more_device_memory_than_the_forecast(tmp_path, num_ranks, settings):
    """Steps are full of rows, and experts are wider than attention; the fullest rank has up to a quarter less."""
    router = Router(top_k=2)
    sizes = {"vocab_size": 64, "width": 512, "num_layers": 2, "max_positions": 256}
    model = Architecture(
        family="random", attention=AttentionShape(4, 2, 16), experts=Experts(num=4, width=128, router=router), **sizes
    )
    initialize(model, tmp_path / "weights.h5", seed=1)
    lengths = (3, 60, 120) * (4 * num_ranks)
    lines = [
        {"tokens": [(7 * one**2 + 3 * row**2 + one * row) % 64 for row in range(length)], "max_tokens": 4}
        for one, length in enumerate(lengths)
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    values = {
        "model.weights": "weights.h5", "input.prompts": "prompts.jsonl", "output.results": "out.h5",
        "sampling.ignore_eos": True, "run.batch_tokens": 512, "run.max_sequences": 12, "run.lanes": 1,
        "run.micro_batches": 1,
    } | settings  # fmt: skip
    (tmp_path / "job.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    program = python("tests/simt/peak.py", "run", tmp_path / "job.toml")
    outcome = mpirun(num_ranks, *program, PYTHONPATH="tests")
    assert outcome.code == 0, outcome.err
    ranks = [json.loads(line) for line in outcome.out.splitlines() if line.startswith('{"')]
    assert len(ranks) == num_ranks
    taken = max((found["peak"] - found["held"]) / (found["forecast"] - found["held"]) for found in ranks)
    assert 0.75 <= taken <= 1
