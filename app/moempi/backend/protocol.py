"""The verbs of a backend, by topic: memory, rows, attention, experts, tokens. The model computes with these alone.

Arrays are opaque to callers, which may slice, reshape and pass them on, but never compute with them. Activations are
rows in the run's precision. With bfloat16 a verb accumulates sums in float32 and rounds once, when it stores its
result. A verb submits its work and returns; only verbs documented as "Blocks the host" wait for it.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from moempi.arrays import Float32Array, IntArray
from moempi.backend.values import (
    Array,
    AttentionBlock,
    Cache,
    DeltaRates,
    Expert,
    ExpertsBlock,
    LayerState,
    LogitScan,
    PackedChoices,
    PhysicalIds,
    RmsNorm,
    SampledTokens,
    SamplingRequests,
    Segment,
    StateConstants,
    Stored,
)
from moempi.config.architecture import Clamp, DeltaRule, Router, StateSpace


class Event(Protocol):
    """A point in a queue of submitted work."""

    def is_done(self) -> bool:
        """Whether all work submitted before the event is done; does not block."""

    def synchronize(self) -> None:
        """Block the host until all work submitted before the event is done."""


class Download(NamedTuple):
    """Host memory that holds copies of a backend's arrays once `event` is done, or at once if there is none."""

    event: Event | None
    memory: Sequence[npt.NDArray[Any]]

    def values(self) -> list[npt.NDArray[Any]]:
        """The copied arrays, in memory of their own; the event must be done."""
        return list(self.memory) if self.event is None else [values.copy() for values in self.memory]


class MemoryVerbs(Protocol):
    """Weights, caches, buffers and queues."""

    def available_bytes(self) -> int:
        """Free memory in bytes, shared by all ranks on the node whose backends have the same `memory_id`."""

    def tensor(self, *stored: Stored) -> Array:
        """Load stored values, bfloat16 bits (uint16) or float32, joined along axis 0."""

    def matrix(self, *stored: Stored, transposed: bool = False) -> Array:
        """Load stored (outputs, inputs) matrices, joined along the outputs; transposed ones are (inputs, outputs)."""

    def head_matrices(self, stored: Stored) -> Array:
        """Load a matrix for each head, stored as (H, inputs, outputs), for `linear_heads`."""

    def table(self, stored: Stored) -> Array:
        """Load a table (V, D) whose rows `embed` looks up."""

    def finish_loading(self) -> None:
        """Free memory that only loading needed. Blocks the host until the loaded tensors can be used on any queue."""

    def cache(self, pages: int, kv_heads: int, head_dim: int, *, latent: int = 0) -> Cache:
        """Allocate a zeroed cache of `pages` pages; if `latent`, values are the first `latent` numbers of the keys."""

    def clear(self, cache: Cache, pages: IntArray) -> None:
        """Set the rows of `pages` to zero."""

    @property
    def queue(self) -> int:
        """The number of the current queue: verbs are submitted to it."""

    def on_queue(self, number: int) -> AbstractContextManager[None]:
        """Make `number` the current queue (a CUDA stream) inside a `with`. Queues are not ordered by each other."""

    def record_event(self) -> Event | None:
        """Record an event behind all work in the current queue.

        Returns None on a machine whose verbs are complete when they return.
        """

    def register_host_memory(self, memory: npt.NDArray[np.uint8]) -> None:
        """Make host memory that the caller allocated usable by `pack` and `unpack`, until it is unregistered."""

    def unregister_host_memory(self, memory: npt.NDArray[np.uint8]) -> None:
        """Undo `register_host_memory`, before the caller frees the memory. Blocks the host until no verb uses it."""

    def comm_buffer(self, rows: int, width: int) -> Array:
        """Allocate a contiguous, 64-byte aligned buffer (rows, width) of `row_dtype` that MPI can read and write.

        MPI may read what a verb wrote to it once an event recorded behind the verb is done.
        """

    def rows_in(self, buffer: Array) -> Array | None:
        """A comm buffer as rows that verbs write where they are sent; None if they are written by `pack` alone."""

    def row_buffer(self, rows: int, width: int) -> Array:
        """Allocate a contiguous, 64-byte aligned buffer (rows, width) of `row_dtype` for verbs alone."""

    def upload(self, values: npt.NDArray[Any]) -> Array:
        """Make a host array of indices or weights usable by verbs; the caller must not change it afterwards."""

    def download(self, values: Array) -> npt.NDArray[Any]:
        """Return a host array of equal values. Blocks the host."""

    def start_download(self, *arrays: Array) -> Download:
        """Submit copies of arrays to the host."""


class RowVerbs(Protocol):
    """Dense layers: embedding, norms, products, and elementwise functions of rows."""

    def embed(self, tokens: IntArray, table: Array) -> Array:
        """Look up rows of `table` (V, D) -> (T, D)."""

    def rms_norm(self, x: Array, weight: Array, *, eps: float, rounded: bool = True) -> Array:
        """Divide x by sqrt(mean(x^2) + eps) over the last axis, then multiply by `weight` (Zhang & Sennrich 2019).

        With `rounded`, the quotient is rounded to the run's precision before it is multiplied.
        """

    def add_rms_norm(
        self, x: Array, y: Array, weight: Array, *, eps: float, rounded: bool = True
    ) -> tuple[Array, Array]:
        """Add x and y, both (T, D), and normalize the sum; the bits of `add` and of `rms_norm` of what it returns."""

    def layer_norm(self, x: Array, weight: Array, bias: Array, *, eps: float) -> Array:
        """Compute (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias over the last axis (Ba et al. 2016)."""

    def linear(self, x: Array, matrix: Array, bias: Array | None = None) -> Array:
        """Multiply x (T, inputs) by a matrix and add the bias (outputs,) -> (T, outputs)."""

    def linear_heads(self, x: Array, matrices: Array) -> Array:
        """Multiply each head of x (T, H, inputs) by its own of the `head_matrices` -> (T, H, outputs)."""

    def clip(self, x: Array, limit: float) -> Array:
        """Limit every number of x to [-limit, limit]."""

    def join_columns(self, *parts: Array) -> Array:
        """Concatenate along the last axis."""

    def add(self, x: Array, y: Array) -> Array:
        """Add x and y, both (T, D)."""

    def swiglu(self, gate_up: Array, clamp: Clamp | None = None) -> Array:
        """Compute silu(gate) * up of (T, 2F) -> (T, F); the clamped form is defined by `config.architecture.Clamp`."""

    def squared_relu(self, x: Array) -> Array:
        """Compute max(0, x)^2 of x (T, F) (So et al. 2021)."""

    def scale_by_sigmoid(self, x: Array, logits: Array) -> Array:
        """Multiply rows x (T, D) by sigmoid(logits): one logit for each row (T, 1), or one for each number (T, D)."""


class AttentionVerbs(Protocol):
    """Rotary embedding, the paged key-value cache, and attention over it."""

    def rope_angles(self, positions: IntArray, *, frequencies: Float32Array, amplitude: float) -> Array:
        """Cosines and sines (T, n) of position times frequency, times `amplitude`; float32, computed once per step."""

    def rotate(self, x: Array, angles: Array, *, interleaved: bool = False) -> Array:
        """Rotate the first 2n numbers of every head of x (T, H, dim) by the row's n angles (Su et al. 2021).

        Number i forms a pair with number i + n; when `interleaved`, number 2i forms a pair with number 2i + 1.
        """

    def extend_cache(self, cache: Cache, keys: Array, values: Array | None, segments: Sequence[Segment]) -> None:
        """Write new keys and values (T, key-value heads, dim) to their positions; a latent cache takes keys only."""

    def rotate_into_cache(
        self,
        heads: tuple[Array, Array, Array],
        angles: Array,
        *,
        cache: Cache,
        segments: Sequence[Segment],
        interleaved: bool = False,
        norms: tuple[RmsNorm, RmsNorm] | None = None,
    ) -> Array:
        """Rotate queries and keys, and extend the cache by the rotated keys and the values; the rotated queries.

        `heads` are queries, keys and values. With `norms`, of one `eps`, every head of queries and keys is normalized
        first. Shapes and bits equal the results of `rms_norm`, `rotate` and `extend_cache`. The cache is not latent.
        """

    def extend_latent_cache(
        self,
        keys: tuple[Array, Array],
        angles: Array,
        *,
        norm: RmsNorm,
        cache: Cache,
        segments: Sequence[Segment],
        interleaved: bool = False,
        queries: tuple[Array, RmsNorm] | None = None,
    ) -> Array | None:
        """Normalize the first part of keys (T, 1, kept), rotate the second (T, 1, dim), and cache both.

        Returns the latent vectors (T, N) of `queries`, normalized by their own norm, if any. Norms round before they
        multiply by the weights, which have one type. Bits equal the results of `rms_norm`, `rotate`, `join_columns` and
        `extend_cache`.
        """

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

        A query sees the last `window` positions, or all of them if `window` is 0. `sinks` (H,) are extra logits in the
        divisor of the softmax.
        """

    def attend_latent(
        self,
        queries: tuple[Array, Array],
        angles: Array,
        cache: Cache,
        segments: Sequence[Segment],
        *,
        scale: float,
        interleaved: bool = False,
    ) -> Array:
        """`attend` over a latent cache, of queries in two parts (T, H, value dim) and (T, H, dim).

        The second part is rotated first. Bits equal the results of `rotate`, `join_columns` and `attend`.
        """

    def select_positions(
        self, queries: Array, weights: Array, index: Cache, segments: Sequence[Segment], *, top_k: int
    ) -> Array:
        """Choose the `top_k` positions with the largest scores for rows that see more -> (T, top_k), ascending.

        The score of a position s is the sum over heads h, in float32, of weights[t, h] * max(0, queries[t, h] . key[s])
        (DeepSeek-V3.2, 2025); queries are (T, H, dim), weights float32 (T, H). On a tie the lowest position is chosen;
        NaN counts as infinity.
        """

    def attend_selected(
        self, queries: Array, cache: Cache, segments: Sequence[Segment], positions: Array, *, scale: float
    ) -> Array:
        """Attention of queries (T, H, dim) over the `positions` (T, k) of each alone -> (T, H, value dim).

        The cache is latent.
        """


class StateVerbs(Protocol):
    """The gated delta rule (Yang et al. 2025) and state spaces: a state per sequence in place of cached keys.

    A row's results and the state after it have the same bits however the rows of its sequence come in steps.
    """

    def layer_state(self, slots: int, rule: DeltaRule | StateSpace) -> LayerState:
        """Allocate the state of `slots` sequences in one layer."""

    def causal_conv(
        self, x: Array, taps: Array, state: LayerState, segments: Sequence[Segment], bias: Array | None = None
    ) -> Array:
        """Compute silu(bias[c] + sum of taps[j, c] * x[t - n + 1 + j, c] over j) of x (T, C), taps (n, C) -> (T, C).

        Rows before the segment are from the tail of its sequence's state, which is brought up to date.
        """

    def delta_rule(
        self,
        heads: tuple[Array, Array, Array],
        rates: Array,
        constants: DeltaRates,
        state: LayerState,
        segments: Sequence[Segment],
    ) -> Array:
        """Compute outputs (T, value heads, value dim), and bring the memory of the sequences up to date.

        `heads` are queries and keys (T, key heads, key dim) and values (T, value heads, value dim); `rates` (T, 2 *
        value heads) are b, then a. With q and k divided by their lengths sqrt(sum of squares + 1e-6), q also by
        sqrt(key dim), beta = sigmoid(b), alpha = exp(-exp(decay_log) * softplus(a + decay_bias)), each row computes
        S = alpha * S; S = S + k (beta * (v - k S)); output = q S. Key head h serves adjacent value heads.
        """

    def state_space(
        self,
        heads: tuple[Array, Array, Array],
        steps: Array,
        constants: StateConstants,
        state: LayerState,
        segments: Sequence[Segment],
        *,
        least_step: float,
    ) -> Array:
        """Compute outputs (T, heads, head dim), and bring the memory of the sequences up to date (Mamba-2, 2024).

        `heads` are c and b (T, groups, state dim) and x (T, heads, head dim), `steps` (T, heads) are a. With
        d = max(softplus(a + step_bias), least_step), each row computes S = exp(-exp(decay_log) * d) * S + b (d * x);
        output = c S + skip * x. Group g serves adjacent heads.
        """

    def gated_norm(self, x: Array, gate: Array, norm: RmsNorm) -> Array:
        """Normalize each head of x (T, H, dim), as by `rms_norm`, and multiply it by silu(gate); rounded once."""


class ExpertVerbs(Protocol):
    """The router, the exchange's rows, and the experts' networks."""

    def choose_experts(
        self,
        logits: Array,
        router: Router,
        *,
        correction: Array | None = None,
        selection_bias: Float32Array | None = None,
    ) -> tuple[Array, Array]:
        """Choose experts (T, K) in order of falling score, lowest index on a tie, with float32 weights (T, K).

        The logits are first rounded to the run's precision, unless `router.float32_logits`.
        The float32 `correction` (E,) and `selection_bias` (E,), a host array, are added to the scores that select.
        """

    def pick_replicas(self, experts: Array, period: int) -> Array:
        """Index a table of replicas (E * period,): experts * period + row % period, (T, K) -> (T, K)."""

    def weigh_experts(self, logits: Array, experts: Array, router: Router) -> Array:
        """Compute the router's weights (T, K) of given experts (T, K), from logits rounded as by `choose_experts`."""

    def group(self, experts: Array, physical_ids: Array, *, num_ids: int) -> tuple[Array, Array, Array]:
        """Sort the T * K choices by physical_ids[expert], stably.

        The ids are a host array or from `upload`, and less than `num_ids`.

        Returns the source row of each sorted choice (T * K,), the sorted position of each choice (T, K), and the number
        of choices per physical id (num_ids,).
        """

    def group_and_pack(
        self, rows: Array, experts: Array, physical_ids: Array, out: Array, *, num_ids: int
    ) -> tuple[Array, Array]:
        """`group` of at most `most_packed_choices`, and `pack` of their source rows to out (T * K, D), in one.

        `out` is from `rows_in` or `row_buffer`. Returns the sorted position of each choice and the number of choices
        per physical id.
        """

    def take_rows(self, rows: Array, index: IntArray) -> Array:
        """Select rows[index]; the index is a host array or from `upload`."""

    def pack(self, rows: Array, index: Array | None, out: Array) -> None:
        """Write rows[index], or all rows if None, to a comm buffer; the index is a host array or from `upload`."""

    def unpack(self, buffer: Array, index: Array | None) -> Array:
        """Read rows buffer[index], or all rows if None, from a comm buffer; the index as in `pack`.

        Without an index they may stay in the buffer: then only verbs that are submitted before the buffer is used again
        may read them.
        """

    def join(self, parts: Sequence[Array]) -> Array:
        """Concatenate the rows of all parts into new memory."""

    def combine(self, buffer: Array, output_rows: Array, weights: Array, addends: Sequence[Array] = ()) -> Array:
        """Sum weights[t, k] * buffer[output_rows[t, k]] over k, in slot order in float32 -> (T, D).

        Then add at most two `addends` (T, D) one after the other; each sum is rounded, as by `add`.
        """

    def combine_rms_norm(
        self, buffer: Array, output_rows: Array, weights: Array, addends: Sequence[Array], norm: RmsNorm
    ) -> tuple[Array, Array]:
        """Compute the sums of `combine`, and normalize them; bits equal the results of `combine` and `rms_norm`."""

    def expert_mlp(
        self, rows: Array, experts: Sequence[Expert], counts: IntArray, *, out: Array | None = None
    ) -> Array:
        """Apply experts[e] to the next counts[e] rows, for e = 0, 1, ...; (sum(counts), D) -> (sum(counts), D).

        The results are in `out`, rows of `rows_in`, if it is given.
        """


class TokenVerbs(Protocol):
    """The head's logits and the tokens chosen from them."""

    def logits(self, x: Array, head: Array, bias: Array | None = None) -> Array:
        """Multiply x (N, D) by the matrix of the head or a router, and add the bias (V,) -> (N, V) in float32."""

    def sample(self, logits: Array, requests: SamplingRequests, *, top: int) -> SampledTokens:
        """Sample the next token of each row (N, V). Blocks the host.

        Log-probabilities are the model's, before any sampling rule; `top` is the number of most likely tokens returned.
        """

    def score(self, logits: Array, targets: IntArray, *, top: int) -> SampledTokens:
        """Compute the log-probability of each row's target token (N,). Blocks the host."""

    def take_outputs(self, matrix: Array, outputs: range) -> Array:
        """The part of a matrix, not transposed, for `outputs`, in its memory; they begin with a block of `scan`."""

    def scan(self, logits: Array, targets: IntArray, *, first: int, top: int) -> LogitScan:
        """Scan logits (N, W) of tokens from `first` on, in blocks of `scores.SUM_TOKENS`. Blocks the host.

        `targets` (N,) are tokens of the whole vocabulary.
        """

    def tokens_above(self, logits: Array, least: Float32Array) -> tuple[IntArray, IntArray, Float32Array]:
        """The rows and columns (S,) of logits (N, V) above the `least` of their row (N,), in order, and the logits.

        NaN is above nothing. Blocks the host, to which no other logits are copied.
        """


HANDLE_BYTES = 64
"""Bytes of the handle by which another process maps GPU memory."""


class RowCopy(NamedTuple):
    """A copy of `num_rows` rows of `source`, from row `source_first` on, to rows from `first` on."""

    source: Array
    source_first: int
    first: int
    num_rows: int


class PeerMemory(Protocol):
    """GPU memory that the other processes of the node can map."""

    def allocate(self, rows: int, width: int) -> Array:
        """Allocate rows of the backend's `row_dtype`; freeing them waits for the device."""

    def handle(self, rows: Array) -> bytes:
        """The handle (HANDLE_BYTES) by which other processes map allocated rows; raises ConfigError if refused."""

    def map(self, handle: bytes, rows: int, width: int) -> Array:
        """Map the rows that another process of the node allocated; raises ConfigError if the GPU refuses."""

    def unmap(self, rows: Array) -> None:
        """Undo `map`, before the other process frees the rows. Blocks the host until no verb uses them."""

    def copy(self, copies: Sequence[RowCopy], target: Array) -> Event:
        """Submit copies to rows of `target`, behind each other and beside all queues; the event is behind them."""


Attended = tuple[Array, Array, PackedChoices | None]
"""The sum of rows of the residual stream and their attention's output (T, D), its norm (T, D), and its choices."""
Attend = Callable[[Array, Array, Cache, Sequence[Segment], PhysicalIds | None], Attended]
"""The verbs of an attention between two norms; with physical ids, also those that choose experts and pack rows."""


class FusedAttention(Protocol):
    """An attention block as one verb, for at most `most_rows` rows, with the bits of its separate verbs."""

    most_rows: int

    def __call__(
        self, x: Array, angles: Array, cache: Cache, segments: Sequence[Segment], ids: PhysicalIds | None = None
    ) -> Attended:
        """Extend the cache by rows x (T, D) of the residual stream, and attend them.

        There may be no choices although `ids` are given. The next call of a fused attention in the same queue may
        overwrite the results: verbs that read them are submitted before.
        """


class FusedExperts(Protocol):
    """An experts block as one verb, for at most `most_rows` rows, with the bits of its separate verbs."""

    most_rows: int

    def __call__(self, x: Array, addends: Sequence[Array], load: IntArray) -> tuple[Array, Array, Array]:
        """The weighted sums of the experts of rows x (T, D), plus the addends (T, D), as by `Backend.combine`.

        Returns them, and the experts and weights (T, K) that the router chose. Adds the number of choices of each
        expert to `load` (E,), on the host.
        """


class FusedLayers(Protocol):
    """Layers of a fused attention and fused experts each as one verb, with the bits of its separate verbs."""

    def most_layers(self, num_rows: int, segments: Sequence[Segment]) -> int:
        """How many layers one call may compute for these rows; 0 if one takes too long: nothing else goes on."""

    def __call__(
        self,
        layers: range,
        x: Array,
        angles: Array,
        caches: Sequence[Cache],
        segments: Sequence[Segment],
        loads: Sequence[IntArray],
    ) -> tuple[Array, Array, Array]:
        """The residual stream (T, D) behind `layers`, numbered from the first of all, for rows x (T, D) before them.

        Extends the caches of these layers, and adds to their `loads` (E,) as `FusedExperts` does. Returns with the rows
        the experts and weights (layers, T, K) that the routers chose.
        """


class FusedVerbs(Protocol):
    """Layers and parts of them that a rank computes alone, made once of their weights; None if a backend has none."""

    def fuse_attention(self, block: AttentionBlock) -> FusedAttention | None:
        """The block as one call."""

    def capture_attention(self, attend: Attend) -> FusedAttention | None:
        """The same calls, each as one submission that is recorded once."""

    def fuse_experts(self, block: ExpertsBlock) -> FusedExperts | None:
        """The block as one call."""

    def fuse_layers(self, layers: Sequence[tuple[FusedAttention, FusedExperts]]) -> FusedLayers | None:
        """Adjacent layers, given by their fused parts, in few calls."""


class Backend(MemoryVerbs, RowVerbs, AttentionVerbs, StateVerbs, ExpertVerbs, FusedVerbs, TokenVerbs, Protocol):
    """A machine that holds weights and rows and computes with them."""

    name: str
    row_dtype: np.dtype[Any]
    """Element type of rows in comm buffers: uint16 (bfloat16 bits) or float32."""
    comm_buffers_on_host: bool
    """Whether the host can read and write comm buffers."""
    widened: bool
    """Whether it holds weights and cache as float32, whatever their type."""
    memory_id: str
    """Identifies the memory that holds weights, caches and rows, among all memories of the node."""
    most_packed_choices: int
    """The most choices of a layer that `group_and_pack` takes; 0 if rows are always packed apart."""

    @property
    def peer_memory(self) -> PeerMemory | None:
        """GPU memory that the other ranks of the node can map; None without a GPU."""
