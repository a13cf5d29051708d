"""Latent attention in its absorbed form against its definition, which expands every key and value."""

import numpy as np
import pytest

from moempi.arrays import narrow, round_to_bfloat16
from moempi.backend.cpu.backend import NumpyBackend
from moempi.backend.values import Segment
from moempi.config.architecture import AttentionShape, Latent, Rope
from moempi.model.latent_attention import LatentAttention
from moempi.model.rope import rope_angles

HEADS, PLAIN, ROTATED, VALUES, RANK, QUERY_RANK, WIDTH = 3, 6, 4, 5, 8, 10, 12
BACKEND = NumpyBackend(precision="float32")


def shape(query_rank):
    latent = Latent(key_value_rank=RANK, rope_dim=ROTATED, value_dim=VALUES, query_rank=query_rank)
    return AttentionShape(HEADS, HEADS, PLAIN + ROTATED, rope=Rope(interleaved=True), score_factor=1.3, latent=latent)


def weights(query_rank):
    random = np.random.default_rng(5)

    def matrix(*sizes):
        return round_to_bfloat16(random.normal(size=sizes).astype(np.float32) * sizes[-1] ** -0.5)

    return {
        "query_latent": matrix(QUERY_RANK, WIDTH),
        "query_norm": matrix(QUERY_RANK) + 1,
        "queries": matrix(HEADS * (PLAIN + ROTATED), query_rank or WIDTH),
        "latent": matrix(RANK + ROTATED, WIDTH),
        "norm": matrix(RANK) + 1,
        "expand": matrix(HEADS, PLAIN + VALUES, RANK),
        "output": matrix(WIDTH, HEADS * VALUES),
    }


def built(held, query_rank):
    attention = shape(query_rank)
    return LatentAttention(
        shape=attention,
        latent=attention.latent,
        down=BACKEND.matrix(narrow(held["query_latent" if query_rank else "queries"]), narrow(held["latent"])),
        key_value_norm=held["norm"],
        absorb_keys=held["expand"][:, :PLAIN],
        expand_values=held["expand"][:, PLAIN:].transpose(0, 2, 1),
        output=BACKEND.matrix(narrow(held["output"])),
        queries=BACKEND.matrix(narrow(held["queries"])) if query_rank else None,
        query_norm=held["query_norm"] if query_rank else None,
    )


def attended(x, chunks, query_rank):
    module, pages, parts, start = built(weights(query_rank), query_rank), np.array([2, 0]), [], 0
    cache = BACKEND.cache(3, 1, RANK + ROTATED, latent=RANK)
    for count in chunks:
        rows, positions = x[start : start + count], np.arange(start, start + count)
        angles = rope_angles(BACKEND, module.shape, positions, np.full(count, sum(chunks)))
        parts.append(module(BACKEND, rows, angles, cache, [Segment(0, count, start, pages)]))
        start += count
    return np.concatenate(parts)


def twin(x, query_rank):
    """Latent attention with expanded keys and values, in float64, position by position."""
    held = {name: array.astype(np.float64) for name, array in weights(query_rank).items()}
    x = x.astype(np.float64)

    def normed(rows, weight):
        return rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-6) * weight

    def rotated(rows, position):
        pairs = rows[..., 0::2] + 1j * rows[..., 1::2]
        pairs = pairs * np.exp(1j * position * 10000.0 ** (-np.arange(0, ROTATED, 2) / ROTATED))
        return np.stack([pairs.real, pairs.imag], -1).reshape(rows.shape)

    source = normed(x @ held["query_latent"].T, held["query_norm"]) if query_rank else x
    queries = (source @ held["queries"].T).reshape(len(x), HEADS, -1)
    both = x @ held["latent"].T
    expanded = np.einsum("hor,tr->tho", held["expand"], normed(both[:, :RANK], held["norm"]))
    result = np.zeros((len(x), HEADS, VALUES))
    for position in range(len(x)):
        for head in range(HEADS):
            query = queries[position, head]
            query = np.concatenate([query[:PLAIN], rotated(query[PLAIN:], position)])
            keys = [
                np.concatenate([expanded[at, head, :PLAIN], rotated(both[at, RANK:], at)]) for at in range(position + 1)
            ]
            scores = np.array(keys) @ query * (PLAIN + ROTATED) ** -0.5 * 1.3
            powers = np.exp(scores - scores.max())
            result[position, head] = powers / powers.sum() @ expanded[: position + 1, head, PLAIN:]
    return result.reshape(len(x), -1) @ held["output"].T


@pytest.mark.parametrize("query_rank", [0, QUERY_RANK])
def test_the_absorbed_form_equals_the_expanded_form(query_rank):
    x = np.random.default_rng(1).normal(size=(70, WIDTH)).astype(np.float32)
    np.testing.assert_allclose(attended(x, (70,), query_rank), twin(x, query_rank), atol=2e-6)


def test_all_chunks_give_the_same_bits():
    x = np.random.default_rng(2).normal(size=(70, WIDTH)).astype(np.float32)
    whole = attended(x, (70,), QUERY_RANK)
    for chunks in [(1,) * 70, (33, 30, 7)]:
        np.testing.assert_array_equal(attended(x, chunks, QUERY_RANK), whole)
