"""The records of a run: one per finished request and per rank, values at positions; their encoding (MessagePack)."""

import math
import re
import sys
from itertools import pairwise
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from moempi.arrays import Float32Array, Int32Array
from moempi.storage.results_layout import HOME, TABLE_LAYERS, TRACES

Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, Meta(ge=0)]
SmallCount = Annotated[int, Meta(ge=0, le=2**31 - 1)]

_SURROGATES = re.compile("[\ud800-\udfff]")
_DTYPES = {name: np.dtype(name) for name in ("<i4", "<i8", "<f4", "|u1", "<u2", "<f2")}
_INT32, _INT64, _FLOAT32 = np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.float32)

_NO_TOKENS = np.zeros(0, np.int32)
_NO_LOGPROBS = np.zeros(0, np.float32)
_NO_TOP_TOKENS = np.zeros((0, 0), np.int32)
_NO_TOP_LOGPROBS = np.zeros((0, 0), np.float32)
_NO_LOAD = np.zeros((0, 0), np.int64)
for _empty in (_NO_LOAD, _NO_TOKENS, _NO_LOGPROBS, _NO_TOP_TOKENS, _NO_TOP_LOGPROBS):
    _empty.flags.writeable = False


class RequestRecord(msgspec.Struct, frozen=True, eq=False, kw_only=True, tag="request"):
    """One finished request with n prompt tokens and m generated tokens.

    `prompt` (n,) and `tokens` (m,) are int32, `logprobs` (m,) float32 natural logarithms. `top_tokens` (m, k) int32 and
    `top_logprobs` (m, k) hold the k likeliest tokens, (0, 0) unless requested. `score` (n,) float32 holds the prompt
    tokens' log-probabilities, the first NaN, with `score_top_tokens` and `score_top_logprobs` (n, k); all are empty
    when generating. `computed` positions went through the model, in the attempt at the job whose first step is `since`.
    Hidden states are recorded at `hidden_rows` of them, from `hidden_first` on.
    The first token and the end came `first_token_s` and `end_to_end_s` after the request left the queue; None if never.
    `prompt_id` is the id of the prompt, None for its first sample. `endpoint` is OpenAI's for a chat, else None.
    `metadata` is the text of a JSON object. Raises ValueError if types or lengths disagree.
    """

    index: Count
    id: str
    finish: Literal["stop", "length", "error"]
    error: str = ""
    computed: Count = 0
    hidden_first: SmallCount = 0
    hidden_rows: Count = 0
    since: Count = 0
    first_token_s: Seconds | None = None
    end_to_end_s: Seconds | None = None
    reference: str | None = None
    prompt_id: str | None = None
    endpoint: str | None = None
    metadata: str | None = None
    group: str | None = None
    text: str = ""
    prompt: Int32Array = _NO_TOKENS
    tokens: Int32Array = _NO_TOKENS
    logprobs: Float32Array = _NO_LOGPROBS
    top_tokens: Int32Array = _NO_TOP_TOKENS
    top_logprobs: Float32Array = _NO_TOP_LOGPROBS
    score: Float32Array = _NO_LOGPROBS
    score_top_tokens: Int32Array = _NO_TOP_TOKENS
    score_top_logprobs: Float32Array = _NO_TOP_LOGPROBS

    def __post_init__(self) -> None:
        n, m = len(self.prompt), len(self.tokens)
        if max(self.computed, self.hidden_first + self.hidden_rows) > n + m:
            raise ValueError(f"computed is {self.computed} and hidden_rows {self.hidden_rows}, of {n + m} tokens")
        k, score_k = self.top_tokens.shape[-1], self.score_top_tokens.shape[-1]
        _expect("prompt", self.prompt, _INT32, (n,))
        _expect("tokens", self.tokens, _INT32, (m,))
        _expect("logprobs", self.logprobs, _FLOAT32, (m,))
        _expect("top_tokens", self.top_tokens, _INT32, (m, k), or_empty=True)
        _expect("top_logprobs", self.top_logprobs, _FLOAT32, self.top_tokens.shape)
        _expect("score", self.score, _FLOAT32, (n,), or_empty=True)
        _expect("score_top_tokens", self.score_top_tokens, _INT32, (n, score_k), or_empty=True)
        _expect("score_top_logprobs", self.score_top_logprobs, _FLOAT32, self.score_top_tokens.shape)


class Scores(Struct, frozen=True):
    """The sum of the log-probabilities of scored tokens, and their number."""

    num_tokens: int = 0
    sum: float = 0.0

    @classmethod
    def of(cls, logprobs: Float32Array) -> "Scores":
        """The scores of tokens (n,); NaN, as at the first token of a prompt, is no score."""
        scored = ~np.isnan(logprobs)
        return cls(int(scored.sum()), float(logprobs.sum(where=scored, dtype=np.float64)))

    def __add__(self, other: "Scores") -> "Scores":
        return Scores(self.num_tokens + other.num_tokens, self.sum + other.sum)

    @property
    def mean(self) -> float:
        """The mean log-probability of a token; NaN without tokens."""
        return self.sum / self.num_tokens if self.num_tokens else math.nan

    @property
    def perplexity(self) -> float:
        """The exponential of the negative mean; infinite beyond the range of float64."""
        with np.errstate(over="ignore"):
            return float(np.exp(-self.mean))


class RankRecord(msgspec.Struct, frozen=True, eq=False, kw_only=True, tag="rank"):
    """The work of one rank, written once at the end of its run, in the journal of rank 0.

    `expert_load` (layers, experts) int64 counts the tokens that this rank routed. `seconds` has one entry per phase
    (compute, exchange, idle), `counters` one per counter (network_bytes), `place` one per coordinate of the rank
    (stage, node); their keys are identifiers. Loading `loaded_bytes` of weights took `loading_s`. `hosted` lists the
    rank's experts by Mixture-of-Experts layer. With a balancing routing policy, `asked_load` (layers, experts) counts
    the routers' own choices, `shifts` (layers, experts) float32 is this rank's contribution to the final expert bias,
    and `balance` holds further figures. `replay` counts routes that a file gave. In a journal, rank 0's record has the
    sums of the three arrays over all ranks, and the others have none. Raises ValueError if types, shapes or keys are
    wrong.
    """

    rank: Count
    host: str
    expert_load: NDArray[np.int64]
    seconds: dict[str, float]
    loaded_bytes: Count = 0
    loading_s: float = 0.0
    steps: Count
    tokens: Count
    counters: dict[str, Int64] = {}
    place: dict[str, Int64] = {}
    hosted: dict[SmallCount, tuple[SmallCount, ...]] = {}
    asked_load: NDArray[np.int64] = _NO_LOAD
    shifts: Float32Array = _NO_TOP_LOGPROBS
    replay: dict[str, Count] = {}
    balance: dict[str, float] = {}

    def __post_init__(self) -> None:
        if self.expert_load.dtype != np.int64 or self.expert_load.ndim != 2:
            raise ValueError(f"expert_load is {_describe(self.expert_load)}, not int64 (layers, experts)")
        _expect("asked_load", self.asked_load, _INT64, self.expert_load.shape, or_empty=True)
        _expect("shifts", self.shifts, _FLOAT32, self.expert_load.shape, or_empty=True)
        names = (*self.seconds, *self.counters, *self.place, *self.balance, *self.replay)
        wrong = [name for name in names if not name.isidentifier() or name in self.__struct_fields__]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is not a free identifier")


class TraceRecord(msgspec.Struct, frozen=True, eq=False, kw_only=True, tag="trace"):
    """Values at the T positions that one rank computed in one step, for a `table` of `results_layout.TRACES`.

    Row t is position `positions[t]` (T,) int32 of request `requests[t]` (T,) int64. Each of the `columns` has the
    values (layers, T, ...) of the model's `layers`, which ascend, or (T, ...) in a table without layers. In the table
    "above" row t has counts[t] of the values (sum of counts,) of the other columns. Rows with the same `step` were
    computed together, in the attempt at the job whose first step is `since`; `rank` counts node by node. With `home`,
    rank, step and row are columns of the results. A record is checked when it is read, not when it is made.
    """

    table: Literal["routing", "hidden", "score", "above"]
    since: Count
    step: Count
    rank: SmallCount
    layers: tuple[SmallCount, ...]
    requests: NDArray[np.int64]
    positions: Int32Array
    columns: dict[str, NDArray[Any]]
    home: bool = False

    def require_valid(self) -> None:
        """Raise ValueError if names, types or lengths disagree or a position is negative."""
        rows, known = len(self.requests), TRACES[self.table]
        _expect("requests", self.requests, _INT64, (rows,))
        _expect("positions", self.positions, _INT32, (rows,))
        sizes: dict[str, int] = {}
        for name, values in self.columns.items():
            if name not in known or name in HOME:
                raise ValueError(f"{self.table} has no column {name[:20]!r}")
            before = (len(self.layers), rows) if self.table in TABLE_LAYERS else (rows,)
            if self.table == "above" and name != "counts":
                before = (self._num_values(),)
            dims, behind = known[name].dims[len(before) :], values.shape[len(before) :]
            shape = tuple(sizes.setdefault(dim, size) for dim, size in zip(dims, behind, strict=False))
            if values.dtype not in known[name].dtypes or len(shape) < len(dims):
                raise ValueError(f"{name} is {_describe(values)}")
            _expect(name, values, values.dtype, (*before, *shape))
        if any(below >= above for below, above in pairwise(self.layers)):
            raise ValueError(f"layers {self.layers} do not ascend")
        if rows and self.positions.min() < 0:
            raise ValueError(f"position {self.positions.min()} is negative")

    def _num_values(self) -> int:
        """The number of values of a table whose rows have various numbers of them."""
        counts = self.columns.get("counts")
        if counts is None or (len(counts) and counts.min() < 0):
            raise ValueError("above has no counts, or negative ones")
        return int(counts.sum(dtype=np.int64))

    def row_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a column behind rows and layers."""
        return self.columns[name].shape[1 + (self.table in TABLE_LAYERS) :]

    @property
    def num_bytes(self) -> int:
        """Bytes of the columns."""
        return sum(values.nbytes for values in self.columns.values())


Record = RequestRecord | RankRecord | TraceRecord


def encode(record: Record) -> bytes:
    """The bytes of a record; lone surrogates, which have no UTF-8 form, become U+FFFD."""
    try:
        return _ENCODER.encode(record)
    except UnicodeEncodeError:
        return _ENCODER.encode(_without_surrogates(record))


def replace_surrogates(text: str) -> str:
    """The text with U+FFFD in the place of lone surrogates, which have no UTF-8 form."""
    return _SURROGATES.sub("\ufffd", text)


def decode(payload: bytes, *, num_requests: int = sys.maxsize) -> Record:
    """The record in bytes from `encode`.

    Raises ValueError if they are not a record that this program can use, or one of a request beyond `num_requests`.
    """
    try:
        record = _DECODER.decode(payload)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if isinstance(record, TraceRecord):
        record.require_valid()
    for request in _requests_of(record):
        if not 0 <= request < num_requests:
            raise ValueError(f"it is of request {request}, the job has {num_requests}")
    return record


def _requests_of(record: Record) -> tuple[int, ...]:
    """The request of a record, or the first and the last in input order."""
    if isinstance(record, RequestRecord):
        return (record.index,)
    if isinstance(record, TraceRecord) and len(record.requests):
        return int(record.requests.min()), int(record.requests.max())
    return ()


def _expect(
    name: str, array: NDArray[Any], dtype: np.dtype[Any], shape: tuple[int, ...], *, or_empty: bool = False
) -> None:
    if array.dtype == dtype and array.shape == shape:
        return
    absent = or_empty and array.size == 0 and array.ndim == len(shape)
    if array.dtype != dtype or not absent:
        raise ValueError(f"{name} is {_describe(array)}, not {dtype} {shape}")


def _describe(array: NDArray[Any]) -> str:
    return f"{array.dtype} {array.shape}"


def _pack_array(array: object) -> tuple[str, tuple[int, ...], memoryview | bytes]:
    if not isinstance(array, np.ndarray):
        raise NotImplementedError(f"a record cannot hold {type(array)}")
    return array.dtype.str, array.shape, array.data if array.flags.c_contiguous else array.tobytes()


def _unpack_array(_: type, packed: Any) -> NDArray[Any]:
    dtype, shape, values = packed
    if dtype not in _DTYPES or not shape:
        raise ValueError(f"an array of type {dtype!r} and shape {shape!r}")
    return np.frombuffer(values, _DTYPES[dtype]).reshape(shape)


def _without_surrogates(record: Record) -> Record:
    texts = {name: value for name, value in msgspec.structs.asdict(record).items() if isinstance(value, str)}
    changes: dict[str, Any] = {name: replace_surrogates(text) for name, text in texts.items()}
    return msgspec.structs.replace(record, **changes)


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_pack_array)
_DECODER: msgspec.msgpack.Decoder[Record] = msgspec.msgpack.Decoder(Record, dec_hook=_unpack_array)
