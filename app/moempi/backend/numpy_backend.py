"""The backend of machines without a GPU: NumPy, with float32 matrix products from its BLAS.

Weights and the cache are widened to float32 in memory; with bfloat16 the rows between verbs are float32 arrays that
hold bfloat16 values. A row's product depends on how many rows share the BLAS call, so `reproducible` multiplies in
calls that are equal to those of BLOCK rows and attends in blocks of BLOCK positions and PAGE_ROWS keys: results are
then the same bits for any batching.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moempi.arrays import aligned_empty, round_to_bfloat16, widen
from moempi.backend.blocked_product import BLOCK, blocked_product
from moempi.backend.protocol import (
    Cache,
    Choice,
    Expert,
    IntArray,
    Picked,
    Segment,
    Stored,
)
from moempi.backend.sampling import pick_token
from moempi.config.architecture import Router
from moempi.config.tensors import PAGE_ROWS

Rows = npt.NDArray[np.float32]

QUERY_ROWS = 128
PIECE_FLOPS = 4e8


class NumpyBackend:
    """The verbs of `protocol.Backend` on host memory; every verb has finished when it returns."""

    name = "numpy"

    def __init__(self, *, precision: str, reproducible: bool, between: Callable[[], None] = lambda: None) -> None:
        self.is_bfloat16 = precision == "bfloat16"
        self.reproducible = reproducible or not self.is_bfloat16
        self.row_dtype = np.dtype(np.uint16 if self.is_bfloat16 else np.float32)
        self.between = between

    # Weights and buffers

    def available_bytes(self) -> int:
        """See `Backend.available_bytes`: memory that the system can give without swapping."""
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def tensor(self, stored: Stored) -> Rows:
        """See `Backend.tensor`."""
        return widen(stored) if stored.dtype == np.uint16 else stored

    def matrix(self, *stored: Stored, transposed: bool = False) -> Rows:
        """See `Backend.matrix`; held as (inputs, outputs), the faster layout for few rows."""
        parts = [self.tensor(part) if transposed else self.tensor(part).T for part in stored]
        width = sum(part.shape[1] for part in parts)
        joined = aligned_empty((parts[0].shape[0], width), np.float32)
        return np.concatenate(parts, axis=1, out=joined)

    def cache(self, pages: int, kv_heads: int, head_dim: int) -> Cache:
        """See `Backend.cache`."""
        shape = (pages * PAGE_ROWS, kv_heads, head_dim)
        return Cache(keys=np.zeros(shape, np.float32), values=np.zeros(shape, np.float32))

    def clear(self, cache: Cache, pages: IntArray) -> None:
        """See `Backend.clear`."""
        for held in (cache.keys, cache.values):
            held.reshape(-1, PAGE_ROWS, *held.shape[1:])[pages] = 0

    def wire(self, rows: int, width: int) -> npt.NDArray[Any]:
        """See `Backend.wire`."""
        return aligned_empty((rows, width), self.row_dtype)

    def upload(self, values: IntArray) -> IntArray:
        """See `Backend.upload`."""
        return values

    def download(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """See `Backend.download`."""
        return values

    # Rows

    def embed(self, tokens: IntArray, table: Rows) -> Rows:
        """See `Backend.embed`."""
        return table[tokens]

    def rms_norm(self, x: Rows, weight: Rows, *, eps: float) -> Rows:
        """See `Backend.rms_norm`."""
        scale = np.square(x).mean(axis=-1, keepdims=True)
        scale += np.float32(eps)
        np.sqrt(scale, out=scale)
        normalized = self._stored(x / scale)
        normalized *= weight
        return self._stored(normalized)

    def linear(self, x: Rows, matrix: Rows) -> Rows:
        """See `Backend.linear`."""
        return self._stored(self._product(x, matrix))

    def add(self, x: Rows, y: Rows) -> Rows:
        """See `Backend.add`."""
        return self._stored(x + y)

    def swiglu(self, gate_up: Rows) -> Rows:
        """See `Backend.swiglu`."""
        hidden = gate_up.shape[1] // 2
        gate, up = gate_up[:, :hidden], gate_up[:, hidden:]
        activated = np.negative(gate)
        with np.errstate(over="ignore"):
            np.exp(activated, out=activated)
        activated += 1
        np.divide(gate, activated, out=activated)
        activated *= up
        return self._stored(activated)

    # Attention

    def rope_angles(self, positions: IntArray, *, theta: float, dim: int) -> tuple[Rows, Rows]:
        """See `Backend.rope_angles`; shaped (T, 1, dim / 2) to apply to every head."""
        exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
        inverse = (1.0 / np.float32(theta) ** exponents).astype(np.float32)
        angles = positions.astype(np.float32)[:, None, None] * inverse
        return np.cos(angles), np.sin(angles)

    def rotate(self, x: Rows, angles: tuple[Rows, Rows]) -> Rows:
        """See `Backend.rotate`."""
        cosine, sine = angles
        half = x.shape[-1] // 2
        first, second = x[..., :half], x[..., half:]
        rotated = np.empty(x.shape, np.float32)
        np.subtract(first * cosine, second * sine, out=rotated[..., :half])
        np.add(second * cosine, first * sine, out=rotated[..., half:])
        return self._stored(rotated)

    def extend_cache(self, cache: Cache, keys: Rows, values: Rows, segments: Sequence[Segment]) -> None:
        """See `Backend.extend_cache`."""
        for segment in segments:
            rows = slice(segment.row, segment.row + segment.length)
            places = _cache_rows(segment.pages, segment.start, segment.start + segment.length)
            cache.keys[places] = keys[rows]
            cache.values[places] = values[rows]

    def attend(self, queries: Rows, cache: Cache, segments: Sequence[Segment], *, scale: float) -> Rows:
        """See `Backend.attend`; the softmax is in float32."""
        num_rows, heads, dim = queries.shape
        attended = np.empty((num_rows, heads, dim), np.float32)
        for segment in segments:
            end = segment.start + segment.length
            for first, last, num_keys in self._query_blocks(segment.start, end):
                keys_at = _cache_rows(segment.pages, 0, num_keys)
                low, high = max(first, segment.start), min(last, end)
                rows = slice(segment.row + low - segment.start, segment.row + high - segment.start)
                block = np.zeros((last - first, heads, dim), np.float32)
                np.multiply(queries[rows], np.float32(scale), out=block[low - first : high - first])
                result = _attention(block, cache.keys[keys_at], cache.values[keys_at], first)
                attended[rows] = result[low - first : high - first]
            self.between()
        return self._stored(attended.reshape(num_rows, heads * dim))

    def _query_blocks(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Blocks [first, last) of query positions and the number of keys that each sees."""
        if self.reproducible:
            for first in range(start - start % BLOCK, end, BLOCK):
                yield first, first + BLOCK, -(-(first + BLOCK) // PAGE_ROWS) * PAGE_ROWS
        else:
            for first in range(start, end, QUERY_ROWS):
                last = min(first + QUERY_ROWS, end)
                yield first, last, last

    # Experts

    def choose_experts(self, x: Rows, matrix: Rows, router: Router) -> tuple[IntArray, Rows]:
        """See `Backend.choose_experts`."""
        scores = self.linear(x, matrix)
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
        experts = np.argsort(-scores, axis=1, kind="stable")[:, : router.top_k]
        weights = np.take_along_axis(scores, experts, axis=1)
        if router.renormalize:
            weights /= weights.sum(axis=1, keepdims=True)
        return experts.astype(np.int32), self._stored(weights)

    def group(self, experts: IntArray, keys: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """See `Backend.group`."""
        chosen = keys[experts.reshape(-1)]
        order = np.argsort(chosen, kind="stable")
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        return order, places.reshape(experts.shape), np.bincount(chosen, minlength=len(keys))

    def pack(self, rows: Rows, index: IntArray | None, out: npt.NDArray[Any]) -> None:
        """See `Backend.pack`."""
        if not len(out):
            return
        if self.is_bfloat16:
            bits = np.ascontiguousarray(rows).view(np.uint16)[:, 1::2]
            np.copyto(out, bits if index is None else bits[index])
        elif index is None:
            np.copyto(out, rows)
        else:
            np.take(rows, index, axis=0, out=out, mode="clip")

    def unpack(self, wire: npt.NDArray[Any], index: IntArray | None) -> Rows:
        """See `Backend.unpack`."""
        rows = wire if index is None else wire[index]
        return widen(rows) if self.is_bfloat16 else rows

    def join(self, parts: Sequence[Rows]) -> Rows:
        """See `Backend.join`."""
        return np.concatenate(parts)

    def combine(self, wire: npt.NDArray[Any], places: IntArray, weights: Rows) -> Rows:
        """See `Backend.combine`."""
        total = np.zeros((places.shape[0], wire.shape[1]), np.float32)
        for slot in range(places.shape[1]):
            rows = self.unpack(wire, places[:, slot])
            rows = rows * weights[:, slot, None]
            total += rows
        return self._stored(total)

    def expert_mlp(self, rows: Rows, experts: Sequence[Expert], counts: IntArray) -> Rows:
        """See `Backend.expert_mlp`."""
        outputs = np.empty_like(rows)
        first = 0
        for expert, count in zip(experts, counts.tolist(), strict=True):
            if count:
                hidden = self.swiglu(self.linear(rows[first : first + count], expert.gate_up))
                outputs[first : first + count] = self.linear(hidden, expert.down)
                first += count
        return outputs

    # Tokens

    def logits(self, x: Rows, head: Rows) -> Rows:
        """See `Backend.logits`."""
        return self._product(x, head)

    def pick(self, logits: Rows, choices: Sequence[Choice], *, top: int) -> Picked:
        """See `Backend.pick`."""
        tokens = [pick_token(row, choice) for row, choice in zip(logits, choices, strict=True)]
        return self.score(logits, np.array(tokens, np.int32), top=top)

    def score(self, logits: Rows, targets: IntArray, *, top: int) -> Picked:
        """See `Backend.score`."""
        logprobs = _log_softmax(logits)
        top_tokens = np.argsort(-logits, axis=1, kind="stable")[:, :top] if top else np.zeros((len(logits), 0), int)
        return Picked(
            tokens=targets.astype(np.int32),
            logprobs=np.take_along_axis(logprobs, targets.astype(np.intp)[:, None], axis=1)[:, 0],
            top_tokens=top_tokens.astype(np.int32),
            top_logprobs=np.take_along_axis(logprobs, top_tokens, axis=1),
        )

    # The two places where precision and reproducibility are decided

    def _stored(self, values: Rows) -> Rows:
        return round_to_bfloat16(values) if self.is_bfloat16 else values

    def _product(self, x: Rows, matrix: Rows) -> Rows:
        num_rows = len(x)
        most_rows = max(64, int(PIECE_FLOPS / (2 * matrix.shape[0] * matrix.shape[1])))
        if self.reproducible:
            return blocked_product(x, matrix, most_rows=most_rows, between=self.between)
        pieces = max(1, -(-num_rows // most_rows))
        product = np.empty((num_rows, matrix.shape[1]), np.float32)
        for piece in range(pieces):
            rows = slice(piece * num_rows // pieces, (piece + 1) * num_rows // pieces)
            np.matmul(x[rows], matrix, out=product[rows])
            self.between()
        return product


def _attention(queries: Rows, keys: Rows, values: Rows, first: int) -> Rows:
    """Softmax attention of scaled queries (n, H, dim) at positions from `first` on over keys 0 .. len(keys)."""
    num_rows, heads, dim = queries.shape
    kv_heads = keys.shape[1]
    shared = heads // kv_heads
    grouped = queries.reshape(num_rows, kv_heads, shared, dim).transpose(1, 0, 2, 3).reshape(kv_heads, -1, dim)
    scores = np.matmul(grouped, keys.transpose(1, 2, 0))
    if len(keys) > first + 1:
        later = np.arange(first, len(keys))[None, :] > np.arange(first, first + num_rows)[:, None]
        scores.reshape(kv_heads, num_rows, shared, -1)[..., first:] += np.where(later, -np.inf, 0)[:, None, :]
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    total = scores.sum(axis=-1, keepdims=True)
    mixed: Rows = np.matmul(scores, values.transpose(1, 0, 2))
    mixed /= total
    return mixed.reshape(kv_heads, num_rows, shared, dim).transpose(1, 0, 2, 3).reshape(num_rows, heads, dim)


def _cache_rows(pages: IntArray, start: int, end: int) -> Any:
    """Where positions [start, end) lie in the cache: a slice when their pages follow each other, else indices."""
    first, last = start // PAGE_ROWS, -(-end // PAGE_ROWS)
    held = pages[first:last]
    if len(held) == 1 or bool((np.diff(held) == 1).all()):
        base = (int(held[0]) - first) * PAGE_ROWS
        return slice(base + start, base + end)
    positions = np.arange(start, end)
    return pages[positions // PAGE_ROWS] * PAGE_ROWS + positions % PAGE_ROWS


def _log_softmax(logits: Rows) -> Rows:
    shifted = logits - logits.max(axis=1, keepdims=True)
    logprobs: Rows = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return logprobs
