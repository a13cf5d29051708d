"""Loading: a rank reads its share of a weight file and builds its part of the model."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import Struct
from msgspec.structs import replace

from moempi.backend.protocol import Backend
from moempi.backend.values import Array, DeltaRates, Expert, RmsNorm, StateConstants
from moempi.config.architecture import Architecture, DeltaRule, Indexer, Latent, StateSpace
from moempi.config.tensors import layer_path
from moempi.engine.shard import Shard
from moempi.model.attention import Attention
from moempi.model.feed_forward import Dense, LatentMaps, MixtureOfExperts
from moempi.model.gated_delta import GatedDelta
from moempi.model.head import LMHead
from moempi.model.kv_cache import KVCache
from moempi.model.latent_attention import LatentAttention
from moempi.model.norm import Norm
from moempi.model.sparse_attention import LightningIndexer
from moempi.model.state_space import StateSpaceMixer
from moempi.model.transformer import Layer, Mixer, Transformer, with_graphs


class Loading(Struct, frozen=True):
    """Bytes of weights that a rank read, and seconds to read, verify and copy them to the backend's memory."""

    num_bytes: int
    seconds: float


def load_model(
    shard: Shard,
    backend: Backend,
    *,
    layers: range,
    hosted: Mapping[int, tuple[int, ...]],
    pages: int,
    slots: range,
    on_layer: Callable[[int], object] = lambda loaded: None,
) -> Transformer:
    """Read this rank's share of `layers` with the experts hosted[layer], and allocate a cache of `pages` pages.

    Layers that keep a state have one for each of the `slots`.
    Calls `on_layer` with the number of layers that are loaded, from 0. Raises DataError if a checksum is wrong. Not
    collective; blocks until the weights are in the backend's memory.
    """

    def load_layers() -> Iterator[Layer]:
        for loaded, layer in enumerate(layers):
            on_layer(loaded)
            yield _layer(shard, backend, layer, hosted.get(layer, ()))

    architecture = shard.architecture
    is_first, is_last = layers.start == 0, layers.stop == architecture.num_layers
    with_cache = [layer for layer in layers if architecture.has_cache(layer)]
    rule, num_states = architecture.recurrence, sum(map(architecture.has_state, layers))
    model = Transformer(
        architecture=architecture,
        backend=backend,
        embedding=backend.table(shard.read("embedding")) if is_first else None,
        layers=tuple(load_layers()),
        head=_head(shard, backend) if is_last else None,
        cache=KVCache(
            backend,
            architecture.attention,
            layers=len(with_cache),
            pages=pages,
            first_slot=slots.start,
            index_dims=list(map(architecture.index_values, with_cache)),
        ),
        states=[backend.layer_state(len(slots), rule) for _ in range(num_states) if rule],
    )
    parts = [parts for layer in model.layers if (parts := layer.fused_parts)]
    if len(parts) == len(model.layers):
        model = replace(model, fused_layers=backend.fuse_layers(parts))
    backend.finish_loading()  # the lanes compute on other queues, which do not wait for this one
    return model


def _head(shard: Shard, backend: Backend) -> LMHead:
    architecture = shard.architecture
    return LMHead(
        backend=backend,
        norm=_norm(shard, backend, "norm"),
        matrix=backend.matrix(shard.read_vocabulary("embedding" if architecture.tied_embeddings else "head")),
        bias=_optional(shard, backend, "head_bias"),
        vocab_size=architecture.vocab_size,
    )


def _layer(shard: Shard, backend: Backend, layer: int, hosted: tuple[int, ...]) -> Layer:
    path, architecture = layer_path(layer), shard.architecture
    attends, feeds = architecture.has_attention(layer), architecture.has_feed_forward(layer)
    norm = _norm(shard, backend, f"{path}/attention_norm") if attends else None
    attention = _mixer(shard, backend, layer) if attends else None
    next_norm = _norm(shard, backend, f"{path}/feed_forward_norm") if feeds else None
    block = attention.block(norm, next_norm) if isinstance(attention, Attention) and norm and next_norm else None
    made = Layer(
        index=layer,
        attention_norm=norm,
        attention=attention,
        feed_forward_norm=next_norm,
        feed_forward=_feed_forward(shard, backend, layer, hosted) if feeds else None,
        fused_attention=backend.fuse_attention(block) if block else None,
    )
    return with_graphs(made, backend)


def _feed_forward(shard: Shard, backend: Backend, layer: int, hosted: tuple[int, ...]) -> Dense | MixtureOfExperts:
    if shard.architecture.is_moe(layer):
        return _experts(shard, backend, layer, hosted)
    return _dense(shard, backend, f"{layer_path(layer)}/dense")


def _mixer(shard: Shard, backend: Backend, layer: int) -> Mixer:
    path, architecture = layer_path(layer), shard.architecture
    rule, space, latent = architecture.delta_rule, architecture.state_space, architecture.attention.latent
    if rule and architecture.has_state(layer):
        return _gated_delta(shard, backend, f"{path}/delta", rule=rule)
    if space and architecture.has_state(layer):
        return _state_space(shard, backend, f"{path}/state_space", space=space)
    if latent:
        return _latent_attention(shard, backend, f"{path}/attention", latent=latent)
    return _attention(shard, backend, f"{path}/attention", window=architecture.window(layer))


def _norm(shard: Shard, backend: Backend, name: str) -> Norm:
    return Norm(
        kind=shard.architecture.norm,
        eps=shard.architecture.norm_eps,
        weight=backend.tensor(shard.read(name)),
        bias=_optional(shard, backend, f"{name}_bias"),
    )


def _attention(shard: Shard, backend: Backend, path: str, *, window: int) -> Attention:
    return Attention(
        shape=shard.architecture.attention,
        eps=shard.architecture.norm_eps,
        qkv=backend.matrix(*(shard.read(f"{path}/{name}") for name in "qkv")),
        output=backend.matrix(shard.read(f"{path}/o"), transposed=True),
        qkv_bias=_optional(shard, backend, *(f"{path}/{name}_bias" for name in "qkv")),
        output_bias=_optional(shard, backend, f"{path}/o_bias") if shard.is_first else None,
        q_norm=_optional(shard, backend, f"{path}/q_norm"),
        k_norm=_optional(shard, backend, f"{path}/k_norm"),
        sinks=_optional(shard, backend, f"{path}/sinks"),
        gate=backend.matrix(shard.read(f"{path}/gate")) if shard.architecture.attention.output_gate else None,
        window=window,
        norms_rounded=shard.architecture.norm == "rms",
    )


def _gated_delta(shard: Shard, backend: Backend, path: str, *, rule: DeltaRule) -> GatedDelta:
    def read(*names: str) -> Iterator[npt.NDArray[Any]]:
        return (shard.read(f"{path}/{name}") for name in names)

    return GatedDelta(
        rule=rule,
        mixed=backend.matrix(*read("q", "k", "v")),
        taps=backend.tensor(np.ascontiguousarray(np.concatenate(list(read("q_taps", "k_taps", "v_taps"))).T)),
        gate=backend.matrix(*read("z")),
        rates=backend.matrix(*read("beta", "decay")),
        constants=DeltaRates(backend.tensor(*read("decay_log")), backend.tensor(*read("decay_bias"))),
        norm=RmsNorm(backend.tensor(*read("norm")), shard.architecture.norm_eps),
        output=backend.matrix(*read("o"), transposed=True),
    )


def _state_space(shard: Shard, backend: Backend, path: str, *, space: StateSpace) -> StateSpaceMixer:
    def read(*names: str) -> Iterator[npt.NDArray[Any]]:
        return (shard.read(f"{path}/{name}") for name in names)

    return StateSpaceMixer(
        space=space,
        eps=shard.architecture.norm_eps,
        mixed=backend.matrix(*read("x", "b", "c")),
        taps=backend.tensor(np.ascontiguousarray(np.concatenate(list(read("x_taps", "b_taps", "c_taps"))).T)),
        taps_bias=backend.tensor(*read("x_taps_bias", "b_taps_bias", "c_taps_bias")),
        gate=backend.matrix(*read("z")),
        steps=backend.matrix(*read("step")),
        constants=StateConstants(*(backend.tensor(one) for one in read("decay_log", "step_bias", "skip"))),
        norms=[backend.tensor(weights) for one in read("norm") for weights in np.split(one, space.num_groups)],
        output=backend.matrix(*read("o"), transposed=True),
    )


def _latent_attention(shard: Shard, backend: Backend, path: str, *, latent: Latent) -> LatentAttention:
    shape = shard.architecture.attention
    unrotated_dim, of_queries = shape.head_dim - latent.rope_dim, "q_latent" if latent.query_rank else "q"
    expand = shard.read(f"{path}/kv_expand").reshape(-1, unrotated_dim + latent.value_dim, latent.key_value_rank)
    return LatentAttention(
        shape=shape,
        latent=latent,
        down=backend.matrix(shard.read(f"{path}/{of_queries}"), shard.read(f"{path}/kv_latent")),
        down_bias=_down_bias(shard, backend, path, latent=latent),
        queries=backend.matrix(shard.read(f"{path}/q_expand")) if latent.query_rank else None,
        query_norm=_optional(shard, backend, f"{path}/q_latent_norm"),
        key_value_norm=backend.tensor(shard.read(f"{path}/kv_latent_norm")),
        absorb_keys=backend.head_matrices(expand[:, :unrotated_dim]),
        expand_values=backend.head_matrices(expand[:, unrotated_dim:].transpose(0, 2, 1)),
        output=backend.matrix(shard.read(f"{path}/o"), transposed=True),
        output_bias=_optional(shard, backend, f"{path}/o_bias") if shard.is_first else None,
        indexer=_indexer(shard, backend, path, latent.indexer)
        if latent.indexer and shard.has(f"{path}/index_q")
        else None,
    )


def _down_bias(shard: Shard, backend: Backend, path: str, *, latent: Latent) -> Array | None:
    """The bias of queries and latent vectors; queries without a latent vector have none, so zeros."""
    if not shard.has(f"{path}/kv_latent_bias"):
        return None
    of_keys, heads = shard.read(f"{path}/kv_latent_bias"), shard.architecture.attention
    if latent.query_rank:
        return backend.tensor(shard.read(f"{path}/q_latent_bias"), of_keys)
    return backend.tensor(np.zeros(heads.num_heads * heads.head_dim, of_keys.dtype), of_keys)


def _indexer(shard: Shard, backend: Backend, path: str, shape: Indexer) -> LightningIndexer:
    return LightningIndexer(
        shape=shape,
        queries=backend.matrix(shard.read(f"{path}/index_q")),
        keys=backend.matrix(shard.read(f"{path}/index_k")),
        key_norm=backend.tensor(shard.read(f"{path}/index_k_norm")),
        key_norm_bias=backend.tensor(shard.read(f"{path}/index_k_norm_bias")),
        weights=backend.matrix(shard.read(f"{path}/index_weights")),
    )


def _dense(shard: Shard, backend: Backend, path: str) -> Dense:
    return Dense(
        Expert(
            gate_up=backend.matrix(*(shard.read(f"{path}/{name}") for name in _gate_and_up(shard.architecture))),
            down=backend.matrix(shard.read(f"{path}/down"), transposed=True),
            gated=shard.architecture.activation == "swiglu",
        )
    )


def _experts(shard: Shard, backend: Backend, layer: int, hosted: tuple[int, ...]) -> MixtureOfExperts:
    path, experts = layer_path(layer), shard.architecture.experts
    layer_experts = MixtureOfExperts(
        layer=layer,
        rule=experts.router,
        router=backend.matrix(shard.read(f"{path}/router")),
        router_bias=_optional(shard, backend, f"{path}/router_bias"),
        router_correction=_optional(shard, backend, f"{path}/router_correction"),
        experts=tuple(_expert(shard, backend, f"{path}/experts", expert) for expert in hosted),
        shared=_dense(shard, backend, f"{path}/shared") if experts.shared_width else None,
        shared_gate=backend.matrix(shard.read(f"{path}/shared_gate")) if experts.shared_gate else None,
        latent=_latent_maps(shard, backend, f"{path}/latent") if experts.latent_width else None,
    )
    block = layer_experts.block() if len(hosted) == experts.num else None
    return replace(layer_experts, fused_experts=backend.fuse_experts(block)) if block else layer_experts


def _latent_maps(shard: Shard, backend: Backend, path: str) -> LatentMaps:
    return LatentMaps(*(backend.matrix(shard.read(f"{path}/{name}")) for name in ("down", "up")))


def _expert(shard: Shard, backend: Backend, path: str, expert: int) -> Expert:
    def read(name: str) -> Array:
        return shard.read_expert(f"{path}/{name}", expert)

    experts = shard.architecture.experts
    return Expert(
        gate_up=backend.matrix(*map(read, _gate_and_up(shard.architecture))),
        down=backend.matrix(read("down")),
        gate_up_bias=backend.tensor(read("gate_bias"), read("up_bias")) if experts.biases else None,
        down_bias=backend.tensor(read("down_bias")) if experts.biases else None,
        clamp=experts.clamp,
        gated=shard.architecture.activation == "swiglu",
    )


def _gate_and_up(architecture: Architecture) -> tuple[str, ...]:
    return ("gate", "up") if architecture.activation == "swiglu" else ("up",)


def _optional(shard: Shard, backend: Backend, *names: str) -> Array | None:
    """The tensors of these names, concatenated; None if the model has none of them."""
    return backend.tensor(*(shard.read(name) for name in names)) if shard.has(names[0]) else None
