"""Tokens chosen from logits: the launches of kernels/tokens.cu. Each verb blocks the host for its results."""

import numpy as np

from moempi.arrays import Float32Array, IntArray
from moempi.backend.cuda.host_copies import HostCopies
from moempi.backend.cuda.launches import Launches
from moempi.backend.sampling import sample_tokens
from moempi.backend.scores import SUM_TOKENS
from moempi.backend.values import Array, LogitScan, SampledTokens, SamplingRequests, take_likeliest


class TokenVerbs:
    """See `protocol.TokenVerbs`."""

    def __init__(self, launches: Launches, copies: HostCopies) -> None:
        self._launches = launches
        self._copies = copies

    def sample(self, logits: Array, requests: SamplingRequests, *, top: int) -> SampledTokens:
        """The device finds the most likely token; the host applies the other sampling rules."""
        targets = np.full(len(requests), -1)
        for row in np.flatnonzero(~take_likeliest(requests)).tolist():
            (on_host,) = self._copies.download(logits[row])
            targets[row] = sample_tokens(on_host[None], requests[row : row + 1])[0]
        return self.score(logits, targets, top=top)

    def score(self, logits: Array, targets: IntArray, *, top: int) -> SampledTokens:
        """A negative target means the most likely token."""
        (rows, vocabulary), empty = logits.shape, self._launches.empty
        tokens, logprobs = empty((rows,), np.int32), empty((rows,), np.float32)
        top = min(top, vocabulary)
        top_tokens, top_logprobs = empty((rows, top), np.int32), empty((rows, top), np.float32)
        found = (tokens, logprobs, top_tokens, top_logprobs)
        given = (logits, self._copies.upload(targets), *found)
        self._launches.launch("tokens", "score", (rows, 1, 1), 1024, *given, vocabulary, top)
        return SampledTokens(*self._copies.download(*found))

    def scan(self, logits: Array, targets: IntArray, *, first: int, top: int) -> LogitScan:
        (rows, width), top, empty = logits.shape, min(top, logits.shape[1]), self._launches.empty
        blocks = -(-width // SUM_TOKENS)
        highest, sums, target_logits, top_logits = (
            empty(shape, np.float32) for shape in ((rows, blocks), (rows, blocks), (rows,), (rows, top))
        )
        top_tokens = empty((rows, top), np.int32)
        given = (logits, highest, sums, width, SUM_TOKENS)
        self._launches.launch("tokens", "sum_exponentials", (rows, blocks, 1), 256, *given)
        places = self._copies.upload(np.clip(targets - first, 0, width - 1))
        found = (target_logits, top_tokens, top_logits)
        self._launches.launch("tokens", "likeliest", (rows, 1, 1), 1024, logits, places, *found, width, top)
        return LogitScan(*self._copies.download(highest, sums, *found))

    def tokens_above(self, logits: Array, least: Float32Array) -> tuple[IntArray, IntArray, Float32Array]:
        """The first kernel counts, so that the second writes what is downloaded, and no more."""
        (rows, width), grid, empty = logits.shape, (len(logits), 1, 1), self._launches.empty
        limits, counts = self._copies.upload(least), empty((rows,), np.int32)
        self._launches.launch("tokens", "count_above", grid, 1024, logits, limits, counts, width)
        (in_row,) = self._copies.download(counts)
        ends, num_found = np.cumsum(in_row), int(in_row.sum())
        found = [empty((num_found,), kind) for kind in (np.int32, np.float32)]
        if num_found:
            given = (logits, limits, self._copies.upload(ends - in_row), *found, width)
            self._launches.launch("tokens", "take_above", grid, 1024, *given)
        columns, values = self._copies.download(*found)
        return np.repeat(np.arange(rows), in_row), columns, values
