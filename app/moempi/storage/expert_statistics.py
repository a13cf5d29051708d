"""Statistics of experts, summed over the recorded positions of each prompt group; beside /experts/load."""

from collections.abc import Callable
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from moempi.storage.journal_index import JournalIndex
from moempi.storage.results_columns import create
from moempi.storage.results_layout import missing_value

BLOCK_ROWS = 1 << 14
OF_EXPERT = ("group", "routed_layer", "expert")
SUMS = {
    "tokens": (np.int64, "positions of the group that chose the expert"),
    "gates": (np.float64, "sum of the expert's weights"),
    "gated_norms": (np.float64, "sum of the expert's weight times the norm of its output"),
}


def write_statistics(file: Any, index: JournalIndex, require_success: Callable[[], None]) -> None:
    """Write /statistics from the whole /routing of the file; memory holds the sums of one layer and a block of rows.

    The sums are of recorded positions alone, each of which is in the file once, whatever attempts computed it.
    """
    groups = create(file, "statistics/group", h5py.string_dtype(), ("group",), "group of prompts")
    groups[...] = index.groups
    num_experts = index.expert_load.shape[1]
    sums = {name: create(file, f"statistics/{name}", kind, OF_EXPERT, text) for name, (kind, text) in SUMS.items()}
    pairs = create(
        file, "statistics/pairs", np.int64, (*OF_EXPERT, "expert_beside"), "positions that chose both experts"
    )
    ends, group_of_request = np.cumsum(index.entries["computed"], dtype=np.int64), index.group_of_request
    for layer in range(len(index.traces["routing"].layers)):
        require_success()
        totals = _layer_sums(file, layer, ends, group_of_request, (len(index.groups), num_experts))
        for name, dataset in sums.items():
            dataset[:, layer] = totals[name]
        pairs[:, layer] = totals["pairs"]


def _layer_sums(
    file: Any, layer: int, ends: NDArray[np.int64], group_of_request: NDArray[np.int64], shape: tuple[int, int]
) -> dict[str, NDArray[Any]]:
    """The sums (groups, experts) and pairs (groups, experts, experts) of one layer.

    The rows of request i end before row `ends[i]`.
    """
    num_groups, num_experts = shape
    totals: dict[str, NDArray[Any]] = {name: np.zeros(shape, kind) for name, (kind, _) in SUMS.items()}
    totals["pairs"] = np.zeros((*shape, num_experts), np.int64)
    num_rows = int(ends[-1]) if len(ends) else 0
    for start in range(0, num_rows, BLOCK_ROWS):
        rows = slice(start, min(start + BLOCK_ROWS, num_rows))
        experts, gates, norms = (file[f"routing/{name}"][rows, layer] for name in ("experts", "weights", "norms"))
        known = (experts != missing_value(experts.dtype)).any(axis=1)
        experts, gates, norms = experts[known].astype(np.int64), gates[known].astype(np.float64), norms[known]
        numbers = np.arange(rows.start, rows.stop)[known]
        groups = group_of_request[np.searchsorted(ends, numbers, side="right")]
        entries = (groups[:, None] * num_experts + experts).reshape(-1)
        for name, values in (("tokens", None), ("gates", gates), ("gated_norms", gates * norms)):
            found = np.bincount(entries, None if values is None else values.reshape(-1), num_groups * num_experts)
            totals[name] += found.reshape(shape).astype(totals[name].dtype, copy=False)
        for group in np.unique(groups).tolist():
            chosen = np.zeros((int((groups == group).sum()), num_experts), np.float32)
            np.put_along_axis(chosen, experts[groups == group], 1, axis=1)
            totals["pairs"][group] += (chosen.T @ chosen).astype(np.int64)  # exact: counts below 2**24
    return totals
