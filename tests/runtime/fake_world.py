"""The communicator of one rank of a world of any size, in which every other rank has what this one has.

It counts the bytes that arrive at this rank by each call. It has only what `moempi.runtime.reductions` calls.
"""

import math

import numpy as np
from mpi4py import MPI


class FakeComm:
    def __init__(self, rank, size):
        self.rank, self.size = rank, size
        self.received = []

    def Allreduce(self, own, total, op):  # noqa: N802  # the names of mpi4py
        total[...] = own if op == MPI.MAX else own * self.size
        self.received.append(own.nbytes * math.ceil(math.log2(self.size)))

    def Reduce(self, own, total, op):  # noqa: N802  # the names of mpi4py
        assert op == MPI.SUM
        self.received.append(own.nbytes * math.ceil(math.log2(self.size)))  # at most, of a tree
        if self.rank == 0:
            total[...] = own * self.size

    def Gather(self, own, gathered):  # noqa: N802  # the names of mpi4py
        assert (gathered is not None) == (self.rank == 0)
        if self.rank == 0:
            gathered[...] = np.repeat(own, self.size)
            self.received.append(gathered.nbytes)

    def Gatherv(self, own, gathered):  # noqa: N802  # the names of mpi4py
        assert (gathered is not None) == (self.rank == 0)
        if self.rank == 0:
            values, counts, _ = gathered
            assert counts.tolist() == [len(own)] * self.size
            values[...] = np.tile(own, self.size)
            self.received.append(values.nbytes)
