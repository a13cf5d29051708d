"""What `moempi check` prints. A module of its own, because `check` forks its monitor before it imports MPI."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from moempi.backend.select import describe_gpus, find_gpus
from moempi.comm.device_memory import trial
from moempi.comm.link_probe import LinkTrial, median_error
from moempi.comm.transport_probe import ROWS, WIDTH, ProbeResult, RankLocation, Timing
from moempi.comm.transports.cuda_ipc import CudaIpc
from moempi.config.topology_file import TopologyFile
from moempi.layout.topology import Topology
from moempi.observe.console import console, figures_table
from moempi.runtime.world import World


def print_probe(result: ProbeResult, world: World, *, hidden_ranks: bool) -> None:
    """Print the ranks, the GPUs of this rank's node, and the times of exchanges on stdout.

    `hidden_ranks` is whether MPI finds other shared-memory groups than the host names.
    """
    lines = [
        result.library,
        f"{world.size} ranks on {world.num_nodes} nodes, "
        f"thread level {result.thread_level} of {result.max_thread_level}",
        *_gpu_lines(),
    ]
    if hidden_ranks:
        lines.append("MPI finds other shared-memory groups than the host names: the launcher hides ranks of a node")
    lines.extend(_division_lines(result.topology))
    tables = (
        _rank_table(result.topology, result.locations),
        _exchange_table(result.timings, world.size),
        _transport_table(result.transports),
    )
    console().print(*lines, *tables, sep="\n")


def print_links(file: TopologyFile, trials: Sequence[LinkTrial]) -> None:
    """Print the figures of each level of links, and their median error in the trials, on stdout."""
    table = figures_table("link", "latency us", "GB/s of a rank that sends", title="Links, all ranks at work")
    for level in file.levels:
        table.add_row(level.name, f"{level.latency_us:.1f}", f"{level.bandwidth_gb_s:.2f}")
    table.caption = f"{len(trials)} random exchanges foretold within {median_error(trials):.0%} (median)"
    console().print(table)


def _gpu_lines() -> list[str]:
    """The GPUs of this node, whether MPI sends from their memory, and the keys that a job file should have for them."""
    lines = describe_gpus()
    if find_gpus()[0]:
        takes = trial()
        lines.append(f"MPI {'moves' if takes else 'does not move'} rows between buffers in GPU memory")
        lines.append(f'job file: run.backend = "cupy", exchange.buffers = "{"device" if takes else "host"}"')
    return lines


def _division_lines(topology: Topology) -> list[str]:
    """The number of domains and of switches, where they are known and divide the ranks."""
    divisions = {"islands inside nodes": topology.islands, "switches above them": topology.switches}
    return [f"{name}: {len(set(numbers)) if numbers else 'not told apart'}" for name, numbers in divisions.items()]


def _rank_table(topology: Topology, locations: Sequence[RankLocation]) -> Table:
    table = figures_table("rank", "switch", "node", "host", "cores", "near")
    for index, location in enumerate(locations):
        switch = str(topology.switches[index]) if topology.switches else ""
        node = str(topology.nodes[index])
        table.add_row(str(location.rank), switch, node, location.host, location.cores, location.domain)
    return table


def _exchange_table(timings: Sequence[Timing], size: int) -> Table:
    table = figures_table(
        "bytes per pair", "best us", "median us", "GB/s per rank", title="Alltoallv between all ranks"
    )
    for timing in timings:
        rate = timing.num_bytes * size / timing.best_s / 1e9
        table.add_row(
            f"{timing.num_bytes:,}", f"{timing.best_s * 1e6:.1f}", f"{timing.median_s * 1e6:.1f}", f"{rate:.2f}"
        )
    return table


def _transport_table(transports: Mapping[str, Sequence[float]]) -> Table:
    """One row a transport, and the key that a job file should have: the fastest, or rows that stay in GPU memory."""
    heads = (f"us, {rows * 2 * WIDTH:,} bytes per pair" for rows in ROWS)
    table = figures_table(
        "transport", *heads, title="Rows between all ranks (shared does not copy: they are read in place)"
    )
    for name, seconds in transports.items():
        table.add_row(name, *(f"{one * 1e6:.1f}" for one in seconds))
    best = CudaIpc.name if CudaIpc.name in transports else min(transports, key=lambda name: sum(transports[name]))
    table.caption = f'job file: exchange.transport = "{best}", or "auto", which asks at every start'
    return table
