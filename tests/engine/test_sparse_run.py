"""A run of a model with sparse attention, beyond the positions that its indexers choose: the bits of one rank."""

import json

import pytest

from moempi.cli import main
from moempi.storage.compare import compare
from mpirun import ROOT

JOB = ROOT / "jobs/abacus.toml"
ARCHITECTURE = """
family = "random"
vocab_size = 60
width = 16
num_layers = 5
max_positions = 256
dense_layers = [0]
dense_width = 12

[attention]
num_heads = 4
num_kv_heads = 4
head_dim = 12

[attention.latent]
key_value_rank = 8
rope_dim = 4
value_dim = 6
query_rank = 10

[attention.latent.indexer]
num_heads = 12
head_dim = 8
top_k = 24
shared_layers = [1, 3, 4]

[experts]
num = 4
width = 8

[experts.router]
top_k = 2
scoring = "sigmoid"
correction = true
float32_logits = true
float32_weights = true
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, runner):
    """`run(ranks, name, *options, key=value)` generates from a few prompts into `<name>.h5`."""
    folder = tmp_path_factory.mktemp("sparse")
    (folder / "sparse.toml").write_text(ARCHITECTURE)
    assert main(["init", str(folder / "sparse.toml"), str(folder / "sparse.h5"), "--seed", "3"]) == 0
    lengths = (20, 3, 130, 24, 25, 70, 1, 90)
    prompts = [[(7 * index + 5 * row + row * row // 7) % 60 for row in range(n)] for index, n in enumerate(lengths)]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"tokens": tokens}) for tokens in prompts))

    def run(num_ranks, name, *options, module="moempi.cli", **settings):
        named = {
            "model.weights": folder / "sparse.h5",
            "input.prompts": folder / "prompts.jsonl",
            "output.results": folder / f"{name}.h5",
            "run.precision": "float32",
            "sampling.max_tokens": 9,
        }
        words = [word for key, value in (named | settings).items() for word in ("--set", f"{key}={value}")]
        return runner(num_ranks, module=module).run("run", JOB, *words, *options), folder / f"{name}.h5"

    return run


@pytest.fixture(scope="module")
def alone(run):
    outcome, path = run(1, "alone")
    assert outcome.code == 0, outcome.err
    return path


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("num_ranks", "settings", "within"),
    [
        (1, {"run.batch_tokens": 7, "run.max_sequences": 2, "run.micro_batches": 1}, 0.0),
        (3, {"run.batch_tokens": 16}, 0.0),
        (2, {"parallel.stages": 2}, 0.0),
        (4, {"parallel.stages": 2, "exchange.immediate": "true", "run.micro_batches": 4}, 0.0),
        (4, {"parallel.tensor": 2}, 1e-4),
    ],
)
def test_any_layout_gives_the_bits_of_one_rank(run, alone, num_ranks, settings, within):
    name = "-".join([str(num_ranks), *(key.partition(".")[2] for key in settings)])
    outcome, path = run(num_ranks, name, **settings)
    assert outcome.code == 0, outcome.err
    found = compare(alone, path)
    assert (found.requests, found.different) == (8, 0)
    assert found.largest <= within


@pytest.mark.mpi
def test_the_cuda_kernels_give_the_tokens_of_the_cpu_and_the_same_bits_on_any_grid(run, alone):
    paths = []
    for num_ranks, settings in ((1, {"run.batch_tokens": 32}), (2, {"parallel.stages": 2})):
        settings = settings | {"exchange.buffers": "host", "exchange.transport": "alltoallv"}
        outcome, path = run(num_ranks, f"cuda-{num_ranks}", module="simt.run", **settings)
        assert outcome.code == 0, outcome.err
        paths.append(path)
    found = compare(alone, paths[0])
    assert (found.requests, found.different) == (8, 0)
    assert found.largest <= 1e-4
    found = compare(*paths)
    assert (found.different, found.largest) == (0, 0.0)


@pytest.mark.mpi
def test_a_stopped_run_goes_on_with_other_ranks(run, alone):
    assert run(2, "stopped", "--max-minutes", "0.0001", **{"run.batch_tokens": 16})[0].code == 75
    outcome, path = run(3, "stopped", **{"run.batch_tokens": 16})
    assert outcome.code == 0, outcome.err
    found = compare(alone, path)
    assert (found.requests, found.different, found.largest) == (8, 0, 0.0)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("num_ranks", "settings", "problem"),
    [
        (3, {"parallel.stages": 3}, "the model forms at most 2 stages, because 3 of its 5 layers share the positions"),
        (
            2,
            {"parallel.stages": 2, "parallel.stage_layers": "[3, 2]"},
            "a stage begins with layer 3, which shares the positions of the indexer of layer 2",
        ),
    ],
)
def test_stages_that_divide_layers_with_shared_positions_are_refused(run, num_ranks, settings, problem):
    outcome, path = run(num_ranks, "refused", **settings)
    assert outcome.code == 78
    assert len(outcome.lines) == 1
    assert problem in outcome.lines[0]
    assert not path.exists()
