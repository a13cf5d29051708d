"""Loading: a rank's share of a weight file becomes a model on its machine."""

from moempi.backend.protocol import Backend, Expert
from moempi.config.tensors import layer_path
from moempi.model.attention import Attention
from moempi.model.feed_forward import Dense, MixtureOfExperts
from moempi.model.kv_cache import KVCache
from moempi.model.transformer import Layer, Transformer
from moempi.storage.weights import WeightFile


def load_model(file: WeightFile, backend: Backend, *, hosted: tuple[int, ...], pages: int) -> Transformer:
    """Read all dense weights and the `hosted` experts of every layer; `pages` is the size of the cache.

    Raises DataError when a checksum does not hold. Not collective.
    """
    architecture = file.architecture
    heads = architecture.attention
    embedding = file.read("embedding")
    return Transformer(
        architecture=architecture,
        backend=backend,
        embedding=backend.tensor(embedding),
        layers=tuple(_layer(file, backend, layer, hosted) for layer in range(architecture.num_layers)),
        norm=backend.tensor(file.read("norm")),
        head=backend.matrix(embedding if architecture.tied_embeddings else file.read("head")),
        cache=KVCache(
            backend,
            layers=architecture.num_layers,
            pages=pages,
            kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
        ),
    )


def _layer(file: WeightFile, backend: Backend, layer: int, hosted: tuple[int, ...]) -> Layer:
    path = layer_path(layer)
    moe = file.architecture.is_moe(layer)
    return Layer(
        attention_norm=backend.tensor(file.read(f"{path}/attention_norm")),
        attention=_attention(file, backend, f"{path}/attention"),
        feed_forward_norm=backend.tensor(file.read(f"{path}/feed_forward_norm")),
        feed_forward=_experts(file, backend, layer, hosted) if moe else Dense(_dense(file, backend, f"{path}/dense")),
    )


def _attention(file: WeightFile, backend: Backend, path: str) -> Attention:
    shape = file.architecture.attention
    normed = shape.qk_norm == "head"
    return Attention(
        shape=shape,
        eps=file.architecture.norm_eps,
        qkv=backend.matrix(*(file.read(f"{path}/{name}") for name in "qkv")),
        output=backend.matrix(file.read(f"{path}/o"), transposed=True),
        q_norm=backend.tensor(file.read(f"{path}/q_norm")) if normed else None,
        k_norm=backend.tensor(file.read(f"{path}/k_norm")) if normed else None,
    )


def _dense(file: WeightFile, backend: Backend, path: str) -> Expert:
    return Expert(
        gate_up=backend.matrix(file.read(f"{path}/gate"), file.read(f"{path}/up")),
        down=backend.matrix(file.read(f"{path}/down"), transposed=True),
    )


def _experts(file: WeightFile, backend: Backend, layer: int, hosted: tuple[int, ...]) -> MixtureOfExperts:
    path, architecture = layer_path(layer), file.architecture
    return MixtureOfExperts(
        layer=layer,
        rule=architecture.experts.router,
        router=backend.matrix(file.read(f"{path}/router")),
        experts=tuple(_expert(file, backend, f"{path}/experts", expert) for expert in hosted),
    )


def _expert(file: WeightFile, backend: Backend, path: str, expert: int) -> Expert:
    gate, up, down = (file.read(f"{path}/{name}", expert, expert + 1)[0] for name in ("gate", "up", "down"))
    return Expert(gate_up=backend.matrix(gate, up), down=backend.matrix(down))
