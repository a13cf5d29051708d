"""Experts that compute in a latent width: the same bits on any ranks, and rows of that width between them."""

import json

import h5py
import pytest

from engine.runs import LATENT_EXPERTS, SPACES
from moempi.layout.topology import LEVELS
from moempi.storage.compare import compare
from moempi.storage.initialize import initialize

LENGTHS = (70, 5, 33, 1, 17)


@pytest.fixture(scope="module")
def scored(tmp_path_factory, runner):
    """`scored(architecture, ranks, key=value)` scores some prompts; how it ended, and the results' path."""
    folder = tmp_path_factory.mktemp("latent")
    prompts = [{"tokens": [2 + (5 * index + row) % 38 for row in range(count)]} for index, count in enumerate(LENGTHS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))

    def scored(architecture, ranks, **settings):
        width = architecture.experts.latent_width
        name = "-".join(map(str, (width, ranks, *settings.values())))
        if not (folder / f"{width}.h5").exists():
            initialize(architecture, folder / f"{width}.h5", seed=3)
        named = {"task": "score", "input.prompts": folder / "prompts.jsonl", "run.precision": "float32"}
        named |= {"model.weights": folder / f"{width}.h5", "output.results": folder / f"{name}.results"} | settings
        values = {key: value if isinstance(value, int) else str(value) for key, value in named.items()}
        (folder / f"{name}.toml").write_text("".join(f"{key} = {json.dumps(values[key])}\n" for key in values))
        return runner(ranks).run("run", folder / f"{name}.toml"), named["output.results"]

    return scored


@pytest.fixture(scope="module")
def alone(scored):
    outcome, path = scored(LATENT_EXPERTS, 1)
    assert outcome.code == 0, outcome.err
    return path


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("ranks", "settings", "within"),
    [
        (2, {"exchange.transport": "pairwise"}, 0.0),
        (3, {"exchange.transport": "shared", "run.batch_tokens": 64}, 0.0),
        (4, {"exchange.transport": "alltoallv", "parallel.stages": 2, "exchange.verify": True}, 0.0),
        (4, {"exchange.hops": 2, "topology.ranks_per_node": 2}, 1e-4),
        (4, {"parallel.tensor": 2}, 1e-4),
    ],
)
def test_ranks_stages_and_transports_change_no_bit(scored, alone, ranks, settings, within):
    outcome, path = scored(LATENT_EXPERTS, ranks, **settings)
    assert outcome.code == 0, outcome.err
    found = compare(alone, path)
    assert (found.requests, found.different) == (len(LENGTHS), 0)
    assert found.largest <= within


@pytest.mark.mpi
def test_rows_of_the_latent_width_are_sent(scored):
    """Over all levels: each choice there and back, whatever its expert; a prompt's last token is not computed."""
    num_bytes = []
    for architecture in (SPACES, LATENT_EXPERTS):
        outcome, path = scored(architecture, 2)
        assert outcome.code == 0, outcome.err
        with h5py.File(path) as file:
            num_bytes.append(sum(int(file[f"network/{level}_bytes"][:].sum()) for level in LEVELS))
            assert set(file["placement/row_bytes"][:].tolist()) == {4 * architecture.routed_width}
    rows, layers, top_k = sum(max(1, length - 1) for length in LENGTHS), 2, 2
    assert num_bytes == [2 * rows * layers * top_k * 4 * width for width in (SPACES.width, 6)]


@pytest.mark.mpi
def test_immediate_routing_is_refused(scored):
    outcome, path = scored(LATENT_EXPERTS, 2, **{"parallel.stages": 2, "exchange.immediate": True})
    assert outcome.code == 78
    (line,) = outcome.lines
    assert "exchange.immediate = true: outputs of the model's latent experts return home; use false" in line
    assert not path.exists()
