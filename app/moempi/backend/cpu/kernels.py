"""The C kernels of `kernels/`: which the processor can run, and their calls on NumPy arrays.

They are compiled on first use for the instructions of the processor: AVX-512, AVX2 or NEON. All have the same bits, but
products of tiles have others.
"""

import ctypes
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from moempi.arrays import Float32Array, Int32Array, IntArray, aligned_empty, widen
from moempi.arrays import address_of as _at
from moempi.backend.c_compiler import load_kernel
from moempi.backend.cpu import kernel_calls as calls
from moempi.backend.cpu.attention_layout import AttentionTasks, CachedRows
from moempi.backend.cpu.router import TOP_OF_GROUP
from moempi.backend.cpu.weight_memory import WeightMemory
from moempi.backend.values import Cache, RmsNorm, Stored
from moempi.config.architecture import Clamp, Router
from moempi.config.tensors import PAGE_ROWS

log = logging.getLogger(__name__)
SOURCES = Path(__file__).with_name("kernels")
EXACT_FLAGS = ("-pthread", "-ffp-contract=off", "-fno-strict-aliasing")
AVX512 = {"avx512f", "avx512bw", "avx512vl"}
AVX512_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma")
WITH_TILES, WITH_PAIRS = "AVX-512 with bfloat16 and AMX", "AVX-512 with bfloat16"
PAIRS, TILES = {"avx512_bf16"}, {"amx_tile", "amx_bf16"}
INSTRUCTIONS = {
    WITH_TILES: (AVX512 | PAIRS | TILES, (*AVX512_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-bf16")),
    WITH_PAIRS: (AVX512 | PAIRS, (*AVX512_FLAGS, "-mavx512bf16", "-DWITHOUT_TILES")),
    "AVX-512": (AVX512, AVX512_FLAGS),
    "AVX2": ({"avx2", "fma"}, ("-mavx2", "-mfma")),
    "NEON": ({"asimd"}, ()),
}
"""For each set of instructions, widest first: the processor's features that it takes, and the compiler's flags."""
PIECE_FLOPS = 1e8
"""Work of a thread between two calls of `progress`: about a millisecond."""
SCORINGS = ("softmax", "sigmoid", "softmax_chosen")
"""The rules of router.c, by number."""
SCORE_BYTES = 64 << 20
"""Memory for the scores of an indexer; more rows are scored in several calls."""


FLOAT32, BFLOAT16, TILED = range(3)
"""How product.c packs weights; TILED: as BFLOAT16, and products with bfloat16 rows use tiles."""


class PanelMatrix:
    """A matrix (inputs, outputs) in the panels of product.c; `weights` is FLOAT32, BFLOAT16 or TILED."""

    def __init__(self, packed: npt.NDArray[Any], shape: tuple[int, int], weights: int) -> None:
        self.packed = packed
        self.shape = shape
        self.weights = weights
        self.address = _at(packed)


class MatrixProduct(NamedTuple):
    """The product of `rows` rows from number `x_at` of x on with a matrix, plus a bias, to number `out_at` of `out`."""

    matrix: PanelMatrix
    rows: int
    x_at: int = 0
    out_at: int = 0
    bias: Float32Array | None = None


class Rotation(Struct, frozen=True):
    """Cosines and sines (T, 1, n) by which heads are rotated, as by `Backend.rotate`; `rounded` to bfloat16 values."""

    cosine: Float32Array
    sine: Float32Array
    interleaved: bool
    rounded: bool


def instructions() -> list[str]:
    """The sets of INSTRUCTIONS that this processor has, widest first."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "").split()
    return [name for name, (needed, _) in INSTRUCTIONS.items() if needed <= set(features)]


def compiler_flags(name: str) -> tuple[str, ...]:
    """The flags of one of the INSTRUCTIONS, which uses no others, also if `CC` enables them everywhere."""
    others = () if name in (WITH_TILES, WITH_PAIRS) else ("-DWITHOUT_PAIRS", "-DWITHOUT_TILES")
    return (*EXACT_FLAGS, *INSTRUCTIONS[name][1], *others)


@cache
def load_kernels(name: str | None = None) -> "Kernels | None":
    """The kernels for a set of instructions, by default the widest; None if they cannot be compiled or run here."""
    names = [name] if name else instructions()
    library = load_kernel(SOURCES, *map(compiler_flags, names)) if names else None
    if library is None:
        return None
    are_chains = library.pairs_are_chains()
    if not are_chains:
        log.info("the processor's bfloat16 products have other bits than multiply-adds, which are used instead")
    library.use_pairs(are_chains and library.pairs_are_faster())
    return Kernels(library)


class Kernels:
    """Calls of the compiled kernels. Results are complete when a call returns."""

    def __init__(self, library: Any) -> None:
        self.library = library
        library.pack.argtypes = [calls.POINTER, calls.POINTER, calls.LONG, calls.LONG, calls.LONG, calls.INT, calls.INT]
        library.multiply.argtypes = [ctypes.c_char_p, calls.LONG, calls.POINTER, calls.LONG, calls.LONG]
        library.product_tasks.argtypes, library.product_tasks.restype = [ctypes.c_char_p, calls.LONG], calls.LONG
        library.pack.restype = library.multiply.restype = None
        for call in (
            *("normalize_rows", "activate_rows", "rotate_rows", "gather_rows", "combine_rows", "normalize_gated"),
            *("choose_experts", "sum_exponentials", "angle_rows", "select_positions", "convolve", "apply_delta_rule"),
        ):
            getattr(library, call).argtypes, getattr(library, call).restype = [calls.POINTER], None
        library.attend.argtypes = [ctypes.POINTER(calls.Attention), calls.LONG, calls.LONG]
        library.attend.restype = None
        for call, rows in (
            ("begin_attention", calls.AttentionRows),
            ("end_attention", calls.AttentionRows),
            ("compute_experts", calls.ExpertsRows),
        ):
            getattr(library, call).argtypes = [calls.POINTER, ctypes.POINTER(rows)]
            getattr(library, call).restype = None
        library.compute_layers.argtypes = [calls.POINTER, calls.LONG, ctypes.POINTER(calls.LayersRows)]
        library.compute_layers.restype = None
        library.layers_scratch.argtypes, library.layers_scratch.restype = (
            [
                calls.POINTER,
                calls.LONG,
                calls.LONG,
            ],
            calls.LONG,
        )
        for call in ("attention_scratch", "experts_scratch"):
            getattr(library, call).argtypes, getattr(library, call).restype = [calls.POINTER, calls.LONG], calls.LONG
        library.panel_outputs.restype = library.row_scratch.restype = library.chunk_queries.restype = calls.LONG
        self._panel, self._row_scratch = library.panel_outputs(), library.row_scratch()
        self.chunk = library.chunk_queries()
        self._scratch = np.empty(0, np.float32)
        self._weights = WeightMemory()
        self._workspace, self._workspace_at = np.empty(0, np.uint8), 0
        self._has_tiles = False
        self.threads = 1

    def use_threads(self, count: int) -> int:
        """Compute with at least this number of threads from the next call on, alone if it is 1; returns the number.

        A pool that is larger from an earlier call keeps its size. Returns 1 if a thread cannot start.
        """
        self.threads = 1 if self.library.use_threads(count) else count
        return self.threads

    def request_tiles(self) -> bool:
        """Ask for the processor's tiles, from now on, for this process; whether it has some, and may use them."""
        self._has_tiles = bool(self.library.request_tiles())
        return self._has_tiles

    def workspace(self, num_bytes: int) -> int:
        """The address of memory that the next call of a fused part of a layer may use."""
        if num_bytes > len(self._workspace):
            self._workspace = aligned_empty((num_bytes + num_bytes // 4,), np.uint8)
            self._workspace_at = _at(self._workspace)
        return self._workspace_at

    def pack(self, parts: Sequence[Stored], *, transposed: bool, tiled: bool = False) -> PanelMatrix:
        """Pack stored (outputs, inputs) matrices, joined along the outputs; transposed ones are (inputs, outputs).

        Products of `tiled` bfloat16 weights with bfloat16 rows use tiles, if `request_tiles` has found some.
        """
        if len({part.dtype for part in parts}) > 1:
            parts = [widen(part) if part.dtype == np.uint16 else part for part in parts]
        weights = BFLOAT16 if parts[0].dtype == np.uint16 else FLOAT32
        inputs = parts[0].shape[0 if transposed else 1]
        counts = [part.shape[1 if transposed else 0] for part in parts]
        packed = self._weights.empty((-(-sum(counts) // self._panel), inputs + inputs % 2, self._panel), parts[0].dtype)
        if inputs % 2:
            packed[:, -2:] = 0
        if sum(counts) % self._panel:
            packed[-1] = 0
        first = 0
        for part, count in zip(parts, counts, strict=True):
            stored = np.ascontiguousarray(part)
            self.library.pack(_at(stored), _at(packed), inputs, count, first, int(transposed), weights)
            first += count
        return PanelMatrix(
            packed, (inputs, sum(counts)), TILED if tiled and self._has_tiles and weights == BFLOAT16 else weights
        )

    def take_outputs(self, matrix: PanelMatrix, outputs: range) -> PanelMatrix:
        """The columns `outputs` of a matrix, which begin with a panel."""
        if outputs.start % self._panel:
            raise ValueError(f"outputs from {outputs.start} on do not begin with a panel of {self._panel}")
        panels = matrix.packed[outputs.start // self._panel : -(-outputs.stop // self._panel)]
        return PanelMatrix(panels, (matrix.shape[0], len(outputs)), matrix.weights)

    def multiply(
        self,
        x: Float32Array,
        parts: Sequence[MatrixProduct],
        out: Float32Array,
        *,
        narrow: bool,
        rounded: bool,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Multiply parts of x, whose rows are contiguous, as are the rows of `out`; round to bfloat16 if `rounded`.

        All numbers of a `narrow` x must be bfloat16 values: others would be cut without notice.
        Calls `progress` between pieces of PIECE_FLOPS of work.
        """
        x_address, out_address = _at(x), _at(out)
        strides = _row_stride(x), _row_stride(out)
        described, numbers, flops = [], 0, 0
        for matrix, rows, x_at, out_at, bias in parts:
            inputs, outputs = matrix.shape
            addresses = (
                x_address + 4 * x_at,
                matrix.address,
                0 if bias is None else _at(bias),
                out_address + 4 * out_at,
            )
            described.append(
                calls.PRODUCT.pack(*addresses, 0, rows, inputs, outputs, *strides, matrix.weights, narrow, rounded)
            )
            numbers += rows * (inputs + self._row_scratch)
            flops += 2 * rows * inputs * outputs
        if numbers > len(self._scratch):
            self._scratch = aligned_empty((numbers,), np.float32)
        array, memory = b"".join(described), self._scratch  # held while `progress` may run other verbs
        scratch, tasks = _at(memory), self.library.product_tasks(array, len(described))
        step = max(1, int(tasks * min(1.0, self.threads * PIECE_FLOPS / max(flops, 1))))
        for first in range(0, tasks, step):
            self.library.multiply(array, len(described), scratch, first, min(first + step, tasks))
            progress()

    def attend(
        self,
        queries: Float32Array,
        cache: Cache,
        layout: CachedRows,
        *,
        window: int,
        sinks: Float32Array | None,
        rounded: bool,
        progress: Callable[[], None] = lambda: None,
    ) -> Float32Array:
        """Attention of scaled queries (T, H, dim) over a cache of keys and values (positions, kv heads, width).

        Calls `progress` between pieces of PIECE_FLOPS of work.
        """
        rows, heads, dim = queries.shape
        keys, values, segments, pages = cache.keys, cache.values, layout.segments, layout.pages
        kv_heads, value_dim = values.shape[1:]
        out = np.empty((rows, heads, value_dim), np.float32)
        tasks = layout.attention_tasks(kv_heads, heads // kv_heads, self.chunk)
        call = calls.Attention(
            _at(queries), _at(keys), _at(values), _at(out), _at(segments), _at(pages),
            None if sinks is None else _at(sinks), len(segments), heads, kv_heads, dim, value_dim,
            values.strides[1] // values.itemsize, window, _at(tasks.first),
            keys.dtype == np.uint16, rounded,
        )  # fmt: skip
        self.attend_tasks(call, tasks, progress)
        return out

    def attend_tasks(self, call: Any, tasks: AttentionTasks, progress: Callable[[], None]) -> None:
        """Compute all tasks of a `kernel_calls.Attention`; calls `progress` between pieces of PIECE_FLOPS of work."""
        flops = 2 * tasks.scores * call.heads * (call.dim + call.value_dim)
        step = max(1, int(tasks.number * min(1.0, self.threads * PIECE_FLOPS / max(flops, 1))))
        for first in range(0, tasks.number, step):
            self.library.attend(call, first, min(first + step, tasks.number))
            progress()

    def select_positions(
        self,
        queries: Float32Array,
        weights: Float32Array,
        index: Cache,
        layout: CachedRows,
        *,
        top_k: int,
        progress: Callable[[], None],
    ) -> Int32Array:
        """The positions (T, top_k) of queries (T, H, dim) with weights (T, H); `progress` as in `multiply`."""
        rows, heads, dim = queries.shape
        seen, first_pages = layout.seen, layout.first_pages
        width = -(-int(seen.max(initial=0)) // PAGE_ROWS) * PAGE_ROWS
        positions = np.empty((rows, top_k), np.int32)
        of_row = max(1, 2 * width * heads * dim)
        step = max(1, min(SCORE_BYTES // max(1, 4 * width), int(self.threads * PIECE_FLOPS / of_row)))
        scores = np.empty((min(step, rows), width), np.float32)
        for first in range(0, rows, step):
            some = slice(first, first + step)
            call = calls.Selection(
                _at(queries[some]), _at(weights[some]), _at(index.keys), _at(scores), _at(positions[some]),
                _at(seen[some]), _at(first_pages[some]), _at(layout.pages), len(seen[some]), heads, dim, width, top_k,
                index.keys.dtype == np.uint16,
            )  # fmt: skip
            self.library.select_positions(ctypes.addressof(call))
            progress()
        return positions

    def normalize(
        self,
        x: Float32Array,
        weight: Float32Array,
        y: Float32Array | None = None,
        *,
        eps: float,
        quotient_rounded: bool,
        rounded: bool,
    ) -> tuple[Float32Array, Float32Array]:
        """The sum of x and y, or x, and its norm over the last axis; x is (T, width) or (T, heads, width)."""
        heads, stride = 1 if x.ndim == 2 else x.shape[1], _row_stride(x)
        out = np.empty(x.shape, np.float32)
        total = x if y is None else np.empty(x.shape, np.float32)
        call = calls.Norm(
            _at(x), None if y is None else _at(y), _at(weight), None if y is None else _at(total), _at(out), len(x),
            heads, x.shape[-1], stride, eps, quotient_rounded, rounded,
        )  # fmt: skip
        self.library.normalize_rows(ctypes.addressof(call))
        return total, out

    def activate(self, gate_up: Float32Array, clamp: Clamp | None, *, rounded: bool) -> Float32Array:
        """The activation of a SwiGLU network, (T, 2F) -> (T, F)."""
        rows, width = len(gate_up), gate_up.shape[1] // 2
        out = np.empty((rows, width), np.float32)
        limit, alpha = (0.0, 0.0) if clamp is None else (clamp.limit, clamp.alpha)
        call = calls.Activation(_at(gate_up), _at(out), rows, width, clamp is not None, rounded, limit, alpha)
        self.library.activate_rows(ctypes.addressof(call))
        return out

    def rope_angles(
        self, positions: IntArray, frequencies: Float32Array, amplitude: float
    ) -> tuple[Float32Array, Float32Array]:
        """Cosines and sines (T, 1, n) of the rotations of rows at `positions` (T,), as by `Backend.rope_angles`."""
        rows, pairs = len(positions), len(frequencies)
        cosine, sine = (np.empty((rows, 1, pairs), np.float32) for _ in range(2))
        positions = np.ascontiguousarray(positions, np.int64)
        call = calls.Angles(_at(positions), _at(frequencies), _at(cosine), _at(sine), rows, pairs, amplitude)
        self.library.angle_rows(ctypes.addressof(call))
        return cosine, sine

    def rotate(self, x: Float32Array, rotation: Rotation, norm: RmsNorm | None = None) -> Float32Array:
        """Heads x (T, H, dim), normalized if there is a norm, and rotated."""
        out = np.empty(x.shape, np.float32)
        self._rotate(x, rotation, norm, out=_at(out))
        return out

    def rotate_into(
        self,
        cache: npt.NDArray[Any],
        rows: IntArray,
        x: Float32Array,
        rotation: Rotation | None = None,
        norm: RmsNorm | None = None,
    ) -> None:
        """Write heads x (T, H, dim), normalized and rotated if so requested, to `rows` (T,) of a cache of heads."""
        self._rotate(x, rotation, norm, cache=_at(cache), cached=_at(rows), is_bfloat16=cache.dtype == np.uint16)

    def _rotate(self, x: Float32Array, rotation: Rotation | None, norm: RmsNorm | None, **target: Any) -> None:
        rows, heads, dim = x.shape
        call = calls.Rotation(x=_at(x), rows=rows, heads=heads, dim=dim, stride=_row_stride(x), **target)
        if norm is not None:
            call.weight, call.eps = _at(norm.weight), norm.eps
            call.quotient_rounded = norm.rounded and rotation is not None and rotation.rounded
        if rotation is not None:
            call.cosine, call.sine = _at(rotation.cosine), _at(rotation.sine)
            call.pairs = rotation.cosine.shape[-1]
            call.interleaved, call.rounded = rotation.interleaved, rotation.rounded
        self.library.rotate_rows(ctypes.addressof(call))

    def copy_rows(self, rows: npt.NDArray[Any], index: IntArray | None, out: npt.NDArray[Any]) -> None:
        """Write rows[index], or all rows if None, to `out`: bfloat16 bits become float32, or float32 such bits."""
        widens, narrows = rows.dtype.itemsize < out.dtype.itemsize, rows.dtype.itemsize > out.dtype.itemsize
        at = None if index is None else _at(index)
        call = calls.Gathering(_at(rows), _at(out), at, len(out), out.shape[1], widens, narrows, rows.itemsize)
        self.library.gather_rows(ctypes.addressof(call))

    def combine(
        self,
        buffer: npt.NDArray[Any],
        output_rows: IntArray,
        weights: Float32Array,
        addends: Sequence[Float32Array],
    ) -> Float32Array:
        """The sums of `Backend.combine`; a buffer of bfloat16 bits gives rounded results."""
        out = np.empty((len(output_rows), buffer.shape[1]), np.float32)
        added = (calls.POINTER * 2)(*map(_at, addends))
        call = calls.Combination(
            _at(buffer), _at(output_rows), _at(weights), added, _at(out), len(out), output_rows.shape[1],
            buffer.shape[1], buffer.dtype == np.uint16, buffer.dtype == np.uint16,
        )  # fmt: skip
        self.library.combine_rows(ctypes.addressof(call))
        return out

    def convolve(
        self,
        x: Float32Array,
        taps: Float32Array,
        bias: Float32Array | None,
        tail: Float32Array,
        spans: IntArray,
        *,
        rounded: bool,
        progress: Callable[[], None] = lambda: None,
    ) -> Float32Array:
        """The convolution of `StateVerbs.causal_conv`; the `spans` (n, 4) are of `attention_layout.CachedRows`.

        Calls `progress` between pieces of PIECE_FLOPS of work.
        """
        out = np.empty(x.shape, np.float32)
        for piece in self._pieces(spans, 16 * taps.size):
            call = calls.Convolution(
                _at(x), _at(taps), None if bias is None else _at(bias), _at(tail), _at(out), _at(piece), len(piece),
                x.shape[1], len(taps), _row_stride(x), rounded,
            )  # fmt: skip
            self.library.convolve(ctypes.addressof(call))
            progress()
        return out

    def _pieces(self, spans: IntArray, row_flops: int) -> Iterator[IntArray]:
        """The spans in order, divided where a piece of all threads is full; no piece has two parts of a span."""
        most = max(1, int(self.threads * PIECE_FLOPS / row_flops))
        if spans[:, 1].sum() <= most:
            yield spans
            return
        piece: list[tuple[int, int, int, int]] = []
        rows = 0
        for row, length, start, state in spans.tolist():
            for first in range(0, max(length, 1), most):
                count = min(most, length - first)
                if piece and rows + count > most:
                    yield np.array(piece, np.int64)
                    piece, rows = [], 0
                piece.append((row + first, count, start + first, state))
                rows += count
        yield np.array(piece, np.int64)

    def apply_delta_rule(
        self,
        heads: tuple[Float32Array, Float32Array, Float32Array],
        alpha: Float32Array,
        beta: Float32Array,
        memory: Float32Array,
        spans: IntArray,
        *,
        rounded: bool,
        progress: Callable[[], None] = lambda: None,
    ) -> Float32Array:
        """The outputs of `StateVerbs.delta_rule`, given alpha and beta (T, H); rows of `heads` are equally apart.

        Calls `progress` between pieces of PIECE_FLOPS of work.
        """
        (rows, key_heads, key_dim), (num_heads, value_dim) = heads[0].shape, heads[2].shape[1:]
        out, units = np.empty((rows, num_heads, value_dim), np.float32), np.empty((2, *heads[0].shape), np.float32)
        for piece in self._pieces(spans, 8 * num_heads * key_dim * value_dim):
            call = calls.DeltaRule(
                *map(_at, heads), _at(alpha), _at(beta), None, _at(units[0]), _at(units[1]), _at(memory), _at(out),
                _at(piece), len(piece), rows, key_heads, num_heads, key_dim, value_dim, _row_stride(heads[0]), rounded,
            )  # fmt: skip
            self.library.apply_delta_rule(ctypes.addressof(call))
            rows = 0  # the first call divides the queries and keys of all rows by their lengths
            progress()
        return out

    def apply_state_space(
        self,
        heads: tuple[Float32Array, Float32Array, Float32Array],
        rates: tuple[Float32Array, Float32Array],
        skip: Float32Array,
        memory: Float32Array,
        spans: IntArray,
        *,
        rounded: bool,
        progress: Callable[[], None] = lambda: None,
    ) -> Float32Array:
        """The outputs of `StateVerbs.state_space`, given decays and steps (T, H).

        The first two of `heads` are contiguous. Calls `progress` between pieces of PIECE_FLOPS of work.
        """
        outputs, inputs, values = heads
        (rows, groups, state_dim), (num_heads, head_dim) = inputs.shape, values.shape[1:]
        out = np.empty((rows, num_heads, head_dim), np.float32)
        for piece in self._pieces(spans, 8 * num_heads * state_dim * head_dim):
            call = calls.DeltaRule(
                None, None, _at(values), *map(_at, rates), _at(skip), _at(outputs), _at(inputs), _at(memory),
                _at(out), _at(piece), len(piece), rows, groups, num_heads, state_dim, head_dim, _row_stride(values),
                rounded,
            )  # fmt: skip
            self.library.apply_delta_rule(ctypes.addressof(call))
            progress()
        return out

    def normalize_gated(self, x: Float32Array, gate: Float32Array, norm: RmsNorm, *, rounded: bool) -> Float32Array:
        """The norm of `StateVerbs.gated_norm`."""
        out = np.empty(x.shape, np.float32)
        call = calls.GatedNorm(_at(x), _at(gate), _at(norm.weight), _at(out), *x.shape, norm.eps, rounded)
        self.library.normalize_gated(ctypes.addressof(call))
        return out

    def sum_exponentials(self, logits: Float32Array, *, block: int) -> tuple[Float32Array, Float32Array]:
        """The largest number m of each block of logits (T, V), and the sum of exp(x - m) (T, blocks)."""
        rows, width = logits.shape
        highest, sums = np.empty((2, rows, -(-width // block)), np.float32)
        call = calls.ExponentialSums(_at(logits), _at(highest), _at(sums), rows, width, block)
        self.library.sum_exponentials(ctypes.addressof(call))
        return highest, sums

    def choose_experts(
        self, logits: Float32Array, router: Router, correction: Float32Array | None, *, rounds: bool
    ) -> tuple[IntArray, Float32Array]:
        """Experts and weights (T, K) of a router that is no SparseMixer; `rounds` logits and weights to bfloat16."""
        rows, num = logits.shape
        experts, weights = np.empty((rows, router.top_k), np.int32), np.empty((rows, router.top_k), np.float32)
        scores = np.empty(4 * rows * num, np.float32)
        call = calls.Choice(
            _at(logits), None if correction is None else _at(correction), _at(scores), _at(experts), _at(weights),
            rows, num, router.top_k, router.num_groups, router.kept_groups, TOP_OF_GROUP[router.group_score],
            SCORINGS.index(router.scoring), router.renormalize, rounds and not router.float32_logits,
            rounds and not router.float32_weights, router.least_sum, router.scaling,
        )  # fmt: skip
        self.library.choose_experts(ctypes.addressof(call))
        return experts, weights


def contiguous_rows(x: Float32Array) -> Float32Array:
    """The same rows (T, width) or (T, heads, width), each contiguous; they may be apart."""
    expected = x.itemsize
    for size, stride in zip(x.shape[:0:-1], x.strides[:0:-1], strict=True):
        if stride != expected and size > 1:
            return np.ascontiguousarray(x)
        expected *= size
    return x


def _row_stride(x: Float32Array) -> int:
    return x.strides[0] // x.itemsize if len(x) > 1 else x[:1].size
