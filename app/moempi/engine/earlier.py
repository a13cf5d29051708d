"""What earlier attempts at a job finished, as their journals say."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moempi.arrays import IntArray
from moempi.engine.traced_rows import TracedRows
from moempi.errors import StorageError
from moempi.storage.journal import JournalReader, Problem, whole_folder
from moempi.storage.records import RequestRecord, TraceRecord

FINISHES = ("stop", "length", "error")
_BLOCK = 1 << 16
_FINISHED_REQUEST = np.dtype(
    [
        *((name, "i8") for name in ("index", "since")),
        *((name, "u4") for name in ("tokens", "computed", "hidden_rows", "scored")),
        *((name, "i1") for name in ("finish", "referenced", "exact")),
    ]
)

FinishedRequests = npt.NDArray[np.void]
"""Finished requests: index, first step of the attempt, numbers of tokens, of computed positions, of hidden states
and of scored tokens, index in FINISHES, whether it has a reference, whether its text equals it."""


@dataclass(frozen=True, eq=False)
class Earlier:
    """The requests that earlier attempts at the job finished; all their steps are below `next_step`.

    `indices` (n,) ascend.
    """

    indices: IntArray
    finishes: Counter[str]
    tokens: int
    referenced: int
    exact: int
    next_step: int = 0

    @classmethod
    def from_finished(cls, finished: FinishedRequests, *, next_step: int = 0) -> "Earlier":
        """Count each request once, as its latest attempt recorded it."""
        once = _latest(finished)
        return cls(
            indices=once["index"].copy(),
            finishes=Counter(FINISHES[finish] for finish in once["finish"].tolist()),
            tokens=int(once["tokens"].sum()),
            referenced=int(once["referenced"].sum()),
            exact=int(once["exact"].sum()),
            next_step=next_step,
        )


def finished_requests(
    journals: Iterable[Path], fingerprint: str, num_requests: int, *, traced: TracedRows | None = None
) -> tuple[FinishedRequests, int, list[Problem]]:
    """Read the journals: their finished requests, the first step number that no attempt has used, and their problems.

    Damage, incomplete records at the end and records that cannot be used are passed over. Recorded rows are counted
    in `traced`, if given. Raises StorageError if a journal has another fingerprint or cannot be read.
    """
    blocks, block, next_step, problems = [], list[tuple[int, ...]](), 0, list[Problem]()
    for path in journals:
        with JournalReader(path) as journal:
            if journal.fingerprint != fingerprint:
                raise StorageError(
                    f"{path}: belongs to an unfinished run with other weights, prompts or settings; finish that run, "
                    f"remove {whole_folder(path)} to give it up, or choose another output.results"
                )
            for _, record in journal.records(num_requests=num_requests):
                if isinstance(record, RequestRecord):
                    block.append(_entry(record))
                    if len(block) == _BLOCK:
                        blocks.append(np.array(block, _FINISHED_REQUEST))
                        block.clear()
                    next_step = max(next_step, record.since + 1)
                elif isinstance(record, TraceRecord):
                    next_step = max(next_step, record.step + 1)
                    if traced is not None:
                        traced.add(record)
            problems += journal.problems
    return np.concatenate([*blocks, np.array(block, _FINISHED_REQUEST)]), next_step, problems


def with_traces(
    finished: FinishedRequests, num_rows: npt.NDArray[np.int64], rows_of: Mapping[str, tuple[str, int]]
) -> tuple[FinishedRequests, int]:
    """The requests all of whose rows are recorded; how many are not.

    `num_rows` (tables, N) is from `TracedRows`. In the tables of `rows_of`, in the same order, a request has as many
    rows as a field of it says, in as many layers. What was lost is recorded again by computing these requests again.
    """
    once = _latest(finished)
    whole = np.ones(len(once), np.bool_)
    for rows, (name, num_layers) in zip(num_rows, rows_of.values(), strict=True):
        whole &= rows[once["index"]] >= num_layers * once[name].astype(np.int64)
    return once[whole], int((~whole).sum())


def _latest(finished: FinishedRequests) -> FinishedRequests:
    """The first entry of the latest attempt for each request, by index."""
    order = np.lexsort((-finished["since"], finished["index"]))
    return finished[order[np.diff(finished["index"][order], prepend=-1) > 0]]


def _entry(record: RequestRecord) -> tuple[int, int, int, int, int, int, int, bool, bool]:
    tokens = len(record.score) + len(record.tokens)
    referenced = record.reference is not None
    exact = referenced and record.text == record.reference
    finish = FINISHES.index(record.finish)
    rows = record.computed, record.hidden_rows, max(len(record.score) - 1, 0)
    return record.index, record.since, tokens, *rows, finish, referenced, exact


NOTHING_EARLIER = Earlier.from_finished(np.zeros(0, _FINISHED_REQUEST))
