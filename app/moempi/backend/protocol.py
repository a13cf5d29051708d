"""The verbs that a machine must have. The model is written in them alone.

Arrays are opaque to the callers: they may slice, reshape and pass them on, never compute with them. Activations are
rows of the run's precision. With bfloat16 every verb rounds once, when it stores; sums accumulate in float32.
Every verb submits; only those whose text says so block the host.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moempi.config.architecture import Router
from moempi.config.job import Sampling

Array = Any
IntArray = npt.NDArray[np.integer[Any]]
FloatArray = npt.NDArray[np.float32]
Stored = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Expert:
    """One SwiGLU network: `gate_up` maps D to 2F (gate first), `down` maps F to D."""

    gate_up: Array
    down: Array


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values of one layer: each (pages * PAGE_ROWS, key-value heads, head_dim)."""

    keys: Array
    values: Array


@dataclass(frozen=True, slots=True)
class Segment:
    """The new rows of one sequence in a step: rows [row, row + length) stand at positions from `start` on.

    `pages` lists the cache pages of the sequence; position p lives in row p % PAGE_ROWS of page pages[p // PAGE_ROWS].
    """

    row: int
    length: int
    start: int
    pages: IntArray


@dataclass(frozen=True, slots=True)
class Choice:
    """How the next token of one sequence is chosen: its sampling, one uniform number in [0, 1), the tokens so far."""

    sampling: Sampling
    uniform: float
    seen: IntArray


@dataclass(frozen=True, slots=True)
class Picked:
    """Per row: a token, its log-probability, and the `n` most likely tokens with theirs, (rows, n)."""

    tokens: IntArray
    logprobs: FloatArray
    top_tokens: npt.NDArray[np.int32]
    top_logprobs: FloatArray

    def take(self, index: IntArray | slice) -> "Picked":
        """Some of the rows."""
        return Picked(self.tokens[index], self.logprobs[index], self.top_tokens[index], self.top_logprobs[index])

    def shortened(self, top: int) -> "Picked":
        """The same with the `top` most likely tokens only."""
        return Picked(self.tokens, self.logprobs, self.top_tokens[:, :top], self.top_logprobs[:, :top])

    @staticmethod
    def join(parts: "Sequence[Picked]") -> "Picked":
        """The rows of all parts, one after another."""
        return Picked(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.logprobs for part in parts]),
            np.concatenate([part.top_tokens for part in parts]),
            np.concatenate([part.top_logprobs for part in parts]),
        )



class Backend(Protocol):
    """A machine that holds weights and rows and computes on them."""

    name: str
    row_dtype: np.dtype[Any]
    """Element type of rows on the wire: uint16 (bfloat16 bits) or float32."""
    between: Callable[[], None]
    """Called between the pieces of long verbs so that the network makes progress."""

    def available_bytes(self) -> int:
        """Memory of the machine that is free now, shared by all ranks on it."""

    def tensor(self, stored: Stored) -> Array:
        """Take stored values as they are laid out: bfloat16 bits (uint16) or float32, as in the weight file."""

    def matrix(self, *stored: Stored, transposed: bool = False) -> Array:
        """Take stored (outputs, inputs) matrices, joined along the outputs; transposed ones are (inputs, outputs)."""

    def cache(self, pages: int, kv_heads: int, head_dim: int) -> Cache:
        """Make an empty key-value cache of `pages` pages."""

    def clear(self, cache: Cache, pages: IntArray) -> None:
        """Set the rows of `pages` to zero."""

    def wire(self, rows: int, width: int) -> Array:
        """A contiguous, 64-byte aligned buffer of `rows` x `width` wire elements that MPI can read and write."""

    def upload(self, values: IntArray) -> Array:
        """Take a host array of indices."""

    def download(self, values: Array) -> npt.NDArray[Any]:
        """Return a host array of equal values. Blocks the host."""

    def embed(self, tokens: IntArray, table: Array) -> Array:
        """Rows of `table` (V, D) -> (T, D)."""

    def rms_norm(self, x: Array, weight: Array, *, eps: float) -> Array:
        """X / sqrt(mean(x^2) + eps) over the last axis, rounded, times `weight` (Zhang & Sennrich 2019)."""

    def linear(self, x: Array, matrix: Array) -> Array:
        """X (T, inputs) times a matrix -> (T, outputs)."""

    def add(self, x: Array, y: Array) -> Array:
        """X + y, both (T, D)."""

    def rope_angles(self, positions: IntArray, *, theta: float, dim: int) -> Array:
        """Cosines and sines (T, dim / 2) of the rotary angles, once per step."""

    def rotate(self, x: Array, angles: Array) -> Array:
        """Rotate the halves of every head of x (T, H, dim) by the row's angles."""

    def extend_cache(self, cache: Cache, keys: Array, values: Array, segments: Sequence[Segment]) -> None:
        """Write new keys and values (T, key-value heads, head_dim) to their positions."""

    def attend(self, queries: Array, cache: Cache, segments: Sequence[Segment], *, scale: float) -> Array:
        """Causal attention of queries (T, H, dim) over each sequence's cached positions -> (T, H * dim)."""

    def swiglu(self, gate_up: Array) -> Array:
        """silu(gate) * up of (T, 2F) -> (T, F)."""

    def choose_experts(self, x: Array, matrix: Array, router: Router) -> tuple[Array, Array]:
        """The router: experts (T, K) in order of falling score, lowest index on a tie, and float32 weights (T, K)."""

    def group(self, experts: Array, keys: IntArray) -> tuple[Array, Array, IntArray]:
        """Sort the T * K choices by keys[expert], stably. Blocks the host for the counts.

        Returns the choice (t * K + k) at each place (T * K,), the place of each choice (T, K), and how many choices
        have each key (len(keys),), on the host.
        """

    def pack(self, rows: Array, index: Array | None, out: Array) -> None:
        """Write rows[index] (all rows when None) to a wire buffer."""

    def unpack(self, wire: Array, index: Array | None) -> Array:
        """Rows wire[index] (all when None) of a wire buffer."""

    def join(self, parts: Sequence[Array]) -> Array:
        """The rows of all parts, one after another, in memory of their own."""

    def combine(self, wire: Array, places: Array, weights: Array) -> Array:
        """Sum over k, in slot order in float32, of weights[t, k] * wire[places[t, k]] -> (T, D)."""

    def expert_mlp(self, rows: Array, experts: Sequence[Expert], counts: IntArray) -> Array:
        """Apply experts[e] to the next counts[e] rows, for e = 0, 1, ...; rows (sum(counts), D), same shape back."""

    def logits(self, x: Array, head: Array) -> Array:
        """X (N, D) times the output matrix -> (N, V), kept in float32."""

    def pick(self, logits: Array, choices: Sequence[Choice], *, top: int) -> Picked:
        """Choose the next token of each row. Log-probabilities are the model's, before any sampling rule. Blocks."""

    def score(self, logits: Array, targets: IntArray, *, top: int) -> Picked:
        """Log-probability of each row's target token. Blocks the host."""
