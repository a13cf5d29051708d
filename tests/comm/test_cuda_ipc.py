"""The transport between GPUs of a node: every row, in order, out of memory that another rank allocated.

The ranks have SIMT devices, or the node's GPUs with MOEMPI_TEST_DEVICE=cuda.
"""

import os

import numpy as np
import pytest

from comm.test_transports import PATTERNS, counts_of
from moempi.comm.transports.base import start_transfer, wait

WIDTH = 12


def make_backend(precision="bfloat16"):
    from moempi.backend.cuda.backend import CudaBackend

    if os.environ.get("MOEMPI_TEST_DEVICE") == "cuda":
        from mpi4py import MPI

        from moempi.backend.cuda.cupy_device import CupyDevice, count_devices

        device = CupyDevice(MPI.COMM_WORLD.rank % count_devices(), pinned=True)
    else:
        from simt.device import SimtDevice

        device = SimtDevice()
    return CudaBackend(device, precision=precision, reproducible=False)


def block(source, destination, count, step):
    """Rows that differ from the rows of any other pair, step or index."""
    rows = np.zeros((count, WIDTH), np.uint16)
    rows[:, :4] = source, destination, step, 17
    rows[:, -1] = np.arange(count)
    return rows


def start(transport, backend, rank, counts, step):
    """Start a transfer of packed rows; its receipt, and the rows that should be received."""
    size = len(counts)
    sent = np.concatenate([block(rank, other, counts[rank, other], step) for other in range(size)])
    expected = np.concatenate([block(other, rank, counts[other, rank], step) for other in range(size)])
    outgoing = transport.outgoing(len(sent))
    if len(sent):
        backend.pack(backend.tensor(sent), None, outgoing)
    event = backend.record_event()
    while not event.is_done():
        pass
    incoming = transport.incoming(len(expected))
    return start_transfer(transport, outgoing, counts[rank], incoming, counts[:, rank]), expected


def received(backend, receipt):
    buffer, index = receipt.rows()
    assert index is None
    rows = backend.unpack(buffer, None) if len(buffer) else buffer
    receipt.release()
    return backend.download(rows)


def kinds_of_flags(rank):
    from moempi.comm.transports.shared_flags import SharedFlags, make_shared_flags

    return {"C": make_shared_flags, "Python": SharedFlags, "both": SharedFlags if rank % 2 else make_shared_flags}


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_row_is_received_in_order(comm, num_ranks, pattern):
    from moempi.comm.transports.cuda_ipc import CudaIpc

    backend = make_backend()
    for name, make_flags in kinds_of_flags(comm.rank).items():
        transport = CudaIpc(comm, backend.peer_memory, width=WIDTH, make_flags=make_flags)
        for step in range(6):
            receipt, expected = start(transport, backend, comm.rank, counts_of(pattern, num_ranks, step), step)
            wait(receipt)
            assert (received(backend, receipt) == expected).all(), f"flags in {name}, step {step}"
        transport.free()


@pytest.mark.ranks(2, 3)
def test_two_transfers_are_pending_while_ranks_are_late_and_slots_grow(comm, num_ranks):
    import time

    from moempi.comm.transports.cuda_ipc import CudaIpc

    backend = make_backend()
    transport, started = CudaIpc(comm, backend.peer_memory, width=WIDTH), []
    for step in range(30):
        if step % num_ranks == comm.rank:
            time.sleep(0.002)
        counts = counts_of("random", num_ranks, step) * (1 + step * step)
        started.append(start(transport, backend, comm.rank, counts, step))
        if len(started) == 2:
            receipt, expected = started.pop(0)
            wait(receipt)
            assert (received(backend, receipt) == expected).all(), f"step {step - 1}"
    receipt, expected = started[0]
    wait(receipt)
    assert (received(backend, receipt) == expected).all()
    transport.free()


@pytest.mark.ranks(2)
def test_a_slot_is_free_once_its_rows_are_copied(comm, num_ranks):
    from moempi.comm.transports.cuda_ipc import CudaIpc

    backend, counts = make_backend(), np.full((2, 2), 3)
    transport = CudaIpc(comm, backend.peer_memory, width=WIDTH)
    receipts = [start(transport, backend, comm.rank, counts, step)[0] for step in range(2)]
    comm.Barrier()
    assert not transport.can_send()  # the next transfer takes the slot of the first
    comm.Barrier()
    wait(receipts[0])
    comm.Barrier()
    assert transport.can_send()
    wait(receipts[1])
    transport.free()


@pytest.mark.ranks(1, 2)
def test_a_third_pending_transfer_is_refused(comm, num_ranks):
    from moempi.comm.transports.cuda_ipc import CudaIpc

    backend, counts = make_backend(), np.eye(num_ranks, dtype=int) * 5
    transport = CudaIpc(comm, backend.peer_memory, width=WIDTH)
    receipts = [start(transport, backend, comm.rank, counts, step)[0] for step in range(2)]
    with pytest.raises(RuntimeError, match="third transfer"):
        start(transport, backend, comm.rank, counts, 2)
    for receipt in receipts:
        wait(receipt)
    transport.free()


@pytest.mark.ranks(1, 2, 3)
def test_a_trial_says_whether_ranks_can_map_each_other_s_memory(comm, num_ranks):
    from moempi.backend.cpu.backend import NumpyBackend
    from moempi.comm.peer_trial import mapping_problem
    from moempi.errors import ConfigError
    from moempi.layout.topology import Topology

    topology, backend = Topology((0,) * num_ranks), make_backend()
    assert mapping_problem(comm, topology, backend) == ""
    for precision in ("bfloat16", "float32"):
        assert mapping_problem(comm, Topology(tuple(range(num_ranks))), make_backend(precision)) == ""
    on_cpu = NumpyBackend(precision="bfloat16")
    mixed = on_cpu if comm.rank == 0 else backend
    assert mapping_problem(comm, topology, mixed) == "not every rank has a GPU"

    def refuse(*_):
        raise ConfigError("invalid device context")

    if comm.rank == num_ranks - 1:
        backend.device.map_shared = backend.device.handle = refuse
    assert mapping_problem(comm, topology, backend) == "invalid device context"


@pytest.mark.ranks(2)
def test_memory_that_reads_as_other_values_is_found(comm, num_ranks):
    from moempi.comm.peer_trial import mapping_problem
    from moempi.layout.topology import Topology

    backend = make_backend()
    if comm.rank == 1:
        backend.device.map_shared = lambda handle, shape, dtype: backend.device.empty(shape, dtype)
        backend.device.unmap_shared = lambda values: None
    assert "reads as other values" in mapping_problem(comm, Topology((0, 0)), backend)


@pytest.mark.ranks(4)
def test_the_transport_is_chosen_where_it_can_be_used(comm, num_ranks):
    from moempi.comm.rank_groups import RankGroups
    from moempi.comm.select_transport import choose_transport
    from moempi.config.job import ExchangeSection
    from moempi.errors import ConfigError
    from moempi.layout.grid import Grid, Stage
    from moempi.layout.topology import Topology

    backend = make_backend()
    grid = Grid((Stage(range(2), range(4)),), tensor=1, slots_per_group=4)
    alone = Topology(tuple(range(4)))
    two_nodes, one_node = Topology((0, 0, 1, 1)), Topology((0,) * 4)

    def choose(topology, **section):
        return choose_transport(
            ExchangeSection(**section), RankGroups.make(comm, grid), grid, backend, topology=topology, width=WIDTH
        )

    assert choose(two_nodes, hops=2).name == "cuda_ipc"
    assert choose(one_node).name == "cuda_ipc"
    for topology, section in [(two_nodes, {}), (one_node, {"buffers": "host"}), (alone, {"hops": 2})]:
        assert choose(topology, **section).name != "cuda_ipc"
    assert choose(one_node, transport="cuda_ipc").name == "cuda_ipc"
    for topology, section, problem in [
        (two_nodes, {}, "takes exchange.hops = 2"),
        (one_node, {"verify": True}, "exchange.verify"),
        (one_node, {"buffers": "host"}, "exchange.buffers"),
        (alone, {"hops": 2}, "alone on its node"),
    ]:
        with pytest.raises(ConfigError, match=problem):
            choose(topology, transport="cuda_ipc", **section)
    grid = Grid((Stage(range(1), range(2)), Stage(range(1, 2), range(2, 4))), tensor=1, slots_per_group=4)
    assert choose(alone, hops=2).name != "cuda_ipc"
    with pytest.raises(ConfigError, match="alone on its node"):
        choose(alone, transport="cuda_ipc", hops=2)


@pytest.mark.ranks(2)
def test_freed_transports_and_trials_leave_no_communicator_and_no_memory(comm, num_ranks):
    from comm.test_transports import next_handle, shared_mappings
    from moempi.comm.select_transport import fastest
    from moempi.comm.transports.cuda_ipc import CudaIpc

    backend = make_backend()

    def exchange():
        transport = CudaIpc(comm, backend.peer_memory, width=WIDTH)
        for step in range(4):
            receipt, _ = start(transport, backend, comm.rank, np.full((2, 2), 2 + step), step)
            wait(receipt)
        transport.free()

    live = getattr(backend.device, "live_bytes", None)
    for action in (exchange, lambda: fastest(comm, comm, backend, width=WIDTH, nodes=(0, 0))):
        before = next_handle(comm), shared_mappings()
        action()
        assert (next_handle(comm), shared_mappings()) == before
        assert getattr(backend.device, "live_bytes", None) == live
