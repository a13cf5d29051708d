"""Loading: a rank's share of a weight file becomes a model on its machine."""

from moempi.backend.protocol import Backend, Expert
from moempi.config.tensors import layer_path
from moempi.engine.shard import Shard
from moempi.model.attention import Attention
from moempi.model.feed_forward import Dense, MixtureOfExperts
from moempi.model.kv_cache import KVCache
from moempi.model.transformer import Layer, Transformer


def load_model(shard: Shard, backend: Backend, *, layers: range, hosted: tuple[int, ...], pages: int) -> Transformer:
    """Read this rank's share of `layers` with the `hosted` experts of each; `pages` is the size of the cache.

    Raises DataError when a checksum does not hold. Not collective.
    """
    architecture = shard.architecture
    heads = architecture.attention
    is_first, is_last = layers.start == 0, layers.stop == architecture.num_layers
    return Transformer(
        architecture=architecture,
        backend=backend,
        embedding=backend.tensor(shard.read("embedding")) if is_first else None,
        layers=tuple(_layer(shard, backend, layer, hosted) for layer in layers),
        norm=backend.tensor(shard.read("norm")) if is_last else None,
        head=backend.matrix(shard.read("embedding" if architecture.tied_embeddings else "head")) if is_last else None,
        cache=KVCache(
            backend, layers=len(layers), pages=pages, kv_heads=heads.num_kv_heads, head_dim=heads.head_dim
        ),
    )


def _layer(shard: Shard, backend: Backend, layer: int, hosted: tuple[int, ...]) -> Layer:
    path = layer_path(layer)
    moe = shard.architecture.is_moe(layer)
    return Layer(
        index=layer,
        attention_norm=backend.tensor(shard.read(f"{path}/attention_norm")),
        attention=_attention(shard, backend, f"{path}/attention"),
        feed_forward_norm=backend.tensor(shard.read(f"{path}/feed_forward_norm")),
        feed_forward=_experts(shard, backend, layer, hosted) if moe else Dense(_dense(shard, backend, f"{path}/dense")),
    )


def _attention(shard: Shard, backend: Backend, path: str) -> Attention:
    shape = shard.architecture.attention
    normed = shape.qk_norm == "head"
    return Attention(
        shape=shape,
        eps=shard.architecture.norm_eps,
        qkv=backend.matrix(*(shard.read(f"{path}/{name}") for name in "qkv")),
        output=backend.matrix(shard.read(f"{path}/o"), transposed=True),
        q_norm=backend.tensor(shard.read(f"{path}/q_norm")) if normed else None,
        k_norm=backend.tensor(shard.read(f"{path}/k_norm")) if normed else None,
    )


def _dense(shard: Shard, backend: Backend, path: str) -> Expert:
    return Expert(
        gate_up=backend.matrix(shard.read(f"{path}/gate"), shard.read(f"{path}/up")),
        down=backend.matrix(shard.read(f"{path}/down"), transposed=True),
    )


def _experts(shard: Shard, backend: Backend, layer: int, hosted: tuple[int, ...]) -> MixtureOfExperts:
    path, architecture = layer_path(layer), shard.architecture
    return MixtureOfExperts(
        layer=layer,
        rule=architecture.experts.router,
        router=backend.matrix(shard.read(f"{path}/router")),
        experts=tuple(_expert(shard, backend, f"{path}/experts", expert) for expert in hosted),
    )


def _expert(shard: Shard, backend: Backend, path: str, expert: int) -> Expert:
    gate, up, down = (shard.read_expert(f"{path}/{name}", expert) for name in ("gate", "up", "down"))
    return Expert(gate_up=backend.matrix(gate, up), down=backend.matrix(down))
