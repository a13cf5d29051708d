"""Configurations of checkpoints on the hub, in their original spelling."""

import math
import re
from pathlib import Path

import msgspec
import pytest

from config import hub_models
from moempi.config.architecture import Clamp, DeltaRule, Experts, Indexer, Latent, LongRope, Rope, Router, Yarn
from moempi.config.families import FAMILIES, read_architecture
from moempi.config.tensors import catalogue
from moempi.errors import DataError

COMMON = {"hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
V3_YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
DUAL_CHUNKS = {
    "dual_chunk_attention_config": {
        "chunk_size": 262144,
        "local_size": 8192,
        "original_max_position_embeddings": 262144,
    }
}
LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
V3_ROUTER = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "moe_layer_freq": 1}

OLMOE = COMMON | {
    "model_type": "olmoe",
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "attention_bias": False,
    "clip_qkv": None,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "eos_token_id": 50279,
}
MIXTRAL = COMMON | {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
}
DEEPSEEK_V3 = (
    COMMON
    | LATENT
    | V3_ROUTER
    | {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "attention_bias": False,
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": V3_YARN,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    }
)
MOONLIGHT = DEEPSEEK_V3 | {
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.446,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "rope_scaling": None,
    "quantization_config": None,
    "vocab_size": 163840,
}
KIMI_K2 = DEEPSEEK_V3 | {
    "model_type": "kimi_k2",
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_group": 1,
    "topk_group": 1,
    "rope_theta": 50000.0,
    "rope_scaling": V3_YARN | {"factor": 32.0, "beta_fast": 1.0},
}
DEEPSEEK_V2_LITE = (
    COMMON
    | LATENT
    | {
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "q_lora_rank": None,
        "attention_bias": False,
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": V3_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    }
)
GLM_AIR = COMMON | {
    "model_type": "glm4_moe",
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "attention_bias": True,
    "use_qk_norm": False,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "eos_token_id": [151329, 151336, 151338],
}
DOTS = GLM_AIR | {
    "model_type": "dots1",
    "n_shared_experts": 2,
    "attention_bias": False,
    "partial_rotary_factor": None,
    "use_qk_norm": None,
    "scoring_func": "noaux_tc",
    "sliding_window": None,
    "max_window_layers": 62,
}
QWEN2_MOE = MIXTRAL | {
    "model_type": "qwen2_moe",
    "num_local_experts": None,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
    "use_sliding_window": False,
    "sliding_window": 32768,
    "max_window_layers": 21,
}
ERNIE = COMMON | {
    "model_type": "ernie4_5_moe",
    "vocab_size": 103424,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "moe_num_experts": 64,
    "moe_k": 6,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 27,
    "moe_layer_interval": 1,
    "use_bias": False,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
PHI = MIXTRAL | {
    "model_type": "phimoe",
    "num_local_experts": 16,
    "attention_bias": True,
    "lm_head_bias": True,
    "router_jitter_noise": 0.01,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "sliding_window": 131072,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0] * 64,
        "long_factor": [2.0] * 64,
        "short_mscale": 1.243,
        "long_mscale": 1.243,
        "original_max_position_embeddings": 4096,
    },
}
GPT_OSS = COMMON | {
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 2,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "attention_bias": True,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"],
    "swiglu_limit": 7.0,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}
MINIMAX_M2, GLM_FLASH, HY3, SOLAR, SARVAM = (
    hub_models.MINIMAX_M2 | {"quantization_config": None}, hub_models.GLM_47_FLASH, hub_models.HY3, hub_models.SOLAR,
    hub_models.SARVAM_30B,
)  # fmt: skip
HUB = (
    OLMOE, MIXTRAL, DEEPSEEK_V3, MOONLIGHT, KIMI_K2, DEEPSEEK_V2_LITE, GLM_AIR, DOTS, QWEN2_MOE, ERNIE, PHI, GPT_OSS,
    MINIMAX_M2, GLM_FLASH, HY3, SOLAR, SARVAM, hub_models.DEEPSEEK_V32, hub_models.GLM_52, hub_models.QWEN3_NEXT,
    hub_models.QWEN35_TEXT,
)  # fmt: skip


def read(values, **changes):
    return read_architecture(values | changes, {}, origin="config.json")


def scale(architecture):
    return architecture.attention.head_dim**-0.5 * architecture.attention.score_factor


@pytest.mark.parametrize("values", HUB, ids=lambda values: f"{values['model_type']}-{values['hidden_size']}")
def test_every_tensor_has_distinct_names(values):
    architecture = read(values)
    sources = [FAMILIES[values["model_type"]].sources(tensor) for tensor in catalogue(architecture)]
    names = [name for found in sources for name in (found if isinstance(found, tuple) else (found,))]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", hub_models.READ)
def test_a_configuration_of_the_hub_is_read(name):
    architecture = read(hub_models.READ[name])
    assert sum(tensor.num_bytes for tensor in catalogue(architecture)) > 1 << 33


@pytest.mark.parametrize("name", hub_models.REFUSED)
def test_a_configuration_of_the_hub_is_refused_with_the_reason(name):
    values, reason = hub_models.REFUSED[name]
    with pytest.raises(DataError) as error:
        read(values)
    assert reason in str(error.value)


def test_the_table_of_models_names_the_configurations_that_were_tried():
    readme = (Path(__file__).parents[2] / "weights/README.md").read_text()
    table = readme.partition("## Models\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"`([\w.-]+/[^`]+)`", table)) == hub_models.READ.keys() | hub_models.REFUSED.keys()


@pytest.mark.parametrize("name", hub_models.READ)
@pytest.mark.parametrize("value", [True, False, 0, 0.5, "rms", [1], {"a": 1}])
def test_a_key_that_is_not_known_is_refused_by_name(name, value):
    values, more = hub_models.READ[name], {"residual_multiplier": value}
    inner = values.get("text_config")
    values = values | ({"text_config": inner | more} if inner else more)
    with pytest.raises(DataError, match=r"residual_multiplier = .* is not known: it may change the arithmetic"):
        read(values)


@pytest.mark.parametrize("value", [None, "", [], {}])
def test_a_key_that_says_nothing_may_be_unknown(value):
    assert read(OLMOE, residual_multiplier=value) == read(OLMOE)


def test_minimax_m2():
    architecture = read(MINIMAX_M2)
    assert (architecture.attention.rope, architecture.attention.qk_norm) == (Rope(theta=5e6, dim=64), "vector")
    assert architecture.experts.router == Router(
        top_k=8, scoring="sigmoid", correction=True, renormalize=True, float32_logits=True, float32_weights=True
    )
    assert read(MINIMAX_M2, rotary_dim=None, partial_rotary_factor=0.5) == architecture


def test_qwen3_next_and_qwen3_5():
    coder, vision = read(hub_models.QWEN3_NEXT), read(hub_models.QWEN35_397B)
    assert coder.delta_layers == tuple(layer for layer in range(48) if layer % 4 != 3)
    assert coder.delta_rule == DeltaRule(num_key_heads=16, num_value_heads=32, key_dim=128, value_dim=128, taps=4)
    assert coder.delta_rule.state_values == 32 * 128 * 128 + 3 * 8192
    assert (coder.norm, coder.float32_norms, coder.attention.output_gate) == ("rms_float32", True, True)
    assert (coder.attention.rope.dim, coder.attention.qk_norm, coder.experts.shared_gate) == (64, "head", True)
    assert (vision.delta_rule.num_value_heads, len(vision.delta_layers)) == (64, 45)
    assert coder.experts.router == vision.experts.router == Router(top_k=10, renormalize=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"full_attention_interval": 0}, "full_attention_interval is 0, not a positive number"),
        ({"full_attention_interval": None}, "full_attention_interval is missing"),
        ({"layer_types": ["linear_attention"] * 47}, "is not linear_attention or full_attention for each layer"),
        ({"layer_types": ["sliding_attention"] * 48}, "is not linear_attention or full_attention for each layer"),
        ({"linear_num_value_heads": 33}, "num_value_heads 33 is not a multiple of 16 key heads"),
        ({"linear_conv_kernel_dim": 1}, "Expected `int` >= 2"),
        ({"linear_key_head_dim": 4096}, "Expected `int` <= 1024"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"attn_output_gate": False}, "attn_output_gate = False is not supported"),
        ({"output_gate_type": "sigmoid"}, "output_gate_type = 'sigmoid' is not supported"),
        ({"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype = 'bfloat16' is not supported"),
        ({"partial_rotary_factor": None}, "partial_rotary_factor is missing"),
    ],
)
def test_linear_attention_that_is_another_is_refused(changes, message):
    with pytest.raises(DataError, match=re.escape(message)):
        read(hub_models.QWEN3_NEXT, **changes)


def test_nemotron_3_nano():
    nano = read(hub_models.NEMOTRON_NANO)
    assert (nano.num_layers, len(nano.moe_layers), len(nano.state_space_layers)) == (52, 23, 23)
    assert [layer for layer in range(52) if nano.has_cache(layer)] == [5, 12, 19, 26, 33, 42]
    assert nano.state_space.memory_shape == (64, 128, 64)
    assert nano.state_space.state_values == 64 * 128 * 64 + 3 * 6144
    assert (nano.activation, nano.norm, nano.attention.rope.none) == ("relu2", "rms_float32", True)
    assert (nano.experts.router.scoring, nano.experts.router.scaling, nano.experts.shared_width) == (
        "sigmoid",
        2.5,
        3712,
    )
    kinds = {"M": "mamba", "E": "moe", "*": "attention"}
    listed = [kinds[letter] for letter in hub_models.NEMOTRON_NANO["hybrid_override_pattern"]]
    assert read(hub_models.NEMOTRON_NANO, hybrid_override_pattern=None, layers_block_type=listed) == nano
    assert 31e9 < sum(math.prod(tensor.shape) for tensor in catalogue(nano)) < 32e9


def test_nemotron_3_super_has_latent_experts():
    model = read(hub_models.NEMOTRON_SUPER)
    assert (model.width, model.experts.latent_width, model.routed_width) == (4096, 1024, 1024)
    shapes = {tensor.name: tensor.shape for tensor in catalogue(model)}
    assert shapes["layers/001/latent/down"] == (1024, 4096)
    assert shapes["layers/001/latent/up"] == (4096, 1024)
    assert shapes["layers/001/experts/up"] == (512, 2688, 1024)
    assert shapes["layers/001/experts/down"] == (512, 1024, 2688)
    assert shapes["layers/001/router"] == (512, 4096)
    assert shapes["layers/001/shared/up"] == (5376, 4096)
    assert 119e9 < sum(map(math.prod, shapes.values())) < 122e9
    assert read(hub_models.NEMOTRON_SUPER, moe_latent_size=None).routed_width == 4096


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hybrid_override_pattern": "MEX" * 4}, "hybrid_override_pattern is not a known kind for each of 1 to 1000"),
        ({"hybrid_override_pattern": ""}, "hybrid_override_pattern is not a known kind for each of 1 to 1000"),
        ({"num_hidden_layers": 51}, "num_hidden_layers = 51 is not supported, only 52"),
        ({"layers_block_type": ["mamba", "moe"]}, "num_hidden_layers = 52 is not supported, only 2"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act = 'silu' is not supported, only 'relu2'"),
        ({"use_conv_bias": False}, "use_conv_bias = False is not supported"),
        ({"use_bias": True}, "use_bias = True is not supported"),
        ({"time_step_limit": [0.0, 0.1]}, "time_step_limit = [0.0, 0.1] is not supported"),
        ({"n_shared_experts": 2}, "n_shared_experts = 2 is not supported"),
        ({"norm_eps": 1e-6}, "layer_norm_epsilon and norm_eps differ"),
        ({"n_groups": 7}, "state_space.num_heads 64 is not a multiple of 7 groups"),
        ({"ssm_state_size": 4096}, "Expected `int` <= 1024"),
        ({"time_step_min": -1.0}, "Expected `float` >= 0"),
        ({"moe_latent_size": "1024"}, "moe_latent_size is '1024', not an integer"),
        ({"moe_latent_size": -1}, "Expected `int` >= 0"),
        ({"moe_latent_size": 0}, "moe_latent_size is 0"),
    ],
)
def test_state_spaces_that_are_another_are_refused(changes, message):
    with pytest.raises(DataError, match=re.escape(message)):
        read(hub_models.NEMOTRON_NANO, **changes)


def test_glm_4_7_flash_and_hy3_say_their_dense_layers_in_two_ways():
    for values in (GLM_FLASH, HY3):
        types = ["dense"] + ["sparse"] * (values["num_hidden_layers"] - 1)
        assert read(values).dense_layers == (0,)
        assert read(values, mlp_layer_types=types) == read(values)
        assert read(values, mlp_layer_types=types, first_k_dense_replace=None) == read(values)


def test_families_whose_groups_may_be_absent_have_one():
    for values in (SOLAR, hub_models.DOTS):
        router = read(values).experts.router
        assert (router.num_groups, router.kept_groups) == (1, 1)


def test_sarvam():
    architecture = read(SARVAM)
    attention = architecture.attention
    assert (attention.rope, attention.qk_norm, attention.biases) == (Rope(theta=8e6), "head", "none")
    assert (architecture.dense_layers, architecture.experts.shared_width) == ((0,), 1024)
    assert architecture.experts.router == Router(
        top_k=6, scoring="sigmoid", correction=True, num_groups=1, kept_groups=1, group_score="top2",
        renormalize=True, scaling=2.5, float32_logits=True, float32_weights=True,
    )  # fmt: skip
    assert read(SARVAM, use_qkv_bias=True).attention.biases == "qkv"
    assert read(SARVAM, norm_topk_prob=None, score_function=None, n_group=None, topk_group=None) == architecture
    saved = {"num_experts": None, "n_routed_experts": 128, "num_shared_experts": None, "n_shared_experts": 1}
    assert read(SARVAM, **saved, use_qkv_bias=None, attention_bias=False) == architecture


def test_olmoe():
    architecture = read(OLMOE)
    assert architecture.attention.qk_norm == "vector"
    assert architecture.attention.clip is None
    assert architecture.experts == Experts(num=64, width=1024, router=Router(top_k=8))
    assert architecture.eos_tokens == (50279,)
    assert read(OLMOE, clip_qkv=8).attention.clip == 8.0


def test_mixtral():
    assert read(MIXTRAL).experts.router == Router(top_k=2, renormalize=True, float32_weights=True)
    windowed = read(MIXTRAL, sliding_window=4096)
    assert [windowed.window(layer) for layer in (0, 31)] == [4096, 4096]


def test_deepseek_v3():
    architecture = read(DEEPSEEK_V3)
    assert architecture.dense_layers == (0, 1, 2)
    assert architecture.attention.latent == Latent(512, 64, 128, query_rank=1536)
    assert architecture.attention.rope == Rope(interleaved=True, yarn=Yarn(factor=40.0, original_positions=4096))
    assert scale(architecture) == pytest.approx(0.135234, rel=1e-5)
    assert architecture.attention.cached_values == 576
    assert architecture.experts.shared_width == 2048
    assert architecture.experts.router == Router(
        top_k=8, scoring="sigmoid", correction=True, num_groups=8, kept_groups=4, group_score="top2",
        renormalize=True, scaling=2.5, float32_logits=True, float32_weights=True,
    )  # fmt: skip


def test_moonlight_and_kimi_are_read_as_deepseek_v3():
    moonlight, kimi = read(MOONLIGHT), read(KIMI_K2)
    assert moonlight.family == kimi.family == "deepseek_v3"
    assert (moonlight.norm_eps, moonlight.attention.latent.norm_eps) == (1e-5, 1e-6)
    assert (moonlight.attention.latent.query_rank, moonlight.attention.score_factor) == (0, 1.0)
    assert scale(kimi) == pytest.approx(0.130861, rel=1e-5)


def test_deepseek_v32_is_deepseek_v3_with_an_indexer_in_every_layer():
    sparse, dense = read(hub_models.DEEPSEEK_V32), read(hub_models.DEEPSEEK_V3)
    indexer = Indexer(num_heads=64, head_dim=128, top_k=2048)
    latent = msgspec.structs.replace(dense.attention.latent, indexer=indexer)
    attention = msgspec.structs.replace(dense.attention, latent=latent)
    assert sparse == msgspec.structs.replace(dense, family="deepseek_v32", attention=attention)
    assert [sparse.index_values(layer) for layer in (0, 60)] == [128, 128]
    assert dense.index_values(0) == 0


def test_glm_5_rotates_adjacent_numbers_and_its_value_heads_are_larger():
    architecture = read(hub_models.GLM_5)
    assert architecture.attention.indexer == Indexer(num_heads=32, head_dim=128, top_k=2048, interleaved=True)
    assert (architecture.attention.head_dim, architecture.attention.value_dim) == (256, 256)
    assert read(hub_models.GLM_5, indexer_rope_interleave=None) == architecture
    assert not read(hub_models.GLM_5, indexer_rope_interleave=False).attention.indexer.interleaved


def test_three_ways_to_say_which_layers_share_positions():
    architecture = read(hub_models.GLM_52)
    with_indexer = [layer for layer in range(78) if architecture.has_indexer(layer)]
    assert with_indexer == [0, 1, *range(2, 78, 4)]
    assert read(hub_models.GLM_52, indexer_types=None) == architecture
    assert read(hub_models.GLM_52, index_topk_freq=None) == architecture
    pattern = "".join("F" if layer in with_indexer else "S" for layer in range(78))
    assert read(hub_models.GLM_52, index_topk_pattern=pattern) == architecture
    assert read(hub_models.GLM_5, index_topk_freq=4).joined_layers[:4] == (2, 3, 4, 6)
    assert len(list(catalogue(architecture))) == len(list(catalogue(read(hub_models.GLM_5)))) - 5 * (78 - 21)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"indexer_types": ["full"] * 77}, "indexer_types"),
        ({"indexer_types": ["full"] * 77 + ["none"]}, "indexer_types"),
        ({"indexer_types": ["shared"] + ["full"] * 77}, "shared_layers has layer 0"),
        ({"indexer_types": ["full", "shared"] * 39, "index_topk_freq": 4}, "indexer_types and .* differ"),
        ({"index_topk_pattern": "F" * 77}, "index_topk_pattern"),
        ({"index_topk_pattern": "F" * 77 + "f"}, "index_topk_pattern"),
        ({"index_topk_freq": 0}, "index_topk_freq is 0"),
        ({"index_topk_freq": "4"}, "index_topk_freq is '4'"),
        ({"index_topk": None}, "index_topk is missing"),
        ({"index_topk": 0}, "top_k"),
        ({"index_head_dim": 32}, "head_dim 32 is less than the rope_dim 64"),
        ({"q_lora_rank": None}, "indexer needs a query_rank"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"moe_router_dtype": "bfloat16"}, "moe_router_dtype"),
        ({"layer_types": ["full_attention"] * 78}, "layer_types"),
    ],
)
def test_an_indexer_that_cannot_be_is_refused(changes, words):
    with pytest.raises(DataError, match=words):
        read(hub_models.GLM_5, **changes)


def test_deepseek_v2():
    lite = read(DEEPSEEK_V2_LITE)
    assert scale(lite) == pytest.approx(0.11472, rel=1e-4)
    assert lite.attention.rope.amplitude == 1.0
    assert lite.experts.router == Router(top_k=6, float32_logits=True, float32_weights=True)
    grouped = read(DEEPSEEK_V2_LITE, topk_method="group_limited_greedy", n_group=8, topk_group=3)
    assert (grouped.experts.router.num_groups, grouped.experts.router.kept_groups) == (8, 3)
    assert grouped.experts.router.group_score == "max"


def test_glm_and_dots():
    air, dots = read(GLM_AIR), read(DOTS)
    assert (air.attention.rope.dim, air.attention.biases, air.attention.qk_norm) == (64, "qkv", "none")
    assert len(air.eos_tokens) == 3
    assert (dots.attention.rope.dim, dots.attention.biases, dots.attention.qk_norm) == (0, "none", "head")
    assert dots.experts.shared_width == 2 * 1408
    assert read(DOTS, sliding_window=64, max_window_layers=44).attention.windowed_layers == (44, 45)


def test_qwen2_moe():
    architecture = read(QWEN2_MOE)
    assert (architecture.attention.biases, architecture.attention.windowed_layers) == ("qkv", ())
    assert (architecture.experts.shared_width, architecture.experts.shared_gate) == (5632, True)


def test_ernie():
    architecture = read(ERNIE)
    assert architecture.attention.rope == Rope(theta=5e5, interleaved=True)
    assert architecture.dense_layers == (0,)
    assert architecture.experts.router.least_sum == 1e-12
    assert read(ERNIE, moe_layer_interval=2, moe_layer_end_index=-1).dense_layers == tuple(range(0, 28, 2))


def test_phimoe():
    architecture = read(PHI)
    assert architecture.max_positions == 131072
    assert architecture.attention.rope == Rope(
        amplitude=1.243, divisors=(1.0,) * 64, long=LongRope(4096, divisors=(2.0,) * 64, amplitude=1.243)
    )
    assert read(PHI, max_position_embeddings=4096).attention.rope.long is None
    assert (architecture.norm, architecture.head_bias, architecture.attention.biases) == ("layer", True, "all")
    assert architecture.experts.router.scoring == "sparsemixer"


def test_gpt_oss():
    architecture = read(GPT_OSS)
    assert architecture.attention.rope.amplitude == pytest.approx(1.34657, rel=1e-5)
    assert architecture.attention.rope.yarn.truncate is False
    assert [architecture.window(layer) for layer in (0, 1)] == [128, 0]
    assert architecture.experts.clamp == Clamp(alpha=1.702, limit=7.0)
    assert (architecture.norm, architecture.attention.sinks) == ("rms_float32", True)


def test_yarn_amplitude_has_three_sources():
    def amplitude(**more):
        return read(OLMOE, rope_scaling=GPT_OSS["rope_scaling"] | more).attention.rope.amplitude

    assert amplitude(attention_factor=1.5) == 1.5
    assert amplitude() == pytest.approx(0.1 * math.log(32) + 1)
    ratio = (0.05 * math.log(32) + 1) / (0.2 * math.log(32) + 1)
    assert amplitude(mscale=0.5, mscale_all_dim=2.0) == pytest.approx(ratio)


def test_yarn_lengthens_the_positions():
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert read(OLMOE, max_position_embeddings=40960).max_positions == 40960
    assert read(OLMOE, max_position_embeddings=40960, rope_scaling=scaling).max_positions == 131072
    assert read(DEEPSEEK_V3).max_positions == 163840
    assert read(OLMOE, rope_scaling=scaling | {"factor": 1e300}).max_positions == 2**31 - 1


def test_dual_chunk_attention_is_full_attention_within_its_original_positions():
    assert read(OLMOE, **DUAL_CHUNKS, max_position_embeddings=262144).max_positions == 262144


def test_both_sections_of_the_rope_may_be_there_if_they_say_the_same():
    renamed = {key: value for key, value in V3_YARN.items() if key != "type"} | {
        "rope_type": "yarn",
        "rope_theta": 10000,
    }
    assert read(DEEPSEEK_V3, rope_parameters=renamed) == read(DEEPSEEK_V3)


def test_a_magnitude_without_a_scaled_rope_is_not_applied():
    plain = {"type": "default", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}
    for values in (DEEPSEEK_V3, DEEPSEEK_V2_LITE):
        attention = read(values, rope_scaling=plain).attention
        assert (attention.score_factor, attention.rope) == (1.0, Rope(interleaved=True))


def test_linear_and_dynamic_ropes():
    assert read(OLMOE, rope_scaling={"type": "linear", "factor": 2.5}).attention.rope == Rope(divisors=(2.5,))
    dynamic = read(OLMOE, rope_scaling={"type": "dynamic", "factor": 4.0})
    assert (dynamic.attention.rope, dynamic.max_positions) == (Rope(), 4096)


def test_llama3_keeps_fast_frequencies_and_divides_slow_ones():
    divisors = read(OLMOE, rope_scaling=LLAMA3, rope_theta=500000.0).attention.rope.divisors
    assert len(divisors) == 64
    assert (divisors[0], divisors[-1]) == (1.0, 8.0)
    assert list(divisors) == sorted(divisors)
    assert any(1 < divisor < 8 for divisor in divisors)


@pytest.mark.parametrize(
    ("values", "changes", "message"),
    [
        (OLMOE, {"rope_scaling": {"type": "ntk"}}, "rope_type = 'ntk' is not supported, only default, yarn, longrope"),
        (OLMOE, {"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 3}}, "alpha = 3 is not supported"),
        (OLMOE, {"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 3}}, "alpha = 3 is not supported"),
        (OLMOE, {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "high_freq_factor: need 0 < each, and low < high"),
        (OLMOE, {"rope_scaling": LLAMA3, "rope_theta": -1.0}, "need 0 < each"),
        (OLMOE, {"rope_scaling": LLAMA3, "head_dim": 10**9}, "a head of 1000000000 numbers is not supported"),
        (
            OLMOE,
            DUAL_CHUNKS | {"max_position_embeddings": 1010000},
            "beyond its 262144 original positions: set max_pos",
        ),
        (
            OLMOE,
            {"rope_scaling": V3_YARN | {"factor": 2.0}, "rope_parameters": V3_YARN},
            "rope_parameters and rope_scaling differ in factor: remove one of them",
        ),
        (
            OLMOE,
            {"rope_scaling": V3_YARN | {"attention_factor": 1.0}, "rope_parameters": V3_YARN | {"mscale": None}},
            "differ in attention_factor, mscale: remove one",
        ),
        (OLMOE, {"rope_scaling": {"type": "yarn", "rope_type": "default"}}, "rope_type and type differ"),
        (OLMOE, {"rope_scaling": V3_YARN | {"surprise": 1}}, "surprise = 1 is not supported"),
        (OLMOE, {"rope_parameters": {"rope_type": "default", "surprise": 1}}, "surprise = 1 is not supported"),
        (OLMOE, {"rope_scaling": {"factor": 4.0}}, "rope_scaling: factor = 4.0 is not supported"),
        (OLMOE, {"rope_parameters": {"full_attention": V3_YARN}}, "full_attention = {'type': 'yarn', "),
        (OLMOE, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        (DEEPSEEK_V3, {"topk_method": "greedy"}, "topk_method = 'greedy' is not supported"),
        (DEEPSEEK_V3, {"scoring_func": "softmax"}, "scoring_func = 'softmax' is not supported"),
        (DEEPSEEK_V3, {"moe_layer_freq": 2}, "moe_layer_freq = 2 is not supported"),
        (DEEPSEEK_V3, {"num_key_value_heads": 8}, "num_key_value_heads = 8 is not supported, only 128"),
        (DEEPSEEK_V3, {"n_group": 3}, "256 experts in 3 groups"),
        (DEEPSEEK_V3, {"n_group": 128, "topk_group": 2}, "exceeds the 4 experts of kept groups"),
        (DEEPSEEK_V2_LITE, {"norm_topk_prob": True}, "norm_topk_prob = True is not supported"),
        (DEEPSEEK_V2_LITE, {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc' is not supported"),
        (GLM_AIR, {"partial_rotary_factor": None}, "partial_rotary_factor is missing"),
        (GLM_AIR, {"partial_rotary_factor": 0.01}, "rotary embedding of 1 numbers"),
        (GLM_AIR, {"partial_rotary_factor": 1.5}, "partial_rotary_factor = 1.5 is not a share of a head"),
        (GLM_AIR, {"partial_rotary_factor": 1e308}, "partial_rotary_factor = 1e+308 is not a share of a head"),
        (GLM_AIR, {"partial_rotary_factor": -0.5}, "partial_rotary_factor = -0.5 is not a share of a head"),
        (GLM_AIR, {"head_dim": 10**400}, "a head of 1000"),
        (MINIMAX_M2, {"rotary_dim": 10**400}, "rotary_dim is 1000"),
        (MINIMAX_M2, {"rotary_dim": 256}, "rotary_dim is 256, not 1 to the 128 numbers of a head"),
        (MINIMAX_M2, {"rotary_dim": 0}, "rotary_dim is 0, not 1 to the 128 numbers of a head"),
        (OLMOE, {"rope_scaling": V3_YARN | {"factor": -1e308}}, "factor"),
        (DEEPSEEK_V3, {"rope_scaling": V3_YARN | {"mscale_all_dim": 1e300}}, "score_factor"),
        (GLM_AIR, {"partial_rotary_factor": 0.001}, "partial_rotary_factor = 0.001 leaves nothing"),
        (GPT_OSS, {"rope_theta": 1.0}, "attention.rope.theta 1.0 with yarn"),
        (DOTS, {"sliding_window": 8, "layer_types": ["full_attention"]}, "layer_types is not"),
        (QWEN2_MOE, {"use_sliding_window": True}, "not supported without layer_types"),
        (ERNIE, {"use_bias": True}, "use_bias = True is not supported"),
        (ERNIE, {"moe_layer_interval": 0}, "moe_layer_interval is 0"),
        (PHI, {"num_experts_per_tok": 1}, "top_k is 1, sparsemixer chooses 2"),
        (PHI, {"rope_scaling": PHI["rope_scaling"] | {"short_factor": [1.0]}}, "short_factor has 1 numbers, not 64"),
        (PHI, {"rope_scaling": PHI["rope_scaling"] | {"short_factor": "x"}}, "short_factor is 'x', not numbers"),
        (GPT_OSS, {"quantization_config": {"quant_method": "fp8"}}, "quant_method is 'fp8', only mxfp4 can be read"),
        (OLMOE, {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 10**400}}, "int too large to convert"),
        (OLMOE, {"rope_scaling": V3_YARN | {"original_max_position_embeddings": 10**400}}, "int too large to convert"),
        (MINIMAX_M2, {"attn_type_list": [0] * 62}, "attn_type_list = [0, "),
        (MINIMAX_M2, {"use_routing_bias": False}, "use_routing_bias = False is not supported"),
        (MINIMAX_M2, {"partial_rotary_factor": 0.25}, "are several shares of a head: [0.25, 0.5]"),
        (GLM_FLASH, {"mlp_layer_types": ["sparse"] * 47}, "mlp_layer_types and first_k_dense_replace differ"),
        (GLM_FLASH, {"mlp_layer_types": ["moe"] * 47}, "mlp_layer_types is not dense or sparse for each layer"),
        (GLM_FLASH, {"n_group": None}, "n_group is missing"),
        (HY3, {"route_norm": False}, "route_norm = False is not supported"),
        (SARVAM, {"use_bias": True}, "use_bias = True is not supported"),
        (SARVAM, {"score_function": "softmax"}, "score_function = 'softmax' is not supported"),
        (SARVAM, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        (SARVAM, {"n_routed_experts": 64}, "n_routed_experts and num_experts and num_local_experts differ"),
        (SARVAM, {"moe_shared_expert_intermediate_size": 512}, "moe_shared_expert_intermediate_size = 512 is not"),
        (SOLAR, {"use_qk_norm": True}, "use_qk_norm = True is not supported"),
        (SOLAR, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        (SOLAR, {"layer_types": ["sliding_attention"] * 48}, "layer_types has windows that are not supported"),
        (OLMOE, {"use_qk_norm": False}, "use_qk_norm = False is not known"),
        (GPT_OSS, {"layer_types": None}, "layer_types is missing"),
        (GPT_OSS, {"layer_types": [1, 2]}, "layer_types is [1, 2], not texts"),
    ],
)
def test_unsupported_options_are_refused_by_name(values, changes, message):
    with pytest.raises(DataError) as error:
        read(values, **changes)
    assert str(error.value).startswith("config.json: ")
    assert message in str(error.value)
