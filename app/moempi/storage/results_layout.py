"""Layout 1 of the results file, shared by its writer (`merge`) and its readers (`results`, `routing`).

Ragged rows are concatenated, with offsets. Text is stored twice: as UTF-8 bytes with offsets, and as a string dataset
for people, in which U+2400 replaces NUL because HDF5 strings cannot hold it. jobs/README.md has the table.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from moempi.config.traces import EXPERT_TYPES

FORMAT = "moempi results"
VERSION = 1
NO_TOKEN = -1
NOWHERE = -1
BLOCK_BYTES = 4 << 20
RECORD_BYTES = 256
"""Memory of a request beside its arrays and texts."""


class ArrayColumn(Struct, frozen=True):
    """The dataset of an array of `RequestRecord`; the rows of all requests are concatenated on the first dimension."""

    path: str
    dtype: type[np.generic]
    dims: tuple[str, ...]
    long_name: str


class TraceColumn(Struct, frozen=True):
    """A column of a table of values at positions; its dataset has one of the `dtypes`.

    The first of its `dims` counts the rows of all requests, the second, in a table of TABLE_LAYERS, the layers. Of home
    ranks, the journal has one number a record, from which the column is made.
    """

    path: str
    dtypes: tuple[type[np.generic], ...]
    dims: tuple[str, ...]
    long_name: str


class TextColumn(Struct, frozen=True):
    """The datasets of a text of `RequestRecord`: a string dataset, and a group of UTF-8 `values` and `offsets`."""

    readable: str
    exact: str
    long_name: str


class SecondsColumn(Struct, frozen=True):
    """The dataset of a duration of `RequestRecord`, NaN where it has none."""

    path: str
    long_name: str


ARRAYS = {
    "prompt": ArrayColumn("prompt/tokens", np.int32, ("prompt_token",), "token ids of the prompts"),
    "tokens": ArrayColumn("output/tokens", np.int32, ("output_token",), "generated token ids"),
    "logprobs": ArrayColumn(
        "output/logprobs", np.float32, ("output_token",), "log-probability of each generated token"
    ),
    "top_tokens": ArrayColumn(
        "output/top_tokens", np.int32, ("output_token", "top"), "likeliest token ids, -1 if fewer"
    ),
    "top_logprobs": ArrayColumn("output/top_logprobs", np.float32, ("output_token", "top"), "their log-probabilities"),
    "score": ArrayColumn("score/logprobs", np.float32, ("prompt_token",), "log-probability of each prompt token"),
    "score_top_tokens": ArrayColumn("score/top_tokens", np.int32, ("prompt_token", "score_top"), "likeliest token ids"),
    "score_top_logprobs": ArrayColumn(
        "score/top_logprobs", np.float32, ("prompt_token", "score_top"), "their log-probabilities"
    ),
}
TEXTS = {
    "id": TextColumn("requests/id", "requests/utf8/id", "id of the request"),
    "finish": TextColumn("requests/finish", "requests/utf8/finish", "why the request ended: stop, length or error"),
    "error": TextColumn("requests/error", "requests/utf8/error", "what went wrong, empty if nothing"),
    "reference": TextColumn(
        "requests/reference", "requests/utf8/reference", "expected answer, empty if none was given"
    ),
    "prompt_id": TextColumn("requests/prompt_id", "requests/utf8/prompt_id", "id of the prompt of a further sample"),
    "endpoint": TextColumn("requests/endpoint", "requests/utf8/endpoint", "OpenAI's name for requests of this kind"),
    "group": TextColumn("requests/group", "requests/utf8/group", "group of the prompt"),
    "metadata": TextColumn("requests/metadata", "requests/utf8/metadata", "JSON object that the prompt came with"),
    "text": TextColumn("output/text/readable", "output/text", "generated text"),
}
SECONDS = {
    "first_token_s": SecondsColumn("requests/first_token_s", "time from leaving the queue to the first token"),
    "end_to_end_s": SecondsColumn("requests/end_to_end_s", "time from leaving the queue to the end"),
}
OPTIONAL_TEXTS = ("reference", "prompt_id", "endpoint", "metadata", "group")
"""Columns that are written only if a request has a value."""
RANK_POSITION = {
    "seat": "number of the rank, counted node by node",
    "node": "node of the rank",
    "island": "its island, of a node's ranks those near to each other; -1 where not told apart",
    "switch": "switch of its node; -1 where not told apart",
    "stage": "pipeline stage of the rank",
    "data": "data parallel group of the rank in its stage",
    "tensor": "place of the rank in its tensor group",
    "hops": "hops of a row to an expert",
    "departs": "1 where experts of the stage's last layer answered to the next stage",
    "row_bytes": "bytes of a row on its way",
}
HOSTED = {
    "row": "rank, as a row of /timing and /placement",
    "layer": "layer of the model",
    "expert": "expert of the layer that the rank hosts",
}
_EXPERTS = tuple(np.dtype(name).type for name in EXPERT_TYPES)
_OF_LAYER = ("routed_token", "routed_layer")
TRACES: dict[str, dict[str, TraceColumn]] = {
    "routing": {
        "experts": TraceColumn("routing/experts", _EXPERTS, (*_OF_LAYER, "slot"), "chosen experts"),
        "weights": TraceColumn("routing/weights", (np.float32,), (*_OF_LAYER, "slot"), "weights of the chosen experts"),
        "norms": TraceColumn("routing/norms", (np.float32,), (*_OF_LAYER, "slot"), "norms of their outputs"),
        "step": TraceColumn(
            "routing/step", (np.int64,), ("routed_token",), "step; the rows of equal steps travelled together"
        ),
        "rank": TraceColumn("routing/rank", (np.int32,), _OF_LAYER, "seat of the rank that routed the row"),
        "row": TraceColumn("routing/row", (np.int32,), _OF_LAYER, "number of the row among those of its rank and step"),
    },
    "hidden": {
        "values": TraceColumn(
            "hidden/values",
            (np.uint16, np.float32),
            ("hidden_token", "hidden_layer", "width"),
            "residual stream behind a layer; bfloat16 is in the journal as its bits",
        )
    },
    "score": {
        "top_tokens": TraceColumn(
            "score/top_tokens", (np.int32,), ("prompt_token", "score_top"), "likeliest token ids"
        ),
        "top_logprobs": TraceColumn(
            "score/top_logprobs", (np.float32, np.float16), ("prompt_token", "score_top"), "their log-probabilities"
        ),
    },
    "above": {
        "counts": TraceColumn("score/above/offsets", (np.int32,), ("prompt_token",), "number of tokens above"),
        "tokens": TraceColumn("score/above/tokens", (np.int32,), ("above_token",), "token ids above the threshold"),
        "logprobs": TraceColumn(
            "score/above/logprobs", (np.float32, np.float16), ("above_token",), "their log-probabilities"
        ),
    },
}
"""The tables of values at positions, by name, and their columns."""
ABOVE_OFFSETS = TRACES["above"]["counts"].path
"""The offsets of each prompt token's row of tokens above the threshold; the journal has the lengths."""
SCORES = ("score", "above")
"""The tables with a row for each prompt token but the first."""
TABLE_LAYERS = {"routing": "routed_layer", "hidden": "hidden_layer"}
"""The dimension of the layers of each table."""
HOME = ("step", "rank", "row")
"""The columns of the routing that say where a row was routed."""
OFFSETS = {"prompt_token": "prompt/offsets", "output_token": "output/offsets"}


def ranges(indices: NDArray[np.int64]) -> Iterator[tuple[slice, slice]]:
    """Yield the places of consecutive ascending `indices`, and the range that they are."""
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    for first, last in pairwise([0, *breaks.tolist(), len(indices)]):
        if first < last:
            yield slice(first, last), slice(int(indices[first]), int(indices[last - 1]) + 1)


def missing_value(dtype: np.dtype[Any]) -> float:
    """What all entries of a row are if it was not recorded: NaN, -1, or the largest number of an unsigned type.

    Such a row of experts is no choice, as no token chooses an expert twice.
    """
    if dtype.kind == "f":
        return float("nan")
    return int(np.iinfo(dtype).max) if dtype.kind == "u" else -1


def blocks(num_bytes: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield ranges [start, stop) of requests that together have at most BLOCK_BYTES, or one larger request."""
    ends = np.cumsum(num_bytes + RECORD_BYTES)
    start = 0
    while start < len(ends):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + BLOCK_BYTES, side="right")))
        yield start, stop
        start = stop
