"""Names of TRL, transformers' TrainingArguments and verl, and what each is here.

Sources: trl GRPOConfig, ModelConfig and ScriptArguments (1.16), transformers TrainingArguments (5), verl's
ppo_trainer.yaml. A name with dots is verl's, without `actor_rollout_ref.` at its beginning.
"""

from __future__ import annotations

_SAME = """
lr learning-rate | peak-lr learning-rate | num-train-epochs epochs | num-epochs epochs | max-steps steps |
model-name-or-path model | model-name model | model-path model | pretrained model | adapter-name-or-path model |
processing-class tokenizer | tokenizer-name-or-path tokenizer | dataset-name train-file | dataset train-file |
dataset-path train-file | train-dataset train-file | eval-dataset eval-file | dataset-train-split split |
dataset-split split | dataset-test-split eval-split | dataset-text-field prompt-column | reward-funcs reward |
reward-function reward | reward-model-name-or-path reward | per-device-eval-batch-size eval-batch-size |
num-iterations updates-per-rollout | ppo-epochs updates-per-rollout | importance-sampling-level importance-level |
loss-agg-mode aggregation | sync-ref-model sync-reference | ref-model-sync-steps sync-reference |
ref-model-mixup-alpha reference-mix | use-adaptive-entropy entropy-target | entropy-coeff entropy-coef |
use-bias-correction-kl kl-gradient | off-policy-mask-threshold off-policy-threshold |
vllm-importance-sampling-correction sampler-correction | vllm-importance-sampling-cap importance-weight-cap |
vllm-importance-sampling-clip-max importance-weight-cap | vllm-importance-sampling-clip-min importance-weight-floor |
num-mini-batches mini-batches | num-ppo-epochs updates-per-rollout |
algorithm.norm_adv_by_std_in_grpo scale-rewards | algorithm.use_kl_in_reward kl-in |
algorithm.kl_penalty kl-estimator | algorithm.rollout_correction.rollout_is importance-weight-level |
actor.entropy_coeff entropy-coef | actor.policy_loss.loss_mode loss | actor.kl_loss_type kl-estimator |
algorithm.rollout_correction.rollout_is_threshold importance-weight-cap |
mask-truncated-completions mask-truncated | save-steps save-every |
save-freq save-every | eval-steps eval-every | test-freq eval-every | resume-from-checkpoint resume |
lr-scheduler-type lr-schedule | use-peft lora | lora-rank lora-r | lora-target lora-target-modules |
attn-implementation attention | torch-dtype dtype | torch-compile compile |
num-completions-to-print log-completions | vllm-server-base-url vllm-url | vllm-server-host vllm-url |
vllm-server-port vllm-url | vllm-gpu-memory-utilization vllm-memory | gpu-memory-utilization vllm-memory |
vllm-enable-sleep-mode vllm-sleep | vllm-server-timeout vllm-timeout | logger report-to |
max-response-length max-completion-length | max-new-tokens max-completion-length |
max-length max-completion-length | group-size num-generations | n num-generations | num-samples num-generations
| chat-template-path chat-template | chat-template-kwargs template-args | logging-dir output-dir |
default-local-dir output-dir | data-seed seed | use-cpu cpu | no-cuda cpu | clip-ratio-c delta |
data.train_files train-file | data.val_files eval-file | data.train_batch_size prompts-per-step |
data.max_prompt_length max-prompt-length | data.max_response_length max-completion-length |
data.prompt_key prompt-column | model.path model | rollout.n num-generations | rollout.top_p top-p |
rollout.top_k top-k | rollout.name rollout | rollout.gpu_memory_utilization vllm-memory |
model.enable_gradient_checkpointing gradient-checkpointing | model.lora_rank lora-r |
model.lora_alpha lora-alpha | actor.optim.lr learning-rate | actor.optim.lr_warmup_steps warmup-steps |
actor.optim.weight_decay weight-decay | actor.ppo_epochs updates-per-rollout | actor.grad_clip max-grad-norm |
actor.clip_ratio_low epsilon-low | actor.clip_ratio_high epsilon-high | actor.clip_ratio_c delta |
actor.loss_agg_mode aggregation | actor.ppo_max_token_len_per_gpu tokens-per-micro-batch |
trainer.total_epochs epochs | trainer.total_training_steps steps | trainer.save_freq save-every |
trainer.test_freq eval-every | trainer.logger report-to | trainer.default_local_dir output-dir |
trainer.resume_mode resume | custom_reward_function.path reward | custom_reward_function.name reward |
run-name output-dir | project-name output-dir | device cpu | kl-beta kl-beta-pos |
max-seq-length max-completion-length | tasks suite | num-fewshot suite-fewshot | output-path output |
log-samples completions | num-return-sequences samples | include-path suite-tasks
"""
_KL = "--kl-beta-pos and --kl-beta-neg"
_STEP = "a step is --prompts-per-step prompts of --num-generations completions each"
_TOLD = {
    "beta": f"TRL's beta is {_KL}",
    "kl-coef": f"it is {_KL}",
    "kl-loss-coef": f"it is {_KL}",
    "actor.kl_loss_coef": f"it is {_KL}",
    "algorithm.kl_ctrl.kl_coef": "it is --kl-beta-pos, with --kl-in reward",
    "algorithm.adv_estimator": "it is --preset: grpo, dr_grpo, rloo, ..., or --baseline and --scale-rewards",
    "epsilon": "TRL's epsilon is --epsilon-low, and --epsilon-high above 1 (--loss cispo: its bound less 1)",
    "clip-ratio": "it is --epsilon-low and --epsilon-high",
    "actor.clip_ratio": "it is --epsilon-low and --epsilon-high",
    "loss-type": "TRL's loss_type is --aggregation: grpo, dapo, dr_grpo, bnpo; or --loss: cispo, sapo, luspo, vespo",
    "bf16": "it is --mixed-precision bf16",
    "fp16": "it is --mixed-precision fp16",
    "use-vllm": "it is --rollout vllm",
    "vllm-mode": "--vllm-url names a server; without it vLLM runs in this process",
    "vllm-importance-sampling-mode": "it is --importance-weight-level and --importance-weight-kind",
    "vllm-importance-sampling-min": "it is --importance-weight-floor",
    "ppo-mini-batch-size": f"{_STEP}; --mini-batches gives parts of it an update each",
    "num-train-samples": "it is --steps or --epochs",
    "per-device-train-batch-size": f"{_STEP}; --tokens-per-micro-batch bounds a pass",
    "train-batch-size": f"{_STEP}; --tokens-per-micro-batch bounds a pass",
    "batch-size": f"{_STEP}; --tokens-per-micro-batch bounds a pass",
    "gradient-accumulation-steps": f"{_STEP}, accumulated as --tokens-per-micro-batch needs it",
    "steps-per-generation": f"{_STEP}; --mini-batches gives parts of it an update each",
    "generation-batch-size": _STEP,
    "actor.ppo_mini_batch_size": f"{_STEP}; --mini-batches gives parts of it an update each",
    "actor.ppo_micro_batch_size_per_gpu": "it is --tokens-per-micro-batch",
    "rollout.temperature": "it is --temperature with --multi-temperature false, or --temperatures",
    "logging-steps": "every step is in metrics.jsonl and --report-to",
    "save-strategy": "it is --save-every",
    "eval-strategy": "it is --eval-every",
    "load-best-model-at-end": "it is --keep-best",
    "overwrite-output-dir": "an earlier run in --output-dir is moved aside",
    "logging-first-step": "every step is in metrics.jsonl and --report-to",
    "warmup-ratio": "it is --warmup-steps, a count and no share",
    "save-total-limit": "the newest two checkpoints are kept (--save-every)",
    "adam-beta1": "it is 0.9, as in transformers (--adam-beta2 may change)",
    "wandb-project": "`--report-to wandb` writes to the project mdpgrpo_fast",
    "vllm-tensor-parallel-size": "a server decides it (--vllm-url)",
    "num-gpus": "`torchrun` or `accelerate launch` decides it",
    "gradient-clip": "it is --max-grad-norm",
    "gen-kwargs": "sampling has --temperature, --top-p, --top-k and --min-p",
    "optim": "the optimiser is AdamW (--adam-beta2, --weight-decay, --fused-adamw)",
    "lora-dropout": "there is none: it would make the ratio differ from 1 on-policy (--lora)",
    "use-liger-kernel": "the objective is fused with the head already (--lm-head)",
    "use-liger-loss": "the objective is fused with the head already (--lm-head)",
    "use-flash-attention-2": "it is --attention flash_attention_2",
    "load-in-4bit": "quantised models are not trained; --lora and --dtype bfloat16 save memory",
    "load-in-8bit": "quantised models are not trained; --lora and --dtype bfloat16 save memory",
    "deepspeed": "`accelerate launch` with a file of mdpgrpo_fast/launch",
    "fsdp": "`accelerate launch` with a file of mdpgrpo_fast/launch",
    "hub-token": "`hf auth login` or HF_TOKEN in the environment gives it (--push-to-hub)",
    "hub-strategy": "the model is uploaded once, after the last step (--push-to-hub)",
    "dataset-config": "it follows the hub id behind a colon: --train-file ID:CONFIGURATION",
    "dataset-num-proc": "there is nothing to set",
    "trainer.n_gpus_per_node": "`accelerate launch` decides it",
    "trainer.nnodes": "`accelerate launch` decides it",
}


_HERE = {
    name: f"it is --{flag}" for name, flag in (pair.split() for pair in _SAME.replace("\n", " ").split("|"))
} | _TOLD


def names() -> list[str]:
    """All names that are known."""
    return list(_HERE)


def hint(name: str) -> str | None:
    """What a flag, a key of YAML or verl's dotted key is here, as a sentence; None for a name that is not known."""
    name = name.removeprefix("--").lstrip("+").removeprefix("actor_rollout_ref.")
    return _HERE.get(name if "." in name else name.replace("_", "-"))
