"""Small checkpoints in the hub's format; each value encodes its tensor and position."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

QWEN3_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "bos_token_id": 1,
    "decoder_sparse_step": 1,
    "eos_token_id": 2,
    "head_dim": 6,
    "hidden_act": "silu",
    "hidden_size": 16,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "mlp_only_layers": [0],
    "moe_intermediate_size": 10,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 70,
}

TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "é": 2}, "unk_token": "a"},
}


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes that transformers gives a checkpoint of this configuration."""
    width, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    dim, hidden, dense = config["head_dim"], config["moe_intermediate_size"], config["intermediate_size"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], width), "model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    for layer in range(config["num_hidden_layers"]):
        path = f"model.layers.{layer}"
        shapes |= {f"{path}.{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")}
        shapes |= {f"{path}.self_attn.{norm}_norm.weight": (dim,) for norm in "qk"}
        rows = {"q": heads * dim, "k": kv_heads * dim, "v": kv_heads * dim}
        shapes |= {f"{path}.self_attn.{name}_proj.weight": (count, width) for name, count in rows.items()}
        shapes[f"{path}.self_attn.o_proj.weight"] = (width, heads * dim)
        networks = {f"{path}.mlp": dense}
        if layer not in config["mlp_only_layers"]:
            shapes[f"{path}.mlp.gate.weight"] = (config["num_experts"], width)
            networks = {f"{path}.mlp.experts.{expert}": hidden for expert in range(config["num_experts"])}
        for network, inner in networks.items():
            shapes |= {f"{network}.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
            shapes[f"{network}.down_proj.weight"] = (width, inner)
    return shapes


def origin_bits(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Finite bfloat16 bits that depend on the tensor's name and the position in it."""
    start = zlib.crc32(name.encode())
    return ((start + np.arange(np.prod(shape), dtype=np.int64) * 7) % 0x7F00).astype("<u2").reshape(shape)


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, np.ndarray]]) -> None:
    """Write (type, array) pairs without a library, which could correct deliberate errors."""
    header, end = {}, 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    write_raw_safetensors(path, header, b"".join(array.tobytes() for _, array in tensors.values()))


def write_raw_safetensors(path: Path, header: Any, payload: bytes) -> None:
    """Write any header and any payload."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + payload)


def write_checkpoint(
    folder: Path, *, shards: int = 1, tensors: Mapping[str, tuple[str, np.ndarray]] | None = None, **changes: Any
) -> dict[str, Any]:
    """Write config.json (QWEN3_MOE with `changes`), tokenizer.json and the weights; returns the configuration."""
    config = QWEN3_MOE | changes
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER, ensure_ascii=False), encoding="utf-8")
    if tensors is None:
        tensors = origin_tensors(config)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return config
    files = {name: f"model-{1 + index % shards:05d}-of-{shards:05d}.safetensors" for index, name in enumerate(tensors)}
    for file in set(files.values()):
        write_safetensors(folder / file, {name: tensors[name] for name in tensors if files[name] == file})
    index_text = json.dumps({"metadata": {"total_size": 1}, "weight_map": files})
    (folder / "model.safetensors.index.json").write_text(index_text)
    return config


def origin_tensors(config: Mapping[str, Any]) -> dict[str, tuple[str, np.ndarray]]:
    """The tensors of a checkpoint of this configuration, in bfloat16."""
    return {name: ("BF16", origin_bits(name, shape)) for name, shape in tensor_shapes(config).items()}
