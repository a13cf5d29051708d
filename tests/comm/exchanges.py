"""Makes exchanges as a run does, sends rows through them, and computes the expected sums."""

import numpy as np

WIDTH, TOP_K = 16, 3


def make(
    comm,
    placement,
    *,
    transport,
    hops,
    nodes,
    islands=(),
    switches=(),
    precision="float32",
    links=None,
    pending=None,
    top_k=TOP_K,
):
    """The exchange and the transfers of a lane, as `make_lane_comm` makes them; `links` by level are emulated."""
    from moempi.backend.cpu.backend import NumpyBackend
    from moempi.comm.lane_comm import ExchangeFactory
    from moempi.comm.row_shape import RowShape
    from moempi.comm.transfers import PendingTransfers, Transfers
    from moempi.comm.transport_factory import TransportFactory
    from moempi.layout.topology import Topology

    pending = pending or PendingTransfers()
    backend = NumpyBackend(precision=precision, progress=pending.progress)
    transfers = Transfers(backend, pending)
    shape = RowShape(WIDTH, top_k=top_k, group_rows=20)
    transports = TransportFactory(backend=backend, name=transport, shape=shape, slot_rows=64, links=links or {})
    factory = ExchangeFactory(transports, transfers)
    make_exchange = factory.one_hop if hops == 1 else factory.two_hops
    return make_exchange(comm, {0: placement}, Topology(nodes, islands, switches)), transfers


def route_of(rank, num_rows, num_experts, step, *, top_k=TOP_K):
    """Distinct experts (T, K) and weights (T, K) of one rank's rows."""
    random = np.random.default_rng((step, rank))
    experts = np.argsort(random.random((num_rows, num_experts)), axis=1)[:, :top_k].astype(np.int32)
    weights = random.random((num_rows, top_k)).astype(np.float32)
    return experts, weights


def rows_of(rank, num_rows, step):
    """Rows whose values encode their rank, step and index."""
    rows = np.zeros((num_rows, WIDTH), np.float32)
    rows[:] = 1 + rank + step / 8
    rows[:, 0] = np.arange(num_rows)
    return rows


def expert_output(rows, expert):
    """The output of expert number `expert`: exact in float32, and different for each expert."""
    return rows * np.float32(expert + 1) + np.float32(expert)


def expected(rows, experts, weights):
    """The weighted sum of the outputs in slot order."""
    total = np.zeros_like(rows)
    for slot in range(experts.shape[1]):
        total += expert_output(rows, experts[:, slot, None]) * weights[:, slot, None]
    return total


def exchange_rows(exchange, placement, rank, rows, experts, weights, *, layer=0):
    """Dispatch rows, apply `expert_output`, combine; the phases in order, and the combined rows."""
    from moempi.comm.exchange import Route

    def forward():
        received, plan = yield from exchange.dispatch(rows, Route(layer, experts, weights))
        expert_counts = plan.expert_counts
        assert len(received) == expert_counts.sum()
        expert_of_row = np.repeat(np.array(placement.hosted[rank], int), expert_counts)
        outputs = expert_output(received, expert_of_row[:, None]).astype(np.float32)
        return (yield from exchange.combine(outputs, plan)).rows

    phases, steps = [], forward()
    while True:
        try:
            wait = next(steps)
        except StopIteration as end:
            return phases, end.value
        phases.append(wait.point.phase)
