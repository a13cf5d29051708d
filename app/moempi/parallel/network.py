"""The network of one lane: all ways by which its rows reach other ranks."""

from dataclasses import dataclass

from mpi4py import MPI

from moempi.backend.protocol import Backend
from moempi.parallel.exchange import Exchange
from moempi.parallel.grid import Grid
from moempi.parallel.placement import Placement
from moempi.parallel.stage_link import StageLink
from moempi.parallel.tensor_group import TensorGroup
from moempi.parallel.traffic import Traffic
from moempi.parallel.transports.alltoallv import Alltoallv


@dataclass(frozen=True, slots=True)
class Network:
    """One lane's exchange (among its stage), tensor group, and link between stages, on communicators of their own."""

    exchange: Exchange
    tensor: TensorGroup
    link: StageLink
    traffic: Traffic


def make_network(
    comm: MPI.Intracomm,
    grid: Grid,
    placement: Placement,
    backend: Backend,
    *,
    width: int,
    num_layers: int,
    group_rows: int,
    overlap: bool,
) -> Network:
    """The network of one more lane; collective over all ranks of `comm`, which count node by node."""
    place = grid.coordinates(comm.rank)
    stage = comm.Split(place.stage, comm.rank)
    tensor = stage.Split(place.data, comm.rank)
    traffic = Traffic(overlap=overlap)
    return Network(
        exchange=Exchange(
            stage,
            placement,
            backend,
            traffic=traffic,
            transport=Alltoallv(stage, row_bytes=width * backend.row_dtype.itemsize),
            width=width,
            num_layers=num_layers,
        ),
        tensor=TensorGroup(tensor, backend, traffic=traffic, width=width),
        link=StageLink(
            comm.Dup(), grid, place, backend, traffic=traffic, width=width, group_rows=group_rows
        ),
        traffic=traffic,
    )
