"""A model loaded from real weight files: every tensor of its share, once, and in its place."""

import h5py
import numpy as np
import pytest
from msgspec import structs

from moempi.arrays import widen
from moempi.backend.cpu.backend import NumpyBackend
from moempi.config.architecture import (
    Architecture,
    AttentionShape,
    Clamp,
    DeltaRule,
    Experts,
    Indexer,
    Latent,
    Rope,
    Router,
)
from moempi.config.tensors import PAGE_ROWS, TENSOR_PARALLEL, Share, stage_tensors
from moempi.engine.load import load_model
from moempi.engine.shard import Shard
from moempi.errors import DataError
from moempi.layout.placement import linear
from moempi.model.attention import Attention as LoadedAttention
from moempi.model.feed_forward import Dense, MixtureOfExperts
from moempi.model.gated_delta import GatedDelta
from moempi.model.latent_attention import LatentAttention
from moempi.storage.initialize import initialize
from moempi.storage.weights import WeightFile

PLAIN = Architecture(
    family="random",
    vocab_size=30,
    width=8,
    num_layers=3,
    max_positions=64,
    attention=AttentionShape(num_heads=4, num_kv_heads=2, head_dim=4, qk_norm="head"),
    experts=Experts(num=5, width=6, router=Router(top_k=2)),
    dense_layers=(0,),
    dense_width=10,
)
BIASED = structs.replace(
    PLAIN,
    attention=AttentionShape(
        num_heads=4, num_kv_heads=2, head_dim=4, biases="all", sinks=True, window=8, windowed_layers=(1,)
    ),
    experts=Experts(num=5, width=6, router=Router(top_k=2, bias=True), biases=True, clamp=Clamp(alpha=1.7, limit=7.0)),
    norm="layer",
    head_bias=True,
)
TIED = structs.replace(PLAIN, tied_embeddings=True, norm="rms_float32")
LATENT = structs.replace(
    PLAIN,
    attention=AttentionShape(
        num_heads=4,
        num_kv_heads=4,
        head_dim=6,
        rope=Rope(dim=2),
        biases="all",
        latent=Latent(key_value_rank=5, rope_dim=2, value_dim=3, query_rank=7),
    ),
    experts=Experts(
        num=5,
        width=6,
        router=Router(top_k=2, correction=True, float32_logits=True),
        shared_width=4,
        shared_gate=True,
    ),
)
DELTA = structs.replace(
    PLAIN,
    attention=structs.replace(PLAIN.attention, output_gate=True),
    norm="rms_float32",
    float32_norms=True,
    delta_rule=DeltaRule(num_key_heads=2, num_value_heads=4, key_dim=3, value_dim=5, taps=4),
    delta_layers=(0, 1),
)
SHORT_LATENT = structs.replace(
    LATENT,
    attention=structs.replace(
        LATENT.attention, biases="none", latent=structs.replace(LATENT.attention.latent, query_rank=0)
    ),
)
INDEXED = structs.replace(
    LATENT,
    attention=structs.replace(
        LATENT.attention,
        latent=structs.replace(LATENT.attention.latent, indexer=Indexer(2, head_dim=3, top_k=4, shared_layers=(1,))),
    ),
)
MODELS = {
    "plain": PLAIN,
    "biased": BIASED,
    "tied": TIED,
    "latent": LATENT,
    "delta": DELTA,
    "short_latent": SHORT_LATENT,
    "indexed": INDEXED,
}
BIASES = ("gate_bias", "up_bias", "down_bias")
ALL = dict.fromkeys(range(PLAIN.num_layers), tuple(range(PLAIN.experts.num)))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for name, architecture in MODELS.items():
        assert architecture.problem() is None
        initialize(architecture, folder / f"{name}.h5", seed=5)
    opened = {name: WeightFile.open(folder / f"{name}.h5") for name in MODELS}
    yield opened
    for file in opened.values():
        file.close()


def load(file, *, layers=range(3), part=0, parts=1, hosted=ALL, pages=2):
    backend = NumpyBackend(precision="float32")
    shard = Shard(file, part=part, parts=parts)
    return load_model(shard, backend, layers=layers, hosted=hosted, pages=pages, slots=range(3)), shard


def values(file, name, part=0, parts=1):
    """The float32 values of one part of a tensor."""
    rows = file.read(name)
    own = rows[part * len(rows) // parts : (part + 1) * len(rows) // parts]
    return widen(own) if own.dtype == np.uint16 else own


def expected_bytes(architecture, layers, *, part=0, parts=1, num_hosted=5):
    """Bytes of a rank's share of its stage; only the first part adds the bias of the attention's output."""
    total = 0
    for tensor in stage_tensors(architecture, layers):
        if tensor.name.endswith("attention/o_bias") and part:
            continue
        rows = tensor.shape[0]
        if tensor.share in TENSOR_PARALLEL:
            rows = (part + 1) * rows // parts - part * rows // parts
        elif tensor.share is Share.EXPERTS:
            rows = num_hosted
        total += tensor.num_bytes // tensor.shape[0] * rows
    return total


# Every tensor of the share, once


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("part", "parts"), [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("layers", [range(3), range(2), range(1, 2), range(1, 3)])
def test_every_tensor_of_a_rank_is_read_once(files, name, part, parts, layers):
    _, shard = load(files[name], layers=layers, part=part, parts=parts)
    assert shard.num_bytes == expected_bytes(MODELS[name], layers, part=part, parts=parts)


def test_experts_that_another_rank_hosts_are_not_read(files):
    hosted = {1: (4, 0), 2: (3, 1)}
    _, shard = load(files["biased"], hosted=hosted)
    assert shard.num_bytes == expected_bytes(BIASED, range(3), num_hosted=2)


def test_each_expert_is_read_by_one_of_the_ranks_that_share_a_stage(files):
    bytes_alone = load(files["plain"], hosted={})[1].num_bytes
    placement = linear(5, 3)
    read = [load(files["plain"], hosted=dict.fromkeys((1, 2), experts))[1].num_bytes for experts in placement.hosted]
    assert sum(read) - 3 * bytes_alone == load(files["plain"])[1].num_bytes - bytes_alone


@pytest.mark.parametrize(("layers", "is_first", "is_last"), [(range(3), 1, 1), (range(2), 1, 0), (range(2, 3), 0, 1)])
def test_only_the_ends_of_the_pipeline_hold_embedding_norm_and_head(files, layers, is_first, is_last):
    model, _ = load(files["biased"], layers=layers)
    assert [layer.index for layer in model.layers] == list(layers)
    assert (model.embedding is not None) == is_first
    assert (model.head is not None) == is_last


# The values, in their places


def test_embedding_head_and_its_norm(files):
    for part in range(2):
        model, _ = load(files["biased"], part=part, parts=2)
        np.testing.assert_array_equal(model.embedding, values(files["biased"], "embedding"))
        np.testing.assert_array_equal(model.head.matrix, values(files["biased"], "head", part, 2).T)
        np.testing.assert_array_equal(model.head.bias, values(files["biased"], "head_bias", part, 2))
        np.testing.assert_array_equal(model.head.norm.weight, values(files["biased"], "norm"))
        np.testing.assert_array_equal(model.head.norm.bias, values(files["biased"], "norm_bias"))


def test_a_tied_head_is_a_part_of_the_embedding(files):
    for part in range(2):
        model, _ = load(files["tied"], part=part, parts=2)
        np.testing.assert_array_equal(model.embedding, values(files["tied"], "embedding"))
        np.testing.assert_array_equal(model.head.matrix, values(files["tied"], "embedding", part, 2).T)
        assert model.head.bias is None


@pytest.mark.parametrize(("name", "kind"), [("plain", "rms"), ("tied", "rms_float32"), ("biased", "layer")])
def test_norms_are_of_the_models_kind(files, name, kind):
    model, _ = load(files[name])
    for layer in model.layers:
        for norm, tensor in (
            (layer.attention_norm, f"layers/{layer.index:03d}/attention_norm"),
            (layer.feed_forward_norm, f"layers/{layer.index:03d}/feed_forward_norm"),
        ):
            assert (norm.kind, norm.eps) == (kind, MODELS[name].norm_eps)
            np.testing.assert_array_equal(norm.weight, values(files[name], tensor))
            assert (norm.bias is not None) == (kind == "layer")


@pytest.mark.parametrize("part", [0, 1])
def test_a_part_of_attention_has_the_queries_keys_and_values_of_its_heads(files, part):
    file, path = files["biased"], "layers/001/attention"
    model, _ = load(file, part=part, parts=2)
    attention = model.layers[1].attention
    assert isinstance(attention, LoadedAttention)
    own = {name: values(file, f"{path}/{name}", part, 2) for name in ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias")}
    np.testing.assert_array_equal(attention.qkv, np.concatenate([own["q"], own["k"], own["v"]]).T)
    np.testing.assert_array_equal(attention.qkv_bias, np.concatenate([own["q_bias"], own["k_bias"], own["v_bias"]]))
    np.testing.assert_array_equal(attention.output, own["o"])
    np.testing.assert_array_equal(attention.sinks, values(file, f"{path}/sinks", part, 2))
    assert (attention.shape.num_heads, attention.shape.num_kv_heads) == (2, 1)
    assert model.architecture.attention == attention.shape


@pytest.mark.parametrize("part", [0, 1])
def test_a_part_of_a_delta_rule_has_the_tensors_of_its_heads(files, part):
    file, path = files["delta"], "layers/001/delta"
    model, _ = load(file, part=part, parts=2)
    delta, own = model.layers[1].attention, lambda name: values(file, f"{path}/{name}", part, 2)
    assert isinstance(delta, GatedDelta)
    np.testing.assert_array_equal(delta.mixed, np.concatenate([own(name) for name in "qkv"]).T)
    np.testing.assert_array_equal(delta.taps, np.concatenate([own(f"{name}_taps") for name in "qkv"]).T)
    np.testing.assert_array_equal(delta.gate, own("z").T)
    np.testing.assert_array_equal(delta.rates, np.concatenate([own("beta"), own("decay")]).T)
    np.testing.assert_array_equal(delta.constants.decay_log, own("decay_log"))
    np.testing.assert_array_equal(delta.constants.decay_bias, own("decay_bias"))
    np.testing.assert_array_equal(delta.norm.weight, values(file, f"{path}/norm"))
    np.testing.assert_array_equal(delta.output, own("o"))
    assert (delta.rule.num_key_heads, delta.rule.num_value_heads) == (1, 2)


def test_layers_with_a_state_have_one_per_slot_and_no_pages(files):
    model, _ = load(files["delta"], layers=range(1, 3))
    assert [(state.tail.shape, state.memory.shape) for state in model.states] == [((3, 3, 32), (3, 4, 3, 5))]
    assert len(model.cache.layers) == 1
    assert model.layer_caches == [model.states[0], model.cache.layers[0]]
    assert load(files["delta"], layers=range(2))[0].cache.layers == []


def test_an_output_gate_is_loaded_with_its_heads(files):
    for part in range(2):
        model, _ = load(files["delta"], part=part, parts=2)
        gate = values(files["delta"], "layers/002/attention/gate", part, 2)
        np.testing.assert_array_equal(model.layers[2].attention.gate, gate.T)


@pytest.mark.parametrize("name", ["biased", "latent"])
def test_the_bias_of_the_attention_output_is_added_by_the_first_part_alone(files, name):
    first, second = (load(files[name], part=part, parts=2)[0].layers[1].attention for part in range(2))
    np.testing.assert_array_equal(first.output_bias, values(files[name], "layers/001/attention/o_bias"))
    assert second.output_bias is None


def test_a_model_without_biases_norms_of_heads_or_sinks_has_none(files):
    plain, biased = (load(files[name])[0].layers[1].attention for name in ("plain", "biased"))
    assert (plain.qkv_bias, plain.output_bias, plain.sinks) == (None, None, None)
    assert (biased.q_norm, biased.k_norm) == (None, None)
    np.testing.assert_array_equal(plain.q_norm, values(files["plain"], "layers/001/attention/q_norm"))
    np.testing.assert_array_equal(plain.k_norm, values(files["plain"], "layers/001/attention/k_norm"))


def test_only_windowed_layers_have_a_window(files):
    model, _ = load(files["biased"])
    assert [layer.attention.window for layer in model.layers] == [0, 8, 0]


@pytest.mark.parametrize("part", [0, 1])
def test_latent_attention_is_absorbed_head_by_head(files, part):
    file, path = files["latent"], "layers/002/attention"
    attention = load(file, part=part, parts=2)[0].layers[2].attention
    assert isinstance(attention, LatentAttention)
    heads = values(file, f"{path}/kv_expand", part, 2).reshape(2, 4 + 3, 5)  # four plain key rows, three value rows
    for head, expand in enumerate(heads):
        np.testing.assert_array_equal(attention.absorb_keys[head], expand[:4])
        np.testing.assert_array_equal(attention.expand_values[head], expand[4:].T)
    np.testing.assert_array_equal(attention.queries, values(file, f"{path}/q_expand", part, 2).T)
    down = [values(file, f"{path}/{name}_latent") for name in ("q", "kv")]
    np.testing.assert_array_equal(attention.down, np.concatenate(down).T)
    np.testing.assert_array_equal(attention.query_norm, values(file, f"{path}/q_latent_norm"))
    biases = [values(file, f"{path}/{name}_latent_bias") for name in ("q", "kv")]
    np.testing.assert_array_equal(attention.down_bias, np.concatenate(biases))
    np.testing.assert_array_equal(attention.key_value_norm, values(file, f"{path}/kv_latent_norm"))
    np.testing.assert_array_equal(attention.output, values(file, f"{path}/o", part, 2))


def test_latent_attention_without_a_query_rank_takes_queries_from_the_row(files):
    attention = load(files["short_latent"])[0].layers[0].attention
    down = [values(files["short_latent"], f"layers/000/attention/{name}") for name in ("q", "kv_latent")]
    np.testing.assert_array_equal(attention.down, np.concatenate(down).T)
    assert (attention.queries, attention.query_norm) == (None, None)
    assert (attention.down_bias, attention.output_bias) == (None, None)


@pytest.mark.parametrize("part", [0, 1])
def test_an_indexer_is_whole_on_every_rank_and_has_a_cache_of_its_own(files, part):
    file, path = files["indexed"], "layers/002/attention"
    model, _ = load(file, part=part, parts=2)
    assert [layer.attention.indexer is not None for layer in model.layers] == [True, False, True]
    assert [cache.index and cache.index.keys.shape[1:] for cache in model.cache.layers] == [(1, 3), None, (1, 3)]
    indexer = model.layers[2].attention.indexer
    for name, held in (("q", indexer.queries), ("k", indexer.keys), ("weights", indexer.weights)):
        np.testing.assert_array_equal(held, values(file, f"{path}/index_{name}").T)
    np.testing.assert_array_equal(indexer.key_norm, values(file, f"{path}/index_k_norm"))
    np.testing.assert_array_equal(indexer.key_norm_bias, values(file, f"{path}/index_k_norm_bias"))


@pytest.mark.parametrize("part", [0, 1])
def test_a_dense_layer_has_its_part_of_the_hidden_size(files, part):
    file, path = files["plain"], "layers/000/dense"
    dense = load(file, part=part, parts=2)[0].layers[0].feed_forward
    assert isinstance(dense, Dense)
    gate, up, down = (values(file, f"{path}/{name}", part, 2) for name in ("gate", "up", "down"))
    np.testing.assert_array_equal(dense.mlp.gate_up, np.concatenate([gate, up]).T)
    np.testing.assert_array_equal(dense.mlp.down, down)


@pytest.mark.parametrize("hosted", [(), (2,), (4, 0, 3)])
@pytest.mark.parametrize(("part", "parts"), [(0, 1), (1, 2)])
def test_hosted_experts_are_whole_and_in_the_order_of_the_placement(files, hosted, part, parts):
    file, path = files["biased"], "layers/002/experts"
    moe = load(file, hosted={1: (1,), 2: hosted}, part=part, parts=parts)[0].layers[2].feed_forward
    assert isinstance(moe, MixtureOfExperts)
    assert len(moe.experts) == len(hosted)
    stacks = {name: values(file, f"{path}/{name}") for name in ("gate", "up", "down", *BIASES)}
    for expert, number in zip(moe.experts, hosted, strict=True):
        own = {name: stack[number] for name, stack in stacks.items()}
        np.testing.assert_array_equal(expert.gate_up, np.concatenate([own["gate"], own["up"]]).T)
        np.testing.assert_array_equal(expert.down, own["down"].T)
        np.testing.assert_array_equal(expert.gate_up_bias, np.concatenate([own["gate_bias"], own["up_bias"]]))
        np.testing.assert_array_equal(expert.down_bias, own["down_bias"])
        assert expert.clamp == BIASED.experts.clamp


def test_a_layer_that_the_placement_does_not_name_hosts_no_expert(files):
    model, _ = load(files["plain"], hosted={2: (1,)})
    assert [len(model.layers[layer].feed_forward.experts) for layer in (1, 2)] == [0, 1]


def test_routers_and_shared_networks_are_whole_on_every_rank(files):
    file, path = files["latent"], "layers/001"
    for part in range(2):
        moe = load(file, part=part, parts=2, hosted={})[0].layers[1].feed_forward
        assert (moe.layer, moe.rule) == (1, LATENT.experts.router)
        np.testing.assert_array_equal(moe.router, values(file, f"{path}/router").T)
        np.testing.assert_array_equal(moe.router_correction, values(file, f"{path}/router_correction"))
        shared = [values(file, f"{path}/shared/{name}") for name in ("gate", "up", "down")]
        np.testing.assert_array_equal(moe.shared.mlp.gate_up, np.concatenate(shared[:2]).T)
        np.testing.assert_array_equal(moe.shared.mlp.down, shared[2])
        np.testing.assert_array_equal(moe.shared_gate, values(file, f"{path}/shared_gate").T)
        assert moe.router_bias is None
    biased = load(files["biased"])[0].layers[1].feed_forward
    np.testing.assert_array_equal(biased.router_bias, values(files["biased"], f"{path}/router_bias"))
    assert (biased.router_correction, biased.shared, biased.shared_gate) == (None, None, None)


# The cache


@pytest.mark.parametrize(
    ("name", "parts", "shape"), [("plain", 1, (2, 4)), ("plain", 2, (1, 4)), ("latent", 2, (1, 7))]
)
def test_the_cache_has_its_pages_in_each_layer_of_the_stage(files, name, parts, shape):
    model, _ = load(files[name], layers=range(1, 3), parts=parts, pages=3)
    assert [cache.keys.shape for cache in model.cache.layers] == [(3 * PAGE_ROWS, *shape)] * 2


# Damage


@pytest.mark.parametrize("tensor", ["norm", "layers/002/experts/down", "layers/000/attention/k"])
def test_damage_in_a_tensor_of_the_stage_is_a_data_error_and_in_another_stage_is_not_met(files, tmp_path, tensor):
    changed = tmp_path / "changed.h5"
    changed.write_bytes(files["plain"].path.read_bytes())
    with h5py.File(changed, "r+") as content:
        content[f"tensors/{tensor}"][-1] = 5.0
    with WeightFile.open(changed) as file:
        with pytest.raises(DataError, match=f"changed.h5: {tensor}: rows .* are damaged"):
            load(file)
        load(file, layers=range(1, 2))
