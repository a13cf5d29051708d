"""Latencies: percentiles from buckets, and what a request counts for."""

from collections import Counter

import numpy as np
import pytest

from moempi.engine import latency
from moempi.engine.latency import count_latencies, no_latencies, percentiles
from storage.test_records import make_request


def test_percentiles_are_near_the_exact_ones():
    seconds = np.random.default_rng(1).lognormal(-3, 2, 10_000)
    found = percentiles(Counter(map(latency._bucket, seconds.tolist())))
    exact = np.percentile(seconds, latency.PERCENTILES)
    assert list(found) == list(latency.PERCENTILES)
    np.testing.assert_allclose(list(found.values()), exact, rtol=0.02)


def test_percentiles_of_no_and_of_one_request():
    assert percentiles(Counter()) == {}
    assert percentiles(Counter({latency._bucket(2.0): 1})) == pytest.approx({50: 2.0, 90: 2.0, 99: 2.0}, rel=0.011)


def test_sums_of_counters_are_the_counters_of_all_ranks():
    counts = Counter({-5: 1}) + Counter({-5: 2, 7: 1})
    assert counts == {-5: 3, 7: 1}


@pytest.mark.parametrize(
    ("fields", "counted"),
    [
        ({"num_tokens": 5, "first_token_s": 0.5, "end_to_end_s": 2.5}, [0.5, 0.5, 2.5]),
        ({"num_tokens": 1, "first_token_s": 0.5, "end_to_end_s": 0.5}, [0.5, None, 0.5]),
        ({"num_tokens": 0, "end_to_end_s": 0.25}, [None, None, 0.25]),
        ({"finish": "error", "end_to_end_s": 0.25}, [None, None, None]),
        ({}, [None, None, None]),
    ],
)
def test_what_a_request_counts_for(fields, counted):
    latencies = no_latencies()
    count_latencies(latencies, make_request(0, **fields))
    found = [percentiles(counts).get(50) for counts in latencies.values()]
    assert found == [None if seconds is None else pytest.approx(seconds, rel=0.011) for seconds in counted]
