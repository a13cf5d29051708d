"""The network of one lane: all ways by which its rows reach other ranks."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from mpi4py import MPI

from moempi.backend.protocol import Backend
from moempi.parallel.exchange import Exchange
from moempi.parallel.grid import Grid
from moempi.parallel.placement import Placement
from moempi.parallel.stage_link import StageLink
from moempi.parallel.tensor_group import TensorGroup
from moempi.parallel.topology import link_levels
from moempi.parallel.traffic import Traffic
from moempi.parallel.transport_choice import ChosenTransport, fastest, make_transport
from moempi.parallel.transports.counted import Counted
from moempi.parallel.transports.transfer import Transport

# A rank's share of shared memory, in rows that an even load would send at once; more than that goes as messages.
ROOM_FOR_SKEW = 2


@dataclass(frozen=True, slots=True)
class Network:
    """One lane's exchange (among its stage), tensor group, and link between stages, on communicators of their own."""

    exchange: Exchange
    tensor: TensorGroup
    link: StageLink
    traffic: Traffic


def choose_transport(
    name: str, comm: MPI.Intracomm, grid: Grid, *, nodes: Sequence[int], row_bytes: int
) -> ChosenTransport:
    """The job's transport, or for "auto" the fastest for rows of `row_bytes`; logged.

    Collective over all ranks of `comm`, which count node by node (`nodes`); a probe blocks for some milliseconds.
    """
    choice = ChosenTransport(name, "as the job says")
    if name == "auto":
        place = grid.coordinates(comm.rank)
        stage, own = MPI.Intracomm(comm.Split(place.stage, comm.rank)), grid.stages[place.stage].ranks
        choice = fastest(comm, stage, row_bytes=row_bytes, nodes=tuple(nodes[own.start : own.stop]))
        stage.Free()
    logging.getLogger(__name__).info("transport %s: %s", choice.name, choice.reason)
    return choice


def make_network(
    comm: MPI.Intracomm,
    grid: Grid,
    placement: Placement,
    backend: Backend,
    *,
    nodes: Sequence[int],
    transport: str,
    width: int,
    top_k: int,
    num_layers: int,
    group_rows: int,
    overlap: bool,
) -> Network:
    """The network of one more lane; collective over all ranks of `comm`, which count node by node (`nodes`).

    A data parallel group of the first stage has at most `group_rows` rows in a step, each for `top_k` experts.
    """
    place = grid.coordinates(comm.rank)
    stage = MPI.Intracomm(comm.Split(place.stage, comm.rank))
    tensor = MPI.Intracomm(stage.Split(place.data, comm.rank))
    traffic = Traffic(overlap=overlap)
    own = grid.stages[place.stage].ranks
    most_rows = -(-group_rows * len(grid.peers(place.stage, place.data, other=0)) // grid.tensor)
    exchange = Exchange(
        stage,
        placement,
        backend,
        traffic=traffic,
        transport=_counted(
            transport,
            stage,
            traffic,
            nodes=tuple(nodes[own.start : own.stop]),
            row_bytes=width * backend.row_dtype.itemsize,
            room_rows=ROOM_FOR_SKEW * top_k * most_rows,
        ),
        width=width,
        num_layers=num_layers,
    )
    link = StageLink(comm.Dup(), grid, place, backend, traffic=traffic, width=width, group_rows=group_rows)
    return Network(exchange, TensorGroup(tensor, backend, traffic=traffic, width=width), link, traffic)


def _counted(
    name: str, comm: MPI.Intracomm, traffic: Traffic, *, nodes: tuple[int, ...], row_bytes: int, room_rows: int
) -> Transport:
    transport = make_transport(name, comm, row_bytes=row_bytes, nodes=nodes, room_bytes=room_rows * row_bytes)
    return Counted(transport, traffic.counters, levels=link_levels(nodes, comm.rank), row_bytes=row_bytes)
