"""The buffers in which a lane's rows are exchanged between the ranks of a stage: their sizes, and their kind. Pure."""

from collections import Counter
from collections.abc import Sequence
from math import prod

from moempi.config.job import ExchangeSection

SKEW_FACTOR = 2
"""Rows of a slot, as a multiple of the rows that uniform routing sends; a larger send uses messages or a new slot."""
RECEIVED_FACTOR = 1.5
"""Rows for which a rank has memory when others send them, as a multiple of the rows of even routing."""
SCORED_ROWS, SCORED_LOGITS = 256, 1 << 22
"""Most rows of a rank, and logits, that are scored at a time."""


def scored_rows(vocab_size: int, ranks: int) -> int:
    """Most rows of a rank that are scored at a time if `ranks` divide the head, which then gather a row's logits."""
    return SCORED_ROWS if ranks == 1 else max(1, min(SCORED_ROWS, SCORED_LOGITS // vocab_size))


def grown(rows: int) -> int:
    """Rows of a buffer that replaces one of fewer than `rows` rows."""
    return rows + rows // 4


GROWTH = grown(4) / 4
CHOICE_BYTES = 8
"""A choice in a message of two hops: the physical expert and its weight."""


def ipc_obstacle(exchange: ExchangeSection, stage_nodes: Sequence[Sequence[int]]) -> str:
    """Why ranks of GPUs, of stages on these nodes, cannot read each other's memory in this exchange, or ""."""
    if exchange.verify:
        return "exchange.verify reads rows on the host"
    if exchange.buffers == "host":
        return 'exchange.buffers = "host"'
    if exchange.hops == 1 and any(len(set(nodes)) > 1 for nodes in stage_nodes):
        return "the ranks of a stage are on several nodes, which takes exchange.hops = 2"
    nodes = [node for nodes in stage_nodes for node in nodes]
    if len(set(nodes)) == len(nodes) > 1:
        return "every rank is alone on its node"
    return ""


def share_of_rows(num_experts: int, top_k: int, num_nodes: int) -> float:
    """The share of all rows that have one of their experts on a node, if each of `num_nodes` hosts equally many."""
    elsewhere = num_experts - num_experts / num_nodes
    return 1 - prod(max(0.0, elsewhere - one) / (num_experts - one) for one in range(top_k))


def received_factor(num_ranks: int) -> float:
    """Rows for which a rank of `num_ranks` has memory, as a multiple of the rows of even routing."""
    return min(RECEIVED_FACTOR, num_ranks)


def nodes_of_row(nodes: Sequence[int], num_experts: int, top_k: int) -> float:
    """Nodes to which a row is sent in two hops, its own among them, on the average of even routing."""
    num_nodes = len(set(nodes))
    return num_nodes * share_of_rows(num_experts, top_k, num_nodes)


def exchange_rows(
    nodes: Sequence[int],
    *,
    hops: int,
    num_experts: int,
    top_k: int,
    has_slots: bool,
    has_messages: bool,
    sends_immediate: bool = False,
) -> float:
    """Rows of all buffers of one lane's exchange between ranks on `nodes` (R,), for each row of this rank.

    With `has_slots`, a transport inside a node has slots, as `cuda_ipc` and `shared`, else it sends messages.
    `has_messages`: the buffers of messages are in this memory. With `sends_immediate` the last dispatch of a step has
    no combine, so that either of the two buffers of a direction holds the larger transfer in turn.
    """
    received = received_factor(len(nodes)) * top_k
    if hops == 1:
        transfers = (received if sends_immediate else top_k, received)
        return _hop_rows(len(nodes), top_k, transfers, has_slots=has_slots, has_messages=has_messages)
    sent = nodes_of_row(nodes, num_experts, top_k)
    across = (sent, received_factor(len(nodes)) * sent)
    on_node = max(Counter(nodes).values())
    return _hop_rows(len(nodes), sent, across, has_slots=False, has_messages=has_messages) + _hop_rows(
        on_node, top_k, (received, received), has_slots=has_slots, has_messages=has_messages
    )


def _hop_rows(
    num_ranks: int, even: float, transfers: tuple[float, float], *, has_slots: bool, has_messages: bool
) -> float:
    """Rows of the buffers of one hop, which sends as many rows to experts as come back, and returns as many as it gets.

    These two numbers are `transfers`, of a hop whose even share of either is `even` rows.
    """
    one_direction = GROWTH * sum(transfers)
    if num_ranks == 1:
        return one_direction
    if has_slots:
        return sum(max(SKEW_FACTOR * even, GROWTH * rows) for rows in transfers) + one_direction
    return 2 * one_direction if has_messages else 0.0
