"""The parts of a layer on a GPU: experts, rows that are packed and combined, and the small kernels."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np

from moempi.arrays import IntArray
from moempi.backend.cuda.products import Matrix
from moempi.backend.values import Array, Expert, Segment
from moempi.bench.device_calls import record_calls, replay
from moempi.bench.gpu_report import COPY, KERNELS, OURS, Bench, Case
from moempi.bench.random_layer import WEIGHT_DEVIATION
from moempi.config.architecture import Rope, Router
from moempi.config.tensors import PAGE_ROWS
from moempi.model.rope import frequencies

PRODUCTS = "products alone"
COLD_EXPERTS = 3
"""Experts whose weights are used in turn, so that none is in a cache of less than two experts."""
NORM_EPS = 1e-6
APART = "group, pack"
Make = tuple[str, Callable[[], Case]]


def expert_cases(bench: Bench, sizes: Namespace) -> Iterator[Make]:
    """An expert of each number of rows beside its two products and torch; the weights are not in a cache."""
    weights = _ExpertWeights(bench, sizes)
    for num_rows in (*sizes.few, *sizes.many):
        yield "expert", partial(_expert, bench, sizes, weights, num_rows)


class _ExpertWeights:
    """The weights of COLD_EXPERTS experts, made when the first case needs them."""

    def __init__(self, bench: Bench, sizes: Namespace) -> None:
        self._bench = bench
        self._shapes = (2 * sizes.expert_width, sizes.width), (sizes.width, sizes.expert_width)
        self._arrays: list[list[Array]] = []

    @property
    def arrays(self) -> list[list[Array]]:
        """Of each expert: gate and up (2F, D), down (D, F)."""
        if not self._arrays:
            rows = partial(self._bench.values.rows, deviation=WEIGHT_DEVIATION)
            self._arrays = [[rows(*shape) for shape in self._shapes] for _ in range(COLD_EXPERTS)]
        return self._arrays


def _expert(bench: Bench, sizes: Namespace, weights: _ExpertWeights, num_rows: int) -> Case:
    backend, hidden = bench.backend, sizes.expert_width
    x, counts = bench.values.rows(num_rows, sizes.width), np.array([num_rows])
    hidden_rows, outputs = bench.values.rows(num_rows, 2 * hidden), bench.values.rows(num_rows, sizes.width)
    experts = cycle([Expert(Matrix(gate_up, False), Matrix(down, False)) for gate_up, down in weights.arrays])
    arrays = cycle(weights.arrays)

    def products() -> None:
        gate_up, down = next(arrays)
        backend.device.product(x, gate_up, hidden_rows, transposed=False)
        backend.device.product(hidden_rows[:, :hidden], down, outputs, transposed=False)

    tensors: Any = cycle([])
    if bench.peers.available:
        tensors = cycle([[bench.peers.tensor(array) for array in both] for both in weights.arrays])
    return Case(
        "expert",
        f"{num_rows:,} rows",
        6 * num_rows * sizes.width * hidden,
        "TFLOP/s",
        {
            OURS: lambda: backend.expert_mlp(x, [next(experts)], counts),
            PRODUCTS: products,
            **bench.peers.expert(x, lambda: next(tensors)),
        },
        same=("torch",),
    )


def packing_cases(bench: Bench, sizes: Namespace) -> Iterator[Make]:
    """Rows taken by an index and weighted sums of rows, few and many, beside torch and the device's copy."""
    for num_rows in (sizes.top_k * max(sizes.few), max(sizes.many)):
        yield "pack", partial(_pack, bench, sizes, num_rows)
        yield "combine", partial(_combine, bench, sizes, num_rows)


def _pack(bench: Bench, sizes: Namespace, num_rows: int) -> Case:
    backend = bench.backend
    x, out, copied = (bench.values.rows(num_rows, sizes.width) for _ in range(3))
    order = backend.upload(np.random.default_rng(0).permutation(num_rows))

    def pack() -> Array:
        backend.pack(x, order, out)
        return out

    num_bytes = 2 * x.nbytes
    return Case(
        "pack",
        f"{num_rows:,} rows",
        num_bytes,
        "GB/s",
        {OURS: pack, COPY: lambda: backend.device.copy(x, copied), **bench.peers.pack(x, order)},
        amounts={COPY: num_bytes},
        same=("torch",),
    )


def _combine(bench: Bench, sizes: Namespace, num_rows: int) -> Case:
    """Every row of the buffer is read once."""
    backend, slots = bench.backend, sizes.top_k
    tokens = num_rows // slots
    buffer, copied = bench.values.rows(num_rows, sizes.width), bench.values.rows(num_rows, sizes.width)
    rows = np.random.default_rng(1).permutation(num_rows)[: tokens * slots].reshape(tokens, slots)
    output_rows, weights = backend.upload(rows), backend.upload(np.full(rows.shape, 1 / slots, np.float32))
    return Case(
        "combine",
        f"{tokens:,} rows of {slots}",
        tokens * (slots + 1) * sizes.width * 2,
        "GB/s",
        {
            OURS: lambda: backend.combine(buffer, output_rows, weights),
            COPY: lambda: backend.device.copy(buffer, copied),
            **bench.peers.combine(buffer, output_rows, weights),
        },
        amounts={COPY: 2 * buffer.nbytes},
        same=("torch",),
    )


def copy_case(bench: Bench, sizes: Namespace) -> Case:
    """The device's copy, whose rate the other parts are compared with."""
    x, out = (bench.values.rows(max(sizes.many), sizes.width) for _ in range(2))
    copies = {COPY: lambda: bench.backend.device.copy(x, out)}
    return Case("copy", f"{x.nbytes / 1e6:,.0f} MB", 2 * x.nbytes, "GB/s", copies, amounts={COPY: 2 * x.nbytes})


def small_cases(bench: Bench, sizes: Namespace) -> Iterator[Make]:
    """The kernels between the products, few rows and many, beside torch where it has the same function."""
    for num_rows in (max(sizes.few), max(sizes.many)):
        for part, make in (
            ("rms_norm", _rms_norm),
            ("add", _add),
            ("swiglu", _swiglu),
            ("rotate", _rotate),
            ("extend_cache", _extend_cache),
            ("rotate_into_cache", _rotate_into_cache),
            ("choose_experts", _choose_experts),
            ("group", _group),
            ("group_and_pack", _group_and_pack),
        ):
            yield part, partial(make, bench, sizes, num_rows)


def _rms_norm(bench: Bench, sizes: Namespace, num_rows: int) -> Case:
    x, weight = bench.values.rows(num_rows, sizes.width), bench.values.rows(sizes.width)
    ours = partial(bench.backend.rms_norm, x, weight, eps=NORM_EPS)
    peers = bench.peers.rms_norm(x, weight, eps=NORM_EPS)
    return Case("rms_norm", f"{num_rows:,} rows", 2 * x.nbytes, "GB/s", {OURS: ours, **peers}, same=("torch",))


def _add(bench: Bench, sizes: Namespace, num_rows: int) -> Case:
    x, y = (bench.values.rows(num_rows, sizes.width) for _ in range(2))
    contestants = {OURS: lambda: bench.backend.add(x, y), **bench.peers.add(x, y)}
    return Case("add", f"{num_rows:,} rows", 3 * x.nbytes, "GB/s", contestants, same=("torch",))


def _swiglu(bench: Bench, sizes: Namespace, num_rows: int) -> Case:
    gate_up = bench.values.rows(num_rows, 2 * sizes.expert_width)
    contestants = {OURS: lambda: bench.backend.swiglu(gate_up), **bench.peers.swiglu(gate_up)}
    return Case("swiglu", f"{num_rows:,} rows", 1.5 * gate_up.nbytes, "GB/s", contestants, same=("torch",))


def _rotate(bench: Bench, sizes: Namespace, num_rows: int) -> Case:
    x = bench.values.rows(num_rows, sizes.heads, sizes.head_dim)
    periods = frequencies(Rope(), dim=sizes.head_dim)
    angles = bench.backend.rope_angles(np.arange(num_rows), frequencies=periods, amplitude=1.0)
    contestants = {OURS: lambda: bench.backend.rotate(x, angles)}
    return Case("rotate", f"{num_rows:,} rows", 2 * x.nbytes, "GB/s", contestants)


def _extend_cache(bench: Bench, sizes: Namespace, num_rows: int) -> Case:
    keys, values = (bench.values.rows(num_rows, sizes.heads, sizes.head_dim) for _ in range(2))
    pages = -(-num_rows // PAGE_ROWS)
    cache, segments = bench.backend.cache(pages, sizes.heads, sizes.head_dim), one_sequence(num_rows)
    contestants = {OURS: lambda: bench.backend.extend_cache(cache, keys, values, segments)}
    return Case("extend_cache", f"{num_rows:,} rows", 4 * keys.nbytes, "GB/s", contestants)


def _rotate_into_cache(bench: Bench, sizes: Namespace, num_rows: int) -> Case:
    """Queries, keys and values are parts of one array, as of one product."""
    heads, pages = sizes.heads, -(-num_rows // PAGE_ROWS)
    rows = bench.values.rows(num_rows, 3 * heads, sizes.head_dim)
    parts = rows[:, :heads], rows[:, heads : 2 * heads], rows[:, 2 * heads :]
    periods = frequencies(Rope(), dim=sizes.head_dim)
    angles = bench.backend.rope_angles(np.arange(num_rows), frequencies=periods, amplitude=1.0)
    cache, segments = bench.backend.cache(pages, heads, sizes.head_dim), one_sequence(num_rows)
    ours = partial(bench.backend.rotate_into_cache, parts, angles, cache=cache, segments=segments)
    return Case("rotate_into_cache", f"{num_rows:,} rows", 2 * rows.nbytes, "GB/s", {OURS: ours})


def one_sequence(num_rows: int) -> list[Segment]:
    """A sequence whose `num_rows` rows are all new, on pages in order."""
    return [Segment(0, num_rows, 0, np.arange(-(-num_rows // PAGE_ROWS)))]


def _choose_experts(bench: Bench, sizes: Namespace, num_rows: int) -> Case:
    numbers = np.random.default_rng(0).standard_normal((num_rows, sizes.experts), np.float32)
    logits, rule = bench.backend.upload(numbers), Router(top_k=sizes.top_k, renormalize=True)
    num_bytes = num_rows * (4 * sizes.experts + 8 * sizes.top_k)
    contestants = {
        OURS: lambda: bench.backend.choose_experts(logits, rule),
        **bench.peers.choose_experts(logits, sizes.top_k),
    }
    return Case("choose_experts", f"{num_rows:,} rows of {sizes.experts}", num_bytes, "GB/s", contestants)


def _choices(sizes: Namespace, num_rows: int) -> IntArray:
    """Experts (T, K) of rows, different ones for each row."""
    return np.random.default_rng(0).random((num_rows, sizes.experts)).argsort(axis=1)[:, : sizes.top_k]


def _group_and_pack(bench: Bench, sizes: Namespace, num_rows: int) -> Case:
    """As many of the rows as the verb takes; beside it the kernels of `group` and `pack`, without their wait."""
    backend = bench.backend
    chosen = _choices(sizes, min(num_rows, backend.most_packed_choices // sizes.top_k))
    experts, ids = backend.upload(chosen), backend.upload(np.arange(sizes.experts))
    rows, out = bench.values.rows(len(chosen), sizes.width), backend.row_buffer(chosen.size, sizes.width)

    def apart() -> None:
        backend.pack(rows, backend.group(experts, ids, num_ids=sizes.experts)[0], out)

    calls = record_calls(backend, apart)
    contestants = {
        OURS: lambda: backend.group_and_pack(rows, experts, ids, out, num_ids=sizes.experts),
        APART: lambda: replay(calls),
    }
    return Case("group_and_pack", f"{chosen.size:,} choices", 2 * out.nbytes, "GB/s", contestants)


def _group(bench: Bench, sizes: Namespace, num_rows: int) -> Case:
    """The verb waits for the counts, so its kernels are submitted without it; torch's stable sort is beside them."""
    chosen, ids = _choices(sizes, num_rows), np.arange(sizes.experts)
    experts = bench.backend.upload(chosen)
    contestants = {OURS: lambda: bench.backend.group(experts, ids, num_ids=len(ids)), **bench.peers.group(experts)}
    return Case(
        "group",
        f"{chosen.size:,} choices",
        3 * 4 * chosen.size,
        "GB/s",
        contestants,
        wall_repeats=20,
        blocks=True,
        amounts={KERNELS: 3 * 4 * chosen.size},
    )
