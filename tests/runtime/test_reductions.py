"""Sums and gathers over ranks, beside the collectives of MPI that hold everything on every rank."""

import numpy as np
import pytest

from moempi.runtime import reductions
from moempi.runtime.reductions import gather_on_root, sum_on_all, sum_on_root
from runtime.fake_world import FakeComm


@pytest.mark.ranks(1, 3)
@pytest.mark.parametrize("piece_bytes", [1, 7, 64, 64 << 20])
def test_a_gather_in_pieces_is_a_gather(comm, num_ranks, piece_bytes, monkeypatch):
    monkeypatch.setattr(reductions, "PIECE_BYTES", piece_bytes)
    for own in (b"", b"x" * comm.rank, bytes(range(40 + 3 * comm.rank)), b"of the first" if comm.rank == 0 else b""):
        of_all = comm.allgather(own)
        assert gather_on_root(comm, own) == (of_all if comm.rank == 0 else [])


@pytest.mark.ranks(1, 3)
@pytest.mark.parametrize("dtype", [np.int64, np.float32])
def test_sums_are_those_of_all_ranks(comm, num_ranks, dtype, monkeypatch):
    monkeypatch.setattr(reductions, "PIECE_BYTES", 40)
    own = (np.arange(21, dtype=dtype).reshape(3, 7) + comm.rank)[:, ::2]
    total = np.sum(comm.allgather(own), axis=0)
    np.testing.assert_array_equal(sum_on_all(comm, np.ascontiguousarray(own)), total)
    np.testing.assert_array_equal(sum_on_root(comm, own), total if comm.rank == 0 else 0 * total)
    assert sum_on_root(comm, own[:0]).shape == (0, 4)


def test_no_more_than_a_piece_arrives_at_the_root_at_a_time():
    comm = FakeComm(0, 3904)
    assert len(gather_on_root(comm, bytes(100_000))) == 3904
    assert sum(comm.received) > 3904 * 100_000
    assert max(comm.received) <= 64 << 20
    beyond = FakeComm(7, 3904)
    assert gather_on_root(beyond, bytes(100_000)) == []
    assert sum(beyond.received) < 1 << 10
