"""The figures of a finished run, which `run_report` prints; ranks that print nothing need no more of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moempi.storage.records import Scores


@dataclass(frozen=True, slots=True)
class Report:
    """The figures of a finished run.

    `seconds` holds one number per rank (R,) for each phase (compute, exchange, idle). `expert_load` (L, E) counts
    the tokens that all ranks routed to each expert of each MoE layer. `exact` of `referenced` outputs equal their
    reference. `latencies` has the percentiles in seconds of each kind of latency. `hosts` (R,) names each rank's
    host. The ranks read `loaded_bytes` of weights in all, each in its `loading_s` (R,) seconds. `finishes` counts
    the requests of earlier attempts as well, `tokens` the tokens of this attempt. `sent` counts the bytes and
    messages of rows by kind and by level of link, over all ranks; `transport` names their transport. With a balancing
    routing policy, `asked_load` (L, E) is the load that the routers chose, `moved` the share of choices that the policy
    moved to another expert, and `logprob_change` the mean change that this makes to a token's log-probability, NaN
    if not measured. `errors` has the id and the error of the first requests that ended with one. `scores` sums up the
    scores of all tokens. `slow_hosts` were found slow while the job ran. `replay` counts `routes` that a file gave, and
    those that it `changed`.
    """

    results: str
    tokens: int
    wall_s: float
    seconds: Mapping[str, Sequence[float]]
    expert_load: NDArray[np.int64]
    finishes: Mapping[str, int]
    exact: int = 0
    referenced: int = 0
    latencies: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    hosts: Sequence[str] = ()
    loaded_bytes: int = 0
    loading_s: Sequence[float] = ()
    earlier_requests: int = 0
    earlier_tokens: int = 0
    transport: str = ""
    sent: Mapping[str, int] = field(default_factory=dict)
    asked_load: NDArray[np.int64] | None = None
    moved: float = 0.0
    logprob_change: float = math.nan
    replay: Mapping[str, int] = field(default_factory=dict)
    errors: Sequence[str] = ()
    scores: Scores | None = None
    slow_hosts: Sequence[str] = ()

    @property
    def num_errors(self) -> int:
        """Number of finished requests that ended with an error."""
        return self.finishes.get("error", 0)

    @property
    def num_finished(self) -> int:
        """Number of finished requests, of this attempt and of earlier ones."""
        return sum(self.finishes.values())
