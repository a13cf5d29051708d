"""Keys of configurations that say nothing about what a model computes."""

_NAMES = """
_attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures attn_implementation auto_map
dtype finetuning_task id2label is_decoder is_encoder_decoder label2id model_type name_or_path prefix problem_type
task_specific_params tie_encoder_decoder tokenizer_class torch_dtype torchscript transformers_version
transformers.js_config unsloth_fixed unsloth_version use_bfloat16
"""
_TRAINING = """
attention_dropout aux_loss_alpha classifier_dropout embd_pdrop embedding_dropout ep_size fuse_linear fuse_ln
fuse_rms_norm fuse_rope fuse_softmax_mask fuse_swiglu gradient_checkpointing hidden_dropout hidden_dropout_prob
initializer_range input_jitter_noise moe_capacity moe_dropout_prob output_dropout output_router_logits pretraining_tp
resid_pdrop router_aux_loss_coef router_z_loss_coef seq_aux tf_legacy_loss
"""
_PREDICTED_TOKENS = """
mtp_loss_scaling_factor mtp_num_hidden_layers mtp_transformer_layers mtp_use_dedicated_embeddings num_mtp_layers
num_mtp_modules num_nextn_predict_layers use_mtp
"""
_TOKENS = """
audio_token_id cls_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id image_token_id mask_token_id
media_placeholder_token_id pad_token_id sep_token_id unk_token_id video_token_id vision_end_token_id
vision_start_token_id
"""
_GENERATION = """
bad_words_ids begin_suppress_tokens chunk_size_feed_forward diversity_penalty do_sample early_stopping
encoder_no_repeat_ngram_size exponential_decay_length_penalty length_penalty max_length max_new_tokens min_length
no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states output_scores
remove_invalid_values repetition_penalty return_dict return_dict_in_generate suppress_tokens temperature top_k top_p
typical_p use_cache
"""
_OTHER_ARCHITECTURES = "add_cross_attention cross_attention_hidden_size pruned_heads"

HARMLESS = frozenset(
    " ".join((_NAMES, _TRAINING, _PREDICTED_TOKENS, _TOKENS, _GENERATION, _OTHER_ARCHITECTURES)).split()
)
"""Names, training, further predicted tokens, tokens, generation, and what only other kinds of models have."""
