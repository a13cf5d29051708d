"""Attention on a GPU: decoding, one new row per sequence, and prefill, all rows of one sequence."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from moempi.backend.values import Cache, Segment
from moempi.bench.gpu_parts import NORM_EPS, Make, one_sequence
from moempi.bench.gpu_report import COPY, OURS, Bench, Case
from moempi.bench.torch_peers import ATTENTION_BACKENDS
from moempi.config.tensors import PAGE_ROWS

PEERS = tuple(f"torch {name}" for name in ATTENTION_BACKENDS)


def decode_cases(bench: Bench, sizes: Namespace) -> Iterator[Make]:
    """One new row per sequence beside the device's copy and torch over the same cache."""
    for sequences in sizes.sequences:
        yield "decode attention", partial(_decode, bench, sizes, sequences)


def prefill_cases(bench: Bench, sizes: Namespace) -> Iterator[Make]:
    """All rows of a sequence beside torch's flash and cuDNN attention; FlashAttention-3 is not measured."""
    yield "prefill attention", partial(_prefill, bench, sizes)


def preemption_cases(bench: Bench, sizes: Namespace) -> Iterator[Make]:
    """A short kernel while the attention of another queue runs, alone, and one with the priority of attention."""
    yield "preemption", partial(_preemption, bench, sizes)


def _random_cache(bench: Bench, sizes: Namespace, pages: int) -> Cache:
    cache = bench.backend.cache(pages, sizes.heads, sizes.head_dim)
    bench.values.fill(cache.keys)
    bench.values.fill(cache.values)
    return cache


def _decode(bench: Bench, sizes: Namespace, sequences: int) -> Case:
    backend, pages, scale = bench.backend, -(-sizes.context // PAGE_ROWS), sizes.head_dim**-0.5
    segments = [
        Segment(number, 1, sizes.context - 1, np.arange(number * pages, (number + 1) * pages))
        for number in range(sequences)
    ]
    cache = _random_cache(bench, sizes, sequences * pages)
    queries = bench.values.rows(sequences, sizes.heads, sizes.head_dim)
    peers = bench.peers.attention(queries, cache, sequences=sequences, context=sizes.context, scale=scale)
    return Case(
        "decode attention",
        f"{sequences} sequences of {sizes.context:,}, {sizes.heads} heads",
        2 * sequences * sizes.context * sizes.heads * sizes.head_dim * 2,
        "GB/s",
        {
            OURS: lambda: backend.attend(queries, cache, segments, scale=scale),
            COPY: lambda: backend.device.copy(cache.keys, cache.values),
            **peers,
        },
        amounts={COPY: 2 * cache.keys.nbytes},
        same=PEERS,
    )


def _prefill(bench: Bench, sizes: Namespace) -> Case:
    """Causal attention has half the products of full attention."""
    backend, scale, segments = bench.backend, sizes.head_dim**-0.5, one_sequence(sizes.context)
    cache = _random_cache(bench, sizes, len(segments[0].pages))
    queries = bench.values.rows(sizes.context, sizes.heads, sizes.head_dim)
    return Case(
        "prefill attention",
        f"{sizes.context:,} rows, {sizes.heads} heads; FlashAttention-3 not measured",
        2 * sizes.context**2 * sizes.heads * sizes.head_dim,
        "TFLOP/s",
        {
            OURS: lambda: backend.attend(queries, cache, segments, scale=scale),
            **bench.peers.attention(queries, cache, sequences=1, context=sizes.context, scale=scale),
        },
        same=PEERS,
    )


def _preemption(bench: Bench, sizes: Namespace) -> Case:
    """Two calls of attention for each short kernel, so that they outlast it; one short kernel is attention as well."""
    backend, scale = bench.backend, sizes.head_dim**-0.5
    long, rows = _decode(bench, sizes, max(sizes.sequences)).contestants[OURS], bench.values.rows(1, sizes.width)
    queries, cache = bench.values.rows(1, sizes.heads, sizes.head_dim), _random_cache(bench, sizes, 1)
    norm = partial(backend.rms_norm, rows, bench.values.rows(sizes.width), eps=NORM_EPS)
    short = partial(backend.attend, queries, cache, one_sequence(1), scale=scale)

    def beside_attention(run: Callable[[], object]) -> None:
        with backend.on_queue(1):
            long()
            long()
        run()

    return Case(
        "preemption",
        f"1 row beside decode attention of {max(sizes.sequences)} sequences of {sizes.context:,}",
        0,
        "",
        {
            OURS: partial(beside_attention, norm),
            "without attention": norm,
            "short attention": partial(beside_attention, short),
            "short attention alone": short,
        },
    )
