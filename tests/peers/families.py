"""Small random checkpoints of every family, and what transformers makes of them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

NUM_GREEDY = 12
# A sequence longer than a page and than every window, short ones, and one of a single token; these are continued too.
LENGTHS = (70, 3, 17, 33, 1, 9)
# More to score, so that the mean difference in bfloat16 does not hang on a few tokens that change their experts.
MORE_LENGTHS = (90,) * 8

# One beyond an indexer's 2,048 positions, and others beside it.
LONG_LENGTHS = (2320, 3, 17, 70, 1, 9)

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EIGHT_OF_16: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}
DEEPSEEK: dict[str, Any] = COMMON | {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "intermediate_size": 48,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "n_group": 4,
    "topk_group": 2,
}
GLM: dict[str, Any] = COMMON | {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "intermediate_size": 48,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "n_group": 1,
    "topk_group": 1,
    "head_dim": 16,
}
SARVAM: dict[str, Any] = GLM | {"use_qk_norm": True}
SOLAR: dict[str, Any] = {key: value for key, value in GLM.items() if key != "first_k_dense_replace"}
HY: dict[str, Any] = COMMON | {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "intermediate_size": 48,
    "num_shared_experts": 1,
    "router_scaling_factor": 2.826,
    "head_dim": 16,
}
MIXTRAL: dict[str, Any] = COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24}
QWEN3: dict[str, Any] = COMMON | EIGHT_OF_16 | {"head_dim": 12, "intermediate_size": 40, "norm_topk_prob": True}
OLMOE: dict[str, Any] = COMMON | {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 16}
QWEN2: dict[str, Any] = (
    COMMON | EIGHT_OF_16 | {"shared_expert_intermediate_size": 40, "intermediate_size": 40, "norm_topk_prob": False}
)
ERNIE: dict[str, Any] = COMMON | {
    "moe_num_experts": 8,
    "moe_k": 3,
    "moe_intermediate_size": 16,
    "intermediate_size": 48,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
}
GPT_OSS: dict[str, Any] = COMMON | {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 24,
    "head_dim": 16,
    "sliding_window": 8,
}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.9],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "short_mscale": 1.25,
    "long_mscale": 1.5,
    "original_max_position_embeddings": 128,
}
LINEAR: dict[str, Any] = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", QWEN3),
    "qwen3_moe-dense-bias-yarn-tied": (
        "qwen3_moe",
        QWEN3
        | {"mlp_only_layers": [0], "attention_bias": True, "norm_topk_prob": False, "rope_parameters": YARN}
        | {"tie_word_embeddings": True},
    ),
    "olmoe": ("olmoe", OLMOE | {"num_key_value_heads": 4, "norm_topk_prob": False}),
    "olmoe-clip-grouped": ("olmoe", OLMOE | {"clip_qkv": 0.7, "norm_topk_prob": True, "attention_bias": True}),
    "mixtral": ("mixtral", MIXTRAL),
    "mixtral-linear": ("mixtral", MIXTRAL | {"rope_parameters": LINEAR}),
    "glm4_moe-llama3": (
        "glm4_moe",
        GLM | {"partial_rotary_factor": 0.5, "use_qk_norm": True} | {"rope_parameters": LLAMA3},
    ),
    "mixtral-window-head_dim": ("mixtral", MIXTRAL | {"sliding_window": 16, "head_dim": 12}),
    "deepseek_v3-groups-yarn": (
        "deepseek_v3",
        DEEPSEEK | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "deepseek_v3-one_group-no_q_latent": (
        "deepseek_v3",
        DEEPSEEK
        | {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "norm_topk_prob": False, "rms_norm_eps": 1e-5}
        | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}},
    ),
    "deepseek_v3-halves-bias": ("deepseek_v3", DEEPSEEK | {"rope_interleave": False, "attention_bias": True}),
    "deepseek_v2-greedy-yarn": (
        "deepseek_v2",
        DEEPSEEK
        | {"topk_method": "greedy", "norm_topk_prob": False, "q_lora_rank": None, "routed_scaling_factor": 1.0}
        | {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
    "deepseek_v2-groups": (
        "deepseek_v2",
        DEEPSEEK | {"topk_method": "group_limited_greedy", "norm_topk_prob": False, "routed_scaling_factor": 4.0},
    ),
    "glm4_moe": ("glm4_moe", GLM | {"partial_rotary_factor": 0.5, "attention_bias": True, "use_qk_norm": False}),
    "glm4_moe-qk_norm-groups": (
        "glm4_moe",
        GLM | {"partial_rotary_factor": 0.25, "use_qk_norm": True, "n_group": 2, "topk_group": 1},
    ),
    "dots1": ("dots1", GLM | {"sliding_window": None}),
    "dots1-windows-bias": (
        "dots1",
        GLM | {"sliding_window": 12, "layer_types": SLIDING, "attention_bias": True, "n_shared_experts": 2},
    ),
    "qwen2_moe": ("qwen2_moe", QWEN2),
    "qwen2_moe-windows-sparse_step": (
        "qwen2_moe",
        QWEN2
        | {"qkv_bias": False, "norm_topk_prob": True, "decoder_sparse_step": 2, "use_sliding_window": True}
        | {"sliding_window": 10, "layer_types": SLIDING},
    ),
    "ernie4_5_moe-tied": ("ernie4_5_moe", ERNIE | {"tie_word_embeddings": True}),
    "ernie4_5_moe-interval-no_shared": (
        "ernie4_5_moe",
        ERNIE | {"moe_layer_interval": 2, "moe_layer_start_index": 0, "moe_num_shared_experts": 0},
    ),
    "phimoe-longrope-biases": (
        "phimoe",
        MIXTRAL
        | {"attention_bias": True, "lm_head_bias": True, "rope_parameters": LONGROPE, "router_jitter_noise": 0.2},
    ),
    "phimoe-longrope-long": (
        "phimoe",
        MIXTRAL | {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 48}, "router_jitter_noise": 0.2},
    ),
    "phimoe-window": ("phimoe", MIXTRAL | {"sliding_window": 20, "router_jitter_noise": 0.05}),
    "gpt_oss-yarn": ("gpt_oss", GPT_OSS | {"rope_parameters": YARN | {"truncate": False}}),
    "gpt_oss-clamped": (
        "gpt_oss",
        GPT_OSS
        | {"swiglu_limit": 0.5, "swiglu_alpha": 1.3, "layer_types": ["full_attention", *SLIDING[:2]]}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
    ),
}
CASES |= {
    "minimax_m2": ("minimax_m2", MIXTRAL | {"head_dim": 16, "rotary_dim": 8}),
    "minimax_m2-yarn": (
        "minimax_m2",
        MIXTRAL
        | {"num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 16}
        | {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}},
    ),
    "glm4_moe_lite": ("glm4_moe_lite", DEEPSEEK | {"n_group": 1, "topk_group": 1, "n_shared_experts": 1}),
    "glm4_moe_lite-layer_types-groups": (
        "glm4_moe_lite",
        DEEPSEEK
        | {"mlp_layer_types": ["dense", "sparse", "dense"], "first_k_dense_replace": None, "q_lora_rank": None}
        | {"v_head_dim": 20, "rms_norm_eps": 1e-5, "norm_topk_prob": False},
    ),
    "hy_v3": ("hy_v3", HY),
    "hy_v3-bias-float32_combine": (
        "hy_v3",
        HY | {"attention_bias": True, "enable_moe_fp32_combine": False, "num_shared_experts": 2, "head_dim": 12},
    ),
    "sarvam_moe": ("sarvam_moe", SARVAM),
    "sarvam_moe-bias-yarn-groups": (
        "sarvam_moe",
        SARVAM
        | {"attention_bias": True, "use_qk_norm": False, "n_group": 4, "topk_group": 2, "n_shared_experts": 2}
        | {"rope_parameters": YARN},
    ),
    "solar_open": ("solar_open", SOLAR),
    "solar_open-bias-yarn-groups": (
        "solar_open",
        SOLAR | {"attention_bias": True, "n_group": 4, "topk_group": 2, "n_shared_experts": 2, "rope_parameters": YARN},
    ),
}
# Selections of 16 positions; enough heads that a score of exactly zero, which ties, is rare.
INDEXED: dict[str, Any] = DEEPSEEK | {"index_topk": 16, "index_n_heads": 16, "index_head_dim": 16}
LONG: dict[str, Any] = INDEXED | {
    "num_hidden_layers": 2,
    "index_topk": 2048,
    "max_position_embeddings": 2400,
    "n_group": 1,
    "topk_group": 1,
}
CASES |= {
    "deepseek_v32-yarn-groups": (
        "deepseek_v32",
        INDEXED | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "deepseek_v32-bias-one_group": (
        "deepseek_v32",
        INDEXED | {"n_group": 1, "topk_group": 1, "attention_bias": True, "index_topk": 21, "index_head_dim": 24},
    ),
    "deepseek_v32-2048": ("deepseek_v32", LONG),
    "glm_moe_dsa": ("glm_moe_dsa", INDEXED | {"n_group": 1, "topk_group": 1, "v_head_dim": 20, "rms_norm_eps": 1e-5}),
    "glm_moe_dsa-shared": (
        "glm_moe_dsa",
        INDEXED
        | {"num_hidden_layers": 5, "n_group": 1, "topk_group": 1}
        | {"indexer_types": ["full", "shared", "full", "shared", "shared"]},
    ),
    "glm_moe_dsa-2048-shared": ("glm_moe_dsa", LONG | {"num_hidden_layers": 3, "index_topk_freq": 2}),
}
LINEAR, FULL = "linear_attention", "full_attention"
DELTA: dict[str, Any] = (
    COMMON
    | EIGHT_OF_16
    | {
        "head_dim": 16,
        "shared_expert_intermediate_size": 40,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "linear_conv_kernel_dim": 4,
        "layer_types": [LINEAR, LINEAR, FULL],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    }
)
CASES |= {
    "qwen3_next": ("qwen3_next", DELTA | {"norm_topk_prob": True, "intermediate_size": 40}),
    "qwen3_next-dense-equal_heads-interval": (
        "qwen3_next",
        DELTA
        | {"norm_topk_prob": False, "intermediate_size": 40, "mlp_only_layers": [1], "linear_num_value_heads": 2}
        | {"layer_types": None, "full_attention_interval": 2, "linear_conv_kernel_dim": 3, "num_hidden_layers": 4}
        | {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}, "rms_norm_eps": 1e-5},
    ),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", DELTA),
    "qwen3_5_moe": (
        "qwen3_5_moe",
        DELTA | {"linear_num_value_heads": 6, "layer_types": [LINEAR, FULL, LINEAR], "moe_intermediate_size": 24},
    ),
}
# One mixer a layer: M Mamba-2, E experts, * attention, - a dense network.
NEMOTRON: dict[str, Any] = COMMON | {
    "layers_block_type": [LINEAR, "moe", LINEAR, FULL, "moe"],
    "num_hidden_layers": 5,
    "head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 40,
    "intermediate_size": 48,
    "routed_scaling_factor": 2.5,
    "mamba_num_heads": 8,
    "mamba_head_dim": 6,
    "n_groups": 4,
    "ssm_state_size": 10,
    "conv_kernel": 4,
}
CASES |= {
    "nemotron_h": ("nemotron_h", NEMOTRON),
    "nemotron_h-dense-groups-steps": (
        "nemotron_h",
        NEMOTRON
        | {"layers_block_type": ["moe", FULL, "mlp", LINEAR, LINEAR, "moe", FULL], "num_hidden_layers": 7}
        | {"n_group": 4, "topk_group": 2, "norm_topk_prob": False, "routed_scaling_factor": 1.0, "n_groups": 2}
        | {"time_step_min": 0.7, "conv_kernel": 3, "layer_norm_epsilon": 1e-4},
    ),
}
# Nemotron 3 Super and Ultra: experts compute in a latent width.
NEMOTRON_LATENT = NEMOTRON | {"moe_latent_size": 24}
CASES |= {
    "nemotron_h-latent": ("nemotron_h", NEMOTRON_LATENT),
    "nemotron_h-latent-wide-ends": (
        "nemotron_h",
        NEMOTRON_LATENT
        | {"layers_block_type": ["moe", LINEAR, "moe", FULL, "mlp", "moe"], "num_hidden_layers": 6}
        | {"moe_latent_size": 48, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 4},
    ),
}
# The library would save the experts of these one by one.
FUSED_ON_HUB = ("qwen3_5_moe",)
OFFSET_NORMS = ("qwen3_next", "qwen3_5_moe")
# Types that the library lacks, and the type that is the same arithmetic: the hub's files name its class.
SAME_AS = {"kimi_k2": "deepseek_v3"}
# Multimodal wrappers around a language model of another type, with small parts for images; only text is compared.
WRAPPERS: dict[str, tuple[str, dict[str, Any]]] = {
    "kimi_k25": (
        "deepseek_v3",
        {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 2},
    ),
    "qwen3_vl_moe": (
        "qwen3_vl_moe_text",
        {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2, "patch_size": 2}
        | {"out_hidden_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2, "patch_size": 2}
        | {"out_hidden_size": 32, "num_position_embeddings": 16},
    ),
}
KIMI: dict[str, Any] = DEEPSEEK | {
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "rms_norm_eps": 1e-5,
    "rope_parameters": YARN | {"beta_fast": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
}
CASES |= {
    "kimi_k2-yarn": ("kimi_k2", KIMI),
    "kimi_k2-no_q_latent": ("kimi_k2", KIMI | {"q_lora_rank": None, "n_shared_experts": 2, "rope_parameters": None}),
    "kimi_k25-yarn": ("kimi_k25", KIMI),
    "qwen3_vl_moe": (
        "qwen3_vl_moe",
        QWEN3
        | {"head_dim": 16, "mlp_only_layers": [0], "moe_intermediate_size": 24}  # shapes tell the layout of experts
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}},
    ),
}


@dataclass(frozen=True)
class Expected:
    """What transformers computes: per prompt log-probabilities of its tokens but the first, and greedy tokens.

    `rounding` is how far its float32 is from its float64: more where rounding is amplified, as by the norm of numbers
    that nearly cancel. `experts` and `weights` (tokens, MoE layers, K) are what its routers chose in float32 for all
    tokens of the prompts but the last of each, or for its only one.
    """

    float32: list[torch.Tensor]
    rounding: list[torch.Tensor]
    bfloat16: list[torch.Tensor]
    greedy: list[list[int]]
    experts: torch.Tensor
    weights: torch.Tensor


def prompts(case: str) -> list[list[int]]:
    """Random tokens; one prompt is longer than what an indexer of 2,048 positions chooses, where a case has one."""
    random = torch.Generator().manual_seed(11)
    lengths = LONG_LENGTHS if CASES[case][1].get("index_topk", 0) > max(LENGTHS) else LENGTHS + MORE_LENGTHS
    return [torch.randint(0, COMMON["vocab_size"], (length,), generator=random).tolist() for length in lengths]


def num_greedy(prompt: list[int]) -> int:
    """How many tokens continue a prompt; few of a long one, whose whole length the reference computes for each."""
    return NUM_GREEDY if len(prompt) < max(LONG_LENGTHS) else 3


def write_checkpoint(folder: Path, case: str) -> None:
    """Save a random model of the case as the hub has such: separate experts, weights that bfloat16 can hold."""
    model = _class_of(CASES[case][0]).from_config(_config(case), dtype=torch.float32)
    random = torch.Generator().manual_seed(sum(case.encode()))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if not name.endswith("inv_freq"):
                tensor.copy_(_values(name, tensor.shape, random, is_offset=CASES[case][0].startswith(OFFSET_NORMS)))
    model.save_pretrained(folder, save_original_format=CASES[case][0] not in FUSED_ON_HUB)
    if CASES[case][0] == "kimi_k25":
        name_layers(folder / "model.safetensors")
    if CASES[case][0].startswith("kimi"):
        write_as_kimi(folder)
    refuse_fused(folder)


def _config(case: str) -> Any:
    model_type, options = CASES[case]
    if model_type not in WRAPPERS:
        return AutoConfig.for_model(SAME_AS.get(model_type, model_type), **options)
    inner, vision = WRAPPERS[model_type]
    tied = options["tie_word_embeddings"]
    text = {"model_type": inner, **options}
    return AutoConfig.for_model(model_type, text_config=text, vision_config=vision, tie_word_embeddings=tied)


def _class_of(model_type: str) -> Any:
    return AutoModelForImageTextToText if model_type in WRAPPERS else AutoModelForCausalLM


def name_layers(path: Path) -> None:
    """The library saves Kimi's layers under the name that those of its images have; the hub has them as usual."""
    tensors = load_file(path)
    theirs, hub = "language_model.model.blocks.", "language_model.model.layers."
    save_file({name.replace(theirs, hub): one for name, one in tensors.items()}, path, metadata={"format": "pt"})


def write_as_kimi(folder: Path) -> None:
    """The hub calls the language model kimi_k2, spells its rotary embedding as it was, and holds the frequencies."""
    config = json.loads((folder / "config.json").read_text())
    inner = config.get("text_config", config)
    rope = inner.pop("rope_parameters")
    inner["model_type"], inner["rope_theta"] = "kimi_k2", rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    inner["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("kv_a_layernorm.weight")]:
        tensors[name.replace("kv_a_layernorm.weight", "rotary_emb.inv_freq")] = torch.ones(4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refuse_fused(folder: Path) -> None:
    """Fails unless the library wrote the names of the hub: one matrix an expert, but for families that join them."""
    names = load_file(folder / "model.safetensors")
    joined = [name for name in names if name.endswith("experts.gate_up_proj")]
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    assert bool(joined) == (model_type in ("gpt_oss", "qwen3_vl_moe", *FUSED_ON_HUB)), joined


def _values(name: str, shape: torch.Size, random: torch.Generator, *, is_offset: bool) -> torch.Tensor:
    """With `is_offset`, norms multiply by 1 plus their weights, but for those of the delta rule."""
    values = torch.randn(shape, generator=random)
    if name.endswith("correction_bias"):
        return values * 0.1
    if len(shape) == 1 or name.endswith("_bias"):
        is_factor = name.endswith("norm.weight") and not (is_offset and "linear_attn" not in name)
        values = values * 0.3 + (1.0 if is_factor else 0.0)
    else:
        inputs = shape[-2] if "experts" in name and "gpt_oss" in name else shape[-1]
        values = values * (1.5 if "embed" in name or "lm_head" in name else 1.2) * inputs**-0.5
    return values.bfloat16().float()


def expected(folder: Path, tokens: list[list[int]]) -> Expected:
    """The reference's answers; each precision is loaded anew, because casting a model ruins its rotary buffers."""
    with torch.no_grad():
        model = load(folder, torch.float32)
        choices = _record_routing(model)
        float32 = [_scores(model, prompt) for prompt in tokens]
        experts, weights = _by_token(choices, num_prompts=len(tokens))
        greedy = [_greedy(model, prompt) for prompt in tokens[: len(LENGTHS)]]
        model = load(folder, torch.bfloat16)
        bfloat16 = [_scores(model, prompt) for prompt in tokens]
        with InFloat64():
            model = load(folder, torch.float64)
            float64 = [_scores(model, prompt) for prompt in tokens]
    rounding = [(one - other).abs() for one, other in zip(float32, float64, strict=True)]
    return Expected(float32, rounding, bfloat16, greedy, experts, weights)


def load(folder: Path, dtype: torch.dtype, **options: Any) -> Any:
    """The reference of a checkpoint; only its plain experts compute in float64."""
    values = json.loads((folder / "config.json").read_text())
    model_type, inner = values["model_type"], values.get("text_config", values)
    if inner["model_type"] in SAME_AS:
        inner["model_type"] = SAME_AS[inner["model_type"]]
        options["config"] = AutoConfig.for_model(values.pop("model_type"), **values)
    if dtype == torch.float64:
        options["experts_implementation"] = "eager"
    model = _class_of(model_type).from_pretrained(folder, dtype=dtype, **options).eval()
    use_long_factors(model)
    return model


class InFloat64(TorchFunctionMode):
    """While it is active, what asks for float32 gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        options = {key: _widened(value) for key, value in (kwargs or {}).items()}
        return func(*(_widened(value) for value in args), **options)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def use_long_factors(model: Any) -> None:
    """The library chooses the frequencies of a long sequence, and then computes those of a short one."""
    for rotary in model.modules():
        if type(rotary).__name__ == "PhimoeRotaryEmbedding":
            rotary.rope_init_fn = lambda _config, rotary=rotary: (rotary.inv_freq, 1.0)


def _record_routing(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A list that gets the (experts, weights) that every MoE layer hands to its experts, in the order of the calls."""
    recorded: list[tuple[torch.Tensor, torch.Tensor]] = []

    def record(_module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        _, experts, weights = arguments
        recorded.append((experts, weights))

    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(record)
    return recorded


def _by_token(
    recorded: list[tuple[torch.Tensor, torch.Tensor]], *, num_prompts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Expected`, of prompts that went through the model one after another."""
    layers = len(recorded) // num_prompts
    prompts = [recorded[first : first + layers] for first in range(0, num_prompts * layers, layers)]
    whole = [[torch.stack([call[part] for call in calls], dim=1) for calls in prompts] for part in (0, 1)]
    experts, weights = (torch.cat([rows[: max(len(rows) - 1, 1)] for rows in of_part]) for of_part in whole)
    return experts, weights


def _scores(model: Any, prompt: list[int]) -> torch.Tensor:
    ids = torch.tensor([prompt])
    logprobs = torch.log_softmax(model(ids, use_cache=False).logits[0].float(), dim=-1)
    return logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0]


def _greedy(model: Any, prompt: list[int]) -> list[int]:
    """One prompt at a time and without a cache: the plainest path through the reference."""
    tokens = list(prompt)
    for _ in range(num_greedy(prompt)):
        tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]
