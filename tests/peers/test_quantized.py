"""The number formats of quantized checkpoints, bit for bit, against the libraries that write them.

Expansions of compressed-tensors are compared with its own, of AWQ and of ModelOpt's 4-bit numbers with what it converts
their layouts to, of 8-bit numbers with a scale per block or matrix and of gpt-oss with those of transformers. GPTQ's
libraries do not install beside this torch (gptqmodel 7.7 needs another one and is built from source, auto-gptq 0.7 old
versions of others): tests/storage/test_packed.py compares it with its formula.
"""

import numpy as np
import pytest

from config.test_hub_configs import GPT_OSS
from moempi.arrays import narrow
from moempi.config.families import checkpoint_quantization
from moempi.storage.checkpoint import CheckpointTensor
from moempi.storage.dequantize import dequantized
from moempi.storage.number_tables import E2M1, E4M3, E8M0
from moempi.storage.tensor_table import TensorTable
from storage.packed import FORMATS, MODULE, Format, awq, bfloat16, compressed, packed_integers, plain_integers, source

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
library = pytest.importorskip("compressed_tensors")

SHAPE = (48, 256)
TORCH_TYPES = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu}


def test_all_numbers_of_8_and_4_bits():
    every = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(E4M3, every.view(torch.float8_e4m3fn).float().numpy())
    np.testing.assert_array_equal(E8M0, every.view(torch.float8_e8m0fnu).float().numpy())
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    theirs = unpack_fp4_from_uint8(every, 256, 2, dtype=torch.float32).numpy()
    np.testing.assert_array_equal(E2M1.view(np.uint32), theirs.view(np.uint32))


EXTREME_BITS = np.array([0x00, 0x80, 0x01, 0x81, 0x07, 0x08, 0x7E, 0xFE, 0x38], np.uint8)
EXTREME_SCALES = np.array(
    [0.0, -0.0, 1e-45, 1.1754942e-38, 2.0**-127, 1e-38, 1.0, -1.0, 3.3e38, 7.5e35, 2.0**119, 1 / 3], np.float32
)


def scales_of(kind, random, shape):
    """Bits of scales: random ones, after the extreme ones."""
    if kind in ("F8_E8M0", "U8"):
        return np.resize(np.arange(255, dtype=np.uint8), shape)
    numbers = (random.normal(size=shape) * np.exp(random.uniform(-80, 60, size=shape))).astype(np.float32)
    numbers.reshape(-1)[: EXTREME_SCALES.size] = EXTREME_SCALES[: numbers.size]
    if kind == "BF16":
        return narrow(numbers)
    with np.errstate(over="ignore"):
        return numbers.astype("<f2") if kind == "F16" else numbers


def tensor_of(kind, array):
    """The tensor of torch with these bits."""
    array = np.ascontiguousarray(array)
    if kind == "BF16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    found = torch.from_numpy(array)
    return found.view(TORCH_TYPES[kind]) if kind in TORCH_TYPES else found


def same_bits(ours, theirs):
    """Whether our rows, rounded to bfloat16, have the bits of a tensor, rounded to bfloat16; NaN are all alike."""
    expected = theirs.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16)
    found = bfloat16(ours)
    not_numbers = np.isnan(ours)
    np.testing.assert_array_equal(not_numbers, torch.isnan(theirs).numpy())
    np.testing.assert_array_equal(found[~not_numbers], expected[~not_numbers])


@pytest.mark.parametrize("kind", ["F32", "BF16", "F8_E8M0", "U8"])
@pytest.mark.parametrize(("block", "blocks"), [((128, 128), (3, 4)), ((4, 6), (20, 30)), ((1, 64), (300, 1))])
def test_8_bit_blocks_as_transformers_expands_them(tmp_path, kind, block, blocks):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    random = np.random.default_rng(5)
    shape = tuple(size * count for size, count in zip(block, blocks, strict=True))
    bits = random.integers(0, 256, shape, dtype=np.uint8)
    bits[bits & 127 == 127] = 0  # NaN, which conversion refuses
    bits[0, :9], bits[1] = EXTREME_BITS, np.resize(EXTREME_BITS, shape[1])
    scales = scales_of(kind, random, blocks)
    config = {"quant_method": "fp8", "weight_block_size": list(block)}
    parts = {"weight": ("F8_E4M3", bits), "weight_scale_inv": (kind, scales)}
    ours = source(tmp_path / "raw", config, parts).read(0, shape[0])
    dequantize = Fp8Dequantize(None)._dequantize_one
    same_bits(ours, dequantize(tensor_of("F8_E4M3", bits), tensor_of(kind, scales), torch.bfloat16))
    assert (bfloat16(ours) == 0x8000).any()


@pytest.mark.parametrize("scale", [*EXTREME_SCALES.tolist(), 0.01])
@pytest.mark.parametrize("name", ["fp8-static", "fp8-dynamic", "fp8-transformers", "fp8-modelopt"])
def test_8_bits_with_one_scale_as_transformers_expands_them(tmp_path, name, scale):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    form = FORMATS[name]
    parts, _ = form.write(np.random.default_rng(5), SHAPE)
    parts["weight"][1][0] = np.resize(EXTREME_BITS, SHAPE[1])
    (suffix,) = parts.keys() - {"weight", "input_scale"}
    parts[suffix] = ("F32", np.full_like(parts[suffix][1], scale))
    ours = source(tmp_path / "raw", form.config, parts).read(0, SHAPE[0])
    bits, scales = tensor_of(*parts["weight"]), tensor_of(*parts[suffix]).reshape(1, 1)
    same_bits(ours, Fp8Dequantize(None)._dequantize_one(bits, scales, torch.bfloat16))


def test_mxfp4_of_gpt_oss_as_transformers_expands_it(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = np.random.default_rng(3)
    blocks = random.integers(0, 256, (2, 6, 3, 16), dtype=np.uint8)
    scales = np.resize(np.arange(255, dtype=np.uint8), (2, 6, 3))
    path = tmp_path / "raw"
    path.write_bytes(blocks.tobytes() + scales.tobytes())
    tensors = {
        "experts_blocks": CheckpointTensor(path, "experts_blocks", "U8", blocks.shape, 0),
        "experts_scales": CheckpointTensor(path, "experts_scales", "U8", scales.shape, blocks.nbytes),
    }
    how = checkpoint_quantization(GPT_OSS, origin="test")
    ours = dequantized("experts", how, TensorTable(tmp_path, tensors)).read(0, 2)
    theirs = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32)
    np.testing.assert_array_equal(ours, theirs.transpose(1, 2).numpy())


WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
COMPRESSED = {
    "fp8-channel": (compressed("float-quantized", WEIGHTS | {"strategy": "channel"}), "F8_E4M3", (48, 1)),
    "fp8-tensor": (compressed("float-quantized", WEIGHTS | {"strategy": "tensor"}), "F8_E4M3", (1,)),
    "fp8-block": (
        compressed("float-quantized", WEIGHTS | {"strategy": "block", "block_structure": [16, 64]}),
        "F8_E4M3",
        (3, 4),
    ),
    "int8-channel": (plain_integers().config, "I8", (48, 1)),
}


def expanded(config, parts):
    """What compressed-tensors makes of the parts of a matrix."""
    return expanded_tensors(config, {name: tensor_of(kind, array) for name, (kind, array) in parts.items()})


def expanded_tensors(config, tensors):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    return compressor.decompress(tensors, scheme)["weight"]


@pytest.mark.parametrize("kind", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("name", COMPRESSED)
def test_unpacked_8_bits_as_compressed_tensors_expands_them(tmp_path, name, kind):
    config, code, blocks = COMPRESSED[name]
    random = np.random.default_rng(6)
    bits = random.integers(0, 256, SHAPE, dtype=np.uint8)
    bits[:2] = np.resize(EXTREME_BITS, (2, SHAPE[1]))
    parts = {
        "weight": (code, bits.view(np.int8) if code == "I8" else bits),
        "weight_scale": (kind, scales_of(kind, random, blocks)),
    }
    same_bits(source(tmp_path / "raw", config, parts).read(0, SHAPE[0]), expanded(config, parts))


def with_extremes(form: Format, kind: str, scales: str):
    """Random parts of a format, whose scales are extreme ones at first."""
    random = np.random.default_rng(7)
    parts, _ = form.write(random, SHAPE)
    return parts | {scales: (kind, scales_of(kind, random, parts[scales][1].shape))}


@pytest.mark.parametrize("kind", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("group", [32, 128, 0])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_integers_as_compressed_tensors_expands_them(tmp_path, bits, symmetric, group, kind):
    form = packed_integers(bits=bits, symmetric=symmetric, group=group, kind=kind)
    parts = with_extremes(form, kind, "weight_scale")
    same_bits(source(tmp_path / "raw", form.config, parts).read(0, SHAPE[0]), expanded(form.config, parts))


@pytest.mark.parametrize("whole", [1.0, 1 / 3, 1e-40, 3e38, 1e-3, -7.0])
def test_nvfp4_as_compressed_tensors_expands_it(tmp_path, whole):
    form = FORMATS["nvfp4"]
    parts, _ = form.write(np.random.default_rng(8), SHAPE)
    parts["weight_scale"][1].reshape(-1)[:9] = EXTREME_BITS
    parts["weight_global_scale"] = ("F32", np.array([whole], "<f4"))
    same_bits(source(tmp_path / "raw", form.config, parts).read(0, SHAPE[0]), expanded(form.config, parts))


@pytest.mark.parametrize("whole", [1.0, 2.0**-11, 2.0**7, -(2.0**-3)])
def test_nvfp4_of_modelopt_as_compressed_tensors_converts_it(tmp_path, whole):
    """The converter stores 1 / `whole`, so only powers of two give the same bits."""
    from compressed_tensors.entrypoints.convert import ModelOptNvfp4Converter

    form = FORMATS["nvfp4-modelopt"]
    parts, _ = form.write(np.random.default_rng(8), SHAPE)
    parts["weight_scale"][1].reshape(-1)[:9] = EXTREME_BITS
    parts["weight_scale_2"] = ("F32", np.array(whole, "<f4"))
    ours = source(tmp_path / "raw", form.config, parts).read(0, SHAPE[0])
    converter = ModelOptNvfp4Converter(targets=("re:.*",))
    theirs = converter.process({f"{MODULE}.{name}": tensor_of(*part) for name, part in parts.items()})
    tensors = {name.removeprefix(f"{MODULE}."): tensor for name, tensor in theirs.items()}
    tensors["weight_global_scale"] = tensors["weight_global_scale"].reshape(1)
    same_bits(ours, expanded_tensors(FORMATS["nvfp4"].config, tensors))


def test_mxfp4_as_compressed_tensors_expands_it(tmp_path):
    form = FORMATS["mxfp4"]
    parts, _ = form.write(np.random.default_rng(8), SHAPE)
    parts["weight_scale"] = ("U8", np.resize(np.arange(255, dtype=np.uint8), parts["weight_scale"][1].shape))
    same_bits(source(tmp_path / "raw", form.config, parts).read(0, SHAPE[0]), expanded(form.config, parts))


@pytest.mark.parametrize("kind", ["F16", "BF16"])
@pytest.mark.parametrize("group", [32, 128])
def test_awq_as_compressed_tensors_converts_it(tmp_path, group, kind):
    from compressed_tensors.entrypoints.convert import AutoAWQConverter

    form = awq(group=group, kind=kind)
    parts = with_extremes(form, kind, "scales")
    ours = source(tmp_path / "raw", form.config, parts).read(0, SHAPE[0])
    converter = AutoAWQConverter(group_size=group)
    theirs = converter.process({f"{MODULE}.{name}": tensor_of(*part) for name, part in parts.items()})
    config = packed_integers(symmetric=False, group=group).config
    tensors = {name.removeprefix(f"{MODULE}."): tensor for name, tensor in theirs.items()}
    same_bits(ours, expanded_tensors(config, tensors))
