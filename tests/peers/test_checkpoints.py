"""Checkpoints that transformers saves or expands: the same weight file as from the hub's layout."""

import json
import logging
from pathlib import Path

import pytest

from moempi.storage.convert import convert

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tensor_files = pytest.importorskip("safetensors.torch")
families = pytest.importorskip("peers.families")

FIRST_CASES = {
    model_type: case
    for case, (model_type, _) in reversed(families.CASES.items())
    if model_type not in ("gpt_oss", *families.WRAPPERS)
}
PROJECTIONS = ("_proj.weight", "w1.weight", "w2.weight", "w3.weight", "indexer.wq_b.weight", "indexer.wk.weight")
NOT_QUANTIZED = "indexer.weights_proj.weight"
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)


def converted(folder: Path) -> bytes:
    """The weight file of a checkpoint."""
    convert(folder, folder / "model.h5")
    return (folder / "model.h5").read_bytes()


@pytest.mark.parametrize("case", FIRST_CASES.values())
def test_experts_that_transformers_fused(case: str, tmp_path: Path) -> None:
    families.write_checkpoint(tmp_path / "hub", case)
    model = families.load(tmp_path / "hub", torch.float32)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    names = tensor_files.load_file(tmp_path / "fused/model.safetensors")
    assert any(name.endswith(("mlp.experts.gate_up_proj", "mixer.experts.up_proj")) for name in names)
    assert converted(tmp_path / "fused") == converted(tmp_path / "hub")


@pytest.mark.parametrize("case", FIRST_CASES.values())
def test_8_bit_blocks_that_transformers_expanded(case: str, tmp_path: Path) -> None:
    families.write_checkpoint(tmp_path / "eight", case)
    tensors = {}
    for name, tensor in tensor_files.load_file(tmp_path / "eight/model.safetensors").items():
        if name.endswith(PROJECTIONS) and not name.endswith(NOT_QUANTIZED):
            scale = tensor.abs().max() / 448
            if case.startswith("deepseek_v32"):  # "scale_fmt": "ue8m0"
                scale = torch.exp2(torch.ceil(torch.log2(scale)))
            tensors[name] = (tensor / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale.repeat(*(-(-size // 128) for size in tensor.shape))
        else:
            tensors[name] = tensor.bfloat16()
    tensor_files.save_file(tensors, tmp_path / "eight/model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "eight/config.json").read_text()) | {"quantization_config": BLOCKS}
    (tmp_path / "eight/config.json").write_text(json.dumps(config))
    expansion = transformers.FineGrainedFP8Config(dequantize=True)
    model = families.load(tmp_path / "eight", torch.bfloat16, quantization_config=expansion)
    model.save_pretrained(tmp_path / "sixteen")
    config.pop("quantization_config")
    (tmp_path / "sixteen/config.json").write_text(json.dumps(config))
    assert converted(tmp_path / "eight") == converted(tmp_path / "sixteen")
