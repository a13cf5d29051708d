"""The simulator against the clock: lanes that compute for known times and exchange rows over emulated links."""

import time
from functools import partial

import numpy as np
import pytest

from comm.exchanges import TOP_K, WIDTH, make
from moempi.layout.schedule import EXCHANGE_PHASES, Point
from moempi.planning.simulate import Phase, Transmission, overlapped_s, waiting_s

NUM_ROWS = 16
STEPS = 12
ATTEMPTS = 10
POINTS = tuple(Point(0, phase) for phase in EXCHANGE_PHASES)


def compute(transfers, seconds):
    """A long verb: it takes this time, and transfers advance between its pieces."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        transfers.pending.progress()
        time.sleep(min(1e-3, max(0.0, end - time.perf_counter())))


def steps(exchange, transfers, rows, computing):
    from moempi.comm.exchange import Route

    # Each row's experts are on both ranks alike.
    experts = np.tile(np.array([[0, 2, 3]], np.int32), (len(rows), 1))
    weights = np.ones((len(rows), TOP_K), np.float32)
    for _ in range(STEPS):
        computing(transfers, 0)
        received, plan = yield from exchange.dispatch(rows, Route(0, experts, weights))
        computing(transfers, 1)
        yield from exchange.combine(received, plan)


def measure(comm, durations, link_s, *, num_lanes, overlap):
    """Seconds of a step of all lanes, and the mean seconds that the two computations took."""
    from moempi.comm.transfers import PendingTransfers
    from moempi.comm.transports.emulated import Link
    from moempi.engine.interleave import interleave
    from moempi.layout.placement import linear
    from moempi.layout.topology import NODE

    spent = [[], []]

    def computing(transfers, index):
        begin = time.perf_counter()
        compute(transfers, durations[index])
        spent[index].append(time.perf_counter() - begin)

    bytes_between = 2 * NUM_ROWS * WIDTH * 4  # rank 1's two experts for each row of rank 0; the larger direction
    links = {NODE: Link(0.0, bytes_between / link_s)}
    pending, placement = PendingTransfers(), linear(4, 2)
    made = [
        make(comm.Dup(), placement, transport="alltoallv", hops=1, nodes=(0, 0), links=links, pending=pending)
        for _ in range(num_lanes)
    ]
    rows = np.ones((NUM_ROWS, WIDTH), np.float32)
    lanes = [steps(exchange, transfers, rows, partial(computing)) for exchange, transfers in made]
    comm.Barrier()
    begin = time.perf_counter()
    interleave(lanes, POINTS, pending=pending, overlap=overlap)
    seconds = (time.perf_counter() - begin) / STEPS
    return seconds, [float(np.mean(of_index)) for of_index in spent]


@pytest.mark.ranks(2)
@pytest.mark.parametrize(("durations", "link_s"), [((0.012, 0.006), 0.006), ((0.012, 0.006), 0.012)])
def test_a_measured_step_takes_the_simulated_time(comm, durations, link_s):
    """Whatever else the machine does makes an attempt longer: one of several must agree, unless all are disturbed."""
    for num_lanes, overlap in ((1, True), (2, True), (3, True), (2, False)):
        found, disturbed = [], True
        for _ in range(ATTEMPTS):
            measured, computed = measure(comm, durations, link_s, num_lanes=num_lanes, overlap=overlap)
            phases = [
                Phase(point, seconds, [Transmission(link_s)]) for point, seconds in zip(POINTS, computed, strict=True)
            ]
            simulated = (overlapped_s if overlap else waiting_s)(phases, lanes=num_lanes)
            found.append((max(comm.allgather(measured)), max(comm.allgather(simulated))))
            if found[-1][0] == pytest.approx(found[-1][1], rel=0.25):
                break
            disturbed &= max(comm.allgather(sum(computed))) > 1.1 * sum(durations)
        else:
            if disturbed:
                pytest.skip("the machine is too busy to measure")
            pytest.fail(f"measured and simulated: {found}")
