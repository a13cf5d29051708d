"""What a job records at each position: types and bytes. Pure."""

from moempi.config.architecture import Architecture
from moempi.config.job import Job

EXPERT_TYPES = {"uint8": 1, "uint16": 2, "int32": 4}
"""The types of recorded experts, the smallest first, and their bytes."""


def expert_type(num_experts: int, top_k: int) -> str:
    """The smallest of EXPERT_TYPES that holds the experts and, where a token has one expert, a number beside them."""
    needed = num_experts + (top_k == 1)
    return next((name for name, size in EXPERT_TYPES.items() if needed <= 256**size), "int32")


def recorded_bytes(job: Job, architecture: Architecture) -> dict[str, int]:
    """Bytes that each table of recorded values takes in the results for one position."""
    experts, trace = architecture.experts, job.trace
    layers, top_k = len(architecture.moe_layers), experts.router.top_k
    tables = {}
    if trace.routing:
        choice = EXPERT_TYPES[expert_type(experts.num, top_k)] + 4 * trace.has_weights
        tables["routing"] = layers * top_k * choice + (8 * layers + 8) * trace.has_home
    return tables
