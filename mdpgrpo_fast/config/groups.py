"""The knobs by what they are for, in the order of `--help`."""

GROUPS: dict[str, tuple[str, ...]] = {
    name: tuple(knobs.split())
    for name, knobs in {
        "method": """preset dual_anchor dual_anchor_alpha goal_mean goal_std group_std prospect prospect_beta
            prospect_gain prospect_loss prospect_on_goal asymmetric_kl kl_beta_pos kl_beta_neg kl_estimator
            kl_temperature temperature_objective rescale_per_row importance_weight_cap importance_level
            epsilon_low epsilon_high delta aggregation horizon mask_truncated
            loss sapo_temperature_pos sapo_temperature_neg vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg
            scale_rewards baseline multi_objective_aggregation advantage_clip kl_gradient kl_in
            entropy_coef entropy_target entropy_coef_delta entropy_coef_min entropy_coef_max top_entropy_quantile
            sampler_correction importance_weight_floor importance_weight_level importance_weight_kind
            off_policy_threshold truncated_logprobs sync_reference reference_mix""",
        "sampling": """num_generations multi_temperature temperatures temperature top_p top_k min_p
            max_completion_length repetition_penalty generation_kwargs refill seed""",
        "model and data": """model tokenizer train_file eval_file split eval_split prompt_column columns on_bad_row
            max_prompt_length chat_template system_prompt template_args strip_thinking text_only
            merge_adapter allow_random_weights trust_remote_code""",
        "rewards": """reward reward_weights constraint_reward rules instructions num_constraints reward_range
            reward_isolation reward_timeout reward_workers reward_memory reward_check on_bad_reward max_dropped
            keep_special_tokens""",
        "optimisation": """steps epochs prompts_per_step updates_per_rollout mini_batches learning_rate
            lr_schedule warmup_steps weight_decay adam_beta2 fused_adamw max_grad_norm max_bad_steps
            lora lora_r lora_alpha lora_target_modules""",
        "memory and speed": """dtype mixed_precision gradient_checkpointing packing tokens_per_micro_batch
            micro_batch_size eval_batch_size lm_head workspace_mb fp32_logits skip_idle attention compile""",
        "devices": "cpu backend cpu_linear rank_timeout",
        "vLLM": """rollout vllm_url vllm_memory vllm_sleep vllm_timeout vllm_retries vllm_sync_dir vllm_lora
            async_rollout""",
        "logging": "output_dir eval_every eval_samples report_to log_completions profile",
        "checkpoints": """save_model save_every keep_best resume push_to_hub hub_model_id
            hub_private_repo""",
    }.items()
}
# Left out of `--help`; `--help-all` has them.
ADVANCED = frozenset(
    """
    group_std prospect_on_goal kl_estimator kl_temperature rescale_per_row importance_weight_cap importance_level
    delta mask_truncated min_p columns split eval_split template_args text_only merge_adapter trust_remote_code
    instructions num_constraints reward_timeout reward_workers reward_check on_bad_reward max_dropped
    keep_special_tokens reward_isolation updates_per_rollout weight_decay adam_beta2 fused_adamw
    lora_target_modules micro_batch_size workspace_mb fp32_logits skip_idle compile cpu_linear vllm_memory
    vllm_sleep vllm_timeout vllm_retries vllm_sync_dir eval_samples log_completions profile save_model
    prospect_beta goal_mean goal_std strip_thinking attention refill max_grad_norm lora_alpha lm_head reward_range
    eval_batch_size on_bad_row sapo_temperature_pos sapo_temperature_neg vespo_k_pos vespo_lambda_pos vespo_k_neg
    vespo_lambda_neg horizon baseline multi_objective_aggregation advantage_clip kl_gradient kl_in entropy_target
    entropy_coef_delta entropy_coef_min entropy_coef_max top_entropy_quantile sampler_correction
    importance_weight_floor importance_weight_level importance_weight_kind off_policy_threshold sync_reference
    truncated_logprobs reference_mix repetition_penalty generation_kwargs mini_batches scale_rewards entropy_coef
    reward_memory chat_template hub_model_id hub_private_repo async_rollout vllm_lora rank_timeout max_bad_steps
    allow_random_weights
    """.split()
)
