"""The LM head equals a NumPy twin, in pieces as in one, and on a tensor group as on one rank."""

import numpy as np
import pytest
from mpi4py import MPI

from backend.sampling_twin import requests_of, row_of
from moempi.backend.cpu.backend import NumpyBackend
from moempi.bench.random_layer import run_to_end
from moempi.comm.tensor_group import TensorGroup
from moempi.comm.transfers import PendingTransfers, Transfers
from moempi.layout.row_split import part_range
from moempi.model import head as module
from moempi.model.head import SCORED_ROWS, LMHead
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


def targets_of(seed, count):
    return np.random.default_rng((3, seed)).integers(0, VOCAB, count)


def make_head(comm=MPI.COMM_SELF, *, biased=True):
    """The head as the rank of a group holds it, the group, and the backend."""
    matrix, bias, norm = weights(biased=biased)
    own, backend = part_range(VOCAB, comm.size, comm.rank), CountingBackend()
    head = LMHead(
        backend=backend,
        norm=Norm(kind="rms", eps=EPS, weight=norm),
        matrix=backend.matrix(matrix[own]),
        bias=None if bias is None else bias[own],
        vocab_size=VOCAB,
    )
    transfers = Transfers(backend, PendingTransfers())
    return head, TensorGroup(comm, backend, transfers=transfers, width=WIDTH), backend


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
    head, tensor, _ = make_head(biased=biased)
    x = rows_of(0, 9)
    sampled = run_to_end(head.sample(x, greedy(9), tensor=tensor, counts=[9], top=TOP))
    logprobs = twin_logprobs(x, biased=biased)
    np.testing.assert_array_equal(sampled.tokens, logprobs.argmax(axis=1))
    np.testing.assert_allclose(sampled.logprobs, logprobs.max(axis=1), rtol=0, atol=1e-4)
    assert_top(sampled, logprobs)


def test_each_row_is_sampled_by_its_own_request():
    head, tensor, _ = make_head()
    x = np.repeat(rows_of(0, 1), 6, axis=0)
    uniforms = [0.0, 0.1, 0.4, 0.6, 0.9, 0.99]
    requests = requests_of([row_of(temperature=1.0, uniform=uniform) for uniform in uniforms])
    sampled = run_to_end(head.sample(x, requests, tensor=tensor, counts=[6], top=0))
    logprobs = twin_logprobs(x)[0]
    order = np.argsort(-logprobs)
    drawn = order[np.searchsorted(np.exp(logprobs[order]).cumsum(), uniforms, side="right")]
    np.testing.assert_array_equal(sampled.tokens, drawn)
    assert len(set(drawn.tolist())) > 2
    assert sampled.top_tokens.shape == (6, 0)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("count", [1, SCORED_ROWS, SCORED_ROWS + 1, 3 * SCORED_ROWS - 5])
def test_the_scores_are_the_twin_s_log_probabilities_of_the_targets(biased, count):
    head, tensor, _ = make_head(biased=biased)
    x, targets = rows_of(1, count), targets_of(1, count)
    scored = run_to_end(head.score(x, targets, tensor=tensor, counts=[count], top=TOP))
    logprobs = twin_logprobs(x, biased=biased)
    np.testing.assert_array_equal(scored.tokens, targets)
    np.testing.assert_allclose(scored.logprobs, logprobs[np.arange(count), targets], rtol=0, atol=1e-4)
    assert_top(scored, logprobs)


def test_pieces_of_scored_rows_have_the_bits_of_one_piece(monkeypatch):
    head, tensor, backend = make_head()
    count = 2 * SCORED_ROWS + 7
    x, targets = rows_of(2, count), targets_of(2, count)
    in_pieces = run_to_end(head.score(x, targets, tensor=tensor, counts=[count], top=TOP))
    assert backend.logit_rows == [SCORED_ROWS, SCORED_ROWS, 7]
    monkeypatch.setattr(module, "SCORED_ROWS", 10 * SCORED_ROWS)
    whole = run_to_end(head.score(x, targets, tensor=tensor, counts=[count], top=TOP))
    assert backend.logit_rows[3:] == [count]
    for name in ("tokens", "logprobs", "top_tokens", "top_logprobs"):
        np.testing.assert_array_equal(getattr(in_pieces, name), getattr(whole, name))


def test_no_rows_give_no_tokens_and_no_scores():
    head, tensor, _ = make_head()
    x = rows_of(0, 0)
    for tokens in (
        run_to_end(head.sample(x, requests_of([]), tensor=tensor, counts=[0], top=TOP)),
        run_to_end(head.score(x, targets_of(0, 0), tensor=tensor, counts=[0], top=TOP)),
    ):
        assert (len(tokens.tokens), len(tokens.logprobs), tokens.top_tokens.shape) == (0, 0, (0, TOP))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (SCORED_ROWS + 9, 3), (2, 2 * SCORED_ROWS + 1), (0, 0)])
def test_a_tensor_group_samples_and_scores_as_one_rank_does(comm, num_ranks, counts):
    head, tensor, backend = make_head(comm)
    alone, one_rank, _ = make_head()
    own = counts[comm.rank]
    x, targets = rows_of(comm.rank, own), targets_of(comm.rank, own)
    pairs = [
        (
            run_to_end(head.sample(x, greedy(own), tensor=tensor, counts=counts, top=TOP)),
            run_to_end(alone.sample(x, greedy(own), tensor=one_rank, counts=[own], top=TOP)),
        ),
        (
            run_to_end(head.score(x, targets, tensor=tensor, counts=counts, top=TOP)),
            run_to_end(alone.score(x, targets, tensor=one_rank, counts=[own], top=TOP)),
        ),
    ]
    for divided, whole in pairs:
        np.testing.assert_array_equal(divided.tokens, whole.tokens)
        np.testing.assert_array_equal(divided.top_tokens, whole.top_tokens)
        np.testing.assert_allclose(divided.logprobs, whole.logprobs, rtol=0, atol=1e-6)
        np.testing.assert_allclose(divided.top_logprobs, whole.top_logprobs, rtol=0, atol=1e-6)
    assert max(backend.logit_rows[1:]) <= 2 * SCORED_ROWS
