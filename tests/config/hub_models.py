"""Values of configurations on the hub, model by model: not read from there, and without each key that says nothing.

Long lists are shortened to one repeated value.
"""

from typing import Any

NOISE = {"initializer_range": 0.02, "attention_dropout": 0.0, "use_cache": True, "torch_dtype": "bfloat16"}
QWEN = NOISE | {
    "decoder_sparse_step": 1, "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "use_sliding_window": False, "output_router_logits": False, "router_aux_loss_coef": 0.001, "vocab_size": 151936,
    "bos_token_id": 151643, "eos_token_id": 151645, "transformers_version": "4.51.0", "rope_theta": 1000000.0,
}  # fmt: skip
QWEN3_30B = QWEN | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False, "head_dim": 128,
    "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
    "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
    "rope_scaling": None, "sliding_window": None,
}  # fmt: skip
QWEN3_235B = QWEN3_30B | {
    "hidden_size": 4096, "intermediate_size": 12288, "max_window_layers": 94, "moe_intermediate_size": 1536,
    "num_attention_heads": 64, "num_hidden_layers": 94,
}  # fmt: skip
QWEN3_CODER = QWEN3_30B | {
    "hidden_size": 6144, "intermediate_size": 8192, "max_position_embeddings": 262144, "max_window_layers": 62,
    "moe_intermediate_size": 2560, "num_attention_heads": 96, "num_experts": 160, "num_hidden_layers": 62,
    "num_key_value_heads": 8, "qkv_bias": False, "rope_theta": 10000000, "shared_expert_intermediate_size": 0,
    "use_qk_norm": True,
}  # fmt: skip
QWEN3_CODER_30B = QWEN3_30B | {
    "intermediate_size": 5472, "max_position_embeddings": 262144, "max_window_layers": 28, "qkv_bias": False,
    "rope_theta": 10000000, "shared_expert_intermediate_size": 0, "use_qk_norm": True,
}  # fmt: skip
QWEN15_MOE = QWEN | {
    "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "hidden_size": 2048,
    "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21, "moe_intermediate_size": 1408,
    "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
    "num_hidden_layers": 24, "num_key_value_heads": 16, "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
}  # fmt: skip
QWEN2_57B = QWEN15_MOE | {
    "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28,
    "moe_intermediate_size": 2560, "num_attention_heads": 28, "num_experts": 64, "num_experts_per_tok": 8,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "shared_expert_intermediate_size": 20480,
    "sliding_window": 65536,
}  # fmt: skip
QWEN3_VL_30B = {
    "architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe", "image_token_id": 151655,
    "tie_word_embeddings": False, "transformers_version": "4.57.0.dev0", "video_token_id": 151656,
    "text_config": {key: value for key, value in QWEN3_30B.items() if key != "tie_word_embeddings"} | {
        "model_type": "qwen3_vl_moe_text", "max_position_embeddings": 262144, "rope_theta": 5000000,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    },
    "vision_config": {"depth": 27, "hidden_size": 1152, "patch_size": 16},
}  # fmt: skip
QWEN3_NEXT = QWEN | {
    "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next",
    "full_attention_interval": 4, "head_dim": 256, "hidden_size": 2048, "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_value_head_dim": 128, "max_position_embeddings": 262144, "mlp_only_layers": [],
    "moe_intermediate_size": 512, "norm_topk_prob": True, "num_attention_heads": 16, "num_experts": 512,
    "num_experts_per_tok": 10, "num_hidden_layers": 48, "num_key_value_heads": 2, "partial_rotary_factor": 0.25,
    "rope_scaling": None, "rope_theta": 10000000, "shared_expert_intermediate_size": 512,
}  # fmt: skip
QWEN35_TEXT = NOISE | {
    "model_type": "qwen3_5_moe_text", "attention_bias": False, "attn_output_gate": True, "dtype": "bfloat16",
    "eos_token_id": 248044, "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu", "hidden_size": 2048,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 10, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_value_head_dim": 128, "mamba_ssm_dtype": "float32", "max_position_embeddings": 262144,
    "mlp_only_layers": [], "moe_intermediate_size": 512, "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False, "num_attention_heads": 16, "num_experts": 256, "num_experts_per_tok": 8,
    "num_hidden_layers": 40, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512, "tie_word_embeddings": False, "vocab_size": 248320,
    "rope_parameters": {
        "mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25,
        "rope_theta": 10000000, "rope_type": "default",
    },
}  # fmt: skip
QWEN35 = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe", "image_token_id": 248056,
    "text_config": QWEN35_TEXT, "tie_word_embeddings": False, "video_token_id": 248057,
    "vision_config": {"depth": 27, "hidden_size": 1152, "patch_size": 16}, "vision_end_token_id": 248054,
    "vision_start_token_id": 248053,
}  # fmt: skip
QWEN35_397B = QWEN35 | {
    "text_config": QWEN35_TEXT | {
        "hidden_size": 4096, "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 15,
        "linear_num_value_heads": 64, "moe_intermediate_size": 1024, "num_attention_heads": 32, "num_experts": 512,
        "num_experts_per_tok": 10, "num_hidden_layers": 60, "shared_expert_intermediate_size": 1024,
    },
}  # fmt: skip
NEMOTRON_NANO = {
    "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "attention_bias": False,
    "attention_dropout": 0.0, "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"},
    "bos_token_id": 1, "chunk_size": 128, "conv_kernel": 4, "eos_token_id": 2, "expand": 2, "head_dim": 128,
    "hidden_dropout": 0.0, "hidden_size": 2688, "initializer_range": 0.02, "intermediate_size": 1856,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", "layer_norm_epsilon": 1e-5,
    "mamba_head_dim": 64, "mamba_hidden_act": "silu", "mamba_num_heads": 64, "mamba_proj_bias": False,
    "mamba_ssm_cache_dtype": "float32", "max_position_embeddings": 262144, "mlp_bias": False,
    "mlp_hidden_act": "relu2", "moe_intermediate_size": 1856, "moe_shared_expert_intermediate_size": 3712,
    "n_group": 1, "n_groups": 8, "n_routed_experts": 128, "n_shared_experts": 1, "norm_eps": 1e-5,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_experts_per_tok": 6, "num_hidden_layers": 52,
    "num_key_value_heads": 2, "num_logits_to_keep": 1, "pad_token_id": 0, "partial_rotary_factor": 1.0,
    "rescale_prenorm_residual": True, "residual_in_fp32": False, "rope_theta": 10000, "routed_scaling_factor": 2.5,
    "sliding_window": None, "ssm_state_size": 128, "tie_word_embeddings": False, "time_step_floor": 0.0001,
    "time_step_max": 0.1, "time_step_min": 0.001, "topk_group": 1, "torch_dtype": "bfloat16", "use_bias": False,
    "use_cache": True, "use_conv_bias": True, "use_mamba_kernels": True, "vocab_size": 131072,
}  # fmt: skip
NEMOTRON_SUPER = NEMOTRON_NANO | {
    "hidden_size": 4096, "intermediate_size": 2688,
    "hybrid_override_pattern": "MEMEMEM*" + "EMEMEMEM*" * 2 + "EMEMEMEMEM*" * 4 + "EMEMEMEM*EMEMEMEME",
    "mamba_num_heads": 128, "moe_intermediate_size": 2688, "moe_latent_size": 1024,
    "moe_shared_expert_intermediate_size": 5376, "moe_shared_expert_overlap": False, "n_routed_experts": 512,
    "mtp_hybrid_override_pattern": "*E", "num_experts_per_tok": 22, "num_hidden_layers": 88,
    "num_nextn_predict_layers": 1, "routed_scaling_factor": 5.0,
}  # fmt: skip
OLMOE = NOISE | {
    "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "attention_bias": False, "clip_qkv": None,
    "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 1024,
    "max_position_embeddings": 4096, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64,
    "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16, "output_router_logits": False,
    "pad_token_id": 1, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False, "vocab_size": 50304,
}  # fmt: skip
MIXTRAL = NOISE | {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
    "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32000,
}  # fmt: skip
MIXTRAL_8X22B = MIXTRAL | {
    "hidden_size": 6144, "intermediate_size": 16384, "max_position_embeddings": 65536, "num_attention_heads": 48,
    "num_hidden_layers": 56, "router_jitter_noise": 0.0, "vocab_size": 32768,
}  # fmt: skip
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
V3_YARN = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
DEEPSEEK_V3 = NOISE | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "bos_token_id": 0, "eos_token_id": 1,
    "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "moe_layer_freq": 1,
    "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "quantization_config": BLOCKS,
    "rms_norm_eps": 1e-6, "rope_scaling": V3_YARN, "rope_theta": 10000, "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc",
    "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
DEEPSEEK_V2 = DEEPSEEK_V3 | {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "aux_loss_alpha": 0.001, "n_group": 8,
    "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_size": 5120,
    "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_routed_experts": 160, "n_shared_experts": 2,
    "norm_topk_prob": False, "num_experts_per_tok": 6, "num_hidden_layers": 60, "pretraining_tp": 1,
    "num_nextn_predict_layers": None, "quantization_config": None, "routed_scaling_factor": 16.0,
    "rope_scaling": V3_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}, "scoring_func": "softmax", "seq_aux": True,
    "topk_group": 3, "topk_method": "group_limited_greedy", "vocab_size": 102400,
}  # fmt: skip
DEEPSEEK_V2_LITE = DEEPSEEK_V2 | {
    "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_group": 1,
    "n_routed_experts": 64, "num_attention_heads": 16, "num_hidden_layers": 27, "num_key_value_heads": 16,
    "q_lora_rank": None, "routed_scaling_factor": 1.0, "topk_group": 1, "topk_method": "greedy",
}  # fmt: skip
MOONLIGHT = DEEPSEEK_V3 | {
    "aux_loss_alpha": 0.001, "bos_token_id": 163584, "eos_token_id": 163585, "first_k_dense_replace": 1,
    "hidden_size": 2048, "intermediate_size": 11264, "max_position_embeddings": 8192, "moe_intermediate_size": 1408,
    "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "num_attention_heads": 16, "num_experts_per_tok": 6,
    "num_hidden_layers": 27, "num_key_value_heads": 16, "num_nextn_predict_layers": 0, "q_lora_rank": None,
    "quantization_config": None, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446, "seq_aux": True, "topk_group": 1, "vocab_size": 163840,
}  # fmt: skip
DEEPSEEK_V32 = DEEPSEEK_V3 | {
    "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "index_head_dim": 128,
    "index_n_heads": 64, "index_topk": 2048, "quantization_config": BLOCKS | {"scale_fmt": "ue8m0"},
}  # fmt: skip
KIMI_K2 = DEEPSEEK_V3 | {
    "model_type": "kimi_k2", "aux_loss_alpha": 0.001, "bos_token_id": 163584, "eos_token_id": 163585, "seq_aux": True,
    "first_k_dense_replace": 1, "max_position_embeddings": 131072, "n_group": 1, "n_routed_experts": 384,
    "num_attention_heads": 64, "num_key_value_heads": 64, "num_nextn_predict_layers": 0, "rope_theta": 50000.0,
    "rope_scaling": V3_YARN | {"factor": 32.0, "beta_fast": 1.0}, "routed_scaling_factor": 2.827, "topk_group": 1,
    "vocab_size": 163840,
}  # fmt: skip
KIMI_INT4 = {
    "config_groups": {
        "group_0": {
            "input_activations": None, "output_activations": None, "targets": ["Linear"],
            "weights": {
                "actorder": None, "block_structure": None, "dynamic": False, "group_size": 32, "num_bits": 4,
                "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int",
            },
        }
    },
    "format": "pack-quantized", "ignore": ["lm_head", "re:.*self_attn.*"], "kv_cache_scheme": None,
    "quant_method": "compressed-tensors", "quantization_status": "compressed",
}  # fmt: skip
KIMI_K2_THINKING = KIMI_K2 | {
    "max_position_embeddings": 262144, "rms_norm_eps": 1e-5, "quantization_config": KIMI_INT4,
    "rope_scaling": V3_YARN | {"factor": 64.0, "beta_fast": 32.0},
}  # fmt: skip
# What older versions of transformers write into an inner configuration: the defaults of generation.
DEFAULTS = {
    "add_cross_attention": False, "chunk_size_feed_forward": 0, "diversity_penalty": 0.0, "do_sample": False,
    "id2label": {"0": "LABEL_0"}, "is_encoder_decoder": False, "label2id": {"LABEL_0": 0}, "length_penalty": 1.0,
    "max_length": 20, "no_repeat_ngram_size": 0, "num_beams": 1, "output_attentions": False, "return_dict": True,
    "temperature": 1.0, "tie_encoder_decoder": False, "top_k": 50, "top_p": 1.0, "typical_p": 1.0,
}  # fmt: skip
KIMI_K25 = {
    "architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "bos_token_id": 163584,
    "eos_token_id": 163585, "ignore_index": -100, "media_placeholder_token_id": 163605, "pad_token_id": 163839,
    "text_config": KIMI_K2_THINKING | DEFAULTS, "tie_word_embeddings": False, "use_unified_vision_chunk": True,
    "vision_config": {"patch_size": 14, "vt_hidden_size": 1152},
}  # fmt: skip
GLM_45 = NOISE | {
    "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "attention_bias": True, "pad_token_id": 151329,
    "eos_token_id": [151329, 151336, 151338], "first_k_dense_replace": 3, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 5120, "intermediate_size": 12288, "max_position_embeddings": 131072, "moe_intermediate_size": 1536,
    "n_group": 1, "n_routed_experts": 160, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 96,
    "num_experts_per_tok": 8, "num_hidden_layers": 92, "num_key_value_heads": 8, "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 1000000,
    "routed_scaling_factor": 2.5, "tie_word_embeddings": False, "topk_group": 1, "use_qk_norm": True,
    "vocab_size": 151552,
}  # fmt: skip
GLM_45_AIR = GLM_45 | {
    "first_k_dense_replace": 1, "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408,
    "n_routed_experts": 128, "num_hidden_layers": 46, "routed_scaling_factor": 1.0, "use_qk_norm": False,
}  # fmt: skip
CHANNEL_FP8 = {
    "config_groups": {
        "group_0": {
            "input_activations": {"dynamic": True, "num_bits": 8, "strategy": "token", "type": "float"},
            "targets": ["Linear"],
            "weights": {
                "actorder": None, "dynamic": False, "group_size": None, "num_bits": 8, "strategy": "channel",
                "symmetric": True, "type": "float",
            },
        }
    },
    "format": "float-quantized", "ignore": ["lm_head"], "kv_cache_scheme": None, "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}  # fmt: skip
GLM_47_FLASH = NOISE | {
    "architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite", "attention_bias": False,
    "eos_token_id": [154820, 154827, 154829], "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 10240, "kv_lora_rank": 512, "max_position_embeddings": 202752, "moe_intermediate_size": 1536,
    "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 20,
    "num_experts_per_tok": 4, "num_hidden_layers": 47, "num_key_value_heads": 20, "num_nextn_predict_layers": 1,
    "pad_token_id": 154820, "partial_rotary_factor": 1.0, "q_lora_rank": 768, "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 1000000,
    "routed_scaling_factor": 1.8, "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc",
    "v_head_dim": 256, "vocab_size": 154880,
}  # fmt: skip
GLM_5 = NOISE | {
    "architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa", "attention_bias": False,
    "eos_token_id": [154820, 154827, 154829], "ep_size": 1, "first_k_dense_replace": 3, "head_dim": 64,
    "hidden_act": "silu", "hidden_size": 6144, "index_head_dim": 128, "index_n_heads": 32, "index_topk": 2048,
    "indexer_rope_interleave": True, "intermediate_size": 12288, "kv_lora_rank": 512,
    "max_position_embeddings": 202752, "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 1,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 64,
    "num_experts_per_tok": 8, "num_hidden_layers": 78, "num_key_value_heads": 64, "num_nextn_predict_layers": 1,
    "pad_token_id": 154820, "pretraining_tp": 1, "q_lora_rank": 2048, "qk_head_dim": 256, "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-5, "rope_interleave": True,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}, "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc",
    "v_head_dim": 256, "vocab_size": 154880,
}  # fmt: skip
GLM_52 = GLM_5 | {
    "head_dim": 192, "index_share_for_mtp_iteration": True, "index_skip_topk_offset": 3, "index_topk_freq": 4,
    "index_topk_pattern": None, "indexer_types": ["full"] * 3 + (["shared"] * 3 + ["full"]) * 18 + ["shared"] * 3,
    "max_position_embeddings": 1048576, "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 75,
    "moe_router_dtype": "float32", "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
}  # fmt: skip
DOTS = NOISE | {
    "architectures": ["Dots1ForCausalLM"], "model_type": "dots1", "attention_bias": False, "eos_token_id": 151649,
    "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 10944,
    "max_position_embeddings": 32768, "max_window_layers": 62, "moe_intermediate_size": 1408, "moe_layer_freq": 1,
    "n_group": None, "n_routed_experts": 128, "n_shared_experts": 2, "norm_topk_prob": True, "num_attention_heads": 32,
    "num_experts_per_tok": 6, "num_hidden_layers": 62, "num_key_value_heads": 32, "rms_norm_eps": 1e-5,
    "rope_scaling": None, "rope_theta": 10000000, "routed_scaling_factor": 2.5, "scoring_func": "noaux_tc",
    "sliding_window": None, "tie_word_embeddings": False, "topk_group": None, "vocab_size": 152064,
}  # fmt: skip
ERNIE_21B = NOISE | {
    "architectures": ["Ernie4_5_MoeForCausalLM"], "model_type": "ernie4_5_moe", "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 2560, "intermediate_size": 12288, "max_position_embeddings": 131072,
    "moe_capacity": [64, 64, 64], "moe_gate": "topk", "moe_intermediate_size": 1536, "moe_k": 6,
    "moe_layer_end_index": 27, "moe_layer_interval": 1, "moe_layer_start_index": 1, "moe_num_experts": 64,
    "moe_num_shared_experts": 2, "moe_use_aux_free": True, "num_attention_heads": 20, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "num_nextn_predict_layers": 1, "pad_token_id": 0, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": True, "use_bias": False, "vocab_size": 103424,
}  # fmt: skip
ERNIE_300B = ERNIE_21B | {
    "hidden_size": 8192, "intermediate_size": 28672, "moe_intermediate_size": 3584, "moe_k": 8,
    "moe_layer_end_index": 53, "moe_layer_start_index": 3, "moe_num_shared_experts": 0, "num_attention_heads": 64,
    "num_hidden_layers": 54, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
PHI = NOISE | {
    "architectures": ["PhiMoEForCausalLM"], "model_type": "phimoe", "attention_bias": True, "bos_token_id": 1,
    "eos_token_id": 32000, "hidden_act": "silu", "hidden_dropout": 0.0, "hidden_size": 4096,
    "input_jitter_noise": 0.01, "intermediate_size": 6400, "lm_head_bias": True, "max_position_embeddings": 131072,
    "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "num_local_experts": 16, "original_max_position_embeddings": 4096, "output_router_logits": False,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "router_aux_loss_coef": 0.0, "router_jitter_noise": 0.01,
    "rope_scaling": {
        "long_factor": [2.0] * 64, "long_mscale": 1.243163121016122, "original_max_position_embeddings": 4096,
        "short_factor": [1.0] * 64, "short_mscale": 1.243163121016122, "type": "longrope",
    },
    "sliding_window": 131072, "tie_word_embeddings": False, "vocab_size": 32064,
}  # fmt: skip
GPT_OSS_20B = NOISE | {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True, "eos_token_id": 200002,
    "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
    "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072, "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
    "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False, "pad_token_id": 199999,
    "quantization_config": {"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"}, "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False,
    },
    "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
    "tie_word_embeddings": False, "vocab_size": 201088,
}  # fmt: skip
GPT_OSS_120B = GPT_OSS_20B | {
    "layer_types": ["sliding_attention", "full_attention"] * 18, "num_hidden_layers": 36, "num_local_experts": 128,
}  # fmt: skip
MINIMAX_M2 = NOISE | {
    "architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2", "attn_type_list": [1] * 62,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 1536,
    "max_position_embeddings": 196608, "mtp_transformer_layers": 1, "num_attention_heads": 48,
    "num_experts_per_tok": 8, "num_hidden_layers": 62, "num_key_value_heads": 8, "num_local_experts": 256,
    "num_mtp_modules": 3, "output_router_logits": False, "qk_norm_type": "per_layer",
    "quantization_config": BLOCKS | {"fmt": "float8_e4m3fn"}, "rms_norm_eps": 1e-6, "rope_theta": 5000000,
    "rotary_dim": 64, "router_jitter_noise": 0.0, "scoring_func": "sigmoid", "shared_intermediate_size": 0,
    "tie_word_embeddings": False, "use_mtp": True, "use_qk_norm": True, "use_routing_bias": True, "vocab_size": 200064,
}  # fmt: skip
SOLAR = NOISE | {
    "architectures": ["SolarOpenForCausalLM"], "model_type": "solar_open", "bos_token_id": 1, "eos_token_id": 2,
    "first_k_dense_replace": 0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 10240,
    "max_position_embeddings": 131072, "moe_intermediate_size": 1280, "n_routed_experts": 128, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 64, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 8, "partial_rotary_factor": 1.0, "rms_norm_eps": 1e-5, "rope_theta": 1000000,
    "rope_scaling": {"factor": 2.0, "original_max_position_embeddings": 65536, "type": "yarn"},
    "routed_scaling_factor": 1.0, "tie_word_embeddings": False, "vocab_size": 196608,
}  # fmt: skip
SARVAM_30B = NOISE | {
    "architectures": ["SarvamMoEForCausalLM"], "model_type": "sarvam_moe", "embedding_dropout": 0.0, "eos_token_id": 1,
    "first_k_dense_replace": 1, "head_dim": 64, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 8192,
    "max_position_embeddings": 131072, "max_window_layers": 19, "moe_intermediate_size": 1024,
    "moe_router_enable_expert_bias": True, "n_group": 1, "norm_topk_prob": True, "num_attention_heads": 64,
    "num_experts": 128, "num_experts_per_tok": 6, "num_hidden_layers": 19, "num_key_value_heads": 4,
    "num_shared_experts": 1, "output_dropout": 0.0, "output_router_logits": False, "pad_token_id": 0,
    "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 8000000.0, "routed_scaling_factor": 2.5,
    "score_function": "sigmoid", "tie_word_embeddings": False, "topk_group": 1, "use_bias": False, "use_qk_norm": True,
    "use_qkv_bias": False, "vocab_size": 262144,
}  # fmt: skip
HY3 = NOISE | {
    "architectures": ["HYV3ForCausalLM"], "model_type": "hy_v3", "attention_bias": False, "bos_token_id": 120000,
    "enable_moe_fp32_combine": True, "eos_token_id": 120025, "first_k_dense_replace": 1, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 13312, "max_position_embeddings": 131072,
    "mlp_bias": False, "moe_intermediate_size": 1536, "num_attention_heads": 64, "num_experts": 192,
    "num_experts_per_tok": 8, "num_hidden_layers": 80, "num_key_value_heads": 8, "num_nextn_predict_layers": 1,
    "num_shared_experts": 1, "rms_norm_eps": 1e-5, "rope_theta": 11158840.0, "router_scaling_factor": 2.826,
    "tie_word_embeddings": False, "vocab_size": 120832,
}  # fmt: skip
GPTQ = {
    "bits": 4, "checkpoint_format": "gptq", "damp_percent": 0.1, "desc_act": False, "group_size": 128,
    "lm_head": False, "pack_dtype": "int32", "quant_method": "gptq", "sym": True, "true_sequential": True,
}  # fmt: skip
AWQ = {
    "bits": 4, "group_size": 64, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm",
    "zero_point": True,
}  # fmt: skip
MODELOPT = {
    "ignore": ["lm_head"], "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    "producer": {"name": "modelopt", "version": "0.39.0"}, "quant_algo": "NVFP4", "quant_method": "modelopt",
}  # fmt: skip

Values = dict[str, Any]
READ: dict[str, Values] = {
    "Qwen/Qwen3-30B-A3B": QWEN3_30B,
    "Qwen/Qwen3-30B-A3B-FP8": QWEN3_30B | {"quantization_config": BLOCKS},
    "Qwen/Qwen3-30B-A3B-GPTQ-Int4": QWEN3_30B | {"quantization_config": GPTQ},
    "nvidia/Qwen3-30B-A3B-NVFP4": QWEN3_30B | {"quantization_config": MODELOPT},
    "Qwen/Qwen3-30B-A3B-Instruct-2507": QWEN3_30B | {"max_position_embeddings": 262144, "rope_theta": 10000000},
    "Qwen/Qwen3-235B-A22B": QWEN3_235B,
    "Qwen/Qwen3-235B-A22B-Instruct-2507": QWEN3_235B | {"max_position_embeddings": 262144, "rope_theta": 5000000},
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": QWEN3_CODER,
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": QWEN3_CODER_30B,
    "Qwen/Qwen3-VL-30B-A3B-Instruct": QWEN3_VL_30B,
    "Qwen/Qwen1.5-MoE-A2.7B": QWEN15_MOE,
    "Qwen/Qwen1.5-MoE-A2.7B-Chat-GPTQ-Int4": QWEN15_MOE | {"quantization_config": GPTQ},
    "Qwen/Qwen2-57B-A14B-Instruct": QWEN2_57B,
    "allenai/OLMoE-1B-7B-0924": OLMOE,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": MIXTRAL,
    "mistralai/Mixtral-8x22B-Instruct-v0.1": MIXTRAL_8X22B,
    "neuralmagic/Mixtral-8x7B-Instruct-v0.1-FP8": MIXTRAL
    | {"quantization_config": {"activation_scheme": "static", "ignored_layers": ["lm_head"], "quant_method": "fp8"}},
    "TheBloke/Mixtral-8x7B-Instruct-v0.1-GPTQ": MIXTRAL
    | {
        "pretraining_tp": 1,
        "quantization_config": GPTQ | {"desc_act": True, "group_size": -1, "model_name_or_path": ""},
    },
    "deepseek-ai/DeepSeek-V3": DEEPSEEK_V3,
    "cognitivecomputations/DeepSeek-V3-AWQ": DEEPSEEK_V3 | {"quantization_config": AWQ},
    "nvidia/DeepSeek-R1-NVFP4": DEEPSEEK_V3 | {"quantization_config": MODELOPT},
    "deepseek-ai/DeepSeek-V3.2": DEEPSEEK_V32,
    "deepseek-ai/DeepSeek-V2": DEEPSEEK_V2,
    "deepseek-ai/DeepSeek-V2-Lite": DEEPSEEK_V2_LITE,
    "moonshotai/Moonlight-16B-A3B": MOONLIGHT,
    "moonshotai/Kimi-K2-Instruct": KIMI_K2,
    "moonshotai/Kimi-K2-Thinking": KIMI_K2_THINKING,
    "moonshotai/Kimi-K2.5": KIMI_K25,
    "zai-org/GLM-4.5": GLM_45,
    "zai-org/GLM-4.5-Air": GLM_45_AIR,
    "zai-org/GLM-4.7-FP8": GLM_45 | {"max_position_embeddings": 202752, "quantization_config": CHANNEL_FP8},
    "zai-org/GLM-4.7-Flash": GLM_47_FLASH,
    "zai-org/GLM-5": GLM_5,
    "zai-org/GLM-5-FP8": GLM_5 | {"quantization_config": BLOCKS},
    "zai-org/GLM-5.2": GLM_52,
    "rednote-hilab/dots.llm1.inst": DOTS,
    "baidu/ERNIE-4.5-21B-A3B-PT": ERNIE_21B,
    "baidu/ERNIE-4.5-300B-A47B-PT": ERNIE_300B,
    "microsoft/Phi-3.5-MoE-instruct": PHI,
    "openai/gpt-oss-20b": GPT_OSS_20B,
    "openai/gpt-oss-120b": GPT_OSS_120B,
    "MiniMaxAI/MiniMax-M2": MINIMAX_M2,
    "upstage/Solar-Open-100B": SOLAR,
    "tencent/Hy3-preview": HY3,
    "sarvamai/sarvam-30b": SARVAM_30B,
    "Qwen/Qwen3-Next-80B-A3B-Instruct": QWEN3_NEXT,
    "Qwen/Qwen3-Next-80B-A3B-Instruct-FP8": QWEN3_NEXT | {"quantization_config": BLOCKS},
    "Qwen/Qwen3-Coder-Next": QWEN3_NEXT | {"rope_theta": 5000000},
    "Qwen/Qwen3.5-35B-A3B": QWEN35,
    "Qwen/Qwen3.5-35B-A3B-FP8": QWEN35 | {"quantization_config": BLOCKS},
    "Qwen/Qwen3.5-397B-A17B": QWEN35_397B,
    "Qwen/Qwen3.6-35B-A3B": QWEN35,
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": NEMOTRON_NANO,
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16": NEMOTRON_SUPER,
}
"""Models whose configurations are read."""

_DUAL_CHUNKS = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
REFUSED: dict[str, tuple[Values, str]] = {
    "Qwen/Qwen3-30B-A3B-Instruct-2507 with config_1m.json": (
        QWEN3_30B | {"max_position_embeddings": 1010000, "dual_chunk_attention_config": _DUAL_CHUNKS},
        "dual_chunk_attention_config is not supported beyond its 262144 original positions",
    ),
    "MiniMaxAI/MiniMax-Text-01": (MINIMAX_M2 | {"model_type": "minimax"}, "model_type 'minimax'"),
    "Intel/Qwen3-30B-A3B-int4-AutoRound": (
        QWEN3_30B | {"quantization_config": {"bits": 4, "group_size": 128, "quant_method": "auto-round"}},
        "quant_method is 'auto-round', only fp8",
    ),
    "mlx-community/Qwen3-30B-A3B-4bit": (
        QWEN3_30B | {"quantization": {"bits": 4, "group_size": 64}},
        "quantization = {'bits': 4, 'group_size': 64} is not known",
    ),
}
"""Models whose configurations are refused, and why."""
