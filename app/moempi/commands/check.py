"""`moempi check`: the ranks and the speed of their exchange, with --measure the cost of their links."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

import msgspec

from moempi.commands.flags import MAX_RANKS, add_force_flag, whole_number
from moempi.runtime.monitor import Monitor
from moempi.runtime.shm_segments import choose_segment_folder


def add_flags(parser: ArgumentParser) -> None:
    """Whether to measure links, and the file to write."""
    parser.add_argument("--measure", action="store_true", help="latency and bandwidth of each level of links")
    parser.add_argument("--output", "-o", type=Path, metavar="topology.json", help="write them, for moempi place")
    add_force_flag(parser)
    nodes = "virtual nodes of N ranks"
    parser.add_argument("--ranks-per-node", type=whole_number(0, MAX_RANKS), default=0, metavar="N", help=nodes)


def run(chosen: Namespace) -> int:
    """Measure and print; collective."""
    choose_segment_folder()
    monitor = Monitor()
    monitor.fork()
    from moempi.backend.select import find_island
    from moempi.comm.link_probe import measure
    from moempi.comm.transport_probe import probe
    from moempi.commands.check_tables import print_links, print_probe
    from moempi.config.job import TopologySection
    from moempi.runtime.world import World
    from moempi.storage.files import atomic, check_output

    world = World.start(monitor, debug=chosen.debug)
    with world.guard():
        if chosen.output:
            force = chosen.force
            world.collectively(lambda: check_output(chosen.output, inputs=[], force=force) if not world.rank else None)
        result, hidden_ranks = probe(world), not world.split_matches_nodes()
        if world.rank == 0:
            print_probe(result, world, hidden_ranks=hidden_ranks)
        if chosen.measure or chosen.output:
            section = TopologySection(ranks_per_node=chosen.ranks_per_node)
            file, trials = measure(*world.by_node(section, domain=find_island(world.local_rank, on_gpu=True)))
            if world.rank == 0:
                print_links(file, trials)
                if chosen.output:
                    with atomic(chosen.output) as temporary:
                        temporary.write_bytes(msgspec.json.encode(file))
    return 0
