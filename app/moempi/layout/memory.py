"""The memory that a rank needs. Pure."""

from dataclasses import dataclass
from math import prod

from moempi.config.architecture import Architecture
from moempi.config.job import Job, RunSection
from moempi.config.size import format_size, parse_size
from moempi.config.tensors import PAGE_ROWS, TENSOR_PARALLEL, Share, stage_tensors
from moempi.config.traces import hidden_layers
from moempi.errors import ConfigError

CACHE_SHARE = 0.8
"""Share of the memory left beside weights and rows; the rest is for MPI, the interpreter and temporary arrays."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank: its weights, one page of its KV cache in all its layers, and the rows of its lanes' steps.

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


def rank_memory(
    job: Job,
    architecture: Architecture,
    layers: range,
    *,
    hosted: float,
    groups: int,
    on_gpu: bool,
    widened: bool = False,
) -> Memory:
    """Memory of a rank that computes `layers` for `groups` groups and hosts `hosted` experts per MoE layer.

    `on_gpu`: size for the CUDA backend, whose numbers have the run's precision. On a CPU matrices keep the type in
    which they are stored, the cache has the run's precision, and rows are float32; `widened`: all are float32.
    """
    tensor = job.parallel.tensor
    fractions = {Share.EXPERTS: hosted / architecture.experts.num, **dict.fromkeys(TENSOR_PARALLEL, 1 / tensor)}
    tensors = stage_tensors(architecture, layers)
    is_bfloat16 = job.run.precision == "bfloat16"
    row_bytes = 2 if on_gpu and is_bfloat16 else 4
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
    values = _values_per_row(architecture, tensor, rounds_later=on_gpu and is_bfloat16)
    values += architecture.width * len(hidden_layers(job.trace, layers, num_layers=architecture.num_layers)) // tensor
    rows = groups * job.lanes * job.run.batch_tokens * values
    page_bytes = page * (2 if is_bfloat16 and not widened else 4)
    return Memory(weights, page_bytes, rows * row_bytes, groups, state)


def _values_per_row(architecture: Architecture, tensor: int, *, rounds_later: bool) -> int:
    """The peak number of values per row of a step: in attention or its substitute, or in experts and their buffers.

    With `rounds_later` a product with a bias is first float32, twice the size of the rounded values beside it. Sparse
    attention divides and joins the queries and the attended rows.
    """
    heads, experts = architecture.attention, architecture.experts
    dim = heads.cached_dim if heads.latent else heads.head_dim
    rule = architecture.recurrence
    projections = 5 if heads.indexer else 3 if rounds_later and heads.biases != "none" else 2
    attention = projections * (heads.num_heads * (1 + heads.output_gate) + 2 * heads.cached_heads) * dim // tensor
    if heads.indexer:
        chosen = min(heads.indexer.top_k, architecture.max_positions)
        attention += 2 * heads.indexer.num_heads * heads.indexer.head_dim + chosen
    hidden, rows = (6, 6) if rounds_later and experts.biases else (3, 4)
    if rule:  # beside the buffers of the experts' rows
        buffers = experts.router.top_k * rows * architecture.routed_width
        attention = max(attention, (rule.row_values + buffers) // tensor)
    routed = experts.router.top_k * (hidden * experts.width + rows * architecture.routed_width)
    routed += 3 * experts.shared_width
    feed_forward = max(3 * architecture.dense_width, routed) // tensor
    return 4 * architecture.width + max(attention, feed_forward)


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
        states = f"states of {memory.slots:,} sequences {format_size(memory.state * memory.slots)}, "
        raise ConfigError(
            f"no room for the cache: weights {format_size(memory.weights)}, rows {format_size(memory.rows)}, "
            f"{states if memory.state else ''}a page {format_size(memory.page * memory.groups)}, "
            f"memory {format_size(available)}, run.kv_memory {run.kv_memory}; "
            f"use more ranks or stages, or lower run.batch_tokens{' or run.max_sequences' if memory.state else ''}"
        )
    return pages
