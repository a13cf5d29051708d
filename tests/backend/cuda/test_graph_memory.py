"""The memory of CUDA graphs of large models is within its forecast, on a device whose arrays have no memory."""

from importlib.util import find_spec

import numpy as np
import pytest
from msgspec import structs

from engine.runs import SMALL
from moempi.backend.cuda.backend import CudaBackend
from moempi.backend.cuda.products import Matrix
from moempi.backend.values import PhysicalIds, Segment
from moempi.config.architecture import AttentionShape, Latent, Rope, Router
from moempi.layout.memory import graph_bytes
from moempi.model.attention import Attention
from moempi.model.feed_forward import MixtureOfExperts
from moempi.model.latent_attention import LatentAttention
from moempi.model.norm import Norm
from moempi.model.transformer import Layer, with_graphs

WIDTH, EXPERTS, TOP_K, ROWS = 7168, 256, 8, 256
LATENT = Latent(512, rope_dim=64, value_dim=128, query_rank=1536)
SHAPES = {
    "heads": AttentionShape(128, 128, 128),
    "grouped heads": AttentionShape(64, 8, 128),
    "latent": AttentionShape(128, 128, 192, rope=Rope(dim=64), latent=LATENT),
}


@pytest.mark.skipif(find_spec("cupy") is None, reason="needs CuPy's arrays")
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_arenas_of_all_graphs_of_a_lane_are_within_the_forecast(shape, precision):
    from simt.host_time import IdleDevice

    device = IdleDevice()
    backend = CudaBackend(device, precision=precision, reproducible=False, capture=True)
    layer = Layer(0, norm_of(backend), attention_of(backend, shape), norm_of(backend), router_of(backend))
    fused = with_graphs(layer, backend).fused_attention
    dim, heads = (576, 1) if shape.latent else (shape.head_dim, shape.num_kv_heads)
    cache = backend.cache(2**16, heads, dim, latent=512 if shape.latent else 0)
    x, angles = backend.row_buffer(ROWS, WIDTH), device.empty((ROWS, (shape.rope.dim or dim) // 2), np.float32)
    segments = [Segment(row, 1, 4000, np.arange(126)) for row in range(ROWS)]
    fused(x, (angles, angles), cache, segments, PhysicalIds(device.empty((EXPERTS,), np.int32), EXPERTS))
    (arena,) = fused._sizes.values()
    router = structs.replace(SMALL.experts.router, top_k=TOP_K)
    experts = structs.replace(SMALL.experts, num=EXPERTS, router=router)
    architecture = structs.replace(SMALL, width=WIDTH, attention=shape, experts=experts)
    forecast = graph_bytes(architecture, row_bytes=backend.row_dtype.itemsize)
    assert 2 * (1 << (arena - 1).bit_length()) + (32 << 20) <= forecast < 8 * arena


def matrix(backend, outputs, inputs):
    return Matrix(backend.row_buffer(outputs, inputs), transposed=False)


def norm_of(backend):
    return Norm("rms", 1e-6, backend.row_buffer(1, WIDTH)[0])


def router_of(backend):
    return MixtureOfExperts(0, Router(top_k=TOP_K), matrix(backend, EXPERTS, WIDTH), experts=())


def attention_of(backend, shape):
    heads, dim = shape.num_heads, shape.head_dim
    if not shape.latent:
        outputs = (heads + 2 * shape.num_kv_heads) * dim
        return Attention(shape, 1e-6, matrix(backend, outputs, WIDTH), matrix(backend, WIDTH, heads * dim))
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
