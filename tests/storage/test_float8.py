"""Checkpoints with 8-bit matrices, in every family and with all types and shapes of scales."""

import numpy as np
import pytest

from config.test_hub_configs import GLM_AIR
from fuzz.checkpoints import small
from moempi.arrays import narrow, widen
from moempi.errors import DataError
from moempi.storage.number_tables import E4M3
from storage.checkpoints import QWEN3_MOE
from storage.test_hub_checkpoints import DEEPSEEK, SEPARATE, bfloat16_tensors, converted, fused

MATRICES = tuple(f"{name}.weight" for name in ("_proj", "w1", "w2", "w3", ".query_key_value", ".dense"))
NOT_QUANTIZED = "indexer.weights_proj.weight"
"""Float32 in the weight file: releases leave it as it is."""
ROWS, COLUMNS = 4, 6
BLOCKS = {"quant_method": "fp8", "fmt": "float8_e4m3fn", "weight_block_size": [ROWS, COLUMNS], "scale_fmt": "ue8m0"}
SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")


def compressed(**weights):
    """A quantization_config of compressed-tensors."""
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"} | weights
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"dynamic": True}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


def stored_scales(random, kind, shape):
    """Scales in a type of safetensors, and the float32 numbers that they are."""
    if kind in ("F8_E8M0", "U8"):
        bits = random.integers(110, 130, shape, dtype=np.uint8)
        return (kind, bits), np.ldexp(np.float32(1), bits.astype(np.int32) - 127)
    numbers = np.asarray(random.normal(size=shape) * 0.01, np.float32)
    if kind == "BF16":
        return (kind, narrow(numbers)), widen(narrow(numbers))
    stored = numbers.astype("<f2" if kind == "F16" else "<f4")
    return (kind, stored), stored.astype(np.float32)


def quantized(tensors, block, suffix, *, kind="F32", squeezed=False):
    """Tensors with projections in 8 bits, and the same in bfloat16."""
    random, eight, sixteen = np.random.default_rng(7), dict(tensors), dict(tensors)
    for name, (_, array) in tensors.items():
        if name.endswith(MATRICES) and not name.endswith(NOT_QUANTIZED):
            rows, columns = (size or length for size, length in zip(block, array.shape, strict=True))
            grid = (-(-array.shape[0] // rows), -(-array.shape[1] // columns))
            bits = (
                random.integers(0, 127, array.shape, dtype=np.uint8)
                | random.integers(0, 2, array.shape, dtype=np.uint8) << 7
            )
            (_, scales), numbers = stored_scales(random, kind, grid)
            eight[name] = ("F8_E4M3", bits)
            eight[name + suffix] = (kind, scales.squeeze() if squeezed else scales)
            whole = np.kron(numbers, np.ones((rows, columns), np.float32))[: array.shape[0], : array.shape[1]]
            sixteen[name] = ("BF16", narrow(E4M3[bits] * whole))
    assert len(eight) > len(sixteen)
    return eight, sixteen


@pytest.mark.parametrize("values", SEPARATE, ids=lambda values: values["model_type"])
def test_blocks_are_expanded_in_every_family(tmp_path, values):
    values = small(values)
    eight, sixteen = quantized(bfloat16_tensors(values), (ROWS, COLUMNS), "_scale_inv")
    found = converted(tmp_path / "eight", values | {"quantization_config": BLOCKS}, eight)
    assert found == converted(tmp_path / "sixteen", values, sixteen)


@pytest.mark.parametrize("kind", SCALES)
def test_scales_of_every_type(tmp_path, kind):
    values = small(QWEN3_MOE)
    eight, sixteen = quantized(bfloat16_tensors(values), (ROWS, COLUMNS), "_scale_inv", kind=kind)
    found = converted(tmp_path / "eight", values | {"quantization_config": BLOCKS}, eight)
    assert found == converted(tmp_path / "sixteen", values, sixteen)


@pytest.mark.parametrize("inputs_first", [False, True])
def test_fused_8_bit_experts_are_expanded(tmp_path, inputs_first):
    values = small(QWEN3_MOE)
    random, eight, sixteen = np.random.default_rng(9), fused(bfloat16_tensors(values)), {}
    for name, (kind, array) in list(eight.items()):
        sixteen[name] = (kind, array)
        if array.ndim == 3:
            whole = array.swapaxes(1, 2) if inputs_first else array
            grid = (whole.shape[0], -(-whole.shape[1] // ROWS), -(-whole.shape[2] // COLUMNS))
            bits, scales = random.integers(0, 127, whole.shape, dtype=np.uint8), random.normal(size=grid).astype("<f4")
            eight[name], eight[f"{name}_scale_inv"] = ("F8_E4M3", bits), ("F32", scales)
            by_number = scales.repeat(ROWS, 1).repeat(COLUMNS, 2)[:, : whole.shape[1], : whole.shape[2]]
            sixteen[name] = ("BF16", narrow(E4M3[bits] * by_number))
    values |= {"model_type": "qwen3_vl_moe_text"} if inputs_first else {}
    found = converted(tmp_path / "eight", values | {"quantization_config": BLOCKS}, eight)
    assert found == converted(tmp_path / "sixteen", values, sixteen)


@pytest.mark.parametrize(
    "scales", [np.ones((3, 4, 3), "<f4"), np.ones((4, 4), "<f4"), np.ones((4, 4, 4), "<f4"), np.ones((), "<f4")]
)
def test_fused_8_bit_experts_need_the_scales_of_each_expert(tmp_path, scales):
    values = small(QWEN3_MOE)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    tensors = fused(bfloat16_tensors(values))
    tensors |= {name: ("F8_E4M3", np.zeros(tensors[name][1].shape, "u1")), f"{name}_scale_inv": ("F32", scales)}
    with pytest.raises(DataError, match=f"{name}: its scales are not one a block of {ROWS} x {COLUMNS}"):
        converted(tmp_path / "hub", values | {"quantization_config": BLOCKS}, tensors)


def test_a_block_may_be_larger_than_every_matrix(tmp_path):
    values = small(QWEN3_MOE)
    eight, sixteen = quantized(bfloat16_tensors(values), (0, 0), "_scale_inv")
    config = values | {"quantization_config": BLOCKS | {"weight_block_size": [10**15, 10**15]}}
    assert converted(tmp_path / "eight", config, eight) == converted(tmp_path / "sixteen", values, sixteen)


@pytest.mark.parametrize("squeezed", [False, True])
@pytest.mark.parametrize(
    ("weights", "block"),
    [
        ({"strategy": "channel"}, (1, 0)),
        ({"strategy": "tensor"}, (0, 0)),
        ({"strategy": "block", "block_structure": [ROWS, COLUMNS]}, (ROWS, COLUMNS)),
    ],
)
def test_scales_of_channels_tensors_and_blocks_of_compressed_tensors(tmp_path, weights, block, squeezed):
    values = small(GLM_AIR)
    eight, sixteen = quantized(
        bfloat16_tensors(values), block, "_scale", kind="BF16", squeezed=squeezed and block != (ROWS, COLUMNS)
    )
    eight["model.layers.0.self_attn.q_proj.input_scale"] = ("F32", np.ones(1, "<f4"))
    found = converted(tmp_path / "eight", values | {"quantization_config": compressed(**weights)}, eight)
    assert found == converted(tmp_path / "sixteen", values, sixteen)


def test_8_bit_matrices_without_a_quantization_are_refused_by_name(tmp_path):
    values = small(QWEN3_MOE)
    eight, _ = quantized(bfloat16_tensors(values), (ROWS, COLUMNS), "_scale_inv")
    with pytest.raises(DataError, match=r"proj\.weight: is F8_E4M3 without a quantization_config"):
        converted(tmp_path / "hub", values, eight)


@pytest.mark.parametrize(("kind", "bits"), [("F8_E8M0", 255), ("U8", 255), ("BF16", 0x7F80), ("F32", np.nan)])
def test_scales_that_are_not_finite_are_refused_by_name(tmp_path, kind, bits):
    values = small(QWEN3_MOE)
    eight, _ = quantized(bfloat16_tensors(values), (ROWS, COLUMNS), "_scale_inv", kind=kind)
    name = "model.layers.1.mlp.experts.1.up_proj.weight"
    eight[f"{name}_scale_inv"][1][0, 0] = bits
    with pytest.raises(DataError, match=f"{name}: holds NaN, infinity"):
        converted(tmp_path / "hub", values | {"quantization_config": BLOCKS}, eight)


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_an_empty_8_bit_matrix_is_refused_by_name(tmp_path, strategy):
    values = small(QWEN3_MOE)
    name = "model.layers.0.self_attn.q_proj.weight"
    empty = {name: ("F8_E4M3", np.zeros((0, 16), "u1")), f"{name}_scale": ("F32", np.zeros((0, 1), "<f4"))}
    config = values | {"quantization_config": compressed(strategy=strategy)}
    with pytest.raises(DataError, match=rf"{name}: its shape is \(0, 16\)"):
        converted(tmp_path / "hub", config, bfloat16_tensors(values) | empty)


def test_a_wrapper_may_have_the_quantization_outside(tmp_path):
    values = small(DEEPSEEK)
    eight, sixteen = quantized(bfloat16_tensors(values), (ROWS, COLUMNS), "_scale_inv")
    outer = {"model_type": "any", "text_config": values, "quantization_config": BLOCKS}
    wrapped = {f"language_model.{name}": one for name, one in eight.items()}
    expected = converted(tmp_path / "sixteen", values, sixteen)
    assert converted(tmp_path / "eight", outer, wrapped) == expected
    inner = values | {"quantization_config": {"quant_method": "gptq"}}  # of the model that was quantized again
    assert converted(tmp_path / "again", outer | {"text_config": inner}, wrapped) == expected
