"""placement.json and topology.json: reading, and refusals in one line."""

import json

import pytest

from moempi.config import reading
from moempi.config.placement_file import read_placement
from moempi.config.topology_file import LEVEL_NAMES, read_topology
from moempi.errors import ConfigError, NoInputError

PLACEMENT = {"version": 1, "num_experts": 3, "layers": [{"layer": 2, "hosted": [[0, 2], [], [1, 0]]}]}
LEVELS = [{"name": name, "latency_us": 1.5, "bandwidth_gb_s": 2} for name in LEVEL_NAMES]
TOPOLOGY = {"version": 2, "levels": LEVELS, "nodes": [0, 0, 1]}


@pytest.fixture
def written(tmp_path):
    def write(content):
        path = tmp_path / "file.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def layers(*hosted):
    return {"layers": [{"layer": 2, "hosted": list(hosted)}]}


def test_files_are_read(written):
    assert read_placement(written(PLACEMENT)).layers[0].hosted == ((0, 2), (), (1, 0))
    topology = read_topology(written(TOPOLOGY))
    assert (topology.levels[-1].name, topology.levels[2].latency_us, topology.nodes) == ("network", 1.5, (0, 0, 1))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"version": 2}, "version"),
        ({"num_expert": 3}, "unknown key num_expert; did you mean num_experts?"),
        ({"num_experts": 0}, "num_experts"),
        (layers([0, 1]), "layer 2: no rank hosts expert 2"),
        (layers([0, 1, 2, 1]), "layer 2: rank 0 lists an expert twice"),
        (layers([0, 1, 2], [3]), "layer 2: rank 1 lists expert 3 of 3"),
        (layers([0, 1, 2], [-1]), "hosted"),
        (layers([0, 1, 2.5]), "hosted"),
        ({"layers": PLACEMENT["layers"] * 2}, "layers do not ascend"),
    ],
)
def test_an_impossible_placement_is_refused(written, change, problem):
    path = written(PLACEMENT | change)
    with pytest.raises(ConfigError, match="file.json.*" + problem) as error:
        read_placement(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"levels": LEVELS[:2]}, "levels are not self, island, node, switch, network"),
        ({"levels": LEVELS[::-1]}, "levels are not self, island, node, switch, network"),
        ({"levels": [LEVELS[0] | {"bandwidth_gb_s": 0}, *LEVELS[1:]]}, "bandwidth_gb_s"),
        ({"levels": [LEVELS[0] | {"latency_us": -1}, *LEVELS[1:]]}, "latency_us"),
        ({"nodes": []}, "nodes do not count up from 0"),
        ({"nodes": [0, 2]}, "nodes do not count up from 0"),
        ({"nodes": [1, 1]}, "nodes do not count up from 0"),
        ({"version": 1}, "version"),
        ({"islands": [0, 1]}, "2 islands for 3 ranks"),
        ({"switches": [0]}, "1 switches for 3 ranks"),
        ({"islands": [0, 1, 1]}, "an island lies in several nodes"),
        ({"switches": [0, 1, 1]}, "a node hangs on several switches"),
    ],
)
def test_an_impossible_topology_is_refused(written, change, problem):
    with pytest.raises(ConfigError, match=problem):
        read_topology(written(TOPOLOGY | change))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"version": NaN}', '{"version": 1e999}', "[" * 100_000, "\udcff"])
def test_a_file_that_is_not_a_json_object_is_refused(tmp_path, text):
    path = tmp_path / "file.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=r"file\.json"):
        read_placement(path)


def test_missing_and_endless_files_are_refused(tmp_path, monkeypatch, written):
    with pytest.raises(NoInputError):
        read_placement(tmp_path / "none.json")
    monkeypatch.setattr(reading, "MAX_JSON_BYTES", 10)
    with pytest.raises(ConfigError, match="longer than"):
        read_placement(written(PLACEMENT))
