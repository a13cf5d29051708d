"""What a job records at each position: types and bytes. Pure."""

from math import exp, log

from moempi.config.architecture import Architecture
from moempi.config.job import HiddenPositions, Job, TraceSection

EXPERT_TYPES = {"uint8": 1, "uint16": 2, "int32": 4}
"""The types of recorded experts, the smallest first, and their bytes."""
OFFSET_BYTES = 8
"""Bytes of a position in the offsets of tokens above a threshold."""


def expert_type(num_experts: int, top_k: int) -> str:
    """The smallest of EXPERT_TYPES that holds the experts and, where a token has one expert, a number beside them."""
    needed = num_experts + (top_k == 1)
    return next((name for name, size in EXPERT_TYPES.items() if needed <= 256**size), "int32")


def hidden_layers(trace: TraceSection, layers: range, *, num_layers: int) -> tuple[int, ...]:
    """The layers whose hidden states the ranks of a stage of `layers` record.

    The rows behind the feed-forward network of a stage's last layer are those that the next stage begins with.
    """
    behind = trace.hidden_sublayer == "feed_forward"
    held = range(max(layers.start - behind, 0), layers.stop - (behind and layers.stop < num_layers))
    return tuple(layer for layer in sorted(set(trace.hidden)) if layer in held)


def first_hidden(positions: HiddenPositions, prompt: int, capacity: int) -> int:
    """The first position of a request whose hidden states are recorded: 0, or that of the last token to predict one."""
    return 0 if positions == "all" else min(prompt, capacity) - 1


def recorded_bytes(job: Job, architecture: Architecture) -> dict[str, int]:
    """Bytes that each table of recorded values takes in the results for one recorded position.

    Of tokens above a threshold they are the most, as the probabilities of a position's tokens are 1 together.
    """
    experts, trace = architecture.experts, job.trace
    layers, top_k = len(architecture.moe_layers), experts.router.top_k
    tables = {}
    if trace.has_routing:
        choice = EXPERT_TYPES[expert_type(experts.num, top_k)] + 4 * trace.has_weights + 4 * trace.statistics
        tables["routing"] = layers * top_k * choice + (8 * layers + 8) * trace.has_home
    if job.task == "score" and job.score.top_n:
        tables["score"] = min(job.score.top_n, architecture.vocab_size) * _token_bytes(job)
    if job.task == "score" and job.score.threshold:
        tables["above"] = OFFSET_BYTES + most_above(job.score.threshold, architecture.vocab_size) * _token_bytes(job)
    if trace.hidden:
        num_bytes = 2 if trace.hidden_dtype == "bfloat16" else 4
        tables["hidden"] = len(set(trace.hidden)) * architecture.width * num_bytes
    return tables


def least_recorded_bytes(job: Job, architecture: Architecture) -> dict[str, int]:
    """As `recorded_bytes`, but the least."""
    tables = recorded_bytes(job, architecture)
    return tables | ({"above": OFFSET_BYTES} if "above" in tables else {})


def records_scores(job: Job) -> bool:
    """Whether the job writes tokens of scored positions, on the ranks of the last stage."""
    return job.task == "score" and bool(job.score.top_n or job.score.threshold)


def _token_bytes(job: Job) -> int:
    """Bytes of a token and its log-probability."""
    return 4 + (2 if job.score.dtype == "float16" else 4)


def most_above(threshold: float, vocab_size: int) -> int:
    """The largest number of tokens whose log-probability is above a threshold; none is above 0."""
    if not threshold:
        return 0
    return vocab_size if -threshold > log(vocab_size) else min(int(exp(-threshold)), vocab_size)
