"""A run whose experts stand where a placement file says: the bits of one rank, wherever they stand."""

import json
import random

import pytest

from moempi.storage.compare import compare
from moempi.storage.convert import convert
from mpirun import ROOT

JOB = ROOT / "jobs/abacus.toml"
LAYERS, NUM_EXPERTS = (3, 4, 5), 16


@pytest.fixture(scope="module")
def run(tmp_path_factory, runner):
    """`run(ranks, name, key=value)` scores and generates a few prompts into `<name>.h5`; the outcome and the path."""
    folder = tmp_path_factory.mktemp("placed")
    convert(ROOT / "weights/abacus", folder / "abacus.h5")
    lines = (ROOT / "jobs/abacus.jsonl").read_text().splitlines()[:24]
    (folder / "prompts.jsonl").write_text("\n".join(lines))

    def run(num_ranks, name, *, placement=None, **settings):
        named = {
            "model.weights": folder / "abacus.h5",
            "input.prompts": folder / "prompts.jsonl",
            "output.results": folder / f"{name}.h5",
            "run.precision": "float32",
        }
        if placement is not None:
            (folder / f"{name}.json").write_text(json.dumps(placement))
            named["placement.file"] = folder / f"{name}.json"
        words = [word for key, value in (named | settings).items() for word in ("--set", f"{key}={value}")]
        return runner(num_ranks).run("run", JOB, *words), folder / f"{name}.h5"

    return run


@pytest.fixture(scope="module")
def alone(run):
    outcome, path = run(1, "alone")
    assert outcome.code == 0
    return path


def random_placement(seed, num_ranks, *, copies):
    """Another unequal placement for each layer, `num_ranks[layer]` ranks, with so many copies at most."""
    dice = random.Random(seed)
    layers = []
    for layer in LAYERS:
        hosted = [[] for _ in range(num_ranks[layer])]
        for expert in dice.sample(range(NUM_EXPERTS), NUM_EXPERTS):
            dice.choice(hosted).append(expert)
        for _ in range(copies):
            expert, experts = dice.randrange(NUM_EXPERTS), dice.choice(hosted)
            if expert not in experts:
                experts.append(expert)
        layers.append({"layer": layer, "hosted": hosted})
    return {"version": 1, "num_experts": NUM_EXPERTS, "layers": layers}


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("num_ranks", "stages", "copies", "settings", "within"),
    [
        (2, {3: 2, 4: 2, 5: 2}, 0, {}, 0.0),
        (8, {3: 8, 4: 8, 5: 8}, 8, {"topology.ranks_per_node": 3}, 0.0),
        (5, {3: 2, 4: 3, 5: 3}, 4, {"parallel.stage_layers": "[4,2]", "parallel.stage_ranks": "[2,3]"}, 0.0),
        (5, {3: 5, 4: 5, 5: 5}, 8, {"topology.ranks_per_node": 2, "exchange.hops": 2}, 1e-4),
    ],
)
def test_any_placement_gives_the_bits_of_one_rank(run, alone, num_ranks, stages, copies, settings, within):
    if "parallel.stage_ranks" in settings:
        settings = settings | {"parallel.stages": 2}
    placement = random_placement(num_ranks + copies, stages, copies=copies)
    outcome, path = run(num_ranks, f"placed-{num_ranks}-{copies}", placement=placement, **settings)
    assert outcome.code == 0, outcome.err
    found = compare(alone, path)
    assert (found.requests, found.different) == (24, 0)
    assert found.largest <= within


@pytest.mark.mpi
def test_copies_leave_reproducible_bfloat16_as_it_is(run):
    exact = {"run.precision": "bfloat16", "run.reproducible": "true"}
    paths = [run(1, "bits", **exact)[1]]
    paths.append(run(3, "copied", placement=random_placement(1, dict.fromkeys(LAYERS, 3), copies=9), **exact)[1])
    found = compare(*paths)
    assert (found.different, found.largest) == (0, 0.0)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("ranks", "change", "problem"),
    [
        (3, {}, "layer 3 is placed on 3 ranks, its stage has 2; place it for this layout"),
        (2, {"num_experts": 17}, "no rank hosts expert 16"),
        (2, {"layers": []}, "places 16 experts of 0 layers, the model has 16 in 3 MoE layers"),
    ],
)
def test_a_placement_that_does_not_fit_is_refused(run, ranks, change, problem):
    placement = random_placement(0, dict.fromkeys(LAYERS, ranks), copies=0) | change
    outcome, path = run(2, "refused", placement=placement)
    assert outcome.code == 78
    assert len(outcome.lines) == 1
    assert problem in outcome.lines[0]
    assert not path.exists()
