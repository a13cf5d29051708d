"""Models with a state per sequence: log-probabilities have the same bits for any steps, slots and lanes."""

import json

import numpy as np
import pytest

from engine.runs import SPACES, STATEFUL, Run, requests_of
from moempi.backend.cpu.compiled import CompiledBackend
from moempi.backend.cpu.kernels import load_kernels
from moempi.storage.compare import compare
from moempi.storage.initialize import initialize

LENGTHS = (70, 3, 130, 1, 64, 9, 65)


def compiled_backend(progress):
    kernels = load_kernels()
    if kernels is None:
        pytest.skip("no C compiler")
    return CompiledBackend(kernels, precision="bfloat16", threads=2, progress=progress)


@pytest.fixture(scope="module", params=[STATEFUL, SPACES], ids=["delta_rule", "state_space"])
def architecture(request):
    return request.param


def computed(folder, architecture, lengths=LENGTHS, **options):
    """The tokens and the bits of their log-probabilities, of each request."""
    folder.mkdir(exist_ok=True)
    run = Run(folder, requests_of(*lengths, limit=4), architecture=architecture, **options)
    run.lanes.run()
    return [
        (request.tokens, np.concatenate([sampled.logprobs for sampled in request.sampled]).tobytes())
        for request in run.requests
    ]


@pytest.mark.parametrize("batch_tokens", [7, 64, 512])
@pytest.mark.parametrize("sequences", [1, 2, 7])
@pytest.mark.parametrize("lanes", [1, 3])
def test_steps_slots_and_lanes_change_no_bit(tmp_path, architecture, batch_tokens, sequences, lanes):
    expected = computed(
        tmp_path / "whole", architecture, run={"batch_tokens": 512, "max_sequences": 7, "micro_batches": 1}
    )
    run = {"batch_tokens": batch_tokens, "max_sequences": sequences, "micro_batches": lanes}
    assert computed(tmp_path / "divided", architecture, run=run) == expected


@pytest.mark.parametrize("batch_tokens", [7, 64])
def test_compiled_kernels_and_bfloat16_change_no_bit_either(tmp_path, architecture, batch_tokens):
    options = {"precision": "bfloat16", "max_sequences": 2}
    expected, found = (
        computed(
            tmp_path / str(rows),
            architecture,
            make_backend=compiled_backend,
            run=options | {"batch_tokens": rows, "micro_batches": 1},
        )
        for rows in (512, batch_tokens)
    )
    assert found == expected


def test_a_request_is_the_same_after_any_other_in_its_slot(tmp_path, architecture):
    alone = computed(tmp_path / "alone", architecture, lengths=(70,))
    lengths = (70, 33, 70)
    queued = computed(tmp_path / "queued", architecture, lengths, run={"max_sequences": 1, "micro_batches": 1})
    assert queued[0] == alone[0]
    assert computed(tmp_path / "again", architecture, lengths, run={"max_sequences": 3}) == queued


@pytest.fixture(scope="module")
def scored(tmp_path_factory, architecture, runner):
    """`scored(ranks, name, *options, key=value)` scores prompts of up to 600 tokens into `<name>.h5`; how it ended."""
    folder = tmp_path_factory.mktemp("scored")
    initialize(architecture, folder / "weights.h5", seed=3)
    lengths = (600, 5, 130, 64, 65, 1, 300, 7)
    prompts = [{"tokens": [2 + (5 * index + row) % 38 for row in range(count)]} for index, count in enumerate(lengths)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))

    def scored(ranks, name, *options, **settings):
        named = {"task": "score", "input.prompts": folder / "prompts.jsonl", "run.precision": "float32"}
        named |= {"model.weights": folder / "weights.h5", "output.results": folder / f"{name}.h5"} | settings
        lines = (
            f"{key} = {json.dumps(value if isinstance(value, int) else str(value))}\n" for key, value in named.items()
        )
        (folder / f"{name}.toml").write_text("".join(lines))
        outcome = runner(ranks).run("run", folder / f"{name}.toml", *options)
        return outcome, folder / f"{name}.h5"

    return scored


def assert_same_bits(one, other):
    found = compare(one, other)
    assert (found.requests, found.different, found.largest) == (8, 0, 0.0)


@pytest.fixture(scope="module")
def whole(scored):
    outcome, path = scored(1, "whole", **{"run.batch_tokens": 1024})
    assert outcome.code == 0, outcome.err
    return path


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        *((ranks, {"run.batch_tokens": rows}) for ranks in (1, 2, 3, 4) for rows in (7, 64, 512)),
        (4, {"run.batch_tokens": 7, "run.max_sequences": 1}),
        (2, {"run.batch_tokens": 64, "parallel.stages": 2}),
        (4, {"run.batch_tokens": 512, "parallel.stages": 2, "run.max_sequences": 3}),
        (3, {"run.batch_tokens": 7, "parallel.stages": 3}),
    ],
)
def test_ranks_stages_and_steps_change_no_bit(scored, whole, ranks, settings):
    outcome, path = scored(ranks, f"of-{ranks}-{settings['run.batch_tokens']}-{len(settings)}", **settings)
    assert outcome.code == 0, outcome.err
    assert_same_bits(path, whole)


@pytest.mark.mpi
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(scored, whole):
    settings = {"run.batch_tokens": 7, "run.max_sequences": 2}
    outcome, path = scored(2, "stopped", "--max-minutes", "0.001", **settings)
    assert outcome.code == 75
    outcome, _ = scored(3, "stopped", **settings)
    assert outcome.code == 0, outcome.err
    assert_same_bits(path, whole)


@pytest.mark.mpi
def test_a_tensor_group_divides_the_heads_of_the_state(scored, whole):
    outcome, path = scored(2, "divided", **{"parallel.tensor": 2, "run.batch_tokens": 64})
    assert outcome.code == 0, outcome.err
    found = compare(path, whole)
    assert (found.requests, found.different) == (8, 0)
    assert found.largest < 1e-5
