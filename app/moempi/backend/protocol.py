"""The verbs that a machine must have. The model is written in them alone.

Arrays are opaque to the callers: they may slice, reshape and pass them on, never compute with them. Activations are
rows of the run's precision. With bfloat16 every verb rounds once, when it stores; sums accumulate in float32.
Every verb submits; only those whose text says so block the host.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moempi.arrays import Float32Array, IntArray
from moempi.config.architecture import Clamp, Router
from moempi.config.job import Sampling

Array = Any
Stored = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Expert:
    """One SwiGLU network: `gate_up` maps D to 2F (gate first), `down` maps F to D, each with its bias if it has one."""

    gate_up: Array
    down: Array
    gate_up_bias: Array | None = None
    down_bias: Array | None = None
    clamp: Clamp | None = None


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values of one layer: each (pages * PAGE_ROWS, key-value heads, numbers of a head)."""

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
class SamplingRequest:
    """How the next token of one sequence is chosen: its sampling, one uniform number in [0, 1), the tokens so far."""

    sampling: Sampling
    uniform: float
    seen: IntArray


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """Per row: a token, its log-probability, and the `n` most likely tokens with theirs, (rows, n)."""

    tokens: IntArray
    logprobs: Float32Array
    top_tokens: npt.NDArray[np.int32]
    top_logprobs: Float32Array

    def take(self, index: IntArray | slice) -> "SampledTokens":
        """Some of the rows."""
        return SampledTokens(self.tokens[index], self.logprobs[index], self.top_tokens[index], self.top_logprobs[index])

    def with_top(self, top: int) -> "SampledTokens":
        """The same with the `top` most likely tokens only."""
        return SampledTokens(self.tokens, self.logprobs, self.top_tokens[:, :top], self.top_logprobs[:, :top])

    @staticmethod
    def join(parts: "Sequence[SampledTokens]") -> "SampledTokens":
        """The rows of all parts, one after another."""
        return SampledTokens(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.logprobs for part in parts]),
            np.concatenate([part.top_tokens for part in parts]),
            np.concatenate([part.top_logprobs for part in parts]),
        )


class Event(Protocol):
    """A place in what was submitted."""

    def is_done(self) -> bool:
        """Whether all before it is done; does not block."""

    def synchronize(self) -> None:
        """Block the host until it is."""


class Backend(Protocol):
    """A machine that holds weights and rows and computes on them."""

    name: str
    row_dtype: np.dtype[Any]
    """Element type of rows on the wire: uint16 (bfloat16 bits) or float32."""
    comm_buffers_on_host: bool
    """Whether the host itself can read and write what `wire` makes."""

    def available_bytes(self) -> int:
        """Memory of the machine that is free now, shared by all ranks on it."""

    def tensor(self, *stored: Stored) -> Array:
        """Take stored values, bfloat16 bits (uint16) or float32, as they are laid out, joined along axis 0."""

    def matrix(self, *stored: Stored, transposed: bool = False) -> Array:
        """Take stored (outputs, inputs) matrices, joined along the outputs; transposed ones are (inputs, outputs)."""

    def cache(self, pages: int, kv_heads: int, head_dim: int, *, latent: int = 0) -> Cache:
        """Make an empty cache of `pages` pages; with `latent`, values are the first `latent` numbers of the keys."""

    def clear(self, cache: Cache, pages: IntArray) -> None:
        """Set the rows of `pages` to zero."""

    @property
    def queue(self) -> int:
        """The number of the current queue: verbs are submitted to it."""

    def on_queue(self, number: int) -> AbstractContextManager[None]:
        """Make `number` the current queue (a CUDA stream) inside a `with`. Queues are not ordered by each other."""

    def record_event(self) -> Event | None:
        """A mark behind all that the queue was given; None where every verb is done when it returns."""

    def register_host_memory(self, memory: npt.NDArray[np.uint8]) -> None:
        """Let `pack` and `unpack` work on host memory that somebody else allocated, for as long as the process runs."""

    def comm_buffer(self, rows: int, width: int) -> Array:
        """A contiguous, 64-byte aligned buffer of `rows` x `width` wire elements that MPI can read and write.

        What verbs wrote to it is there once a `mark` behind them is reached.
        """

    def upload(self, values: npt.NDArray[Any]) -> Array:
        """Take a host array of indices or weights as it is."""

    def download(self, values: Array) -> npt.NDArray[Any]:
        """Return a host array of equal values. Blocks the host."""

    def embed(self, tokens: IntArray, table: Array) -> Array:
        """Rows of `table` (V, D) -> (T, D)."""

    def rms_norm(self, x: Array, weight: Array, *, eps: float, rounded: bool = True) -> Array:
        """X / sqrt(mean(x^2) + eps) over the last axis, rounded or not, times `weight` (Zhang & Sennrich 2019)."""

    def layer_norm(self, x: Array, weight: Array, bias: Array, *, eps: float) -> Array:
        """(X - mean(x)) / sqrt(variance(x) + eps) over the last axis, times `weight`, plus `bias` (Ba et al. 2016)."""

    def linear(self, x: Array, matrix: Array, bias: Array | None = None) -> Array:
        """X (T, inputs) times a matrix, plus the bias (outputs,) -> (T, outputs)."""

    def linear_heads(self, x: Array, matrices: Array) -> Array:
        """Each head of x (T, H, inputs) times its own matrix, of (H, inputs, outputs) -> (T, H, outputs)."""

    def clip(self, x: Array, limit: float) -> Array:
        """X with every number brought within -limit and limit."""

    def join_columns(self, *parts: Array) -> Array:
        """The parts side by side, joined along their last axis."""

    def add(self, x: Array, y: Array) -> Array:
        """X + y, both (T, D)."""

    def rope_angles(self, positions: IntArray, *, frequencies: Float32Array, amplitude: float) -> Array:
        """Cosines and sines (T, n) of position times frequency, times `amplitude`; in float32, once per step."""

    def rotate(self, x: Array, angles: Array, *, interleaved: bool = False) -> Array:
        """Rotate the first 2n numbers of every head of x (T, H, dim) by the row's n angles.

        The number that turns with number i is i + n, or its neighbour when `interleaved`.
        """

    def extend_cache(self, cache: Cache, keys: Array, values: Array | None, segments: Sequence[Segment]) -> None:
        """Write new keys and values (T, key-value heads, dim) to their positions; a latent cache takes keys only."""

    def attend(
        self,
        queries: Array,
        cache: Cache,
        segments: Sequence[Segment],
        *,
        scale: float,
        window: int = 0,
        sinks: Array | None = None,
    ) -> Array:
        """Causal attention of queries (T, H, dim) over each sequence's cached positions -> (T, H, value dim).

        Only the last `window` positions are seen unless it is 0. `sinks` (H,) are logits that take part in the softmax
        and give nothing.
        """

    def swiglu(self, gate_up: Array, clamp: Clamp | None = None) -> Array:
        """silu(gate) * up of (T, 2F) -> (T, F); for the clamped form see `config.architecture.Clamp`."""

    def scale_by_sigmoid(self, x: Array, logits: Array) -> Array:
        """Rows x (T, D) times the sigmoid of their logits (T, 1)."""

    def router_logits(self, x: Array, matrix: Array, router: Router, *, bias: Array | None = None) -> Array:
        """X (T, D) times the router's matrix, plus the bias (E,) -> (T, E)."""

    def choose_experts(
        self,
        logits: Array,
        router: Router,
        *,
        correction: Array | None = None,
        selection_bias: Float32Array | None = None,
    ) -> tuple[Array, Array]:
        """The router: experts (T, K) in order of falling score, lowest index on a tie, and float32 weights (T, K).

        The float32 `correction` (E,), and a `shift` (E,) from the host, are added to the scores that select.
        """

    def pick_replicas(self, experts: Array, period: int) -> Array:
        """Experts (T, K) -> experts * turns + row % turns (T, K): where rows find theirs in a table of turns."""

    def weigh_experts(self, logits: Array, experts: Array, router: Router) -> Array:
        """The weights (T, K) that the router gives to these experts (T, K)."""

    def group(self, experts: Array, physical_ids: IntArray) -> tuple[Array, Array, IntArray]:
        """Sort the T * K choices by keys[expert], stably. Blocks the host for the counts.

        Returns the row of the choice at each place (T * K,), the place of each choice (T, K), and how many choices have
        each key (len(keys),), on the host.
        """

    def take_rows(self, rows: Array, index: IntArray) -> Array:
        """Rows rows[index], by an index on the host."""

    def pack(self, rows: Array, index: Array | None, out: Array) -> None:
        """Write rows[index] (all rows when None) to a wire buffer; the index is on the host or from `upload`."""

    def unpack(self, buffer: Array, index: Array | None) -> Array:
        """Rows wire[index] (all when None) of a wire buffer; the index as in `pack`."""

    def join(self, parts: Sequence[Array]) -> Array:
        """The rows of all parts, one after another, in memory of their own."""

    def combine(self, buffer: Array, output_rows: Array, weights: Array) -> Array:
        """Sum over k, in slot order in float32, of weights[t, k] * wire[places[t, k]] -> (T, D)."""

    def expert_mlp(self, rows: Array, experts: Sequence[Expert], counts: IntArray) -> Array:
        """Apply experts[e] to the next counts[e] rows, for e = 0, 1, ...; rows (sum(counts), D), same shape back."""

    def logits(self, x: Array, head: Array, bias: Array | None = None) -> Array:
        """X (N, D) times the output matrix, plus the bias (V,) -> (N, V), kept in float32."""

    def sample(self, logits: Array, requests: Sequence[SamplingRequest], *, top: int) -> SampledTokens:
        """Choose the next token of each row. Log-probabilities are the model's, before any sampling rule. Blocks."""

    def score(self, logits: Array, targets: IntArray, *, top: int) -> SampledTokens:
        """Log-probability of each row's target token. Blocks the host."""
