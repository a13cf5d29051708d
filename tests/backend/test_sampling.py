"""The rules of sampling, each against its definition."""

import numpy as np
import pytest

from moempi.backend.protocol import SamplingRequest
from moempi.backend.sampling import penalized, sample_token
from moempi.config.job import Sampling

LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.25, 0.2], np.float32))
GRID = (np.arange(2000) + 0.5) / 2000
NO_TOKENS = np.zeros(0, np.int64)


def shares(**rules):
    """How often each token is drawn over an even grid of uniform numbers."""
    sampling = Sampling(**{"temperature": 1.0, **rules})
    drawn = [sample_token(LOGITS, SamplingRequest(sampling, uniform, NO_TOKENS)) for uniform in GRID]
    return np.bincount(drawn, minlength=len(LOGITS)) / len(GRID)


def test_greedy_sampling_takes_the_lowest_token_on_a_tie():
    assert sample_token(np.array([1, 5, 5], np.float32), SamplingRequest(Sampling(), 0.99, NO_TOKENS)) == 1


def test_plain_sampling_follows_the_distribution():
    np.testing.assert_allclose(shares(), [0.1, 0.4, 0.05, 0.25, 0.2], atol=0.001)


def test_a_low_temperature_sharpens_the_distribution():
    np.testing.assert_allclose(shares(temperature=0.5), np.exp(2 * LOGITS) / np.exp(2 * LOGITS).sum(), atol=0.001)


@pytest.mark.parametrize(
    ("rule", "kept"),
    [({"top_k": 2}, [1, 3]), ({"top_p": 0.6}, [1, 3]), ({"top_p": 0.66}, [1, 3, 4]), ({"min_p": 0.45}, [1, 3, 4])],
)
def test_truncation_keeps_the_most_likely_tokens_in_proportion(rule, kept):
    expected = np.zeros(5)
    expected[kept] = np.exp(LOGITS[kept]) / np.exp(LOGITS[kept]).sum()
    np.testing.assert_allclose(shares(**rule), expected, atol=0.001)


def test_repetition_penalty_lowers_seen_tokens_of_either_sign():
    scores = penalized(np.array([2.0, -2.0, 3.0], np.float32), np.array([0, 1, 1]), penalty=2.0)
    np.testing.assert_allclose(scores, [1.0, -4.0, 3.0])
    request = SamplingRequest(Sampling(repetition_penalty=2.0), 0.0, np.array([0]))
    assert sample_token(np.array([2.0, 1.5], np.float32), request) == 1
