"""The LM head equals a NumPy twin, in pieces as in one, and on a tensor group as on one rank."""

from functools import partial

import numpy as np
import pytest
from mpi4py import MPI

from backend.sampling_twin import requests_of, row_of
from comm.head_groups import head_group
from moempi.backend.cpu.backend import NumpyBackend
from moempi.backend.cpu.compiled import CompiledBackend
from moempi.backend.cpu.kernels import load_kernels
from moempi.backend.scores import SUM_TOKENS, Above
from moempi.backend.values import SampledTokens
from moempi.bench.random_layer import run_to_end
from moempi.layout import row_buffers
from moempi.layout.row_buffers import SCORED_ROWS
from moempi.layout.row_split import part_range
from moempi.model import head as module
from moempi.model.head import LMHead, ScoredTokens
from moempi.model.norm import Norm

WIDTH, VOCAB, TOP, EPS = 24, 37, 4, 1e-5


class CountingBackend(NumpyBackend):
    """Keeps the number of rows of each product with the output matrix."""

    def __init__(self):
        super().__init__(precision="float32")
        self.logit_rows = []

    def logits(self, x, head, bias=None):
        self.logit_rows.append(len(x))
        return super().logits(x, head, bias)


def weights(*, biased=True):
    random = np.random.default_rng(1)
    matrix, bias, norm = (random.normal(size=size).astype(np.float32) for size in ((VOCAB, WIDTH), VOCAB, WIDTH))
    return matrix, bias if biased else None, norm


def rows_of(seed, count):
    return np.random.default_rng((2, seed)).normal(size=(count, WIDTH)).astype(np.float32)


def score(head, group, x, targets, counts, **tokens):
    """The scores of a rank's rows, and what is written of them, in one piece."""
    pieces, recorded = [], ScoredTokens(**({"top": TOP} | tokens))

    def keep(rows, scored):
        pieces.append(scored)

    sampled = run_to_end(head.score(x, targets, group=group, counts=counts, recorded=recorded, on_scored=keep))
    top_tokens, top_logprobs = (np.concatenate([piece[place] for piece in pieces]) for place in (1, 2))
    above = Above(*(np.concatenate([piece.above[place] for piece in pieces]) for place in range(3)))
    np.testing.assert_array_equal(np.concatenate([piece.logprobs for piece in pieces]), sampled.logprobs)
    return SampledTokens(sampled.tokens, sampled.logprobs, top_tokens, top_logprobs), above


def targets_of(seed, count):
    return np.random.default_rng((3, seed)).integers(0, VOCAB, count)


def make_head(comm=MPI.COMM_SELF, *, biased=True, groups=1):
    """The head as a rank of equal tensor groups holds it, the group that divides it, and the backend."""
    matrix, bias, norm = weights(biased=biased)
    own, backend = part_range(VOCAB, comm.size, comm.rank), CountingBackend()
    head = LMHead(
        backend=backend,
        norm=Norm(kind="rms", eps=EPS, weight=norm),
        matrix=backend.matrix(matrix[own]),
        bias=None if bias is None else bias[own],
        vocab_size=VOCAB,
    )
    return head, head_group(comm, backend, width=WIDTH, groups=groups), backend


def twin_logprobs(x, *, biased=True):
    """Log-probabilities (N, V) in float64."""
    matrix, bias, norm = (None if array is None else array.astype(float) for array in weights(biased=biased))
    normed = x / np.sqrt((x.astype(float) ** 2).mean(axis=1, keepdims=True) + EPS) * norm
    logits = normed @ matrix.T + (0 if bias is None else bias)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def assert_top(sampled, logprobs, *, top=TOP):
    order = np.argsort(-logprobs, axis=1)[:, :top]
    np.testing.assert_array_equal(sampled.top_tokens, order)
    np.testing.assert_allclose(sampled.top_logprobs, np.take_along_axis(logprobs, order, axis=1), rtol=0, atol=1e-4)


def greedy(count):
    return requests_of([row_of(uniform=0.5)] * count)


@pytest.mark.parametrize("biased", [False, True])
def test_the_sampled_tokens_are_the_twin_s_likeliest(biased):
    head, group, _ = make_head(biased=biased)
    x = rows_of(0, 9)
    sampled = run_to_end(head.sample(x, greedy(9), group=group, counts=np.array([[9]]), top=TOP))
    logprobs = twin_logprobs(x, biased=biased)
    np.testing.assert_array_equal(sampled.tokens, logprobs.argmax(axis=1))
    np.testing.assert_allclose(sampled.logprobs, logprobs.max(axis=1), rtol=0, atol=1e-4)
    assert_top(sampled, logprobs)


def test_each_row_is_sampled_by_its_own_request():
    head, group, _ = make_head()
    x = np.repeat(rows_of(0, 1), 6, axis=0)
    uniforms = [0.0, 0.1, 0.4, 0.6, 0.9, 0.99]
    requests = requests_of([row_of(temperature=1.0, uniform=uniform) for uniform in uniforms])
    sampled = run_to_end(head.sample(x, requests, group=group, counts=np.array([[6]]), top=0))
    logprobs = twin_logprobs(x)[0]
    order = np.argsort(-logprobs)
    drawn = order[np.searchsorted(np.exp(logprobs[order]).cumsum(), uniforms, side="right")]
    np.testing.assert_array_equal(sampled.tokens, drawn)
    assert len(set(drawn.tolist())) > 2
    assert sampled.top_tokens.shape == (6, 0)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("count", [1, SCORED_ROWS, SCORED_ROWS + 1, 3 * SCORED_ROWS - 5])
def test_the_scores_are_the_twin_s_log_probabilities_of_the_targets(biased, count):
    head, group, _ = make_head(biased=biased)
    x, targets = rows_of(1, count), targets_of(1, count)
    scored = score(head, group, x, targets, np.array([[count]]))[0]
    logprobs = twin_logprobs(x, biased=biased)
    np.testing.assert_array_equal(scored.tokens, targets)
    np.testing.assert_allclose(scored.logprobs, logprobs[np.arange(count), targets], rtol=0, atol=1e-4)
    assert_top(scored, logprobs)


def test_pieces_of_scored_rows_have_the_bits_of_one_piece(monkeypatch):
    head, group, backend = make_head()
    count = 2 * SCORED_ROWS + 7
    x, targets = rows_of(2, count), targets_of(2, count)
    in_pieces = score(head, group, x, targets, np.array([[count]]))[0]
    assert backend.logit_rows == [SCORED_ROWS, SCORED_ROWS, 7]
    monkeypatch.setattr(row_buffers, "SCORED_ROWS", 10 * SCORED_ROWS)
    whole = score(head, group, x, targets, np.array([[count]]))[0]
    assert backend.logit_rows[3:] == [count]
    for name in ("tokens", "logprobs", "top_tokens", "top_logprobs"):
        np.testing.assert_array_equal(getattr(in_pieces, name), getattr(whole, name))


def test_no_rows_give_no_tokens_and_no_scores():
    head, group, _ = make_head()
    x = rows_of(0, 0)
    for tokens in (
        run_to_end(head.sample(x, requests_of([]), group=group, counts=np.array([[0]]), top=TOP)),
        score(head, group, x, targets_of(0, 0), np.array([[0]]))[0],
    ):
        assert (len(tokens.tokens), len(tokens.logprobs), tokens.top_tokens.shape) == (0, 0, (0, TOP))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (SCORED_ROWS + 9, 3), (2, 2 * SCORED_ROWS + 1), (0, 0)])
def test_ranks_sample_and_score_as_one_rank_does(comm, num_ranks, counts, groups):
    head, group, backend = make_head(comm, groups=groups)
    alone, one_rank, _ = make_head()
    own, counts = counts[comm.rank], np.reshape(counts, (groups, -1))
    x, targets = rows_of(comm.rank, own), targets_of(comm.rank, own)
    pairs = [
        (
            run_to_end(head.sample(x, greedy(own), group=group, counts=counts, top=TOP)),
            run_to_end(alone.sample(x, greedy(own), group=one_rank, counts=np.array([[own]]), top=TOP)),
        ),
        (
            score(head, group, x, targets, counts)[0],
            score(alone, one_rank, x, targets, np.array([[own]]))[0],
        ),
    ]
    for divided, whole in pairs:
        np.testing.assert_array_equal(divided.tokens, whole.tokens)
        np.testing.assert_array_equal(divided.top_tokens, whole.top_tokens)
        np.testing.assert_allclose(divided.logprobs, whole.logprobs, rtol=0, atol=1e-6)
        np.testing.assert_allclose(divided.top_logprobs, whole.top_logprobs, rtol=0, atol=1e-6)
    assert max(backend.logit_rows[1:]) <= 2 * SCORED_ROWS


def large_vocabulary():
    """A head matrix and bias, rows and targets, of a vocabulary of several blocks with equal logits in two of them."""
    random, vocab = np.random.default_rng(5), 5 * SUM_TOKENS + 777
    matrix, bias = (random.normal(size=size).astype(np.float32) for size in ((vocab, WIDTH), vocab))
    matrix[SUM_TOKENS + 5], bias[SUM_TOKENS + 5] = matrix[3], bias[3]
    return matrix, bias, random.normal(size=(9, WIDTH)).astype(np.float32), random.integers(0, vocab, 9)


@pytest.mark.parametrize("make", [NumpyBackend, partial(CompiledBackend, load_kernels())])
def test_pieces_of_the_vocabulary_of_any_size_have_the_bits_of_one(monkeypatch, make):
    matrix, bias, x, targets = large_vocabulary()
    backend = make(precision="float32")
    norm = Norm(kind="rms", eps=EPS, weight=np.ones(WIDTH, np.float32))
    head = LMHead(backend, norm, backend.matrix(matrix), bias, len(matrix))
    group, found = head_group(MPI.COMM_SELF, backend, width=WIDTH), []
    for logits in (1, 2 * len(x) * SUM_TOKENS, 1 << 30):
        monkeypatch.setattr(module, "SCORED_LOGITS", logits)
        found.append(score(head, group, x, targets, np.array([[len(x)]]), top=300, threshold=-9.0))
    for sampled, above in found[1:]:
        for name in ("logprobs", "top_tokens", "top_logprobs"):
            np.testing.assert_array_equal(getattr(sampled, name), getattr(found[0][0], name))
        for values, expected in zip(above, found[0][1], strict=True):
            np.testing.assert_array_equal(values, expected)
    logits = norm(backend, x).astype(np.float64) @ matrix.T + bias
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert_top(found[0][0], logprobs, top=300)
    counts, tokens, _ = found[0][1]
    near = (np.abs(logprobs + 9.0) < 1e-4).sum(axis=1)
    assert (np.abs(counts - (logprobs > -9.0).sum(axis=1)) <= near).all()
    assert set(np.flatnonzero(logprobs[0] > -9.0 + 1e-4)) <= set(tokens[: counts[0]])


@pytest.mark.ranks(4)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("make", [NumpyBackend, partial(CompiledBackend, load_kernels())])
def test_ranks_score_a_large_vocabulary_with_the_bits_of_one_rank(comm, num_ranks, monkeypatch, make, groups):
    matrix, bias, x, targets = large_vocabulary()
    backend, counts = make(precision="float32"), np.array([4, 0, 3, 2])
    first = counts[: comm.rank].sum()
    norm = Norm(kind="rms", eps=EPS, weight=np.ones(WIDTH, np.float32))
    found = []
    for ranks, rows, of_ranks in (
        (comm, slice(first, first + counts[comm.rank]), counts.reshape(groups, -1)),
        (MPI.COMM_SELF, slice(0, 9), np.array([[9]])),
    ):
        own = part_range(len(matrix), ranks.size, ranks.rank)
        head = LMHead(backend, norm, backend.matrix(matrix[own]), bias[own], len(matrix))
        group = head_group(ranks, backend, width=WIDTH, groups=len(of_ranks))
        for place in (module, row_buffers):
            monkeypatch.setattr(place, "SCORED_LOGITS", 9 * SUM_TOKENS)
        sampled, above = score(head, group, x[rows], targets[rows], of_ranks, top=300, threshold=-9.0)
        found.append((sampled, above, rows))
    (divided, above, rows), (whole, whole_above, _) = found
    for name in ("logprobs", "top_tokens", "top_logprobs"):
        np.testing.assert_array_equal(getattr(divided, name), getattr(whole, name)[rows])
    np.testing.assert_array_equal(above.counts, whole_above.counts[rows])
    of_rows = np.repeat(np.arange(9), whole_above.counts)
    own = np.isin(of_rows, np.arange(9)[rows])
    np.testing.assert_array_equal(above.tokens, whole_above.tokens[own])
    np.testing.assert_array_equal(above.logprobs, whole_above.logprobs[own])
