"""The rules of sampling, each against its definition."""

import warnings
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.sampling_twin import requests_of, row_of, sample_slowly
from moempi.backend import sampling
from moempi.backend.sampling import adjusted, sample_tokens
from moempi.backend.values import take_likeliest

LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.25, 0.2], np.float32))
GRID = (np.arange(2000) + 0.5) / 2000


def sample_token(logits, row):
    """The token of a row alone, which is its twin's."""
    token = int(sample_tokens(logits[None], requests_of([row]))[0])
    assert token == sample_slowly(logits, row)
    return token


def shares(**rules):
    """How often each token is drawn over an even grid of uniform numbers."""
    rows = [row_of(**{"temperature": 1.0, "uniform": uniform, **rules}) for uniform in GRID]
    drawn = sample_tokens(np.tile(LOGITS, (len(GRID), 1)), requests_of(rows))
    assert drawn.tolist() == [sample_slowly(LOGITS, row) for row in rows]
    return np.bincount(drawn, minlength=len(LOGITS)) / len(GRID)


def test_greedy_sampling_takes_the_lowest_token_on_a_tie():
    assert sample_token(np.array([1, 5, 5], np.float32), row_of(uniform=0.99)) == 1


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
    request = row_of(seen=[0, 1, 1], repetition_penalty=2.0)
    np.testing.assert_allclose(adjusted(np.array([2.0, -2.0, 3.0], np.float32), request.adjustment), [1.0, -4.0, 3.0])
    assert sample_token(np.array([2.0, 1.5], np.float32), row_of(seen=[0], repetition_penalty=2.0)) == 1


def adjusted_slowly(logits, request):
    """The definition, token by token."""
    rules, scores, adjustment = request.sampling, [], request.adjustment
    for token, logit in enumerate(logits.tolist()):
        score = logit + rules.logit_bias.get(token, 0.0)
        if token in adjustment.seen.tolist():
            score = score / rules.repetition_penalty if score > 0 else score * rules.repetition_penalty
        count = adjustment.generated.tolist().count(token)
        score -= rules.frequency_penalty * count + rules.presence_penalty * (count > 0)
        scores.append(-np.inf if token in adjustment.banned.tolist() else score)
    return scores


TOKENS = st.lists(st.integers(0, 4), max_size=8)
PENALTIES = st.floats(-2, 2)


@given(
    logits=st.lists(st.floats(-100, 100, width=32), min_size=5, max_size=5),
    seen=TOKENS,
    generated=TOKENS,
    banned=st.lists(st.integers(0, 4), max_size=2),
    repetition=st.floats(1e-6, 1e6),
    presence=PENALTIES,
    frequency=PENALTIES,
    bias=st.dictionaries(st.integers(0, 4), st.floats(-100, 100)),
)
def test_bias_and_penalties_are_their_definition(
    logits, seen, generated, banned, repetition, presence, frequency, bias
):
    request = row_of(
        seen=seen,
        generated=generated,
        banned=banned,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=bias,
    )
    row = np.array(logits, np.float32)
    if request.adjustment is None:
        assert sample_token(row, request) == int(np.argmax(row))
        return
    expected = adjusted_slowly(row, request)
    np.testing.assert_allclose(adjusted(row, request.adjustment), expected, rtol=1e-12, atol=1e-12)
    assert sample_token(row, request) == int(np.argmax(adjusted(row, request.adjustment)))


@pytest.mark.parametrize(
    "request_",
    [
        row_of(logit_bias={1: -100.0}),
        row_of(generated=[1, 1], frequency_penalty=2.0),
        row_of(generated=[1], presence_penalty=2.0),
        row_of(banned=[1]),
        row_of(banned=[1], temperature=1.0, uniform=0.5),
    ],
)
def test_each_rule_keeps_the_likeliest_token_from_being_sampled(request_):
    assert not take_likeliest(requests_of([request_]))[0]
    assert sample_token(LOGITS, request_) != 1


def test_plain_rules_take_the_likeliest_token():
    rows = [row_of(top_p=0.5, top_k=3, min_p=0.1, seen=[1]), row_of(temperature=0.1)]
    assert take_likeliest(requests_of(rows)).tolist() == [True, False]


def test_a_vocabulary_that_is_banned_as_a_whole_gives_a_token():
    assert sample_token(np.zeros(2, np.float32), row_of(banned=[0, 1], temperature=1.0, uniform=0.9)) == 0


def test_the_maximum_is_subtracted_before_the_division():
    """Logits of 3e38 at a temperature of 1e-300 would be infinite, and their difference no number."""
    logits = np.array([3e38, 3e38, -3e38], np.float32)
    drawn = [sample_token(logits, row_of(temperature=1e-300, uniform=uniform)) for uniform in (0.2, 0.8)]
    assert drawn == [0, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[np.nan, 1.0, 2.0], [np.inf, 1.0, 2.0], [-np.inf] * 3, [np.nan] * 3])
def test_logits_without_a_finite_maximum_give_a_token_and_no_error(bad, temperature):
    row = row_of(temperature=temperature, top_p=0.9, min_p=0.1, top_k=2, uniform=0.7)
    assert sample_token(np.array(bad, np.float32), row) == 0


def test_logits_of_minus_infinity_are_never_drawn():
    logits = np.array([-np.inf, 1.0, -np.inf, 1.5], np.float32)
    drawn = {sample_token(logits, row_of(temperature=1.0, uniform=uniform)) for uniform in GRID}
    assert drawn == {1, 3}


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-39])
def test_a_temperature_near_zero_takes_the_likeliest_token(temperature):
    for uniform in (0.0, 0.5, 0.999999):
        assert sample_token(LOGITS, row_of(temperature=temperature, uniform=uniform)) == 1
    large = np.array([1e30, 3e30, 2e30], np.float32)
    assert sample_token(large, row_of(temperature=temperature, uniform=0.5)) == 1


EXTREME_LOGITS = [[0, 0, 0], [0, -1, -2], [3e38, 1, -3e38], [-3e38, -3e38, -3e38], [1e-40, 0, -1e-40]]
EXTREME_PENALTIES = [1e-6, 1.0, 1e6]
EXTREME_TEMPERATURES = [0.0, 5e-324, 1e-300, 1.0, 1e300, 1.7e308]


@pytest.mark.parametrize("rules", [{}, {"top_p": 5e-324}, {"min_p": 1.0}, {"min_p": 1e-300}, {"top_k": 2**63 - 1}])
def test_the_largest_and_smallest_rules_give_a_token_without_a_warning(rules):
    seen = np.array([0, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for logits, penalty, temperature in product(EXTREME_LOGITS, EXTREME_PENALTIES, EXTREME_TEMPERATURES):
            row = np.array(logits, np.float32)
            request = row_of(seen=seen, uniform=0.99, repetition_penalty=penalty, temperature=temperature, **rules)
            if request.adjustment is not None:
                assert np.isfinite(adjusted(row, request.adjustment)).all()
            assert 0 <= sample_token(row, request) < 3


RULES = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 7},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 0.9, "top_p": 0.3},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 7, "top_p": 0.8, "min_p": 0.2},
    {"temperature": 1.0, "top_k": 10**9},
    {"temperature": 1e-3},
    {"temperature": 0.8, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "logit_bias": {3: 2.5}},
    {"repetition_penalty": 0.7},
]


@pytest.mark.parametrize("vocabulary", [1, 5, 100, 5000])
def test_each_row_of_many_has_the_token_of_its_twin(vocabulary, monkeypatch):
    """Rows of all rules, with tied and infinite logits, at once and in pieces of three."""
    dice = np.random.default_rng(vocabulary)
    logits = (dice.normal(size=(300, vocabulary)) * 4).astype(np.float32)
    logits[::3] = np.round(logits[::3])
    logits[5::9, : vocabulary // 2] = -np.inf
    logits[7], logits[8, 0], logits[9, -1] = -np.inf, np.nan, np.inf
    uniforms = np.append(dice.random(298), [0.0, 1 - 2.0**-53])
    rows = [
        row_of(
            uniform=uniform, seen=dice.integers(0, vocabulary, 9), generated=dice.integers(0, vocabulary, 4), **rules
        )
        if vocabulary > 3 or "logit_bias" not in rules
        else row_of(uniform=uniform)
        for uniform, rules in zip(uniforms.tolist(), RULES * 30, strict=False)
    ]
    expected = [sample_slowly(*each) for each in zip(logits, rows, strict=True)]
    assert sample_tokens(logits, requests_of(rows)).tolist() == expected
    monkeypatch.setattr(sampling, "MOST_SCORES", 3 * vocabulary)
    assert sample_tokens(logits, requests_of(rows)).tolist() == expected


def test_a_step_without_rows_samples_nothing():
    assert sample_tokens(np.zeros((0, 5), np.float32), requests_of([])).shape == (0,)
