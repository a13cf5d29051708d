"""The memory that a rank needs. Pure."""

from collections.abc import Sequence
from math import ceil, prod

from msgspec import Struct

from moempi.config.architecture import Architecture
from moempi.config.job import Job, RunSection
from moempi.config.size import format_size, parse_size
from moempi.config.tensors import PAGE_ROWS, TENSOR_PARALLEL, Share, stage_tensors
from moempi.config.traces import hidden_layers
from moempi.errors import ConfigError
from moempi.layout.row_buffers import GROWTH, exchange_rows, nodes_of_row, received_factor, scored_rows

CACHE_SHARE = 0.8
"""Share of the memory left beside weights and rows; the rest is for MPI, the interpreter and temporary arrays."""

GRAPH_ROWS, PADDED_ROWS = 256, 64
"""Most rows of a CUDA graph, and the rows of a padded part of a reproducible product."""
WORKSPACE_BYTES, PARTIAL_BYTES, SPLIT_KEYS = 32 << 20, 64 << 20, 256
"""A lane's memory for cuBLAS, and for partial results of attention: at least of one row, for each split of its keys."""


class Memory(Struct, frozen=True):
    """Bytes of one rank: its weights, one page of its KV cache in all its layers, and the rows of its lanes' steps.

    Rows include what CUDA graphs of lanes take.

    The cache is divided among the `groups` data parallel groups of the first stage that the rank computes for. In
    layers that keep a state, each of the rank's `slots` takes `state` bytes in all of them.
    """

    weights: int
    page: int
    rows: int
    groups: int
    state: int = 0
    slots: int = 0

    @property
    def held(self) -> int:
        """Bytes that do not depend on the number of pages."""
        return self.weights + self.rows + self.state * self.slots


class StageRank(Struct, frozen=True):
    """A rank that computes `layers` for `groups` groups and hosts `hosted` experts per MoE layer.

    `nodes` (R,) are the nodes of the stage's ranks. With `reads_peers` they read each other's GPU memory inside a node.
    """

    layers: range
    hosted: float
    groups: int
    nodes: Sequence[int] = (0,)
    reads_peers: bool = False


def rank_memory(
    job: Job, architecture: Architecture, rank: StageRank, *, on_gpu: bool, widened: bool = False
) -> Memory:
    """Memory of a rank of a stage.

    `on_gpu`: size for the CUDA backend, whose numbers have the run's precision. On a CPU matrices keep the type in
    which they are stored, the cache has the run's precision, and rows are float32; `widened`: all are float32.
    """
    tensor, layers = job.parallel.tensor, rank.layers
    fractions = {Share.EXPERTS: rank.hosted / architecture.experts.num, **dict.fromkeys(TENSOR_PARALLEL, 1 / tensor)}
    if job.parallel.head == "stage":
        fractions[Share.VOCABULARY] = 1 / max(tensor, len(rank.nodes))
    tensors = stage_tensors(architecture, layers)
    is_bfloat16 = job.run.precision == "bfloat16"
    row_bytes, sent_bytes = 2 if on_gpu and is_bfloat16 else 4, 2 if is_bfloat16 else 4
    weight_bytes = {"bfloat16": 4 if widened or (on_gpu and not is_bfloat16) else 2, "float32": 4}
    weights = sum(
        int(prod(tensor.shape) * fractions.get(tensor.share, 1)) * weight_bytes[tensor.dtype] for tensor in tensors
    )
    cached = architecture.attention.cached_values // (1 if architecture.attention.latent else tensor)
    num_states = sum(map(architecture.has_state, layers))
    page = PAGE_ROWS * sum(
        cached + architecture.index_values(layer) for layer in layers if architecture.has_cache(layer)
    )
    state = num_states * (architecture.recurrence.state_values if architecture.recurrence else 0) // tensor * 4
    values = _values_per_row(job, architecture, rank, on_gpu=on_gpu)
    values += architecture.width * len(hidden_layers(job.trace, layers, num_layers=architecture.num_layers)) / tensor
    sent = _buffered_values_per_row(job, architecture, rank, on_gpu=on_gpu)
    rows = rank.groups * job.lanes * job.run.batch_tokens
    page_bytes = page * (2 if is_bfloat16 and not widened else 4)
    graphs = job.lanes * graph_bytes(job, architecture, row_bytes) if on_gpu and job.run.capture else 0
    return Memory(weights, page_bytes, rows * ceil(values * row_bytes + sent * sent_bytes) + graphs, rank.groups, state)


def graph_bytes(job: Job, architecture: Architecture, row_bytes: int) -> int:
    """Of a lane's CUDA graphs: memory for cuBLAS, the largest arena, a power of two, and the smaller before it.

    Tensor groups and models with an indexer have no graphs.
    """
    if job.parallel.tensor > 1 or architecture.attention.indexer:
        return WORKSPACE_BYTES
    return WORKSPACE_BYTES + 2 * (1 << (arena_bytes(job, architecture, row_bytes) - 1).bit_length())


def arena_bytes(job: Job, architecture: Architecture, row_bytes: int) -> int:
    """At least the bytes of the largest arena of a CUDA graph.

    An arena has a row's values of the residual stream and its norms, the packed rows, what the heads compute, and in
    float32 the router's logits and a product before its bias. A reproducible product pads its last rows and results:
    those of all products are no more than the values of as many rows.
    """
    heads, experts, width = architecture.attention, architecture.experts, architecture.width
    dim = heads.cached_dim if heads.latent else heads.head_dim
    projected = (heads.num_heads + 2 * heads.cached_heads) * dim
    parts = 3 + 2 * heads.output_gate + (heads.qk_norm == "vector") + (heads.clip is not None)
    values = (4 + experts.router.top_k) * width + parts * projected
    floats = experts.num + width * experts.router.float32_logits + (width + projected) * (heads.biases != "none")
    is_padded = job.run.reproducible or job.run.precision == "float32"
    rows = GRAPH_ROWS + PADDED_ROWS * is_padded
    splits = 1 << (ceil(architecture.max_positions / SPLIT_KEYS) - 1).bit_length()
    value_dim = heads.latent.key_value_rank if heads.latent else heads.head_dim
    partial = max(PARTIAL_BYTES, heads.num_heads * splits * value_dim * 4)
    return rows * (values * row_bytes + floats * 4) + ceil(partial * (1 + 2 / value_dim))


def _values_per_row(job: Job, architecture: Architecture, rank: StageRank, *, on_gpu: bool) -> float:
    """The peak number of values per row of a step, beside buffers: in attention or its substitute, or in feed-forward.

    A product with a bias that rounds later is first float32, twice the size of the rounded values beside it. Sparse
    attention divides and joins the queries and the attended rows. A tensor group gathers rows, and adds up its outputs.
    """
    heads, tensor = architecture.attention, job.parallel.tensor
    rounds_later = on_gpu and job.run.precision == "bfloat16"
    dim = heads.cached_dim if heads.latent else heads.head_dim
    projections = 5 if heads.indexer else 3 if rounds_later and heads.biases != "none" else 2
    attention = projections * (heads.num_heads * (1 + heads.output_gate) + 2 * heads.cached_heads) * dim / tensor
    if heads.indexer:
        chosen = min(heads.indexer.top_k, architecture.max_positions)
        attention += 2 * heads.indexer.num_heads * heads.indexer.head_dim + chosen
    if architecture.recurrence:
        attention = max(attention, architecture.recurrence.row_values / tensor)
    gathered = 2 * architecture.width * (tensor > 1)
    divided = gathered + max(attention, 3 * architecture.dense_width / tensor)
    routed = _expert_values_per_row(job, architecture, rank, on_gpu=on_gpu)
    of_head = _head_rows_per_row(job, architecture, rank) * architecture.width
    return 4 * architecture.width / tensor + max(divided, routed / tensor, of_head)


def _head_rows_per_row(job: Job, architecture: Architecture, rank: StageRank) -> float:
    """The most rows that the ranks of the last stage gather for a head they all divide, for each row of one group."""
    groups = len(rank.nodes) // job.parallel.tensor
    if job.parallel.head == "tensor" or groups <= 1 or rank.layers.stop < architecture.num_layers:
        return 0.0
    if job.task == "score":
        of_group = scored_rows(architecture.vocab_size, len(rank.nodes)) * job.parallel.tensor
    else:
        of_group = ceil(max(job.run.max_sequences, job.num_micro_batches) / job.num_micro_batches)
    return groups * min(1.0, of_group / job.run.batch_tokens)


def _expert_values_per_row(job: Job, architecture: Architecture, rank: StageRank, *, on_gpu: bool) -> float:
    """The peak number of values for each row of this rank in the experts of a layer, and in the shared expert.

    Received rows that are in the order of the experts, and in this memory as they are computed, stay in their buffer;
    so do their outputs, which are computed where they are sent, except in a last layer with immediate routing.
    The outputs of two hops are added up on the forwarder, once the hidden values are freed.
    """
    experts, width = architecture.experts, architecture.routed_width
    is_bfloat16 = job.run.precision == "bfloat16"
    received = received_factor(len(rank.nodes)) * experts.router.top_k
    stays = on_gpu and _has_messages(job, on_gpu=on_gpu)
    in_buffers = stays and (rank.hosted <= 1 or len(rank.nodes) == 1)
    sends_immediate = job.exchange.immediate and rank.layers.stop < architecture.num_layers
    copied, outputs = 0.0 if in_buffers else received, 0.0 if in_buffers and not sends_immediate else received
    added = 0.0
    if job.exchange.hops > 1:
        added = received_factor(len(rank.nodes)) * nodes_of_row(rank.nodes, experts.num, experts.router.top_k)
        copied += 0.0 if stays else added
    biased = on_gpu and is_bfloat16 and experts.biases
    hidden = received * ((6 if biased else 3) * experts.width + (2 * width if biased else 0))
    return (copied + outputs) * width + max(hidden, added * width) + 3 * experts.shared_width


def _buffered_values_per_row(job: Job, architecture: Architecture, rank: StageRank, *, on_gpu: bool) -> float:
    """The number of values per row in the buffers of a lane: exchange, tensor group, stage links, a stage's head.

    On a CPU a probe at the start of the run chooses the transport "auto": the buffers are then the larger of slots and
    messages.
    """
    exchange, experts, tensor = job.exchange, architecture.experts, job.parallel.tensor
    has_messages, is_last = _has_messages(job, on_gpu=on_gpu), rank.layers.stop == architecture.num_layers
    may_have_slots = rank.reads_peers or (exchange.transport in ("auto", "shared") and not on_gpu)
    is_probed = exchange.transport == "auto" and not on_gpu
    rows = max(
        exchange_rows(
            rank.nodes,
            hops=exchange.hops,
            num_experts=experts.num,
            top_k=experts.router.top_k,
            has_slots=has_slots,
            has_messages=has_messages,
            sends_immediate=exchange.immediate and not is_last,
        )
        for has_slots in {may_have_slots, may_have_slots and not is_probed}
    )
    of_exchange = rows * architecture.routed_width / tensor
    if not has_messages:
        return of_exchange
    links = GROWTH * (not is_last) + (rank.layers.start > 0)
    if exchange.immediate:
        outputs = received_factor(len(rank.nodes)) * experts.router.top_k + 1 + (experts.shared_width > 0)
        links += GROWTH * outputs * ((not is_last) + (rank.layers.start > 0))
    of_tensor_group = 4 * GROWTH * (tensor > 1)
    levels = 1 + 1 / len(rank.nodes) + 2 * (tensor > 1) / tensor
    of_head = 2 * GROWTH * _head_rows_per_row(job, architecture, rank) * levels
    return of_exchange + (of_tensor_group + of_head + links / tensor) * architecture.width


def _has_messages(job: Job, *, on_gpu: bool) -> bool:
    """Whether buffers of messages may be in the memory where a rank computes: not on a GPU if they are on the host."""
    on_host = job.exchange.buffers == "host" or job.exchange.verify or job.exchange.transport == "shared"
    return not (on_gpu and on_host)


def pages_for(capacity: int) -> int:
    """Number of pages for `capacity` positions."""
    return -(-capacity // PAGE_ROWS)


def affordable_pages(run: RunSection, memory: Memory, *, available: int) -> int:
    """Pages that a rank with `available` bytes can allocate for each group that it computes for.

    Raises ConfigError, with all sizes, if there is no memory for one page.
    """
    is_auto = run.kv_memory == "auto"
    allowed = int((available - memory.held) * CACHE_SHARE) if is_auto else parse_size(run.kv_memory)
    pages = allowed // max(memory.page * memory.groups, 1)
    if pages < 1:
        lowered = ["run.batch_tokens"]
        lowered += ["run.lanes"] if run.capture else []  # each lane has graphs, which count as rows
        lowered += ["run.max_sequences"] if memory.state else []
        states = f"states of {memory.slots:,} sequences {format_size(memory.state * memory.slots)}, "
        raise ConfigError(
            f"no room for the cache: weights {format_size(memory.weights)}, rows {format_size(memory.rows)}, "
            f"{states if memory.state else ''}a page {format_size(memory.page * memory.groups)}, "
            f"memory {format_size(available)}, run.kv_memory {run.kv_memory}; "
            f"use more ranks or stages, or lower {' or '.join(lowered)}"
        )
    return pages
