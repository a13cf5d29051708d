import json
import tracemalloc

import numpy as np
import pytest

from moempi.config.architecture import Architecture, AttentionShape, Experts, Rope, Router
from moempi.errors import DataError, NoInputError, StorageError
from moempi.storage.convert import convert
from moempi.storage.weights import WeightFile
from storage.checkpoints import (
    QWEN3_MOE,
    TOKENIZER,
    origin_bits,
    origin_tensors,
    tensor_shapes,
    write_checkpoint,
    write_raw_safetensors,
    write_safetensors,
)


def expected_tensors(config):
    """The expected tensors of a qwen3_moe configuration, from the checkpoint's names."""

    def bits(name):
        return origin_bits(f"{name}.weight", tensor_shapes(config)[f"{name}.weight"])

    tensors = {"embedding": bits("model.embed_tokens"), "norm": bits("model.norm")}
    if not config["tie_word_embeddings"]:
        tensors["head"] = bits("lm_head")
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"layers/{layer:03d}", f"model.layers.{layer}"
        tensors[f"{ours}/attention_norm"] = bits(f"{theirs}.input_layernorm")
        tensors[f"{ours}/feed_forward_norm"] = bits(f"{theirs}.post_attention_layernorm")
        for name in "qkv":
            tensors[f"{ours}/attention/{name}"] = bits(f"{theirs}.self_attn.{name}_proj")
        for name in "qk":
            tensors[f"{ours}/attention/{name}_norm"] = bits(f"{theirs}.self_attn.{name}_norm")
        tensors[f"{ours}/attention/o"] = bits(f"{theirs}.self_attn.o_proj").T
        if layer in config["mlp_only_layers"]:
            tensors[f"{ours}/dense/gate"] = bits(f"{theirs}.mlp.gate_proj")
            tensors[f"{ours}/dense/up"] = bits(f"{theirs}.mlp.up_proj")
            tensors[f"{ours}/dense/down"] = bits(f"{theirs}.mlp.down_proj").T
            continue
        tensors[f"{ours}/router"] = bits(f"{theirs}.mlp.gate")
        for name in ("gate", "up", "down"):
            experts = range(config["num_experts"])
            tensors[f"{ours}/experts/{name}"] = np.stack(
                [bits(f"{theirs}.mlp.experts.{expert}.{name}_proj") for expert in experts]
            )
    return tensors


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_is_bit_exact(tmp_path, shards, tied):
    config = write_checkpoint(tmp_path / "hub", shards=shards, tie_word_embeddings=tied)
    summary = convert(tmp_path / "hub", tmp_path / "model.h5")
    expected = expected_tensors(config)
    assert (summary.num_tensors, summary.num_rounded, summary.has_tokenizer) == (len(expected), 0, True)
    assert summary.num_bytes == sum(array.nbytes for array in expected.values())
    with WeightFile.open(tmp_path / "model.h5") as weights:
        assert weights.fingerprint == summary.fingerprint
        assert json.loads(weights.tokenizer) == TOKENIZER
        for name, array in expected.items():
            np.testing.assert_array_equal(weights.read(name), array, err_msg=name)


def test_architecture_as_configured(tmp_path):
    write_checkpoint(tmp_path / "hub")
    assert convert(tmp_path / "hub", tmp_path / "model.h5").architecture == Architecture(
        family="qwen3_moe",
        vocab_size=70,
        width=16,
        num_layers=3,
        max_positions=64,
        attention=AttentionShape(num_heads=4, num_kv_heads=2, head_dim=6, qk_norm="head", rope=Rope(theta=1e6)),
        experts=Experts(num=5, width=10, router=Router(top_k=2, renormalize=True)),
        dense_layers=(0,),
        dense_width=20,
        norm_eps=1e-6,
        tied_embeddings=False,
        bos_token=1,
        eos_tokens=(2,),
    )


def test_one_file_or_several_shards_give_the_same_bytes(tmp_path):
    write_checkpoint(tmp_path / "one")
    write_checkpoint(tmp_path / "four", shards=4)
    convert(tmp_path / "one", tmp_path / "one.h5")
    convert(tmp_path / "four", tmp_path / "four.h5")
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "four.h5").read_bytes()


@pytest.mark.parametrize(("dtype", "kind"), [("F32", "<f4"), ("F16", "<f2")])
def test_other_types_are_rounded_to_nearest_even(tmp_path, dtype, kind):
    shapes = tensor_shapes(QWEN3_MOE)
    random = np.random.default_rng(5)
    values = {name: random.standard_normal(shape).astype(kind) for name, shape in shapes.items()}
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x80000000, 0xBF818000], np.uint32)
    values["model.norm.weight"].reshape(-1)[: len(ties)] = ties.view(np.float32)
    write_checkpoint(tmp_path / "hub", tensors={name: (dtype, array) for name, array in values.items()})
    assert convert(tmp_path / "hub", tmp_path / "model.h5").num_rounded == len(shapes)
    with WeightFile.open(tmp_path / "model.h5") as weights:
        norm, gate = weights.read("norm"), weights.read("layers/001/experts/gate", 3, 4)[0]
    if dtype == "F32":
        assert norm[: len(ties)].tolist() == [0x3F80, 0x3F82, 0x3F81, 0x3F80, 0x8000, 0xBF82]
    exact = values["model.layers.1.mlp.experts.3.gate_proj.weight"].astype(np.float64)
    stored = (gate.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    for step in (-1, 1):
        other = ((gate.astype(np.int64) + step).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        assert (np.abs(stored - exact) <= np.abs(other - exact)).all()


def test_tokenizer_may_be_absent_but_not_broken(tmp_path):
    write_checkpoint(tmp_path / "hub")
    (tmp_path / "hub/tokenizer.json").write_text('{"model": {"type": "Nonsense"}}')
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer"):
        convert(tmp_path / "hub", tmp_path / "model.h5")
    (tmp_path / "hub/tokenizer.json").unlink()
    assert not convert(tmp_path / "hub", tmp_path / "model.h5").has_tokenizer
    with WeightFile.open(tmp_path / "model.h5") as weights:
        assert weights.tokenizer == ""


@pytest.mark.parametrize("name", ["tekken.json", "spiece.model", "vocab.json", "vocab.txt"])
def test_a_tokenizer_in_another_file_is_refused_with_what_to_do_unless_the_tokenizer_is_there(tmp_path, name):
    write_checkpoint(tmp_path / "hub")
    (tmp_path / "hub" / name).write_bytes(b"\0")
    assert convert(tmp_path / "hub", tmp_path / "model.h5").has_tokenizer
    (tmp_path / "hub/tokenizer.json").unlink()
    with pytest.raises(
        DataError, match=f"hub/{name}: only tokenizer.json, .* are read; let transformers write it: .* or move"
    ):
        convert(tmp_path / "hub", tmp_path / "other.h5")
    assert not (tmp_path / "other.h5").exists()


def test_missing_tensor_is_named(tmp_path):
    tensors = origin_tensors(QWEN3_MOE)
    del tensors["model.layers.2.mlp.experts.4.down_proj.weight"]
    write_checkpoint(tmp_path / "hub", tensors=tensors)
    with pytest.raises(DataError, match=r"hub: model\.layers\.2\.mlp\.experts\.4\.down_proj\.weight: is missing"):
        convert(tmp_path / "hub", tmp_path / "model.h5")


def test_extra_tensor_is_named(tmp_path):
    name = "model.layers.0.self_attn.q_proj.bias"
    write_checkpoint(tmp_path / "hub", tensors=origin_tensors(QWEN3_MOE) | {name: ("BF16", origin_bits(name, (24,)))})
    with pytest.raises(DataError, match=r"model\.safetensors: model\.layers\.0\.self_attn\.q_proj\.bias: is not a"):
        convert(tmp_path / "hub", tmp_path / "model.h5")


def test_wrong_shape_is_named(tmp_path):
    name = "model.layers.1.self_attn.o_proj.weight"
    write_checkpoint(
        tmp_path / "hub", tensors=origin_tensors(QWEN3_MOE) | {name: ("BF16", origin_bits(name, (24, 16)))}
    )
    with pytest.raises(DataError, match=r"o_proj\.weight: its shape is \(24, 16\), the configuration says \(16, 24\)"):
        convert(tmp_path / "hub", tmp_path / "model.h5")


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.experts.2.up_proj.weight"])
def test_nan_and_infinity_are_refused_and_the_target_is_unchanged(tmp_path, name, bits):
    tensors = origin_tensors(QWEN3_MOE)
    tensors[name][1].reshape(-1)[-1] = bits
    write_checkpoint(tmp_path / "hub", tensors=tensors)
    (tmp_path / "model.h5").write_bytes(b"what was there before")
    with pytest.raises(DataError, match=f"{name}: holds NaN"):
        convert(tmp_path / "hub", tmp_path / "model.h5")
    assert (tmp_path / "model.h5").read_bytes() == b"what was there before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "model.h5"]


def test_float32_beyond_bfloat16_is_refused(tmp_path):
    tensors = origin_tensors(QWEN3_MOE)
    tensors["model.norm.weight"] = ("F32", np.full(16, np.finfo(np.float32).max, "<f4"))
    write_checkpoint(tmp_path / "hub", tensors=tensors)
    with pytest.raises(DataError, match=r"model\.norm\.weight: .* beyond bfloat16"):
        convert(tmp_path / "hub", tmp_path / "model.h5")


def test_unknown_type_is_named(tmp_path):
    tensors = origin_tensors(QWEN3_MOE) | {"model.norm.weight": ("BOOL", np.ones(16, bool))}
    write_checkpoint(tmp_path / "hub", tensors=tensors)
    with pytest.raises(DataError, match=r"model\.norm\.weight: type BOOL is not supported"):
        convert(tmp_path / "hub", tmp_path / "model.h5")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file_is_refused(tmp_path, keep):
    write_checkpoint(tmp_path / "hub")
    path = tmp_path / "hub/model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"model\.safetensors: truncated"):
        convert(tmp_path / "hub", tmp_path / "model.h5")


def test_overlapping_tensors_are_refused(tmp_path):
    write_checkpoint(tmp_path / "hub")
    entry = {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}
    write_raw_safetensors(tmp_path / "hub/model.safetensors", {"a": entry, "b": entry}, bytes(8))
    with pytest.raises(DataError, match=r"model\.safetensors"):
        convert(tmp_path / "hub", tmp_path / "model.h5")


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "model.bin", "a\0.safetensors"]
)
def test_index_cannot_leave_the_folder(tmp_path, file):
    write_checkpoint(tmp_path / "hub", shards=2)
    write_safetensors(tmp_path / "outside.safetensors", origin_tensors(QWEN3_MOE))
    index = tmp_path / "hub/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensor_shapes(QWEN3_MOE), file)}))
    with pytest.raises(DataError, match="is not the name of a safetensors file in this folder"):
        convert(tmp_path / "hub", tmp_path / "model.h5")


def test_index_and_shards_must_agree(tmp_path):
    write_checkpoint(tmp_path / "hub", shards=2)
    index = tmp_path / "hub/model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": listed | {"ghost.weight": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(DataError, match=r"model-00001-of-00002\.safetensors: ghost\.weight: is missing"):
        convert(tmp_path / "hub", tmp_path / "model.h5")
    listed.pop("model.norm.weight")
    index.write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(DataError, match=r"model\.norm\.weight: .* does not say that it is here"):
        convert(tmp_path / "hub", tmp_path / "model.h5")


def test_missing_files_are_input_errors(tmp_path):
    with pytest.raises(NoInputError, match="is not a folder"):
        convert(tmp_path / "nowhere", tmp_path / "model.h5")
    write_checkpoint(tmp_path / "hub", shards=2)
    (tmp_path / "hub/model-00002-of-00002.safetensors").unlink()
    with pytest.raises(NoInputError, match=r"model-00002-of-00002\.safetensors: cannot be read"):
        convert(tmp_path / "hub", tmp_path / "model.h5")
    (tmp_path / "hub/model.safetensors.index.json").unlink()
    with pytest.raises(NoInputError, match="has neither"):
        convert(tmp_path / "hub", tmp_path / "model.h5")


def test_pickles_are_refused(tmp_path):
    write_checkpoint(tmp_path / "hub")
    (tmp_path / "hub/model.safetensors").rename(tmp_path / "hub/pytorch_model.bin")
    with pytest.raises(DataError, match="pickled"):
        convert(tmp_path / "hub", tmp_path / "model.h5")


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path):
    write_checkpoint(tmp_path / "hub")
    with pytest.raises(StorageError, match="cannot be written"):
        convert(tmp_path / "hub", tmp_path / "nowhere/model.h5")


@pytest.mark.parametrize("layers", [10**9, 999])
def test_more_layers_than_tensors_is_refused_at_once(tmp_path, layers):
    config = write_checkpoint(tmp_path / "hub")
    (tmp_path / "hub/config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    with pytest.raises(DataError, match=r"config\.json: (num_hidden_layers is|asks for more layers)"):
        convert(tmp_path / "hub", tmp_path / "model.h5")


def test_progress_ends_at_the_total(tmp_path):
    write_checkpoint(tmp_path / "hub")
    calls = []
    summary = convert(tmp_path / "hub", tmp_path / "model.h5", progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1] == (summary.num_bytes, summary.num_bytes)


def test_memory_stays_below_twice_the_largest_tensor(tmp_path):
    config = QWEN3_MOE | {"hidden_size": 1024, "moe_intermediate_size": 512, "vocab_size": 32768, "num_experts": 8}
    write_checkpoint(tmp_path / "hub", **config)
    largest = 2 * config["vocab_size"] * config["hidden_size"]
    tracemalloc.start()
    convert(tmp_path / "hub", tmp_path / "model.h5")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * largest
