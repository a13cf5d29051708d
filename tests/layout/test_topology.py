"""The topology: order of ranks by switch and node, and levels of the links between them."""

import random

import pytest

from moempi.layout.topology import LEVELS, Topology, arrange


def test_ranks_are_ordered_and_levels_follow_from_their_names():
    dice = random.Random(3)
    for _ in range(300):
        num_ranks = dice.randrange(1, 10)
        switch_of = {f"n{node}": dice.choice(["s0", "s1", "s0.s2", ""]) for node in range(4)}
        nodes = [dice.choice([*switch_of]) for _ in range(num_ranks)]
        islands = [dice.choice(["x", "y", "y", "x", "x", ""][: dice.choice([2, 6])]) for _ in range(num_ranks)]
        switches = [switch_of[node] for node in nodes]
        order, topology = arrange(nodes, islands, switches)
        assert sorted(order) == list(range(num_ranks))
        divided_nodes = len({*zip(nodes, islands, strict=True)}) > len({*nodes})
        assert bool(topology.islands) == (all(islands) and divided_nodes)
        assert bool(topology.switches) == (all(switches) and len({*switches}) > 1)
        assert list(topology.nodes) == sorted(topology.nodes)
        if topology.switches:
            assert list(topology.switches) == sorted(topology.switches)
        for position, rank in enumerate(order):
            found = [LEVELS[level] for level in topology.levels(position)]
            assert found == [level_of(rank, other, nodes, islands, switches, topology) for other in order]
        ranks_of_a_node = [[rank for rank in order if nodes[rank] == node] for node in {*nodes}]
        assert all(ranks == sorted(ranks) for ranks in ranks_of_a_node)


def level_of(one, other, nodes, islands, switches, topology):
    """The slow twin, from the names."""
    if one == other:
        return "self"
    if nodes[one] == nodes[other]:
        return "island" if topology.islands and islands[one] == islands[other] else "node"
    return "switch" if topology.switches and switches[one] == switches[other] else "network"


def test_a_subset_keeps_its_islands_and_switches():
    whole = Topology((0, 0, 1, 1, 2), islands=(0, 1, 2, 2, 3), switches=(0, 0, 0, 0, 1))
    subset = whole.subset(range(2, 5))
    assert subset == Topology((0, 0, 1), islands=(2, 2, 3), switches=(0, 0, 1))
    for rank in range(3):
        assert subset.levels(rank).tolist() == whole.levels(rank + 2)[2:].tolist()


@pytest.mark.ranks(4)
def test_ranks_are_ordered_by_slurm_switches_before_nodes(comm, monkeypatch):
    from moempi.config.job import TopologySection
    from moempi.runtime.world import World

    node, switch = (("a", "s1"), ("b", "s2"), ("c", "s1"), ("a", "s1"))[comm.rank]
    monkeypatch.setenv("SLURMD_NODENAME", node)
    monkeypatch.setenv("SLURM_TOPOLOGY_ADDR", f"s0.{switch}.{node}")
    world = World(comm)
    topology, ranks = world.by_node(TopologySection(), domain="socket 0")
    assert topology == Topology((0, 0, 1, 2), switches=(0, 0, 0, 1))  # one socket a node: nothing to tell apart
    assert ranks.allgather(comm.rank) == [0, 3, 2, 1]
    assert world.by_node(TopologySection(), domain=f"socket {comm.rank // 2}")[0].islands == (0, 1, 2, 3)
    assert world.by_node(TopologySection(), domain="socket 0" if comm.rank else "")[0].islands == ()
    virtual, ranks = world.by_node(TopologySection(ranks_per_node=3), domain="socket 0")
    assert virtual == Topology((0, 0, 0, 1))
    assert ranks.rank == comm.rank
    monkeypatch.setenv("SLURM_TOPOLOGY_ADDR", node)  # Slurm's value without switches
    assert world.by_node(TopologySection())[0] == Topology((0, 0, 1, 2))


@pytest.mark.ranks(2)
def test_a_topology_file_is_used_or_refused_on_all_ranks(comm, tmp_path, capfd):
    from msgspec import json

    from moempi.config.job import TopologySection
    from moempi.config.topology_file import Level, TopologyFile
    from moempi.runtime.world import AgreedExit, World

    world = World(comm)
    levels = tuple(Level(name, 1.0, 1.0) for name in LEVELS)
    folder = comm.bcast(tmp_path)
    path, other = folder / "topology.json", folder / "other.json"
    if comm.rank == 0:
        path.write_bytes(json.encode(TopologyFile(2, levels, (0, 1), switches=(0, 1))))
        other.write_bytes(json.encode(TopologyFile(2, levels, (0, 1, 2))))
    comm.Barrier()
    topology, ranks = world.by_node(TopologySection(file=str(path)))
    assert (topology, ranks.rank) == (Topology((0, 1), switches=(0, 1)), comm.rank)
    refused = {
        "places 3 ranks, there are 2": TopologySection(file=str(other)),
        "both say where ranks stand": TopologySection(file=str(path), ranks_per_node=1),
        "nothing.json": TopologySection(file=str(folder / "nothing.json")),
    }
    for problem, section in refused.items():
        with pytest.raises(AgreedExit):
            world.by_node(section)
        assert (problem in capfd.readouterr().err) == (comm.rank == 0)
