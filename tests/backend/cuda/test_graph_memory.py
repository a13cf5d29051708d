"""The memory of CUDA graphs of large models is within its forecast, on a device whose arrays have no memory."""

from importlib.util import find_spec

import numpy as np
import pytest
from msgspec import structs

from engine.jobs import make_job
from engine.runs import SMALL
from moempi.backend.cuda import attention, captured_attention, device, products
from moempi.backend.cuda.backend import CudaBackend
from moempi.backend.cuda.products import Matrix
from moempi.backend.values import PhysicalIds, Segment
from moempi.config.architecture import AttentionShape, Latent, Rope, Router
from moempi.config.tensors import PAGE_ROWS
from moempi.layout import memory
from moempi.layout.memory import WORKSPACE_BYTES, arena_bytes, graph_bytes
from moempi.model.attention import Attention
from moempi.model.feed_forward import MixtureOfExperts
from moempi.model.latent_attention import LatentAttention
from moempi.model.norm import Norm
from moempi.model.transformer import Layer, with_graphs

WIDTH, EXPERTS, TOP_K = 5120, 256, 8
LATENT = Latent(512, rope_dim=64, value_dim=128, query_rank=1536)
SHAPES = {
    "heads": AttentionShape(128, 128, 128),
    "grouped heads": AttentionShape(64, 8, 128),
    "biases": AttentionShape(96, 8, 128, biases="qkv"),
    "all biases": AttentionShape(64, 8, 64, biases="all"),
    "gate": AttentionShape(64, 8, 128, output_gate=True),
    "gate, normalized vectors, clipped": AttentionShape(64, 8, 128, output_gate=True, qk_norm="vector", clip=1.0),
    "latent": AttentionShape(128, 128, 192, rope=Rope(dim=64), latent=LATENT),
}
STEPS = {"most rows": (256, 4000), "padded rows": (240, 4000), "long sequences": (16, 160_000)}
"""Rows, and the positions of their sequences."""


def test_the_forecast_has_the_constants_of_graphs():
    assert memory.GRAPH_ROWS == captured_attention.MOST_ROWS
    assert memory.PADDED_ROWS == products.PRODUCT_ROWS
    assert memory.WORKSPACE_BYTES == device.WORKSPACE_BYTES
    assert (memory.PARTIAL_BYTES, memory.SPLIT_KEYS) == (attention.PARTIAL_BYTES, attention.SPLIT_KEYS)


@pytest.mark.skipif(find_spec("cupy") is None, reason="needs CuPy's arrays")
@pytest.mark.parametrize(
    ("precision", "reproducible"),
    [("bfloat16", False), ("bfloat16", True), ("float32", True)],
    ids=["bfloat16", "reproducible", "float32"],
)
@pytest.mark.parametrize(("rows", "positions"), STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_arenas_of_all_graphs_of_a_lane_are_within_the_forecast(shape, rows, positions, precision, reproducible):
    from simt.host_time import IdleDevice

    idle = IdleDevice()
    backend = CudaBackend(idle, precision=precision, reproducible=reproducible, capture=True)
    layer = Layer(0, norm_of(backend), attention_of(backend, shape), norm_of(backend), router_of(backend))
    fused = with_graphs(layer, backend).fused_attention
    dim, heads, pages = shape.cached_dim, shape.cached_heads, -(-positions // PAGE_ROWS)
    cache = backend.cache(rows * pages, heads, dim, latent=LATENT.key_value_rank if shape.latent else 0)
    x, angles = backend.row_buffer(rows, WIDTH), idle.empty((rows, (shape.rope.dim or dim) // 2), np.float32)
    segments = [Segment(row, 1, positions - 1, np.arange(pages)) for row in range(rows)]
    fused(x, (angles, angles), cache, segments, PhysicalIds(idle.empty((EXPERTS,), np.int32), EXPERTS))
    (arena,) = fused._sizes.values()
    router = structs.replace(SMALL.experts.router, top_k=TOP_K)
    experts = structs.replace(SMALL.experts, num=EXPERTS, router=router)
    architecture = structs.replace(
        SMALL, width=WIDTH, attention=shape, experts=experts, max_positions=max(positions, 4096)
    )
    job = make_job(run={"precision": precision, "reproducible": reproducible})
    forecast, of_all = (of(job, architecture, backend.row_dtype.itemsize) for of in (arena_bytes, graph_bytes))
    assert arena <= forecast
    assert WORKSPACE_BYTES + 2 * (1 << (arena - 1).bit_length()) <= of_all
    if rows == captured_attention.MOST_ROWS:
        assert forecast < 2 * arena


def matrix(backend, outputs, inputs):
    return Matrix(backend.row_buffer(outputs, inputs), transposed=False)


def norm_of(backend):
    return Norm("rms", 1e-6, backend.row_buffer(1, WIDTH)[0])


def router_of(backend):
    return MixtureOfExperts(0, Router(top_k=TOP_K), matrix(backend, EXPERTS, WIDTH), experts=())


def attention_of(backend, shape):
    heads, dim = shape.num_heads, shape.head_dim
    if not shape.latent:
        outputs, is_vector = (heads + 2 * shape.num_kv_heads) * dim, shape.qk_norm == "vector"
        return Attention(
            shape,
            1e-6,
            qkv=matrix(backend, outputs, WIDTH),
            output=matrix(backend, WIDTH, heads * dim),
            qkv_bias=backend.row_buffer(1, outputs)[0] if shape.biases != "none" else None,
            output_bias=backend.row_buffer(1, WIDTH)[0] if shape.biases == "all" else None,
            q_norm=backend.row_buffer(1, heads * dim)[0] if is_vector else None,
            k_norm=backend.row_buffer(1, shape.num_kv_heads * dim)[0] if is_vector else None,
            gate=matrix(backend, heads * dim, WIDTH) if shape.output_gate else None,
        )
    rank = LATENT.key_value_rank
    return LatentAttention(
        shape,
        LATENT,
        down=matrix(backend, LATENT.query_rank + rank + LATENT.rope_dim, WIDTH),
        key_value_norm=backend.row_buffer(1, rank)[0],
        absorb_keys=backend.row_buffer(heads * 128, rank).reshape(heads, 128, rank),
        expand_values=backend.row_buffer(heads * rank, 128).reshape(heads, rank, 128),
        output=matrix(backend, WIDTH, heads * LATENT.value_dim),
        queries=matrix(backend, heads * dim, LATENT.query_rank),
        query_norm=backend.row_buffer(1, LATENT.query_rank)[0],
    )
