"""The arguments of the C kernels: the structures of kernels.h, field by field.

An array is given by the address of its first number.
"""

import ctypes
import struct
from typing import Any

POINTER, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
TYPES: dict[str, Any] = {
    "pointer": POINTER,
    "two_pointers": POINTER * 2,
    "long": LONG,
    "int": INT,
    "float": FLOAT,
}
PRODUCT = struct.Struct("@PPPPPllllliii0l")
"""A `product` of product.c; as bytes, because a step describes thousands of them."""


def _structure(name: str, fields: str) -> type[ctypes.Structure]:
    """The structure with these fields: on each line a type and the names of fields."""
    lines = [line.split() for line in fields.strip().splitlines()]
    return type(
        name, (ctypes.Structure,), {"_fields_": [(field, TYPES[kind]) for kind, *names in lines for field in names]}
    )


Attention = _structure(
    "Attention",
    """
    pointer queries keys values out segments pages sinks
    long num_segments heads kv_heads dim value_dim value_stride window
    pointer first_tasks
    int is_bfloat16 rounded
    """,
)
Norm = _structure(
    "Norm",
    """
    pointer x y weight sum out
    long rows heads width stride
    float eps
    int quotient_rounded rounded
    """,
)
Activation = _structure(
    "Activation",
    """
    pointer gate_up out
    long rows width
    int clamped rounded
    float limit alpha
    """,
)
Rotation = _structure(
    "Rotation",
    """
    pointer x cosine sine out cache cached weight
    long rows heads dim stride pairs
    float eps
    int quotient_rounded interleaved rounded is_bfloat16
    """,
)
Selection = _structure(
    "Selection",
    """
    pointer queries weights keys scores positions seen first_pages pages
    long rows heads dim width top_k
    int is_bfloat16
    """,
)
Convolution = _structure(
    "Convolution",
    """
    pointer x taps bias tail out spans
    long num_spans channels num_taps stride
    int rounded
    """,
)
DeltaRule = _structure(
    "DeltaRule",
    """
    pointer queries keys values alpha beta skip unit_queries unit_keys memory out spans
    long num_spans rows key_heads heads key_dim value_dim stride
    int rounded
    """,
)
GatedNorm = _structure(
    "GatedNorm",
    """
    pointer x gate weight out
    long rows heads width
    float eps
    int rounded
    """,
)
Gathering = _structure(
    "Gathering",
    """
    pointer from_ to index
    long rows width
    int widens narrows bytes
    """,
)
Combination = _structure(
    "Combination",
    """
    pointer buffer output_rows weights
    two_pointers addends
    pointer out
    long rows slots width
    int is_bfloat16 rounded
    """,
)
ExponentialSums = _structure(
    "ExponentialSums",
    """
    pointer logits highest sums
    long rows width block
    """,
)
Angles = _structure(
    "Angles",
    """
    pointer positions frequencies cosine sine
    long rows pairs
    float amplitude
    """,
)
Choice = _structure(
    "Choice",
    """
    pointer logits correction scores experts weights
    long rows num top_k num_groups kept_groups scores_of_group
    int scoring renormalize rounds_logits rounded
    float least_sum scaling
    """,
)
NormWeights = TYPES["norm_weights"] = _structure(
    "NormWeights",
    """
    pointer weight
    float eps
    int quotient_rounded
    """,
)
Matrix = TYPES["matrix"] = _structure(
    "Matrix",
    """
    pointer packed bias
    long inputs outputs
    int weights
    """,
)
AttentionLayer = _structure(
    "AttentionLayer",
    """
    matrix qkv output
    norm_weights before of_queries of_keys after
    long heads kv_heads dim
    float scale
    int interleaved is_bfloat16
    """,
)
AttentionRows = _structure(
    "AttentionRows",
    """
    pointer x cosine sine keys values cached queries attended sum out scratch
    long rows pairs
    """,
)
Expert = _structure("Expert", "pointer gate_up down gate_up_bias down_bias")
ExpertsLayer = _structure(
    "ExpertsLayer",
    """
    matrix router gate_up down
    pointer experts correction
    long num top_k num_groups kept_groups scores_of_group
    int scoring renormalize rounds_logits rounds_weights
    float least_sum scaling
    int clamped
    float limit alpha
    int is_bfloat16
    """,
)
ExpertsRows = _structure(
    "ExpertsRows",
    """
    pointer x
    two_pointers addends
    pointer out experts weights load scratch
    long rows
    """,
)
FusedLayer = _structure(
    "FusedLayer",
    """
    pointer attention experts keys values sinks
    long window
    """,
)
LayersRows = _structure(
    "LayersRows",
    """
    pointer x cosine sine cached segments pages first_tasks out experts weights loads scratch
    long rows pairs num_segments
    """,
)
