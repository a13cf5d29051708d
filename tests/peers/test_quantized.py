"""The number formats of quantized checkpoints against torch and transformers."""

import numpy as np
import pytest

from moempi.storage.checkpoint import CheckpointTensor
from moempi.storage.tensor_sources import E4M3, Mxfp4Experts

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


def test_all_256_numbers_of_float8():
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(E4M3, theirs)


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
