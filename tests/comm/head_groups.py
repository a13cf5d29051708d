"""Groups of ranks that divide an LM head."""

from functools import partial

from moempi.comm.head_group import HeadGroup
from moempi.comm.tensor_group import TensorGroup
from moempi.comm.transfers import PendingTransfers, Transfers


def head_group(comm, backend, *, width, groups=1):
    """The ranks of `comm` as equal tensor groups in the order of ranks; collective."""
    transfers = Transfers(backend, PendingTransfers())
    make = partial(TensorGroup, backend=backend, transfers=transfers, width=width)
    group, index = divmod(comm.rank, comm.size // groups)
    inside, across = comm.Split(group, index), comm.Split(index, group)
    return HeadGroup(make(inside), make(across), backend, transfers=transfers)
