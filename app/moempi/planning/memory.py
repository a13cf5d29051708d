"""How much memory a rank needs."""

from dataclasses import dataclass
from math import prod

from moempi.config.architecture import Architecture
from moempi.config.job import Job
from moempi.config.tensors import Share, catalogue

WIDENED_BYTES = 4


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank: its weights, a page of its cache (all layers), and the rows of its lanes' steps."""

    weights: int
    page: int
    rows: int


def rank_memory(architecture: Architecture, job: Job, *, hosted: int, page_rows: int) -> Memory:
    """Memory of a rank that hosts `hosted` experts of each MoE layer, on the NumPy backend, which holds float32."""
    shares = {Share.EXPERTS: hosted / architecture.experts.num}
    weights = sum(int(prod(tensor.shape) * shares.get(tensor.share, 1)) for tensor in catalogue(architecture))
    heads = architecture.attention
    page = 2 * architecture.num_layers * page_rows * heads.num_kv_heads * heads.head_dim
    return Memory(
        weights=weights * WIDENED_BYTES,
        page=page * WIDENED_BYTES,
        rows=job.run.micro_batches * job.run.batch_tokens * _values_per_row(architecture) * WIDENED_BYTES,
    )


def _values_per_row(architecture: Architecture) -> int:
    """Values that a step holds per row at most at once: around attention, or around the experts and their buffers."""
    heads = architecture.attention
    attention = 2 * (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
    top_k, hidden = architecture.experts.router.top_k, architecture.experts.width
    feed_forward = max(3 * architecture.dense_width, top_k * (3 * hidden + 4 * architecture.width))
    return 4 * architecture.width + max(attention, feed_forward)
