"""Quantized matrices as the hub has them: random parts of each format, and the values that its formula gives."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moempi.arrays import narrow, widen
from moempi.config.families import checkpoint_quantization
from moempi.storage.checkpoint import CheckpointTensor
from moempi.storage.dequantize import dequantized
from moempi.storage.number_tables import E4M3
from moempi.storage.tensor_sources import Source
from moempi.storage.tensor_table import TensorTable
from storage.checkpoints import QWEN3_MOE

Parts = dict[str, tuple[str, np.ndarray]]
"""Type and array of each part of a matrix, by the end of its name: `weight_scale`, `qweight`."""

MODULE = "model.layers.0.mlp.gate_proj"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that each number of a word belongs to
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)


@dataclass(frozen=True)
class Format:
    """A quantization_config, and a function of (random, shape) that gives parts and values (float32 or float16)."""

    config: dict[str, Any]
    write: Any
    group: int


def pack(numbers: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Words of 32 bits, the first number lowest; the last word of an axis may have bits that are no number's."""
    per_word = 32 // bits
    first = np.moveaxis(numbers.astype(np.uint64), axis, 0)
    first = np.concatenate([first, np.zeros((-len(first) % per_word, *first.shape[1:]), np.uint64)])
    words = sum(first[place::per_word] << np.uint64(bits * place) for place in range(per_word))
    return np.moveaxis(words, 0, axis).astype(np.uint32).view("<i4")


def scales_of(
    random: np.random.Generator, shape: tuple[int, ...], kind: str
) -> tuple[tuple[str, np.ndarray], np.ndarray]:
    """Scales in a type of safetensors, and the numbers that they are; some negative, zero or subnormal."""
    numbers = np.asarray(random.normal(size=shape) * 0.02, np.float32)
    flat = numbers.reshape(-1)
    flat[: min(4, flat.size)] = (0.0, -0.0, 6e-8, 2e-39)[: min(4, flat.size)]
    if kind == "BF16":
        return (kind, narrow(numbers)), widen(narrow(numbers))
    stored = numbers.astype("<f2" if kind == "F16" else "<f4")
    return (kind, stored), stored


def values_of(numbers: np.ndarray, zeros: np.ndarray, scales: np.ndarray, block_of: np.ndarray) -> np.ndarray:
    """(q - zero) x scale, one number after another, in the type of the scales."""
    values = np.empty(numbers.shape, scales.dtype)
    for output, place in np.ndindex(numbers.shape):
        block = output, block_of[place]
        difference = np.float32(numbers[output, place]) - np.float32(zeros[block])
        values[output, place] = scales.dtype.type(difference * np.float32(scales[block]))
    return values


def gptq(*, bits: int = 4, group: int = 8, act_order: bool = False, second: bool = False, kind: str = "F16") -> Format:
    """AutoGPTQ's layout; `group` 0 stands for all inputs."""

    def write(random: np.random.Generator, shape: tuple[int, int]) -> tuple[Parts, np.ndarray]:
        outputs, inputs = shape
        size = group or inputs
        numbers = random.integers(0, 1 << bits, shape)
        block_of = random.permutation(inputs) // size if act_order else np.arange(inputs) // size
        zeros = random.integers(0, 1 << bits, (outputs, -(-inputs // size)))
        stored, scales = scales_of(random, zeros.shape[::-1], kind)
        parts = {
            "qweight": ("I32", pack(numbers.T, bits, 0)),
            "qzeros": ("I32", pack((zeros - (0 if second else 1)).T % (1 << bits), bits, 1)),
            "scales": stored,
            "g_idx": ("I32", block_of.astype("<i4")),
        }
        return parts, values_of(numbers, zeros, scales.T, block_of)

    config = {
        "quant_method": "gptq", "bits": bits, "group_size": group or -1, "desc_act": act_order, "sym": False,
        "checkpoint_format": "gptq_v2" if second else "gptq", "damp_percent": 0.1, "true_sequential": True,
    }  # fmt: skip
    return Format(config, write, group)


def awq(*, group: int = 8, kind: str = "F16") -> Format:
    """AutoAWQ's layout for its product `gemm`."""

    def write(random: np.random.Generator, shape: tuple[int, int]) -> tuple[Parts, np.ndarray]:
        outputs, inputs = shape
        numbers = random.integers(0, 16, shape)
        zeros = random.integers(0, 16, (outputs, inputs // group))
        stored, scales = scales_of(random, zeros.shape[::-1], kind)
        place = np.arange(outputs).reshape(-1, 8)[:, AWQ_ORDER].reshape(-1)
        parts = {
            "qweight": ("I32", pack(numbers.T[:, place], 4, 1)),
            "qzeros": ("I32", pack(zeros.T[:, place], 4, 1)),
            "scales": stored,
        }
        return parts, values_of(numbers, zeros, scales.T, np.arange(inputs) // group)

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return Format(config, write, group)


def packed_integers(*, bits: int = 4, group: int = 8, symmetric: bool = True, kind: str = "BF16") -> Format:
    """The format pack-quantized of compressed-tensors; `group` 0 stands for a channel."""

    def write(random: np.random.Generator, shape: tuple[int, int]) -> tuple[Parts, np.ndarray]:
        outputs, inputs = shape
        size = group or inputs
        numbers = random.integers(0, 1 << bits, shape)
        zeros = random.integers(0, 1 << bits, (outputs, -(-inputs // size)))
        zeros = np.full_like(zeros, 1 << (bits - 1)) if symmetric else zeros
        stored, scales = scales_of(random, zeros.shape, kind)
        parts = {
            "weight_packed": ("I32", pack(numbers, bits, 1)),
            "weight_scale": stored,
            "weight_shape": ("I64", np.array(shape, "<i8")),
        }
        if not symmetric:
            parts["weight_zero_point"] = ("I32", pack(zeros, bits, 0))
        return parts, values_of(numbers, zeros, scales, np.arange(inputs) // size)

    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, "actorder": None} | strategy
    return Format(compressed("pack-quantized", weights), write, group)


def plain_integers(*, kind: str = "BF16") -> Format:
    """The format int-quantized of compressed-tensors: signed bytes with a scale per output."""

    def write(random: np.random.Generator, shape: tuple[int, int]) -> tuple[Parts, np.ndarray]:
        numbers = random.integers(-128, 128, shape)
        stored, scales = scales_of(random, (shape[0], 1), kind)
        parts = {"weight": ("I8", numbers.astype("i1")), "weight_scale": stored}
        return parts, values_of(numbers, np.zeros((shape[0], 1)), scales, np.zeros(shape[1], int))

    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    return Format(compressed("int-quantized", weights), write, 0)


def four_bit_floats(config: dict[str, Any], *, group: int, packed: str, divides: bool | None) -> Format:
    """e2m1 numbers, two a byte, with an e4m3 scale per 16 and one for all, or an exponent per 32."""

    def write(random: np.random.Generator, shape: tuple[int, int]) -> tuple[Parts, np.ndarray]:
        outputs, inputs = shape
        codes = random.integers(0, 16, shape)
        bytes_ = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
        if divides is None:
            exponents = random.integers(1, 200, (outputs, inputs // group), dtype=np.uint8)
            scales = np.exp2(exponents.astype(np.float64) - 127).astype(np.float32)
            parts = {packed: ("U8", bytes_), "weight_scale": ("U8", exponents)}
        else:
            eighths = random.integers(0, 127, (outputs, inputs // group), dtype=np.uint8)
            whole = np.float32(random.uniform(0.001, 4000))
            scales = E4M3[eighths] / whole if divides else E4M3[eighths] * whole
            parts = {packed: ("U8", bytes_), "weight_scale": ("F8_E4M3", eighths)}
            suffix = "weight_global_scale" if divides else "weight_scale_2"
            parts[suffix] = ("F32", np.array([whole] if divides else whole, "<f4"))
        numbers = np.array(E2M1, np.float32)[codes]
        return parts, values_of(numbers, np.zeros(scales.shape), scales, np.arange(inputs) // group)

    return Format(config, write, group)


def compressed(kind: str, weights: dict[str, Any], **others: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group},
        "ignore": ["lm_head"], "quantization_status": "compressed", "kv_cache_scheme": None,
    } | others  # fmt: skip


def whole_float8(config: dict[str, Any], suffix: str, *, flat: bool) -> Format:
    """e4m3 numbers with one scale."""

    def write(random: np.random.Generator, shape: tuple[int, int]) -> tuple[Parts, np.ndarray]:
        bits = random.integers(0, 127, shape, dtype=np.uint8) | random.integers(0, 2, shape, dtype=np.uint8) << 7
        scale = np.array(random.normal() * 0.01, "<f4")
        parts = {
            "weight": ("F8_E4M3", bits),
            f"weight{suffix}": ("F32", scale.reshape(1) if flat else scale),
            "input_scale": ("F32", np.ones((), "<f4")),
        }
        return parts, E4M3[bits] * scale

    return Format(config, write, 0)


FP4 = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False}
NVFP4 = compressed("nvfp4-pack-quantized", FP4 | {"strategy": "tensor_group", "group_size": 16})
MXFP4 = compressed("mxfp4-pack-quantized", FP4 | {"strategy": "group", "group_size": 32})
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}
AUTO_FP8 = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
FORMATS: dict[str, Format] = {
    "gptq": gptq(),
    "gptq-act_order": gptq(act_order=True),
    "gptq-v2": gptq(second=True),
    "gptq-8_bits-channel": gptq(bits=8, group=0),
    "gptq-bfloat16": gptq(kind="BF16"),
    "awq": awq(),
    "awq-group_16": awq(group=16),
    "int4": packed_integers(),
    "int4-asymmetric-float16": packed_integers(symmetric=False, kind="F16"),
    "int4-channel-float32": packed_integers(group=0, kind="F32"),
    "int8": packed_integers(bits=8, group=0),
    "int8-asymmetric": packed_integers(bits=8, symmetric=False),
    "int8-unpacked": plain_integers(),
    "nvfp4": four_bit_floats(NVFP4, group=16, packed="weight_packed", divides=True),
    "nvfp4-modelopt": four_bit_floats(MODELOPT, group=16, packed="weight", divides=False),
    "mxfp4": four_bit_floats(MXFP4, group=32, packed="weight_packed", divides=None),
    "fp8-static": whole_float8(AUTO_FP8, "_scale", flat=False),
    "fp8-dynamic": whole_float8(AUTO_FP8 | {"activation_scheme": "dynamic"}, "_scale", flat=True),
    "fp8-transformers": whole_float8({"quant_method": "fp8", "weight_block_size": None}, "_scale_inv", flat=False),
    "fp8-modelopt": whole_float8(MODELOPT | {"quant_algo": "FP8"}, "_scale", flat=False),
}


def source(path: Path, config: dict[str, Any], parts: Parts) -> Source:
    """The matrix MODULE of a file that has these parts, and nothing else."""
    path.write_bytes(b"".join(array.tobytes() for _, array in parts.values()))
    tensors, offset = {}, 0
    for suffix, (kind, array) in parts.items():
        name = f"{MODULE}.{suffix}"
        tensors[name] = CheckpointTensor(path, name, kind, array.shape, offset)
        offset += array.nbytes
    how = checkpoint_quantization(QWEN3_MOE | {"quantization_config": config}, origin="config.json")
    assert how is not None
    return dequantized(f"{MODULE}.weight", how, TensorTable(path.parent, tensors))


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of values rounded to bfloat16."""
    return narrow(values.astype(np.float32))
