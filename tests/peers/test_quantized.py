"""The number formats of quantized checkpoints against torch and transformers."""

import numpy as np
import pytest

from moempi.arrays import narrow
from moempi.storage.checkpoint import CheckpointTensor
from moempi.storage.tensor_sources import E4M3, Fp8Matrix, Mxfp4Experts

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


def test_all_256_numbers_of_float8():
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(E4M3, theirs)


EXTREME_BITS = np.array([0x00, 0x80, 0x01, 0x81, 0x07, 0x08, 0x7E, 0xFE, 0x38], np.uint8)
EXTREME_SCALES = np.array(
    [0.0, -0.0, 1e-45, 1.1754942e-38, 2.0**-127, 1e-38, 1.0, -1.0, 3.3e38, 7.5e35, 2.0**119, 1 / 3], np.float32
)


def scales_of(kind, random, shape):
    """Bits of scales, and the tensor of torch that has them: random ones, then the extreme ones."""
    if kind == "F8_E8M0":
        bits = np.resize(np.arange(255, dtype=np.uint8), shape)
        return bits, torch.from_numpy(bits).view(torch.float8_e8m0fnu)
    numbers = (random.normal(size=shape) * np.exp(random.uniform(-80, 60, size=shape))).astype(np.float32)
    numbers.reshape(-1)[: EXTREME_SCALES.size] = EXTREME_SCALES
    if kind == "F32":
        return numbers, torch.from_numpy(numbers)
    return narrow(numbers), torch.from_numpy(narrow(numbers).view(np.int16)).view(torch.bfloat16)


@pytest.mark.parametrize("kind", ["F32", "BF16", "F8_E8M0"])
@pytest.mark.parametrize(("block", "blocks"), [((128, 128), (3, 4)), ((4, 6), (20, 30)), ((1, 64), (300, 1))])
def test_8_bit_blocks_as_transformers_expands_them(tmp_path, kind, block, blocks):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    random = np.random.default_rng(5)
    shape = tuple(size * count for size, count in zip(block, blocks, strict=True))
    bits = random.integers(0, 256, shape, dtype=np.uint8)
    bits[bits & 127 == 127] = 0  # NaN, which conversion refuses
    bits[0, :9], bits[1] = EXTREME_BITS, np.resize(EXTREME_BITS, shape[1])
    stored, scales = scales_of(kind, random, blocks)
    path = tmp_path / "raw"
    path.write_bytes(bits.tobytes() + stored.tobytes())
    ours = Fp8Matrix(
        CheckpointTensor(path, "weight", "F8_E4M3", shape, 0),
        CheckpointTensor(path, "scales", kind, blocks, bits.nbytes),
        block,
    )
    weight = torch.from_numpy(bits).view(torch.float8_e4m3fn)
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scales, torch.bfloat16)
    expected = theirs.view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(narrow(ours.read(0, shape[0])), expected)
    assert (expected & 0x7FFF == 0).any()
    assert (expected == 0x8000).any()


def test_mxfp4_as_transformers_expands_it(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = np.random.default_rng(3)
    blocks = random.integers(0, 256, (2, 6, 3, 16), dtype=np.uint8)
    scales = random.integers(115, 130, (2, 6, 3), dtype=np.uint8)
    path = tmp_path / "raw"
    path.write_bytes(blocks.tobytes() + scales.tobytes())
    ours = Mxfp4Experts(
        CheckpointTensor(path, "blocks", "U8", blocks.shape, 0),
        CheckpointTensor(path, "scales", "U8", scales.shape, blocks.nbytes),
    )
    theirs = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32)
    np.testing.assert_array_equal(ours.read(0, 2), theirs.transpose(1, 2).numpy())
