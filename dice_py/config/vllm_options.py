"""Options of vLLM that `generate.sampling_params` and `generate.vllm.engine_args` do not pass on, with the reasons."""

from __future__ import annotations

OWN_SAMPLING_PARAMS = {
    "n": "it is generate.samples",
    "temperature": "it is generate.temperature",
    "top_p": "it is generate.top_p",
    "top_k": "it is generate.top_k",
    "max_tokens": "it is generate.max_new_tokens",
    "max_new_tokens": "it is generate.max_new_tokens",
    "seed": "each response's seed follows from seed, the run's",
    **dict.fromkeys(
        ("logprobs", "prompt_logprobs", "logprob_token_ids", "prompt_logprob_token_ids", "prompt_logprob_start",
         "flat_logprobs"),
        "the log-probabilities of the sampled tokens are always stored, and no others",
    ),
    "ignore_eos": "the model's stop tokens end a response; add others with stop_token_ids",
    **dict.fromkeys(
        ("detokenize", "include_stop_str_in_output"),
        "the text of a response is that of all of its tokens, a stop string included",
    ),
    **dict.fromkeys(
        ("output_kind", "stream_interval", "skip_clone", "output_text_buffer_length", "skip_reading_prefix_cache",
         "routed_experts_prompt_start"),
        "it is for servers, and changes no sample",
    ),
    "trace_decode_token_ids": "responses are sampled, not given",
    "structured_outputs": (
        "vLLM masks the logits before it takes their log-probabilities, which would then not be the policy's"
    ),
}  # fmt: skip
"""Options of vLLM's SamplingParams that this program sets itself, and why."""

OWN_ENGINE_ARGS = {
    "model": "it is model.policy",
    "tokenizer": "the tokenizer is the one in the policy's folder",
    "skip_tokenizer_init": "the tokenizer is the one in the policy's folder",
    "revision": "it is model.policy_revision",
    "dtype": "it is model.dtype",
    "trust_remote_code": "it is model.trust_remote_code",
    "seed": "it is seed, the run's",
    "max_model_len": "it is generate.vllm.max_model_len",
    "enforce_eager": "it is generate.vllm.enforce_eager",
    "tensor_parallel_size": "it is generate.vllm.tensor_parallel_size",
    "gpu_memory_utilization": "it is generate.vllm.gpu_memory_utilization",
    "max_num_seqs": "it is generate.vllm.max_num_seqs",
    "kv_cache_memory_bytes": "it is generate.vllm.kv_cache_gib",
    "kv_cache_memory": "it is generate.vllm.kv_cache_gib",
    "device": "it is model.device",
    **dict.fromkeys(
        ("pipeline_parallel_size", "data_parallel_size", "nnodes"),
        "a copy of the model is on generate.vllm.tensor_parallel_size GPUs, and each group of devices has its own copy",
    ),
    "generation_config": "the sampling is that of generate, and the model's generation_config.json is not read",
    "override_generation_config": "set generate.temperature, .top_p, .top_k and .sampling_params",
    "logprobs_mode": "the log-probabilities are those of the policy: before temperature, penalties and masks",
    "enable_prefix_caching": "the responses to a prompt share its prefill; it is always on",
    "runner": "the policy samples text",
    "task": "the policy samples text",
    "logits_processors": "what changes the logits is in generate.sampling_params",
}
"""Options of vLLM's LLM that this program sets itself, and why."""
