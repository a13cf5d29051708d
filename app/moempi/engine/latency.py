"""Latencies of requests, counted in logarithmic buckets so that memory does not grow with the requests."""

import math
from collections import Counter
from collections.abc import Mapping

from moempi.storage.records import RequestRecord

BUCKETS_PER_OCTAVE = 64
"""A percentile is within 1.1 % of the exact one."""
SHORTEST_S = 1e-9
PERCENTILES = (50, 90, 99)

Latencies = Mapping[str, Counter[int]]
"""Requests by bucket, for each kind of latency."""


def no_latencies() -> dict[str, Counter[int]]:
    """No requests in any bucket."""
    return {"time to first token": Counter(), "time per output token": Counter(), "end to end": Counter()}


def count_latencies(latencies: Latencies, record: RequestRecord) -> None:
    """Add the latencies of a finished request, as far as it has them; an error has none."""
    if record.finish == "error" or record.end_to_end_s is None:
        return
    latencies["end to end"][_bucket(record.end_to_end_s)] += 1
    if record.first_token_s is not None:
        latencies["time to first token"][_bucket(record.first_token_s)] += 1
        if len(record.tokens) > 1:
            decoding_s = record.end_to_end_s - record.first_token_s
            latencies["time per output token"][_bucket(decoding_s / (len(record.tokens) - 1))] += 1


def percentiles(counts: Counter[int]) -> dict[int, float]:
    """The PERCENTILES of the latencies in seconds; empty if there are none."""
    found: dict[int, float] = {}
    below, total = 0, counts.total()
    for bucket, count in sorted(counts.items()):
        below += count
        reached = (percent for percent in PERCENTILES if percent not in found and below >= percent / 100 * total)
        found |= dict.fromkeys(list(reached), 2.0 ** (bucket / BUCKETS_PER_OCTAVE))
    return found


def _bucket(seconds: float) -> int:
    return round(BUCKETS_PER_OCTAVE * math.log2(max(seconds, SHORTEST_S)))
