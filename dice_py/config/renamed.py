"""Other names of config keys: those of version 0.1, and those of TRL, transformers and vLLM.

None of them is accepted. config/loading.py names the right key in its errors, and finds it in these tables.
"""

from __future__ import annotations

RENAMED_KEYS = {
    "devices.on_dead_group": "devices.on_worker_failure",
    "train.epochs": "train.num_train_epochs",
    "train.micro_batch_size": "train.per_device_train_batch_size",
    "train.lr_scheduler": "train.lr_scheduler_type",
}
"""Key in version 0.1 → key now."""

RENAMED_VALUES = {
    "devices.on_worker_failure": {"go_on": "continue", "stop": "abort"},
    "score.policy_logps": {"gate": "reuse_if_equal", "scored": "recompute"},
}
"""Key → value in version 0.1 → value now."""

# In the two tables below, a name without a section matches in every section.

ALIASES = {
    # The run
    "num_rounds": "rounds",
    "n_rounds": "rounds",
    "iterations": "rounds",
    "num_iterations": "rounds",
    "seed": "seed",
    "data_seed": "seed",
    "train.beta": "beta",
    # Models
    "model.name": "model.policy",
    "model.path": "model.policy",
    "model.model": "model.policy",
    "base_model": "model.policy",
    "policy_model": "model.policy",
    "model_name": "model.policy",
    "model_name_or_path": "model.policy",
    "name_or_path": "model.policy",
    "model_revision": "model.policy_revision",
    "revision": "model.policy_revision",
    "model_ref": "model.reference",
    "ref_model": "model.reference",
    "reference_model": "model.reference",
    "ref_model_name_or_path": "model.reference",
    "sft_model": "model.reference",
    "ref_model_revision": "model.reference_revision",
    "torch_dtype": "model.dtype",
    "precision": "model.dtype",
    "mixed_precision": "model.dtype",
    "attn_impl": "model.attn_implementation",
    "use_flash_attention_2": "model.attn_implementation",
    # Devices
    "gpu_ids": "devices.gpus",
    "num_gpus": "devices.gpus",
    "n_gpus": "devices.gpus",
    "devices.num_processes": "devices.cpu_processes",
    "max_retries": "devices.shard_attempts",
    # Data
    "data.path": "data.prompts",
    "data.dataset": "data.prompts",
    "data.train_file": "data.prompts",
    "dataset_name": "data.prompts",
    "dataset_path": "data.prompts",
    "prompt_file": "data.prompts",
    "data.pairs": "data.replay",
    "offline_pairs_file": "data.replay",
    "preference_dataset": "data.replay",
    "eval_dataset": "data.eval_prompts",
    "eval_file": "data.eval_prompts",
    "prompt_field": "data.prompt_column",
    "max_prompt_length": "data.max_prompt_tokens",
    # Generation
    "generate.n": "generate.samples",
    "generate.k": "generate.samples",
    "best_of": "generate.samples",
    "num_samples": "generate.samples",
    "num_generations": "generate.samples",
    "num_return_sequences": "generate.samples",
    "generate.max_tokens": "generate.max_new_tokens",
    "generate.max_length": "generate.max_new_tokens",
    "generate.max_completion_length": "generate.max_new_tokens",
    "generate.max_response_length": "generate.max_new_tokens",
    "backend": "generate.engine",
    "use_vllm": "generate.engine",
    "vllm_gpu_memory_utilization": "generate.vllm.gpu_memory_utilization",
    "vllm_tensor_parallel_size": "generate.vllm.tensor_parallel_size",
    "tp_size": "generate.vllm.tensor_parallel_size",
    "vllm_max_model_length": "generate.vllm.max_model_len",
    "vllm_max_model_len": "generate.vllm.max_model_len",
    "kv_cache_memory_bytes": "generate.vllm.kv_cache_gib",
    "generate.tensor_parallel_size": "generate.vllm.tensor_parallel_size",
    "generate.gpu_memory_utilization": "generate.vllm.gpu_memory_utilization",
    "generate.max_model_len": "generate.vllm.max_model_len",
    "generate.max_num_seqs": "generate.vllm.max_num_seqs",
    "generate.enforce_eager": "generate.vllm.enforce_eager",
    # Mining and replay
    "length_penalty": "mine.alpha",
    "margin_threshold": "mine.min_margin",
    "replay_ratio": "replay.gamma",
    "replay.ratio": "replay.gamma",
    "buffer_size": "replay.buffer.capacity",
    # Training
    "epochs": "train.num_train_epochs",
    "num_epochs": "train.num_train_epochs",
    "lr": "train.learning_rate",
    "lr_scheduler": "train.lr_scheduler_type",
    "micro_batch_size": "train.per_device_train_batch_size",
    "per_device_batch_size": "train.per_device_train_batch_size",
    "global_batch_size": "train.batch_size",
    "train_batch_size": "train.batch_size",
    "optimizer": "train.optim",
    "clip_grad_norm": "train.max_grad_norm",
    "gradient_clipping": "train.max_grad_norm",
    "rpo_alpha": "train.sft_weight",
    "peft_config": "train.lora.r",
    "use_peft": "train.lora.r",
    "lora_r": "train.lora.r",
    "lora_rank": "train.lora.r",
    "train.lora.rank": "train.lora.r",
    "lora_alpha": "train.lora.alpha",
    "lora_dropout": "train.lora.dropout",
    "lora_target_modules": "train.lora.target_modules",
    "train.max_completion_length": "train.max_length",
    "save_strategy": "train.save_steps",
    "logging_strategy": "train.logging_steps",
    "num_processes": "train.processes",
    "nproc_per_node": "train.processes",
    "world_size": "train.processes",
    "fsdp_config": "train.accelerate_config",
    "deepspeed_config": "train.accelerate_config",
}
"""Name in other libraries → our key with the same meaning."""

ANSWERS = {
    "gradient_accumulation_steps": (
        "it follows from train.batch_size (pairs per optimizer step), train.per_device_train_batch_size and the "
        "number of processes"
    ),
    "bf16": "all stages use one dtype: set model.dtype=bfloat16",
    "fp16": "all stages use one dtype: set model.dtype=float16",
    "warmup_ratio": "set train.warmup_steps: below 1 it is a share of the steps",
    "loss_type": "train.loss has the types with their weights, [{type: sigmoid, weight: 1.0}, …]",
    "loss_weights": "train.loss has the types with their weights, [{type: sigmoid, weight: 1.0}, …]",
    "precompute_ref_log_probs": "the reference's log-probabilities are always computed before training",
    "fsdp": "set train.strategy=fsdp2",
    "deepspeed": "set train.strategy=zero3, or name a file of accelerate's in train.accelerate_config",
    "load_in_4bit": "quantized models are not supported; model.dtype names the dtype",
    "load_in_8bit": "quantized models are not supported; model.dtype names the dtype",
    "output_dir": "the run folder is an option of the command line: dice run --run-dir FOLDER",
    "run_name": "the run folder is an option of the command line: dice run --run-dir FOLDER",
    "logging_dir": "logs are written into the run folder: dice run --run-dir FOLDER",
    "resume_from_checkpoint": "resume a run with: dice resume FOLDER",
    "eval_strategy": "each round is evaluated after training; see evaluate.prompts, .samples and .pairs",
    "eval_steps": "each round is evaluated after training; see evaluate.prompts, .samples and .pairs",
    "device_map": "set model.device to one device, or devices.gpus to the GPUs to use",
    "tokenizer": "the tokenizer is the one in the folder of model.policy",
    "tokenizer_name_or_path": "the tokenizer is the one in the folder of model.policy",
    "do_sample": "responses are always sampled; see generate.temperature, .top_p and .top_k",
    "num_beams": "responses are always sampled; see generate.temperature, .top_p and .top_k",
    **{
        name: f"set generate.sampling_params.{option}"
        for name, option in {
            **{
                name: name
                for name in (
                    "min_p",
                    "repetition_penalty",
                    "presence_penalty",
                    "frequency_penalty",
                    "stop",
                    "stop_token_ids",
                    "min_tokens",
                    "logit_bias",
                    "bad_words",
                    "allowed_token_ids",
                )
            },
            "stop_strings": "stop",
            "min_new_tokens": "min_tokens",
        }.items()
    },
    **{
        name: f"set generate.vllm.engine_args.{name}"
        for name in ("quantization", "kv_cache_dtype", "max_num_batched_tokens", "load_format", "cpu_offload_gb")
    },
    "generate.batch_size": "set generate.token_budget, the tokens of one batch",
    "score.batch_size": "set score.token_budget, the tokens of one batch",
    "per_device_eval_batch_size": "set score.token_budget, the tokens of one batch",
}
"""Name in other libraries → what to do instead, where no key of ours has the same meaning."""


def renaming(key: str, value: object = None) -> str | None:
    """The new name of a key or value of version 0.1, such as "train.epochs is now train.num_train_epochs".

    Args:
        key: the dotted key that the user wrote.
        value: the value that the user set.

    Returns:
        None if neither the key nor the value was renamed.
    """
    new_key = RENAMED_KEYS.get(key)
    new_value = RENAMED_VALUES.get(new_key or key, {}).get(value) if isinstance(value, str) else None
    if new_key is None:
        return f"{key}: {value!r} is now {new_value!r}" if new_value is not None else None
    return f"{key} is now {new_key}" + (f" ({value!r} is now {new_value!r})" if new_value is not None else "")


def foreign_name(key: str) -> str | None:
    """The end of a sentence about a key under a name of other libraries; None for an unknown name."""
    key = key.replace("-", "_")
    for name in (key, key.rpartition(".")[2]):
        if name in ALIASES:
            return f"here it is '{ALIASES[name]}'"
        if name in ANSWERS:
            return ANSWERS[name]
    return None
