"""The values that the verbs of a backend take and return: weights, caches, segments of a step, and sampled tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from moempi.arrays import Float32Array, IntArray
from moempi.config.architecture import Clamp, Router
from moempi.config.job import Sampling

Array = Any
Stored = npt.NDArray[Any]


class Expert(Struct, frozen=True):
    """A SwiGLU network: `gate_up` maps D to 2F (gate first), `down` maps F to D; biases (2F,) and (D,) are optional.

    A network that is not `gated` is down(max(0, up x)^2), without biases: its `gate_up` is the matrix up, from D to F.
    """

    gate_up: Array
    down: Array
    gate_up_bias: Array | None = None
    down_bias: Array | None = None
    clamp: Clamp | None = None
    gated: bool = True


class Cache(Struct, frozen=True):
    """Keys and values of one layer: each (pages * PAGE_ROWS, key-value heads, head width).

    In a layer with an indexer, `index` holds its keys, of one head.
    """

    keys: Array
    values: Array
    index: "Cache | None" = None


class RmsNorm(NamedTuple):
    """The norm of a vector, as by `rms_norm`: its weights (dim,), `eps`, and whether the quotient is rounded."""

    weight: Array
    eps: float
    rounded: bool = True


class LayerState(Struct, frozen=True):
    """The state of each slot in a layer of the gated delta rule or of state spaces, in float32.

    `tail` (slots, taps - 1, C) holds the last rows before the convolution, `memory` (slots, *memory_shape) the sums of
    keys times values, of a state space of inputs times values. A sequence that starts at position 0 begins with zeros,
    whatever its slot holds.
    """

    tail: Array
    memory: Array


class DeltaRates(Struct, frozen=True):
    """The float32 constants (value heads,) of the rates of a delta rule: logarithm and bias of the decay."""

    decay_log: Array
    decay_bias: Array


class StateConstants(Struct, frozen=True):
    """The float32 constants (heads,) of state spaces: logarithm of the decay, bias of the step, factor of the input."""

    decay_log: Array
    step_bias: Array
    skip: Array


class AttentionBlock(Struct, frozen=True):
    """The weights of an attention between two norms, the second one of the sum with the residual stream.

    `head_norms` are of queries and keys. `window` and `sinks` as in `Backend.attend`, `interleaved` as in `rotate`.
    """

    norm: RmsNorm
    qkv: Array
    qkv_bias: Array | None
    head_norms: tuple[RmsNorm, RmsNorm] | None
    output: Array
    output_bias: Array | None
    next_norm: RmsNorm
    num_heads: int
    num_kv_heads: int
    head_dim: int
    interleaved: bool
    scale: float
    window: int
    sinks: Array | None


class ExpertsBlock(Struct, frozen=True):
    """The weights of a router, its rule, and all experts of its layer in order."""

    router: Array
    router_bias: Array | None
    rule: Router
    correction: Array | None
    experts: Sequence[Expert]


class PhysicalIds(Struct, frozen=True, eq=False):
    """By which a layer's choices are sorted: the id of each expert, or of each of its `period` replicas, in order.

    `ids` (E * period,) are on the backend, and less than `num_ids`.
    """

    ids: Array
    num_ids: int
    period: int = 1


class PackedChoices(NamedTuple):
    """The router's choices for rows, and the rows sorted by physical id.

    `experts` and `weights` (T, K) are as of `choose_experts`, `rows` (T * K, D), `output_rows` (T, K) and `counts`
    (num_ids,) as of `group_and_pack`.
    """

    experts: Array
    weights: Array
    rows: Array
    output_rows: Array
    counts: Array


class Segment(NamedTuple):
    """The new rows of one sequence in a step: rows [row, row + length) are at positions [start, start + length).

    `pages` lists the cache pages of the sequence; position p is row p % PAGE_ROWS of page pages[p // PAGE_ROWS].
    `state` is the index of its state in layers that have one.
    """

    row: int
    length: int
    start: int
    pages: IntArray
    state: int = 0


class Segments(Sequence[Segment]):
    """The segments of the n sequences of a step in arrays, in the order of their rows, without gaps.

    `rows`, `lengths`, `starts` and `states` (n,) are the fields of each. The pages of all follow one another in
    `pages`, from `first_pages` (n,) on.
    """

    def __init__(
        self, lengths: IntArray, starts: IntArray, num_pages: IntArray, pages: IntArray, states: IntArray
    ) -> None:
        self.rows, self.lengths, self.starts, self.states = lengths.cumsum() - lengths, lengths, starts, states
        self.first_pages, self.pages = num_pages.cumsum() - num_pages, pages
        self._num_pages = num_pages

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> "Segments":
        """The same segments in arrays."""
        if isinstance(segments, Segments):
            return segments
        numbers = [(segment.length, segment.start, len(segment.pages), segment.state) for segment in segments]
        lengths, starts, num_pages, states = np.array(numbers, np.int64).reshape(-1, 4).T
        pages = np.concatenate([NO_PAGES, *(segment.pages for segment in segments)])
        return cls(lengths, starts, num_pages, pages, states)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Segment: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Segment]: ...
    def __getitem__(self, index: int | slice) -> Segment | Sequence[Segment]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        first = int(self.first_pages[index])
        pages = self.pages[first : first + int(self._num_pages[index])]
        row, length, start, state = (
            int(of_all[index]) for of_all in (self.rows, self.lengths, self.starts, self.states)
        )
        return Segment(row, length, start, pages, state)


NO_PAGES: IntArray = np.zeros(0, np.int64)
NO_TOKENS: IntArray = np.zeros(0, np.int32)
NO_TOKENS.flags.writeable = False


@dataclass(frozen=True, slots=True, eq=False)
class LogitAdjustment:
    """What changes the logits of a sequence before its next token is sampled: the bias and penalties of `sampling`.

    If they are penalized, `seen` are the tokens of its prompt and output, and `generated` the tokens of its output.
    `banned` tokens are not sampled.
    """

    sampling: Sampling
    seen: IntArray = field(default_factory=lambda: NO_TOKENS)
    generated: IntArray = field(default_factory=lambda: NO_TOKENS)
    banned: IntArray = field(default_factory=lambda: NO_TOKENS)

    @property
    def changes_logits(self) -> bool:
        """Whether any logit may change."""
        return len(self.banned) > 0 or has_penalties(self.sampling)


def has_penalties(rules: Sampling) -> bool:
    """Whether rules have a penalty or a bias."""
    penalties = rules.repetition_penalty != 1.0 or rules.presence_penalty or rules.frequency_penalty
    return bool(penalties or rules.logit_bias)


SAMPLING_REQUEST = np.dtype(
    [
        ("temperature", np.float64),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("uniform", np.float64),
        ("adjustment", object),
    ]
)
"""How to sample the next token of a sequence: rules, a uniform number in [0, 1), and a LogitAdjustment or None."""
SamplingRequests = npt.NDArray[np.void]
"""One SAMPLING_REQUEST for each row (N,)."""


def sampling_request(
    sampling: Sampling, *, uniform: float = 0.0, adjustment: LogitAdjustment | None = None
) -> tuple[Any, ...]:
    """The entry of a sequence in an array of SAMPLING_REQUEST."""
    return sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, uniform, adjustment


def take_likeliest(requests: SamplingRequests) -> npt.NDArray[np.bool_]:
    """Whether the next token of each sequence is the most likely one of its plain logits (N,)."""
    is_plain = [adjustment is None for adjustment in requests["adjustment"].tolist()]
    likeliest: npt.NDArray[np.bool_] = (requests["temperature"] == 0.0) & np.array(is_plain, np.bool_)
    return likeliest


class SampledTokens(Struct, frozen=True):
    """Per row: a token and its log-probability (rows,), and the n most likely tokens with theirs (rows, n)."""

    tokens: IntArray
    logprobs: Float32Array
    top_tokens: npt.NDArray[np.int32]
    top_logprobs: Float32Array

    @property
    def columns(self) -> tuple[npt.NDArray[Any], ...]:
        """The arrays, in the order of the fields."""
        return self.tokens, self.logprobs, self.top_tokens, self.top_logprobs

    def take(self, index: IntArray | slice) -> "SampledTokens":
        """Select rows by index."""
        return SampledTokens(self.tokens[index], self.logprobs[index], self.top_tokens[index], self.top_logprobs[index])

    @staticmethod
    def join(parts: "Sequence[SampledTokens]") -> "SampledTokens":
        """Concatenate the rows of all parts."""
        if len(parts) == 1:
            return parts[0]
        columns = zip(*(part.columns for part in parts), strict=True)
        return SampledTokens(*map(np.concatenate, columns))


class LogitScan(Struct, frozen=True):
    """Of logits (N, W) of consecutive tokens: what the log-probabilities of a whole vocabulary are made of.

    Of each block of tokens the largest logit m, `highest`, and the sum of exp(logit - m), `sums` (N, blocks); the
    target's logit (N,), any number if the target is not among the tokens; the likeliest tokens, counted from the first
    of these, with their logits (N, k), the likeliest and of equal ones the lowest first.
    """

    highest: Float32Array
    sums: Float32Array
    target_logits: Float32Array
    top_tokens: npt.NDArray[np.int32]
    top_logits: Float32Array
