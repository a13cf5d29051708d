"""Checkpoints as the hub has them: tensors that are computed, tied, fused or wrapped, and downloads that failed."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from config import hub_models
from config.test_hub_configs import DEEPSEEK_V3, HUB, MIXTRAL, PHI, SARVAM
from fuzz.checkpoints import small, tensors_of
from moempi.arrays import widen
from moempi.cli import main
from moempi.config.families import read_architecture
from moempi.errors import DataError, NoInputError
from moempi.storage.convert import convert
from moempi.storage.weights import WeightFile
from storage.checkpoints import QWEN3_MOE, write_checkpoint, write_safetensors

FIXTURES = Path(__file__).parents[1] / "fixtures"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INDEX = "model.safetensors.index.json"
DEEPSEEK = DEEPSEEK_V3 | {"quantization_config": None}
# One configuration of every family whose experts are separate on the hub.
SEPARATE = {
    values["model_type"]: values | {"quantization_config": None}
    for values in (*HUB, QWEN3_MOE)
    if values["model_type"] != "gpt_oss"
}.values()
# Names in the modules of transformers, where they differ from the hub.
SAVED_NAMES = {
    "mixtral": {"block_sparse_moe.gate": "mlp.gate"},
    "phimoe": {"block_sparse_moe.gate": "mlp.router"},
    "ernie4_5_moe": {"mlp.moe_statics": "mlp.gate.moe_statics"},
    "minimax_m2": {"block_sparse_moe": "mlp"},
    "hy_v3": {
        "router.gate": "gate",
        "mlp.expert_bias": "mlp.e_score_correction_bias",
        "shared_mlp": "shared_experts",
    },
    "sarvam_moe": {
        "word_embeddings": "embed_tokens",
        ".attention.dense": ".self_attn.o_proj",
        ".attention.query_layernorm": ".self_attn.q_norm",
        ".attention.key_layernorm": ".self_attn.k_norm",
        ".attention.": ".self_attn.",
        "mlp.gate.expert_bias": "mlp.gate.e_score_correction_bias",
    },
}
JOINED = ".attention.query_key_value."
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
REFUSAL = b"Access to model one/two is restricted. You must have access to it and be authenticated to access it."


def bfloat16_tensors(values):
    """Names, types and arrays of a checkpoint of this configuration."""
    tensors = tensors_of(read_architecture(values, {}, origin="test"), values["model_type"])
    return {name: (kind, np.frombuffer(bits, "<u2").reshape(shape)) for name, (kind, shape, bits) in tensors.items()}


def converted(folder, values, tensors):
    """The bytes of the weight file of a checkpoint without a tokenizer."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    write_safetensors(folder / "model.safetensors", tensors)
    convert(folder, folder / "model.h5")
    return (folder / "model.h5").read_bytes()


def fused(tensors):
    """The tensors with all experts of a layer in one: (experts, gate then up, inputs)."""
    result, experts = {}, {}
    for name, (kind, array) in tensors.items():
        before, is_expert, after = name.partition(".experts.")
        if is_expert:
            number, matrix, _ = after.split(".")
            experts.setdefault(before, {})[int(number), matrix] = array
        else:
            result[name] = (kind, array)
    for before, matrices in experts.items():
        gate, up, down = (
            np.stack(
                [array for (_, matrix), array in sorted(matrices.items(), key=lambda one: one[0]) if matrix in names]
            )
            for names in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
        )
        path = f"{before.replace('block_sparse_moe', 'mlp')}.experts"
        result[f"{path}.gate_up_proj"] = ("BF16", np.concatenate([gate, up], axis=1))
        result[f"{path}.down_proj"] = ("BF16", down)
    return result


def divided(tensors, values):
    """The tensors with the joined rows of queries, keys and values as tensors of their own."""
    result = dict(tensors)
    for name in [name for name in tensors if JOINED in name]:
        kind, joined = result.pop(name)
        query_heads, heads, dim = (values[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        parts = np.split(joined, [query_heads * dim, (query_heads + heads) * dim])
        for one, rows in zip("qkv", parts, strict=True):
            result[name.replace("query_key_value", f"{one}_proj")] = (kind, rows)
    return result


@pytest.mark.parametrize("values", [QWEN3_MOE, MIXTRAL, DEEPSEEK, DEEPSEEK | {"model_type": "kimi_k2"}, PHI])
def test_rotary_frequencies_are_left_out_in_every_family(tmp_path, values):
    values = small(values)
    tensors = bfloat16_tensors(values)
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": ("F64", np.ones(4))}
    assert converted(tmp_path / "more", values, tensors | more) == converted(tmp_path / "less", values, tensors)


@pytest.mark.parametrize("values", SEPARATE, ids=lambda values: values["model_type"])
def test_fused_experts_give_the_same_bytes_as_separate_ones(tmp_path, values):
    values = small(values)
    tensors = bfloat16_tensors(values)
    together = fused(divided(tensors, values))
    for hub, saved in SAVED_NAMES.get(values["model_type"], {}).items():
        together = {name.replace(hub, saved): one for name, one in together.items()}
    assert len(together) < len(tensors)
    assert converted(tmp_path / "fused", values, together) == converted(tmp_path / "hub", values, tensors)


def test_joined_queries_keys_and_values_may_have_biases(tmp_path):
    values = small(SARVAM) | {"use_qkv_bias": True}
    tensors = bfloat16_tensors(values)
    assert sum(JOINED in name for name in tensors) == 2 * values["num_hidden_layers"]
    apart = {name.replace(".attention.", ".self_attn."): one for name, one in divided(tensors, values).items()}
    for hub, saved in SAVED_NAMES["sarvam_moe"].items():
        apart = {name.replace(hub.replace(".attention.", ".self_attn."), saved): one for name, one in apart.items()}
    assert converted(tmp_path / "apart", values, apart) == converted(tmp_path / "hub", values, tensors)


def test_joined_rows_of_another_number_are_refused_by_name(tmp_path):
    values = small(SARVAM)
    tensors = bfloat16_tensors(values)
    name = "model.layers.1.attention.query_key_value.weight"
    with pytest.raises(DataError, match=rf"{name}: its shape is \(63, 16\), the configuration says groups of 64 rows"):
        converted(tmp_path / "hub", values, tensors | {name: ("BF16", tensors[name][1][:63])})


def test_the_fused_experts_of_qwen3_vl_may_have_their_outputs_first_if_their_shapes_tell(tmp_path):
    values = small(QWEN3_MOE) | {"hidden_size": 24}
    tensors = bfloat16_tensors(values)
    together = fused(tensors)
    found = converted(tmp_path / "fused", values | {"model_type": "qwen3_vl_moe_text"}, together)
    assert found == converted(tmp_path / "hub", values, tensors)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    other = together | {name: ("BF16", together[name][1][:, :, :23])}
    with pytest.raises(DataError, match=rf"{name}: its 23 outputs are not 2 equal parts"):
        converted(tmp_path / "other", values | {"model_type": "qwen3_vl_moe_text"}, other)


def test_the_fused_experts_of_qwen3_vl_have_their_inputs_first(tmp_path):
    values = small(QWEN3_MOE)
    tensors = bfloat16_tensors(values)
    wrapped = {
        name if name == HEAD else name.replace("model.", "model.language_model.", 1): (
            (kind, array.swapaxes(1, 2).copy()) if array.ndim == 3 else (kind, array)
        )
        for name, (kind, array) in fused(tensors).items()
    }
    mrope = {"rope_type": "default", "mrope_section": [1, 1, 1], "mrope_interleaved": True}
    inner = values | {"model_type": "qwen3_vl_moe_text", "rope_scaling": mrope, "tie_word_embeddings": True}
    outer = {"model_type": "qwen3_vl_moe", "text_config": inner, "tie_word_embeddings": False}
    vision = {"model.visual.patch_embed.proj.bias": ("BF16", np.zeros(4, "<u2"))}
    plain = converted(tmp_path / "plain", values, tensors)
    assert converted(tmp_path / "wrapped", outer, wrapped | vision) == plain


def test_fused_experts_of_another_number_or_an_odd_width_are_refused_by_name(tmp_path):
    values = small(MIXTRAL)
    together = {
        name.replace("block_sparse_moe.gate", "mlp.gate"): one for name, one in fused(bfloat16_tensors(values)).items()
    }
    name = "model.layers.1.mlp.experts.gate_up_proj"
    whole = together[name][1]
    with pytest.raises(DataError, match=rf"{name}: its shape is .*, not of 4 experts"):
        converted(tmp_path / "fewer", values, together | {name: ("BF16", whole[:3])})
    with pytest.raises(DataError, match=rf"{name}: its 15 outputs are not 2 equal parts"):
        converted(tmp_path / "odd", values, together | {name: ("BF16", whole[:, :15])})


@pytest.mark.parametrize("kind", ["BF16", "F32"])
def test_a_head_beside_tied_embeddings_is_left_out_if_it_is_equal(tmp_path, kind):
    values = small(QWEN3_MOE) | {"tie_word_embeddings": True}
    tensors = bfloat16_tensors(values)
    bits = tensors[EMBEDDING][1]
    head = bits if kind == "BF16" else (bits.astype("<u4") << 16).view("<f4")
    with_head = tensors | {HEAD: (kind, head)}
    assert converted(tmp_path / "more", values, with_head) == converted(tmp_path / "less", values, tensors)


def test_another_head_beside_tied_embeddings_is_refused_by_name(tmp_path):
    values = small(QWEN3_MOE) | {"tie_word_embeddings": True}
    tensors = bfloat16_tensors(values)
    other = tensors[EMBEDDING][1].copy()
    other[-1, -1] ^= 1
    with pytest.raises(DataError, match=r"lm_head\.weight: differs from model\.embed_tokens\.weight, though tie_word_"):
        converted(tmp_path / "hub", values, tensors | {HEAD: ("BF16", other)})


@pytest.mark.parametrize("prefix", ["language_model.", "language_model.model.", "model.language_model."])
def test_the_language_model_of_a_wrapper_is_converted_and_its_other_parts_are_counted(tmp_path, capsys, prefix):
    inner = small(DEEPSEEK)
    tensors = bfloat16_tensors(inner)
    outer = {"model_type": "kimi_k25", "text_config": inner | {"eos_token_id": None}, "eos_token_id": [1, 2]}
    head_prefix = "language_model." if prefix.startswith("language_model.") else ""
    wrapped = {
        f"{head_prefix}{name}" if name == HEAD else prefix + name.removeprefix("model."): one
        for name, one in tensors.items()
    }
    vision = {
        "vision_tower.patch_embed.pos": ("I64", np.arange(4)),
        "mm_projector.0.weight": ("F16", np.ones(3, "<f2")),
    }
    plain = converted(tmp_path / "plain", inner, tensors)
    assert converted(tmp_path / "wrapped", outer, wrapped | vision) == plain
    assert main(["convert", str(tmp_path / "wrapped"), str(tmp_path / "model.h5")]) == 0
    assert "wrapped: left out 2 tensors of its parts for images or sound" in capsys.readouterr().out


def test_a_wrapper_around_an_unknown_language_model_is_refused_with_the_place(tmp_path):
    write_checkpoint(tmp_path / "hub", text_config={"model_type": "llama"})
    with pytest.raises(DataError, match=r"config\.json: text_config: model_type 'llama' is not supported, only"):
        convert(tmp_path / "hub", tmp_path / "model.h5")


def test_a_tensor_with_and_without_the_prefix_of_a_wrapper_is_refused(tmp_path):
    values = small(QWEN3_MOE)
    tensors = bfloat16_tensors(values)
    with pytest.raises(DataError, match=r"model\.language_model\.norm\.weight: is there twice"):
        converted(
            tmp_path / "hub", values, tensors | {"model.language_model.norm.weight": tensors["model.norm.weight"]}
        )


def test_a_single_file_beside_an_index_of_other_files_is_refused(tmp_path):
    write_checkpoint(tmp_path / "hub", shards=2)
    write_checkpoint(tmp_path / "hub")
    with pytest.raises(DataError, match=rf"model\.safetensors: is beside {INDEX}, which names other files"):
        convert(tmp_path / "hub", tmp_path / "model.h5")
    names = json.loads((tmp_path / "hub" / INDEX).read_text())["weight_map"]
    (tmp_path / "hub" / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    convert(tmp_path / "hub", tmp_path / "model.h5")


@pytest.mark.parametrize(
    "file",
    ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors", INDEX],
)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "is a Git LFS pointer, not the file; fetch it in its folder: git lfs pull"),
        (PAGE, "is a web page or a refusal of the hub, not the file"),
        (b"\n" + PAGE.lower(), "is a web page"),
        (REFUSAL, "is a web page or a refusal of the hub, not the file"),
    ],
)
def test_what_a_download_leaves_in_the_place_of_a_file_is_named(tmp_path, file, content, message):
    write_checkpoint(tmp_path / "hub")
    (tmp_path / "hub" / file).write_bytes(content)
    with pytest.raises(DataError, match=rf"/{file}: {message}"):
        convert(tmp_path / "hub", tmp_path / "model.h5")


def test_a_shard_shorter_than_its_header_says_is_named_with_its_sizes(tmp_path):
    write_checkpoint(tmp_path / "hub")
    path = tmp_path / "hub/model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1000])
    sizes = f"{len(content) - 1000:,} of {len(content):,} bytes"
    with pytest.raises(DataError, match=rf"model\.safetensors: truncated: it has {sizes}; download it again"):
        convert(tmp_path / "hub", tmp_path / "model.h5")


@pytest.mark.parametrize(
    "unfinished", [".cache/huggingface/download/a.incomplete", "b.incomplete", "../../blobs/c.incomplete"]
)
@pytest.mark.parametrize("shards", [1, 2])
def test_a_file_that_a_download_has_not_finished_is_named(tmp_path, unfinished, shards):
    hub = tmp_path / "snapshots/one"
    hub.parent.mkdir()
    write_checkpoint(hub, shards=shards)
    left = hub / unfinished
    left.parent.mkdir(parents=True, exist_ok=True)
    left.touch()
    convert(hub, tmp_path / "model.h5")
    missing = hub / ("model.safetensors" if shards == 1 else "model-00002-of-00002.safetensors")
    missing.unlink()
    with pytest.raises(
        NoInputError, match=rf"{missing.name}: is missing: the download has not ended, .*\.incomplete is"
    ):
        convert(hub, tmp_path / "model.h5")


def test_a_name_on_the_hub_says_how_to_get_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NoInputError, match="downloaded first: hf download Qwen/Qwen3-30B-A3B --local-dir FOLDER"):
        convert("Qwen/Qwen3-30B-A3B", tmp_path / "model.h5")
    with pytest.raises(
        NoInputError, match=r"nowhere: is not a folder with a checkpoint \(config.json, \*.safetensors\)$"
    ):
        convert(tmp_path / "nowhere", tmp_path / "model.h5")


def qwen3_next(folder, **changes):
    """A small checkpoint of Qwen3-Next; `changes` replace tensors of its first layer's rule. The tensors it is of."""
    values = small(hub_models.QWEN3_NEXT)
    tensors = bfloat16_tensors(values)
    tensors |= {f"{DELTA}.{name}": one for name, one in changes.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    write_safetensors(folder / "model.safetensors", tensors)
    return {name: array for name, (_, array) in tensors.items()}


DELTA = "model.layers.0.linear_attn"


def test_fused_inputs_of_qwen3_next_are_taken_apart_by_key_head(tmp_path):
    decays = np.array([1.1, -2.3, 0.7, 1e-30], np.float32)  # which bfloat16 does not hold
    theirs = qwen3_next(tmp_path / "hub", A_log=("F32", decays))
    convert(tmp_path / "hub", tmp_path / "model.h5")
    inputs, rates = (theirs[f"{DELTA}.in_proj_{name}.weight"] for name in ("qkvz", "ba"))
    by_head, rates_by_head = inputs.reshape(2, 3 + 3 + 10 + 10, 16), rates.reshape(2, 4, 16)
    with WeightFile.open(tmp_path / "model.h5") as weights:
        for name, rows in (("q", slice(3)), ("k", slice(3, 6)), ("v", slice(6, 16)), ("z", slice(16, 26))):
            np.testing.assert_array_equal(weights.read(f"layers/000/delta/{name}"), by_head[:, rows].reshape(-1, 16))
        for name, rows in (("beta", slice(2)), ("decay", slice(2, 4))):
            found = weights.read(f"layers/000/delta/{name}")
            np.testing.assert_array_equal(found, rates_by_head[:, rows].reshape(-1, 16))
        taps = np.concatenate([weights.read(f"layers/000/delta/{name}_taps") for name in "qkv"])
        np.testing.assert_array_equal(taps, theirs[f"{DELTA}.conv1d.weight"][:, 0])
        np.testing.assert_array_equal(weights.read("layers/000/delta/decay_log"), decays)
        both = theirs["model.layers.1.self_attn.q_proj.weight"].reshape(4, 2, 8, 16)
        np.testing.assert_array_equal(weights.read("layers/001/attention/q"), both[:, 0].reshape(-1, 16))
        np.testing.assert_array_equal(weights.read("layers/001/attention/gate"), both[:, 1].reshape(-1, 16))
        norm = widen(theirs["model.norm.weight"]) + np.float32(1)
        np.testing.assert_array_equal(weights.read("norm"), norm)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_proj_qkvz.weight": (53, 16)}, r"its shape is \(53, 16\), the configuration says groups of 26 rows"),
        ({"in_proj_qkvz.weight": (78, 16)}, r"its shape is \(9, 16\), the configuration says \(6, 16\)"),
        ({"in_proj_qkvz.weight": ()}, r"its shape is \(\), the configuration says groups of 26 rows"),
        ({"conv1d.weight": (32, 4, 1)}, r"its shape is \(6, 4, 1\), the configuration says \(6, 4\)"),
        ({"conv1d.weight": (32, 1, 3)}, r"its shape is \(6, 3\), the configuration says \(6, 4\)"),
        ({"A_log": (3,)}, r"its shape is \(3,\), the configuration says \(4,\)"),
        ({"conv1d.bias": (32,)}, "is not a tensor of this qwen3_next model"),
    ],
)
def test_tensors_of_a_delta_rule_that_do_not_fit_are_refused_by_name(tmp_path, changes, message):
    qwen3_next(tmp_path / "hub", **{name: ("BF16", np.zeros(shape, "<u2")) for name, shape in changes.items()})
    with pytest.raises(DataError, match=f"{DELTA}.{next(iter(changes))}: {message}"):
        convert(tmp_path / "hub", tmp_path / "model.h5")


@pytest.mark.parametrize("values", [DEEPSEEK, hub_models.GLM_45, hub_models.GLM_47_FLASH, hub_models.HY3])
def test_as_many_layers_are_left_out_as_the_configuration_says_predict_further_tokens(tmp_path, values):
    values = small(values)
    tensors, last = bfloat16_tensors(values), values["num_hidden_layers"]

    def with_layer(layer, said):
        more = {f"model.layers.{layer}.enorm.weight": ("BF16", np.zeros(16, "<u2"))}
        return converted(tmp_path / "hub", values | {"num_nextn_predict_layers": said}, tensors | more)

    assert with_layer(last, 1) == with_layer(last + 1, 2) == converted(tmp_path / "less", values, tensors)
    for layer, said in ((last, 0), (last, None), (last + 1, 1)):
        with pytest.raises(DataError, match=f"model.layers.{layer}.enorm.weight: is not a tensor of this"):
            with_layer(layer, said)


PREDICTED, MODULES = "num_nextn_predict_layers", "num_mtp_modules"


@pytest.mark.parametrize(("predicted", "modules", "most"), [(1, 1, 1), (1, 2, 2), (2, 1, 2), (None, 1, 1), (1, 0, 1)])
def test_of_two_numbers_of_layers_that_predict_further_tokens_the_larger_is_left_out(
    tmp_path, predicted, modules, most
):
    values = small(DEEPSEEK)
    tensors, last = bfloat16_tensors(values), values["num_hidden_layers"]
    values |= {PREDICTED: predicted, MODULES: modules}

    def with_layer(layer):
        more = {f"model.layers.{layer}.enorm.weight": ("BF16", np.zeros(16, "<u2"))}
        return converted(tmp_path / "hub", values, tensors | more)

    assert with_layer(last + most - 1) == converted(tmp_path / "less", values, tensors)
    with pytest.raises(DataError, match=f"model.layers.{last + most}.enorm.weight: is not a tensor of this"):
        with_layer(last + most)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({PREDICTED: -1}, f"config.json: {PREDICTED} is -1, not 0 to "),
        ({PREDICTED: -1, MODULES: 2}, f"config.json: {PREDICTED} is -1, not 0 to "),
        ({PREDICTED: 1, MODULES: -3}, f"config.json: {MODULES} is -3, not 0 to "),
        ({MODULES: 10**30}, f"config.json: {MODULES} is {10**30}, not 0 to "),
        ({PREDICTED: 1.5}, f"config.json: {PREDICTED} is 1.5, not an integer"),
        ({PREDICTED: 1, MODULES: "2"}, f"config.json: {MODULES} is '2', not an integer"),
        ({MODULES: True}, f"config.json: {MODULES} is True, not an integer"),
    ],
)
def test_a_number_of_layers_that_predict_further_tokens_is_refused_by_name(tmp_path, changes, message):
    values = small(DEEPSEEK)
    with pytest.raises(DataError, match=message):
        converted(tmp_path / "hub", values | changes, bfloat16_tensors(values))


@pytest.mark.parametrize("values", [hub_models.ERNIE_21B, hub_models.MIXTRAL, hub_models.DOTS])
def test_a_layer_after_the_last_is_refused_where_layers_that_predict_have_other_names(tmp_path, values):
    values = small(values) | {"num_nextn_predict_layers": 1}
    name = f"model.layers.{values['num_hidden_layers']}.input_layernorm.weight"
    with pytest.raises(DataError, match=f"{name}: is not a tensor of this"):
        converted(tmp_path / "hub", values, bfloat16_tensors(values) | {name: ("BF16", np.zeros(16, "<u2"))})


def test_infinity_in_a_configuration_is_read_as_python_writes_it(tmp_path):
    folder = shutil.copytree(FIXTURES / "nemotron_h", tmp_path / "hub")
    values = json.loads((folder / "config.json").read_text())

    def with_limit(limit):
        (folder / "config.json").write_text(json.dumps(values | {"time_step_limit": limit}))
        convert(folder, folder / "model.h5")
        return (folder / "model.h5").read_bytes()

    assert with_limit([0.0, math.inf]) == with_limit(None)
    for other in (math.nan, -math.inf):
        with pytest.raises(DataError, match=r"time_step_limit = .* is not supported"):
            with_limit([0.0, other])


def test_an_adapter_in_the_folder_is_refused(tmp_path):
    write_checkpoint(tmp_path / "hub")
    (tmp_path / "hub/adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    with pytest.raises(DataError, match=r"adapter_config.json: the folder has an adapter \(LoRA\)"):
        convert(tmp_path / "hub", tmp_path / "model.h5")


def test_layers_that_predict_further_tokens_are_left_out(tmp_path):
    values = small(hub_models.QWEN35_TEXT)
    tensors = bfloat16_tensors(values)
    more = {
        "mtp.layers.0.input_layernorm.weight": ("BF16", np.zeros(16, "<u2")),
        "mtp.fc.weight": ("F32", np.ones(3, "<f4")),
    }
    assert converted(tmp_path / "more", values, tensors | more) == converted(tmp_path / "less", values, tensors)
