"""`moempi place`: it predicts what a run counts, before and after experts move."""

import h5py
import msgspec
import numpy as np
import pytest

from moempi.commands.place import PlacementRequest, place_experts
from moempi.config.placement_file import read_placement
from moempi.errors import DataError, UsageError
from moempi.storage.convert import convert
from moempi.storage.journal import journal_paths
from moempi.storage.merge import merge
from mpirun import ROOT, execute, python
from storage.test_records import make_rank, make_request
from storage.test_results import PROVENANCE, write_journals
from storage.test_traces import make_routing

JOB = ROOT / "jobs/abacus.toml"


@pytest.fixture(scope="module")
def run(tmp_path_factory, runner):
    """`run(ranks, name, key=value)` runs 30 prompts into `<name>.h5` and records the routing."""
    folder = tmp_path_factory.mktemp("place")
    convert(ROOT / "weights/abacus", folder / "abacus.h5")
    (folder / "prompts.jsonl").write_text("\n".join((ROOT / "jobs/abacus.jsonl").read_text().splitlines()[:30]))

    def run(num_ranks, name, **settings):
        named = {
            "model.weights": folder / "abacus.h5",
            "input.prompts": folder / "prompts.jsonl",
            "output.results": folder / f"{name}.h5",
            "run.precision": "float32",
            "run.max_sequences": 3,
            "trace.routing": "true",
        }
        words = [word for key, value in (named | settings).items() for word in ("--set", f"{key}={value}")]
        outcome = runner(num_ranks).run("run", JOB, *words)
        assert outcome.code == 0, outcome.err
        return folder / f"{name}.h5"

    return run


def by_name(results, request, *, policy="topology", out=None):
    return {row.name: row for row in place_experts(results, request, policy=policy, out=out)}


LAYOUTS = [
    (4, {"topology.ranks_per_node": 2}),
    (5, {"topology.ranks_per_node": 2, "exchange.hops": 2}),
    (4, {"topology.ranks_per_node": 2, "parallel.tensor": 2}),
    (5, {"parallel.stages": 2, "parallel.stage_layers": "[4,2]", "parallel.stage_ranks": "[2,3]"}),
]


@pytest.mark.mpi
@pytest.mark.parametrize(("num_ranks", "settings"), LAYOUTS)
def test_predicted_bytes_and_messages_are_those_counted(run, tmp_path, num_ranks, settings):
    results = run(num_ranks, "first", **settings)
    found = by_name(results, PlacementRequest(replicas=0.25), out=tmp_path / "placement.json")
    for what in ("sent_bytes", "messages"):
        assert getattr(found["measured"], what) == getattr(found["as run"], what)
        assert sum(getattr(found["measured"], what)) > 0
    # The same after the experts have moved and busy ones have replicas.
    results = run(num_ranks, "moved", **settings, **{"placement.file": tmp_path / "placement.json"})
    again = by_name(results, PlacementRequest())
    for what in ("sent_bytes", "messages"):
        assert getattr(again["measured"], what) == getattr(again["as run"], what)
    assert again["measured"].sent_bytes != found["measured"].sent_bytes


@pytest.mark.mpi
def test_other_ranks_can_be_placed_for(run, tmp_path):
    results = run(3, "three", **{"exchange.hops": 2})
    found = by_name(
        results, PlacementRequest(ranks=8, ranks_per_node=4, replicas=0.5), policy="balanced", out=tmp_path / "p.json"
    )
    assert list(found) == ["linear", "balanced", "topology"]
    placed = read_placement(tmp_path / "p.json")
    assert [layer.layer for layer in placed.layers] == [3, 4, 5]
    assert all(len(layer.hosted) == 8 and max(map(len, layer.hosted)) == 3 for layer in placed.layers)
    shown = execute(*python("-m", "moempi", "place", results, "--ranks", "16", "--policy", "linear"))
    assert shown.code == 0
    assert "topology" in shown.out
    # With as many ranks as experts none hosts two.
    by_name(results, PlacementRequest(ranks=16, ranks_per_node=4), out=tmp_path / "p.json")
    assert all(len(experts) == 1 for layer in read_placement(tmp_path / "p.json").layers for experts in layer.hosted)


@pytest.mark.mpi
def test_damaged_routing_is_refused(run, tmp_path):
    whole = run(2, "whole")

    def assert_refused(change, problem):
        path = tmp_path / "damaged.h5"
        path.write_bytes(whole.read_bytes())
        with h5py.File(path, "r+") as file:
            change(file)
        with pytest.raises(DataError, match=problem):
            place_experts(path, PlacementRequest(), policy="linear", out=None)

    def set_value(name, index, value):
        def change(file):
            file[name][index] = value

        return change

    def replaced(name, change_values):
        def change(file):
            values = change_values(file[name][:])
            del file[name]
            file[name] = values

        return change

    assert_refused(set_value("routing/experts", (0, 0, 0), 16), "beyond the 16 experts")
    assert_refused(set_value("routing/rank", (0, 0), 7), "outside its stage")
    assert_refused(set_value("routing/row", (0, 0), -2), "negative")
    assert_refused(set_value("placement/seat", 1, 0), "several attempts")
    assert_refused(set_value("placement/hosted/layer", slice(None), 9), "who hosted layer 3")
    assert_refused(set_value("placement/hosted/row", slice(None), 9), "hosted/row: is not from 0 to 1")
    assert_refused(set_value("placement/hosted/row", 0, -1), "hosted/row: is not from 0 to 1")
    assert_refused(set_value("placement/hosted/expert", 0, -1), "hosted/expert: is not from 0 to 15")
    assert_refused(set_value("placement/hosted/expert", 0, 16), "hosted/expert: is not from 0 to 15")
    assert_refused(set_value("placement/hosted/expert", 1, 0), "lists an expert twice")
    assert_refused(set_value("placement/node", slice(None), [1, 0]), "placement/node: does not ascend")
    assert_refused(set_value("placement/seat", 1, 7), "do not count up")
    assert_refused(set_value("placement/hops", 0, 3), "3 hops")
    assert_refused(set_value("placement/hops", slice(None), -1), "-1 hops")
    assert_refused(set_value("placement/row_bytes", 0, 2**62), "bytes are impossible")
    assert_refused(set_value("placement/row_bytes", slice(None), 0), "bytes are impossible")
    assert_refused(set_value("timing/compute", 0, np.nan), "timing/compute: adds up to nan")
    assert_refused(set_value("timing/compute", 0, np.inf), "timing/compute: adds up to inf")
    assert_refused(set_value("routing/layer", 0, 5), "routing/layer: does not ascend")
    assert_refused(set_value("routing/layer", slice(None), -1), "routing/layer: does not ascend")
    assert_refused(set_value("routing/layer", -1, 99), "experts/load: has . layers")
    assert_refused(set_value("routing/offsets", -1, 3), "do not fit")
    for name in ("network/node_bytes", "network/self_messages", "placement/hops"):
        assert_refused(lambda file, name=name: file.move(name, f"{name}_moved"), "missing|ranks were")
    for name in ("placement/node", "placement/hosted/row", "placement/hosted/expert"):
        assert_refused(replaced(name, lambda values: values[:1]), "different lengths")
        assert_refused(replaced(name, lambda values: values[:0]), "different lengths")
    assert_refused(replaced("experts/load", lambda values: np.zeros((0, 2**40), np.int64)), "has 0 layers")


def test_routing_without_home_ranks_is_refused(tmp_path):
    path, trace = tmp_path / "plain.h5", make_routing(0, [(0, 0)], layers=(0, 1))
    write_journals(path, [msgspec.structs.replace(trace, home=False), make_rank(0), make_request(0, computed=1)])
    merge(path, journal_paths(path), num_requests=1, provenance=PROVENANCE)
    with pytest.raises(DataError, match=r"trace\.home=true"):
        place_experts(path, PlacementRequest(), policy="linear", out=None)


def test_results_without_routing_are_refused(tmp_path):
    path = tmp_path / "plain.h5"
    write_journals(path, [])
    merge(path, journal_paths(path), num_requests=0, provenance=PROVENANCE)
    with pytest.raises(DataError, match=r"trace\.routing=experts"):
        place_experts(path, PlacementRequest(), policy="linear", out=None)
    outcome = execute(*python("-m", "moempi", "place", path, "--replicas", "-1"))
    assert (outcome.code, len(outcome.lines)) == (UsageError.exit_code, 1)
