"""Checkpoints of packed integers and floating-point numbers of four and eight bits, each against its formula."""

import json

import numpy as np
import pytest

from config.test_hub_configs import DEEPSEEK_V3, GPT_OSS, MIXTRAL, SARVAM
from fuzz.checkpoints import small
from moempi.config.families import checkpoint_quantization
from moempi.errors import DataError
from moempi.storage.convert import convert
from storage.checkpoints import QWEN3_MOE, write_checkpoint
from storage.packed import AUTO_FP8, FORMATS, FP4, MODELOPT, MODULE, NVFP4, bfloat16, compressed, gptq, pack, source
from storage.test_hub_checkpoints import bfloat16_tensors, converted

SHAPE = (24, 64)
SIZES = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32, "head_dim": 8}
LATENT_SIZES = SIZES | {"q_lora_rank": 32, "kv_lora_rank": 32, "v_head_dim": 8, "head_dim": None}
MODELS = (
    small(QWEN3_MOE) | SIZES,
    small(MIXTRAL) | {"hidden_size": 32, "intermediate_size": 32},
    small(DEEPSEEK_V3) | LATENT_SIZES | {"quantization_config": None},
    small(SARVAM) | SIZES,
)
INTEGERS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
GPTQ, AWQ = FORMATS["gptq"].config, FORMATS["awq"].config


def is_quantized(name, array):
    """Quantized as on the hub: the matrices of layers, but no router; here only those that all formats can divide."""
    return array.ndim == 2 and ".layers." in name and ".gate.weight" not in name and array.shape[0] % 8 == 0


def quantized(tensors, form):
    """A checkpoint with quantized matrices, and the same in bfloat16."""
    random, packed, plain = np.random.default_rng(3), dict(tensors), dict(tensors)
    for name, (_, array) in tensors.items():
        if is_quantized(name, array):
            del packed[name]
            parts, values = form.write(random, array.shape)
            packed |= {f"{name.removesuffix('weight')}{suffix}": part for suffix, part in parts.items()}
            plain[name] = ("BF16", bfloat16(values))
    assert len(packed) > len(plain)
    return packed, plain


@pytest.mark.parametrize("values", MODELS, ids=lambda values: values["model_type"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_checkpoint_gives_the_weight_file_of_its_values(tmp_path, name, values):
    packed, plain = quantized(bfloat16_tensors(values), FORMATS[name])
    found = converted(tmp_path / "packed", values | {"quantization_config": FORMATS[name].config}, packed)
    assert found == converted(tmp_path / "plain", values, plain)


@pytest.mark.parametrize("name", FORMATS)
def test_any_rows_are_those_of_the_whole(tmp_path, name):
    parts, values = FORMATS[name].write(np.random.default_rng(4), SHAPE)
    matrix = source(tmp_path / "raw", FORMATS[name].config, parts)
    assert (matrix.shape, matrix.name.startswith(MODULE)) == (SHAPE, True)
    assert matrix.dtype == ("F16" if values.dtype == np.float16 else "F32")
    for start, stop in [(0, 24), (0, 1), (7, 9), (8, 16), (23, 24), (5, 24)]:
        found = matrix.read(start, stop)
        assert found.dtype == values.dtype
        np.testing.assert_array_equal(found.view(np.uint8), np.ascontiguousarray(values[start:stop]).view(np.uint8))


def test_a_file_that_ends_early_is_named(tmp_path):
    for name in ("gptq", "awq", "int4"):
        parts, _ = FORMATS[name].write(np.random.default_rng(4), SHAPE)
        matrix = source(tmp_path / "raw", FORMATS[name].config, parts)
        (tmp_path / "raw").write_bytes(b"")
        with pytest.raises(DataError, match=rf"{MODULE}.*: the file ends before the tensor does"):
            matrix.read(3, 9)


def without(parts, name):
    return {other: part for other, part in parts.items() if other != name}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gptq", lambda parts: without(parts, "scales"), r"scales: is missing"),
        ("gptq", lambda parts: without(parts, "qzeros"), r"qzeros: is missing"),
        ("gptq-act_order", lambda parts: without(parts, "g_idx"), r"g_idx: is missing"),
        ("gptq", lambda parts: parts | {"qweight": ("I64", np.zeros((8, 24), "<i8"))}, "is I64, .* says I32"),
        ("gptq", lambda parts: parts | {"qweight": ("I32", np.zeros(8, "<i4"))}, "are not three matrices"),
        ("gptq", lambda parts: parts | {"scales": ("F16", np.zeros((7, 24), "<f2"))}, "not one a block of 1 x 8"),
        ("gptq", lambda parts: parts | {"scales": ("U8", np.zeros((8, 24), "u1"))}, "not one a block of 1 x 8"),
        ("gptq", lambda parts: parts | {"qzeros": ("I32", np.zeros((8, 4), "<i4"))}, "zero points are not one a scale"),
        (
            "gptq",
            lambda parts: parts | {"qzeros": ("F32", np.zeros((8, 3), "<f4"))},
            r"is F32 \(8, 3\), not a matrix of I32",
        ),
        ("gptq", lambda parts: parts | {"g_idx": ("I32", np.zeros(63, "<i4"))}, r"is I32 \(63,\), not a group"),
        ("gptq", lambda parts: parts | {"g_idx": ("I64", np.zeros(64, "<i8"))}, "is I64 .*, not a group"),
        ("awq", lambda parts: parts | {"qweight": ("I32", np.zeros((64, 4), "<i4"))}, "not one a block of 1 x 8"),
        ("int4", lambda parts: without(parts, "weight_shape"), "weight_shape: is missing"),
        ("int4", lambda parts: parts | {"weight_scale": ("BF16", np.zeros((24, 4), "<u2"))}, "not one a block"),
        ("int4-asymmetric-float16", lambda parts: without(parts, "weight_zero_point"), "zero_point: is missing"),
        (
            "int4-asymmetric-float16",
            lambda parts: parts | {"weight_zero_point": ("I32", np.array(8, "<i4"))},
            r"zero_point: is I32 \(\), not a matrix of I32",
        ),
        ("nvfp4", lambda parts: without(parts, "weight_global_scale"), "weight_global_scale: is missing"),
        ("nvfp4", lambda parts: parts | {"weight_global_scale": ("F32", np.ones(2, "<f4"))}, "not one F32 number"),
        ("nvfp4", lambda parts: parts | {"weight_scale": ("U8", np.ones((24, 4), "u1"))}, "not one a block of 1 x 16"),
        ("mxfp4", lambda parts: parts | {"weight_scale": ("F8_E4M3", np.ones((24, 2), "u1"))}, "of 1 x 32"),
        ("fp8-static", lambda parts: parts | {"weight_scale": ("F32", np.ones(2, "<f4"))}, "of all x all"),
        ("fp8-static", lambda parts: without(parts, "weight_scale"), "weight_scale: is missing"),
        ("int8-unpacked", lambda parts: parts | {"weight": ("I8", np.ones(3, "i1"))}, "not of a matrix"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(tmp_path, name, change, message):
    parts, _ = FORMATS[name].write(np.random.default_rng(4), SHAPE)
    with pytest.raises(DataError, match=message) as error:
        source(tmp_path / "raw", FORMATS[name].config, change(parts))
    assert MODULE in str(error.value)


@pytest.mark.parametrize("group", [-1, 8])
def test_groups_beyond_the_scales_are_refused_by_name(tmp_path, group):
    parts, _ = FORMATS["gptq"].write(np.random.default_rng(4), SHAPE)
    parts["g_idx"][1][5] = group
    with pytest.raises(DataError, match="g_idx: has groups beyond the 8 scales"):
        source(tmp_path / "raw", GPTQ, parts).read(0, 1)


def test_the_first_gptq_stores_zero_points_less_one_modulo_16(tmp_path):
    parts, _ = gptq().write(np.random.default_rng(4), (8, 8))
    parts |= {"qweight": ("I32", np.zeros((1, 8), "<i4")), "scales": ("F16", np.ones((1, 8), "<f2"))}
    parts["qzeros"] = ("I32", pack(np.array([[0, 7, 14, 15, 15, 15, 1, 2]]), 4, 1))
    found = source(tmp_path / "raw", GPTQ, parts).read(0, 8)[:, 0]
    np.testing.assert_array_equal(found, [-1, -8, -15, 0, 0, 0, -2, -3])


def test_a_bias_of_zeros_beside_a_quantized_matrix_is_left_out_and_another_refused(tmp_path):
    values = MODELS[0]
    packed, plain = quantized(bfloat16_tensors(values), FORMATS["gptq"])
    name = "model.layers.1.mlp.experts.2.up_proj.bias"
    config = values | {"quantization_config": GPTQ}
    bias = np.zeros(32, "<f2")
    found = converted(tmp_path / "zeros", config, packed | {name: ("F16", bias)})
    assert found == converted(tmp_path / "plain", values, plain)
    with pytest.raises(DataError, match=rf"{name}: is not a tensor of this"):
        converted(tmp_path / "other", config, packed | {name: ("F16", bias + 1)})
    with pytest.raises(DataError, match=r"extra\.bias: is not a tensor of this"):
        converted(tmp_path / "alone", config, packed | {"model.layers.1.extra.bias": ("F16", bias)})


def test_scales_of_a_quantized_cache_are_left_out(tmp_path):
    values = MODELS[0]
    packed, plain = quantized(bfloat16_tensors(values), FORMATS["nvfp4-modelopt"])
    path = "model.layers.0.self_attn"
    for name in (f"{path}.k_scale", f"{path}.v_proj.v_scale", f"{path}.q_proj.input_global_scale"):
        packed[name] = ("F32", np.ones((), "<f4"))
    found = converted(tmp_path / "packed", values | {"quantization_config": MODELOPT}, packed)
    assert found == converted(tmp_path / "plain", values, plain)


def test_modelopt_may_say_it_in_a_file_of_its_own(tmp_path):
    values = MODELS[0]
    packed, plain = quantized(bfloat16_tensors(values), FORMATS["nvfp4-modelopt"])
    own = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/hf_quant_config.json").write_text(json.dumps(own))
    found = converted(tmp_path / "packed", values, packed)
    assert found == converted(tmp_path / "plain", values, plain)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("name", "kind", "bits"), [("gptq", "F16", 0x7C00), ("int4", "BF16", 0x7F80)])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, name, kind, bits):
    values = MODELS[0]
    packed, _ = quantized(bfloat16_tensors(values), FORMATS[name])
    scales = next(key for key in packed if key.endswith((".scales", ".weight_scale")))
    packed[scales] = (kind, np.full_like(packed[scales][1].view("<u2"), bits))
    with pytest.raises(DataError, match=r"(qweight|weight_packed): holds NaN, infinity"):
        converted(tmp_path / "packed", values | {"quantization_config": FORMATS[name].config}, packed)


@pytest.mark.filterwarnings("error")
def test_gpt_oss_experts_with_an_exponent_that_is_no_number_are_refused(tmp_path):
    how = checkpoint_quantization(GPT_OSS, origin="test")
    assert how.outputs_first
    blocks, exponents = np.full((1, 1, 1, 16), 0x77, "u1"), np.full((1, 1, 1), 255, "u1")
    matrix = source_of_gpt_oss(tmp_path / "raw", blocks, exponents)
    assert np.isnan(matrix.read(0, 1)).all()


def source_of_gpt_oss(path, blocks, exponents):
    """Experts of 4-bit blocks with exponents, through the names that gpt-oss gives them."""
    from moempi.storage.checkpoint import CheckpointTensor
    from moempi.storage.dequantize import dequantized
    from moempi.storage.tensor_table import TensorTable

    path.write_bytes(blocks.tobytes() + exponents.tobytes())
    tensors = {
        "experts_blocks": CheckpointTensor(path, "experts_blocks", "U8", blocks.shape, 0),
        "experts_scales": CheckpointTensor(path, "experts_scales", "U8", exponents.shape, blocks.nbytes),
    }
    how = checkpoint_quantization(GPT_OSS, origin="test")
    return dequantized("experts", how, TensorTable(path.parent, tensors))


def test_four_bit_blocks_of_gpt_oss(tmp_path):
    random = np.random.default_rng(4)
    blocks = random.integers(0, 256, (2, 6, 2, 16)).astype(np.uint8)
    exponents = random.integers(120, 135, (2, 6, 2)).astype(np.uint8)
    numbers = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    numbers += [-number for number in numbers]
    expected = np.zeros((2, 6, 64))
    for expert, row, column in np.ndindex(expected.shape):
        pair = int(blocks[expert, row, column // 32, column % 32 // 2])
        number = numbers[pair >> 4 if column % 2 else pair & 15]
        expected[expert, row, column] = number * 2.0 ** (int(exponents[expert, row, column // 32]) - 127)
    matrix = source_of_gpt_oss(tmp_path / "raw", blocks, exponents)
    np.testing.assert_array_equal(matrix.read(0, 2), expected)


@pytest.mark.parametrize(("exponents", "block"), [((2, 6, 3), 16), ((2, 6), 16), ((2, 6, 2), 8)])
def test_four_bit_blocks_of_gpt_oss_need_their_exponents(tmp_path, exponents, block):
    with pytest.raises(DataError, match="experts_blocks: its scales are not one a block of 1 x 32"):
        source_of_gpt_oss(tmp_path / "raw", np.zeros((2, 6, 2, block), np.uint8), np.zeros(exponents, np.uint8))


@pytest.mark.parametrize("sparsity", [{"format": "dense", "sparsity_structure": "unstructured"}, {}, None])
def test_dense_sparsity_changes_nothing(sparsity):
    form = FORMATS["int4"]
    read = [
        checkpoint_quantization(QWEN3_MOE | {"quantization_config": config}, origin="test")
        for config in (form.config, form.config | {"sparsity_config": sparsity})
    ]
    assert read[0] == read[1]


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (
            {"quant_method": "hqq", "bits": 4},
            "quant_method is 'hqq', only fp8, compressed-tensors, gptq, awq, modelopt",
        ),
        ({"quant_method": "gptq" * 1000}, "quant_method is 'gptqgptq"),
        ({"bits": 8}, "quant_method is None, only fp8"),
        (AUTO_FP8 | {"fmt": "e5m2"}, "fmt = 'e5m2' is not supported"),
        (AUTO_FP8 | {"weight_block_size": [128]}, "weight_block_size = [128] is not supported, only two positive"),
        (AUTO_FP8 | {"weight_block_size": [0, 128]}, "weight_block_size = [0, 128] is not supported"),
        (compressed("float-quantized", INTEGERS), "num_bits = 4 is not supported, only 8"),
        (compressed("float-quantized", FP4 | {"num_bits": 8, "strategy": "group"}), "strategy = 'group'"),
        (compressed("pack-quantized", INTEGERS | {"num_bits": 3}), "num_bits = 3 is not supported, only 4 or 8"),
        (compressed("pack-quantized", INTEGERS | {"type": "float"}), "type = 'float' is not supported, only 'int'"),
        (compressed("pack-quantized", INTEGERS | {"group_size": 0}), "group_size = 0 is not supported"),
        (compressed("pack-quantized", INTEGERS | {"actorder": "group"}), "actorder = 'group' is not supported"),
        (compressed("pack-quantized", INTEGERS | {"dynamic": True}), "dynamic = True is not supported"),
        (compressed("pack-quantized", INTEGERS, transform_config={"config_groups": {"R1": {}}}), "transform_config"),
        (compressed("pack-quantized", INTEGERS, sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24"),
        (compressed("pack-quantized", INTEGERS, sparsity_config={"targets": ["Linear"]}), "format = None is not supp"),
        (compressed("marlin-24", INTEGERS), "format = 'marlin-24' is not supported"),
        (compressed("mixed-precision", INTEGERS), "format = 'mixed-precision' is not supported"),
        (compressed("float-quantized", {}) | {"config_groups": None}, "config_groups does not have one strategy"),
        (
            compressed("float-quantized", {}) | {"config_groups": {"group_0": {"weights": None}}},
            "says nothing of weights",
        ),
        (NVFP4 | {"format": "mxfp4-pack-quantized"}, "strategy = 'tensor_group' is not supported, only 'group'"),
        (GPTQ | {"bits": 3}, "bits = 3 is not supported, only 4 or 8"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin' is not supported"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format = True is not supported"),
        (GPTQ | {"group_size": -2}, "group_size = -2 is not supported"),
        (GPTQ | {"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic gives some matrices other bits"),
        (AWQ | {"version": "gemv"}, "version = 'gemv' is not supported, only 'gemm'"),
        (AWQ | {"zero_point": False}, "zero_point = False is not supported"),
        (AWQ | {"bits": 8}, "bits = 8 is not supported, only 4"),
        (MODELOPT | {"quant_algo": "W4A8_AWQ"}, "quant_algo = 'W4A8_AWQ' is not supported, only 'FP8' or 'NVFP4'"),
    ],
)
def test_other_quantizations_are_refused_in_one_line(tmp_path, quantization, message):
    write_checkpoint(tmp_path / "hub", quantization_config=quantization)
    with pytest.raises(DataError) as error:
        convert(tmp_path / "hub", tmp_path / "model.h5")
    place, _, refusal = str(error.value).partition("/config.json: quantization_config: ")
    assert place == str(tmp_path / "hub")
    assert message in refusal
    assert len(refusal) <= 200
    assert "\n" not in refusal


def test_packed_integers_are_refused_by_the_method_and_not_by_a_type(tmp_path):
    values = small(QWEN3_MOE)
    tensors = bfloat16_tensors(values) | {"model.layers.0.self_attn.q_proj.qweight": ("I32", np.zeros((2, 2), "<i4"))}
    with pytest.raises(DataError, match="quant_method is 'hqq', only"):
        converted(tmp_path / "hub", values | {"quantization_config": {"quant_method": "hqq"}}, tensors)
