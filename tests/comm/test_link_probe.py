"""Measured links: the predicted time of an exchange, and the topology file."""

import numpy as np
import pytest

from moempi.comm.link_probe import LinkTrial, median_error, predict_s
from moempi.config.topology_file import Level, TopologyFile, read_topology
from mpirun import python

LEVELS = (
    Level("self", 1.0, 10.0),
    Level("island", 1.5, 8.0),
    Level("node", 2.0, 4.0),
    Level("switch", 3.0, 2.0),
    Level("network", 5.0, 1.0),
)


def test_an_exchange_takes_as_long_as_its_slowest_rank():
    topology = TopologyFile(2, LEVELS, nodes=(0, 0, 1))
    sizes = np.array([[100, 0, 1000], [0, 0, 0], [0, 0, 10_000]])
    seconds = [1e-6 + 100 / 10e9 + 5e-6 + 1000 / 1e9, 0.0, 1e-6 + 10_000 / 10e9]
    assert predict_s(topology, sizes) == pytest.approx(max(seconds))
    assert predict_s(topology, sizes * 0) == 0.0


def test_the_median_error_is_the_median_over_trials():
    trials = [LinkTrial(0, predicted_s, 1.0) for predicted_s in (1.1, 0.5, 3.0)]
    assert median_error(trials) == pytest.approx(0.5)


@pytest.mark.mpi
def test_check_measures_and_writes_virtual_nodes(mpirun, tmp_path):
    path = tmp_path / "topology.json"
    outcome = mpirun(4, *python("-m", "moempi", "check", "--ranks-per-node", "2", "-o", path))
    assert outcome.code == 0, outcome.err
    assert "20 random exchanges foretold within" in outcome.out
    topology = read_topology(path)
    assert topology.nodes == (0, 0, 1, 1)
    assert all(level.bandwidth_gb_s > 0 for level in topology.levels)
