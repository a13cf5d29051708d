"""Sparse attention against its definition, and the bits of its parts."""

import numpy as np
import pytest

from moempi.arrays import narrow
from moempi.backend.cpu.backend import NumpyBackend
from moempi.backend.values import Cache, Segment
from moempi.comm.batch import NONE, Batch
from moempi.config.architecture import AttentionShape, Indexer, Latent, Rope
from moempi.model.latent_attention import LatentAttention
from moempi.model.rope import rope_angles
from moempi.model.sparse_attention import LightningIndexer, sparse_rows

HEADS, PLAIN, ROTATED, VALUES, RANK, QUERY_RANK, WIDTH = 3, 6, 4, 5, 8, 10, 12
INDEX_HEADS, INDEX_DIM, TOP_K, LENGTH = 5, 7, 24, 90
BACKEND = NumpyBackend(precision="float32")
PAGES = np.array([2, 0])


def shape(interleaved):
    indexer = Indexer(INDEX_HEADS, INDEX_DIM, TOP_K, interleaved=interleaved)
    latent = Latent(RANK, ROTATED, VALUES, query_rank=QUERY_RANK, indexer=indexer)
    return AttentionShape(HEADS, HEADS, PLAIN + ROTATED, rope=Rope(interleaved=True), latent=latent)


def matrices():
    random = np.random.default_rng(5)
    sizes = {
        "query_latent": (QUERY_RANK, WIDTH), "queries": (HEADS * (PLAIN + ROTATED), QUERY_RANK),
        "latent": (RANK + ROTATED, WIDTH), "expand": (HEADS, PLAIN + VALUES, RANK), "output": (WIDTH, HEADS * VALUES),
        "index_q": (INDEX_HEADS * INDEX_DIM, QUERY_RANK), "index_k": (INDEX_DIM, WIDTH),
        "index_weights": (INDEX_HEADS, WIDTH),
    }  # fmt: skip
    held = {name: random.normal(size=size).astype(np.float32) * size[-1] ** -0.5 for name, size in sizes.items()}
    return held | {"k_norm": random.normal(size=INDEX_DIM) + 1, "k_bias": random.normal(size=INDEX_DIM)}


HELD = {name: (narrow(np.float32(one)).astype(np.uint32) << 16).view(np.float32) for name, one in matrices().items()}


def built(attention, *, has_indexer=True):
    matrix, tensor = (lambda name: BACKEND.matrix(HELD[name])), (lambda name: BACKEND.tensor(HELD[name]))
    indexer = LightningIndexer(
        attention.indexer,
        *map(matrix, ("index_q", "index_k")),
        *map(tensor, ("k_norm", "k_bias")),
        matrix("index_weights"),
    )
    return LatentAttention(
        shape=attention, latent=attention.latent, down=BACKEND.matrix(HELD["query_latent"], HELD["latent"]),
        key_value_norm=np.ones(RANK, np.float32), absorb_keys=HELD["expand"][:, :PLAIN],
        expand_values=HELD["expand"][:, PLAIN:].transpose(0, 2, 1), output=matrix("output"),
        queries=matrix("queries"), query_norm=np.ones(QUERY_RANK, np.float32),
        indexer=indexer if has_indexer else None,
    )  # fmt: skip


def new_cache():
    latent = BACKEND.cache(3, 1, RANK + ROTATED, latent=RANK)
    return Cache(latent.keys, latent.values, BACKEND.cache(3, 1, INDEX_DIM, latent=INDEX_DIM))


def batch_of(starts, lengths):
    slots = np.arange(len(starts))
    capacities = np.full(len(starts), LENGTH)
    return Batch(NONE, slots, slots, np.array(starts), np.array(lengths), capacities, NONE, NONE, prompts=capacities)


def attended(x, chunks, *, interleaved=False, attentions=None):
    """The outputs of the last of some attentions, which all see the same rows."""
    attention, parts, start = shape(interleaved), [], 0
    attentions = attentions or [built(attention)]
    caches = [new_cache() for _ in attentions]
    for count in chunks:
        rows, batch = x[start : start + count], batch_of([start], [count])
        segments = (Segment(0, count, start, PAGES),)
        angles = rope_angles(BACKEND, attention, batch.positions, batch.row_capacities)
        sparse = sparse_rows(BACKEND, attention, segments, batch.row_capacities)
        for one, cache in zip(attentions, caches, strict=True):
            result = one(BACKEND, rows, angles, cache, segments, sparse)
        parts.append(result)
        start += count
    return np.concatenate(parts)


def normed(rows):
    return rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-6)


def rotated(rows, position, *, interleaved):
    """The first ROTATED numbers, rotated."""
    pairs = ROTATED // 2
    first, second = np.s_[..., :pairs], np.s_[..., pairs:ROTATED]
    if interleaved:
        first, second = np.s_[..., 0:ROTATED:2], np.s_[..., 1:ROTATED:2]
    turned = (rows[first] + 1j * rows[second]) * np.exp(1j * position * 10000.0 ** (-np.arange(pairs) / pairs))
    result = rows.copy()
    result[first], result[second] = turned.real, turned.imag
    return result


def twin(x, *, interleaved):
    """Sparse attention with expanded keys and values, in float64, a position at a time."""
    held, x = {name: one.astype(np.float64) for name, one in HELD.items()}, x.astype(np.float64)
    latent = normed(x @ held["query_latent"].T)
    queries = (latent @ held["queries"].T).reshape(len(x), HEADS, -1)
    both = x @ held["latent"].T
    expanded = np.einsum("hor,tr->tho", held["expand"], normed(both[:, :RANK]))
    index_q = (latent @ held["index_q"].T).reshape(len(x), INDEX_HEADS, -1)
    index_k = x @ held["index_k"].T
    index_k = (index_k - index_k.mean(-1, keepdims=True)) / np.sqrt(index_k.var(-1, keepdims=True) + 1e-6)
    index_k = index_k * held["k_norm"] + held["k_bias"]
    index_k = np.array([rotated(key, at, interleaved=interleaved) for at, key in enumerate(index_k)])
    keys = np.array([rotated(both[at, RANK:], at, interleaved=True) for at in range(len(x))])
    result = np.zeros((len(x), HEADS, VALUES))
    for position in range(len(x)):
        query = rotated(index_q[position], position, interleaved=interleaved)
        dots = np.maximum(query @ index_k[: position + 1].T * INDEX_DIM**-0.5, 0)
        scores = (held["index_weights"] @ x[position] * INDEX_HEADS**-0.5) @ dots
        chosen = np.argsort(-scores, kind="stable")[:TOP_K]
        for head in range(HEADS):
            own = queries[position, head]
            turned = rotated(own[PLAIN:], position, interleaved=True)
            logits = (expanded[chosen, head, :PLAIN] @ own[:PLAIN] + keys[chosen] @ turned) * (PLAIN + ROTATED) ** -0.5
            powers = np.exp(logits - logits.max())
            result[position, head] = powers / powers.sum() @ expanded[chosen, head, PLAIN:]
    return result.reshape(len(x), -1) @ held["output"].T


def rows(seed):
    return np.random.default_rng(seed).normal(size=(LENGTH, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("interleaved", [False, True])
def test_sparse_attention_equals_its_definition(interleaved):
    x = rows(1)
    np.testing.assert_allclose(
        attended(x, (LENGTH,), interleaved=interleaved), twin(x, interleaved=interleaved), atol=3e-6
    )


def test_all_chunks_give_the_same_bits():
    x = rows(2)
    whole = attended(x, (LENGTH,))
    for chunks in [(1,) * LENGTH, (20, 3, 30, 37), (24, 66), (25, 65), (7,) * 12 + (6,)]:
        np.testing.assert_array_equal(attended(x, chunks), whole)


def test_rows_that_see_no_more_than_the_indexer_chooses_have_the_bits_of_dense_attention():
    x = rows(3)
    sparse, attention = attended(x, (LENGTH,)), shape(False)
    module, cache, segments = built(attention, has_indexer=False), new_cache(), (Segment(0, LENGTH, 0, PAGES),)
    batch = batch_of([0], [LENGTH])
    angles = rope_angles(BACKEND, attention, batch.positions, batch.row_capacities)
    all_dense = module(BACKEND, x, angles, cache, segments)
    np.testing.assert_array_equal(sparse[:TOP_K], all_dense[:TOP_K])
    assert (sparse[TOP_K:] != all_dense[TOP_K:]).any(axis=1).all()


def test_a_layer_without_an_indexer_shares_the_positions_of_the_layer_before():
    x, attention = rows(4), shape(False)
    pair = [built(attention), built(attention, has_indexer=False)]
    np.testing.assert_array_equal(attended(x, (50, 40), attentions=pair), attended(x, (50, 40)))


def test_sequences_of_a_step_do_not_change_each_other():
    x, attention, module = rows(5), shape(False), built(shape(False))
    alone = attended(x, (60, 30))
    cache = new_cache()
    for starts, lengths, chosen in (([0], [60], [range(60)]), ([60, 0], [30, 20], [range(60, 90), range(20)])):
        batch, firsts = batch_of(starts, lengths), np.cumsum([0, *lengths])
        pages = (PAGES, np.array([1]))
        segments = tuple(
            Segment(int(firsts[number]), lengths[number], starts[number], pages[number])
            for number in range(len(starts))
        )
        angles = rope_angles(BACKEND, attention, batch.positions, batch.row_capacities)
        sparse = sparse_rows(BACKEND, attention, segments, batch.row_capacities)
        result = module(BACKEND, x[np.concatenate(list(map(list, chosen)))], angles, cache, segments, sparse)
    np.testing.assert_array_equal(result[:30], alone[60:])
    np.testing.assert_array_equal(result[30:], alone[:20])


def test_a_stage_whose_first_layer_shares_positions_is_an_error():
    attention = shape(False)
    with pytest.raises(RuntimeError, match="no layer before this one has an indexer"):
        attended(rows(6), (LENGTH,), attentions=[built(attention, has_indexer=False)])
