"""The real program under mpirun: the same answers for any ranks, layout, lanes and overlap, and the right ones."""

import json
import random
from itertools import compress

import h5py
import numpy as np
import pytest
from numpy._core._multiarray_umath import __cpu_features__

from moempi.backend.cpu.kernels import WITH_TILES, instructions
from moempi.storage.compare import compare
from moempi.storage.convert import convert
from moempi.storage.results import ResultFile
from mpirun import ROOT

JOB = ROOT / "jobs/abacus.toml"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The shipped model as a weight file."""
    path = tmp_path_factory.mktemp("weights") / "abacus.h5"
    convert(ROOT / "weights/abacus", path)
    return path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Questions, a bad line, and prompts of tokens that span several cache pages and chunks."""
    dice = random.Random(3)
    lines = [json.loads(line) for line in (ROOT / "jobs/abacus.jsonl").read_text().splitlines()[:18]]
    for length in (1, 2, 63, 64, 65, 100, 119):
        tokens = [dice.randrange(3, 98) for _ in range(length)]
        limit = dice.choice([1, 3, 8])
        lines.append({"id": f"long-{length}", "tokens": tokens, "max_tokens": limit, "ignore_eos": True})
    lines.append({"id": "drawn", "prompt": "12+30=", "temperature": 1.5, "top_k": 40, "seed": 5, "top_logprobs": 3})
    lines.append({"id": "bad", "prompt": "12+30=", "max_tokens": -1})
    path = tmp_path_factory.mktemp("prompts") / "mixed.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def run_with_stderr(weights, prompts, tmp_path_factory, runner):
    """Run the mixed prompts on so many ranks with so many settings; the results file, and the program's own lines."""

    def run(num_ranks, task, *, module="moempi.cli", environment=None, **settings):
        results = tmp_path_factory.mktemp("results") / "out.h5"
        named = {
            "task": task,
            "model.weights": weights,
            "input.prompts": prompts,
            "output.results": results,
            "run.batch_tokens": 48,
            "run.max_sequences": 6,
            "run.timeout_s": 60,
            "score.top_n": 2 if task == "score" else 0,
        } | settings
        options = [word for key, value in named.items() for word in ("--set", f"{key}={value}")]
        outcome = runner(num_ranks, module=module, **(environment or {})).run("run", JOB, *options)
        assert outcome.code == 0, outcome.err
        return results, outcome.lines

    return run


@pytest.fixture(scope="module")
def run(run_with_stderr):
    """The same, but the results file alone."""
    return lambda *words, **settings: run_with_stderr(*words, **settings)[0]


@pytest.fixture(scope="module")
def alone(run):
    """The same on one rank with one lane, in float32."""
    settings = {"run.precision": "float32", "run.micro_batches": 1, "trace.routing": "true"}
    return {task: run(1, task, **settings) for task in ("generate", "score")}


def routed_alike(first, second):
    """Whether all tokens of a request chose the same experts in both files, for each request."""
    with h5py.File(first) as ours, h5py.File(second) as theirs:
        both = [np.sort(file["routing/experts"][:], axis=-1) for file in (ours, theirs)]
        same = (both[0] == both[1]).all(axis=(1, 2))
        return [bool(part.all()) for part in np.split(same, ours["routing/offsets"][1:-1])]


LAYOUTS = [
    (1, {"run.micro_batches": 4}),
    (2, {}),
    (3, {"run.batch_tokens": 20}),
    (5, {"run.overlap": "false"}),
    (8, {"parallel.stages": 2, "parallel.stage_ranks": "[3,5]", "run.micro_batches": "auto"}),
    (4, {"parallel.stages": 4, "run.micro_batches": 3}),
    (16, {"parallel.experts_per_rank": 1}),
]


@pytest.mark.mpi
@pytest.mark.parametrize(("num_ranks", "settings"), LAYOUTS)
def test_float32_is_bit_identical_in_any_layout(run, alone, num_ranks, settings):
    for task, expected in alone.items():
        found = compare(expected, run(num_ranks, task, **{"run.precision": "float32"}, **settings))
        assert (found.different, found.largest) == (0, 0.0)


@pytest.mark.mpi
def test_tensor_groups_re_associate_sums_within_bounds(run, alone):
    """Experts whose scores are equal within rounding may rank either way: requests with such a choice are left out."""
    settings = {"run.precision": "float32", "parallel.stages": 2, "parallel.tensor": 2, "trace.routing": "true"}
    for task, expected in alone.items():
        found = run(8, task, **settings)
        assert compare(expected, found).different == 0
        alike = routed_alike(expected, found)
        assert sum(alike) >= 0.7 * len(alike)
        with ResultFile(expected) as ours, ResultFile(found) as theirs:
            for one, other in compress(zip(ours.requests(), theirs.requests(), strict=True), alike):
                np.testing.assert_allclose(other.logprobs, one.logprobs, atol=1e-4)
                np.testing.assert_allclose(other.score, one.score, atol=1e-4)


@pytest.mark.mpi
def test_reproducible_bfloat16_is_bit_identical(run):
    settings = {"run.precision": "bfloat16", "run.reproducible": "true"}
    for task in ("generate", "score"):
        found = compare(run(1, task, **settings), run(5, task, **settings, **{"run.micro_batches": 3}))
        assert (found.different, found.largest) == (0, 0.0)


needs_tiles = pytest.mark.skipif(
    not {"AVX-512", "AVX2"} & set(instructions()), reason="tiles are defined for AVX-512 and AVX2"
)


@pytest.fixture(scope="module")
def exact_scores(run):
    """Scores on one rank in bfloat16 with exact products."""
    return run(1, "score", **{"run.precision": "bfloat16"})


@pytest.mark.mpi
@needs_tiles
def test_fast_products_are_bit_identical_in_any_layout_and_by_their_definition(run, alone, exact_scores):
    """Tiles of the processor, if it has them, and tiles that are computed as they are defined: both are used."""
    defined = {"module": "backend.cpu.defined_tiles", "run.precision": "bfloat16", "run.products": "fast"}
    kinds = [defined] + [defined | {"module": "moempi.cli"}] * (WITH_TILES in instructions())
    fast = {task: run(1, task, **defined) for task in alone}
    for task, first in fast.items():
        for kind in kinds:
            found = compare(first, run(3, task, **kind, **{"run.micro_batches": 3, "run.threads": 2}))
            assert (found.different, found.largest) == (0, 0.0)
        assert has_fast_products(first)
    assert compare(exact_scores, fast["score"]).largest > 0
    with h5py.File(fast["score"]) as file, h5py.File(alone["score"]) as slow:
        assert np.nanmedian(np.abs(file["score/logprobs"][:] - slow["score/logprobs"][:])) < 0.05


@pytest.mark.mpi
@needs_tiles
def test_products_are_exact_on_all_ranks_if_one_has_no_tiles(run_with_stderr, exact_scores):
    settings = {"module": "backend.cpu.tiles_but_on_rank_1", "run.precision": "bfloat16", "run.products": "fast"}
    results, lines = run_with_stderr(2, "score", **settings)
    found = compare(exact_scores, results)
    assert (found.different, found.largest) == (0, 0.0)
    assert not has_fast_products(results)
    assert not has_fast_products(exact_scores)
    assert sum("products" in line for line in lines) == 1, lines
    assert has_fast_products(run_with_stderr(1, "score", **settings)[0])  # rank 0 has tiles


def has_fast_products(results):
    with h5py.File(results) as file:
        return file.attrs["fast_products"] == 1


WIDER = [name for name in ("X86_V4", "AVX512_ICL", "AVX512_SPR") if __cpu_features__.get(name)]


@pytest.mark.mpi
@pytest.mark.skipif("AVX-512" not in instructions(), reason="this processor has one set of instructions")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_narrower_instructions_give_the_same_bits(run, precision):
    """As on a processor without AVX-512: the kernels are compiled for AVX2, and NumPy uses nothing wider."""
    narrow = {"module": "backend.cpu.narrow_instructions", "environment": {"NPY_DISABLE_CPU_FEATURES": " ".join(WIDER)}}
    for task in ("generate", "score"):
        settings = {"run.precision": precision, "run.micro_batches": 2}
        found = compare(run(1, task, **settings), run(1, task, **settings, **narrow))
        assert (found.different, found.largest) == (0, 0.0)


@pytest.mark.mpi
def test_answers_are_right_and_scores_agree_with_generation(run, alone):
    with ResultFile(alone["generate"]) as results:
        records = {record.id: record for record in results.requests()}
    questions = [record for record in records.values() if record.reference is not None]
    assert sum(record.text == record.reference for record in questions) >= 17
    assert records["bad"].finish == "error"
    assert "max_tokens" in records["bad"].error
    assert records["drawn"].top_tokens.shape == (len(records["drawn"].tokens), 3)
    with ResultFile(alone["score"]) as results:
        scored = {record.id: record for record in results.requests()}
    assert np.isnan(scored["long-119"].score[0])
    assert np.isfinite(scored["long-119"].score[1:]).all()
    assert scored["long-119"].score_top_tokens.shape == (119, 2)


@pytest.mark.mpi
def test_what_was_generated_scores_the_same(run, alone, tmp_path):
    with ResultFile(alone["generate"]) as results:
        records = [record for record in results.requests() if record.finish != "error"]
    whole = [{"id": one.id, "tokens": [*one.prompt.tolist(), *one.tokens.tolist()]} for one in records]
    prompts = tmp_path / "whole.jsonl"
    prompts.write_text("\n".join(map(json.dumps, whole)))
    with ResultFile(run(2, "score", **{"input.prompts": prompts, "run.precision": "float32"})) as results:
        for record, scored in zip(records, results.requests(), strict=True):
            np.testing.assert_array_equal(scored.score[len(record.prompt) :], record.logprobs)
