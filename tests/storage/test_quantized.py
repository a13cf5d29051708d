"""Conversion of checkpoints with quantized weights, or with more tensors than the model."""

import numpy as np
import pytest

from moempi.arrays import narrow
from moempi.errors import DataError
from moempi.storage.checkpoint import CheckpointTensor
from moempi.storage.convert import convert
from moempi.storage.number_tables import E4M3
from moempi.storage.tensor_sources import FusedExpert, Scaled, Unpacked
from moempi.storage.weights import WeightFile
from storage.checkpoints import write_checkpoint, write_safetensors

DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "n_routed_experts": 2,
    "num_experts": None,
    "decoder_sparse_step": None,
    "mlp_only_layers": None,
    "use_sliding_window": None,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "n_shared_experts": 1,
    "hidden_size": 160,
    "intermediate_size": 136,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 4,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}
DOWN = "model.layers.0.mlp.down_proj.weight"


def deepseek_tensors():
    """A model with one quantized matrix, a float32 correction, and a layer for multi-token prediction."""
    random = np.random.default_rng(2)
    attention = {"q_proj": (12, 160), "kv_a_proj_with_mqa": (10, 160), "kv_b_proj": (16, 8), "o_proj": (160, 8)}
    shapes = {"model.embed_tokens": (70, 160), "lm_head": (70, 160), "model.norm": (160,)}
    for layer in range(3):
        path = f"model.layers.{layer}"
        shapes |= {f"{path}.{name}_layernorm": (160,) for name in ("input", "post_attention")}
        shapes |= {f"{path}.self_attn.{name}": shape for name, shape in attention.items()}
        shapes[f"{path}.self_attn.kv_a_layernorm"] = (8,)
        networks = {"shared_experts": 8, "experts.0": 8, "experts.1": 8} if layer else {"": 136}
        for network, hidden in networks.items():
            name = f"{path}.mlp.{network}".rstrip(".")
            shapes |= {f"{name}.gate_proj": (hidden, 160), f"{name}.up_proj": (hidden, 160)}
            shapes[f"{name}.down_proj"] = (160, hidden)
        if layer:
            shapes[f"{path}.mlp.gate"] = (2, 160)
    tensors = {f"{name}.weight": ("BF16", narrow(values(random, shape))) for name, shape in shapes.items()}
    for layer in (1, 2):
        tensors[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] = ("F32", values(random, (2,)))
    tensors["model.layers.2.eh_proj.weight"] = ("BF16", narrow(values(random, (160, 320))))
    bits = random.integers(0, 256, (160, 136)).astype(np.uint8)
    bits[bits & 127 == 127] = 0
    return tensors | {DOWN: ("F8_E4M3", bits), f"{DOWN}_scale_inv": ("F32", values(random, (2, 2)))}


def values(random, shape):
    return random.normal(size=shape).astype(np.float32)


def write_deepseek(folder, tensors, **changes):
    write_checkpoint(folder, tensors=tensors, **(DEEPSEEK_V3 | changes))


def float8(bits):
    """The value of a float8 e4m3fn number, by definition."""
    sign, exponent, fraction = -1 if bits & 128 else 1, bits >> 3 & 15, bits & 7
    return sign * (fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


def test_float8_numbers():
    assert np.isnan(E4M3[[127, 255]]).all()
    finite = [bits for bits in range(256) if bits & 127 != 127]
    np.testing.assert_array_equal(E4M3[finite], [float8(bits) for bits in finite])
    assert E4M3[126] == 448


def test_float8_blocks_are_expanded_and_later_layers_left_out(tmp_path):
    tensors = deepseek_tensors()
    write_deepseek(tmp_path / "hub", tensors)
    summary = convert(tmp_path / "hub", tmp_path / "model.h5")
    assert (summary.architecture.num_layers, summary.num_rounded) == (2, 1)
    bits, scales = tensors[DOWN][1], tensors[f"{DOWN}_scale_inv"][1]
    expected = [
        [np.float32(float8(int(bits[row, column]))) * scales[row // 128, column // 128] for column in range(136)]
        for row in range(160)
    ]
    with WeightFile.open(tmp_path / "model.h5") as weights:
        np.testing.assert_array_equal(weights.read("layers/000/dense/down"), narrow(np.array(expected, "<f4")).T)
        correction = tensors["model.layers.1.mlp.gate.e_score_correction_bias"][1]
        np.testing.assert_array_equal(weights.read("layers/001/router_correction"), correction)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        (
            f"{DOWN}_scale_inv",
            ("F32", np.ones((2, 1), "<f4")),
            "down_proj.weight: its scales are not one a block of 128 x",
        ),
        (f"{DOWN}_scale_inv", ("F8_E4M3", np.ones((2, 2), "u1")), "down_proj.weight: its scales are not one a block"),
        (f"{DOWN}_scale_inv", None, "down_proj.weight_scale_inv: is missing"),
        (f"{DOWN}_scale_inv", ("F32", np.full((2, 2), np.inf, "<f4")), "down_proj.weight: holds NaN, infinity"),
        (DOWN, ("F8_E4M3", np.full((160, 136), 127, "u1")), "down_proj.weight: holds NaN"),
        (DOWN, ("U8", np.zeros((160, 136), "u1")), "down_proj.weight: is U8, quantization_config says F8_E4M3"),
        (DOWN, ("I64", np.zeros((160, 136), "<i8")), "down_proj.weight: its type is I64"),
        ("model.layers.1.extra", ("BF16", np.zeros(3, "<u2")), "model.layers.1.extra: is not a tensor of this"),
        ("model.mtp.weight", ("BF16", np.zeros(3, "<u2")), "model.mtp.weight: is not a tensor of this"),
    ],
)
def test_broken_quantized_checkpoints_are_refused_by_name(tmp_path, name, wrong, message):
    tensors = deepseek_tensors()
    tensors.pop(name, None)
    write_deepseek(tmp_path / "hub", tensors | ({name: wrong} if wrong else {}))
    with pytest.raises(DataError, match=message.replace(".", r"\.")):
        convert(tmp_path / "hub", tmp_path / "model.h5")
    assert not (tmp_path / "model.h5").exists()


@pytest.mark.parametrize(
    "quantization", [{"quant_method": "hqq"}, {"quant_method": "awq"}, {"quant_method": "fp8", "fmt": "e5m2"}]
)
def test_other_quantizations_are_refused(tmp_path, quantization):
    write_deepseek(tmp_path / "hub", deepseek_tensors(), quantization_config=quantization)
    with pytest.raises(DataError, match=r"quantization_config: (quant_method is|fmt =|bits =) .* (supported|bfloat16)"):
        convert(tmp_path / "hub", tmp_path / "model.h5")


def stored(path, **arrays):
    """Tensors of a file that holds these arrays contiguously."""
    path.write_bytes(b"".join(array.tobytes() for array in arrays.values()))
    kinds, tensors, offset = {"u1": "U8", "f4": "F32"}, {}, 0
    for name, array in arrays.items():
        kind = kinds[array.dtype.str[1:]]
        tensors[name] = CheckpointTensor(path, name, kind, array.shape, offset)
        offset += array.nbytes
    return tensors


def test_an_expert_of_a_fused_tensor_is_transposed(tmp_path):
    array = np.arange(2 * 3 * 8, dtype="<f4").reshape(2, 3, 8)
    whole = stored(tmp_path / "raw", whole=array)["whole"]
    expert = FusedExpert(whole, expert=1, outputs=slice(1, None, 2), transposed=True)
    assert expert.shape == (4, 3)
    np.testing.assert_array_equal(expert.read(0, 4), array[1, :, 1::2].T)


def test_float8_rows_may_start_inside_a_block(tmp_path):
    bits = np.random.default_rng(6).integers(0, 127, (300, 5)).astype(np.uint8)
    tensors = stored(tmp_path / "raw", bits=bits, scales=np.float32([[1], [2], [4]]))
    matrix = Scaled(Unpacked(tensors["bits"], E4M3), tensors["scales"], (128, 128))
    whole = matrix.read(0, 300)
    for start, stop in [(0, 1), (127, 129), (130, 300)]:
        np.testing.assert_array_equal(matrix.read(start, stop), whole[start:stop])


def test_quantized_types_need_their_scales(tmp_path):
    write_checkpoint(tmp_path / "hub")
    write_safetensors(tmp_path / "hub/model.safetensors", {"model.norm.weight": ("U8", np.zeros(16, "u1"))})
    with pytest.raises(DataError):
        convert(tmp_path / "hub", tmp_path / "model.h5")
