"""Ways to sum log-probabilities of stored responses: ours and those that it is compared with (benches/scoring.py).

Each takes a model and token ids, and returns the sums in the order of the responses with the seconds of the scoring.
The seconds exclude making models and building trainers.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from stock_trl import weights_not_hashed
from transformers import DynamicCache, PreTrainedModel

from dice_py.config.stages import ScoreConfig
from dice_py.models.packing import batches_by_budget, group_rows
from dice_py.scoring.lm_head import LogitHead
from dice_py.scoring.scorer import Scorer
from dice_py.scoring.token_budget import TokenBudget

DUMMY = [7, 8]
"""The tokens of the authors' "dummy response"."""


@dataclass
class Outcome:
    """Sums of log-probabilities in nats, and their cost."""

    sums: list[float]
    seconds: float
    extra: dict[str, Any] = field(default_factory=dict)


Way = Callable[[PreTrainedModel, list[list[int]], list[list[int]]], Outcome]
"""(model, prompts, responses) → outcome."""


def _synchronized_time(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def one_at_a_time(model: PreTrainedModel, prompts: list[list[int]], responses: list[list[int]]) -> Outcome:
    """One sequence, one plain forward, all logits, log-softmax in float32: the reference for the sums."""
    sums = []
    started = _synchronized_time(model.device)
    with torch.inference_mode():
        for prompt, response in zip(prompts, responses, strict=True):
            ids = torch.tensor([[*prompt, *response]], device=model.device)
            logps = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(dim=-1)
            sums.append(logps.gather(1, ids[0, len(prompt) :, None]).double().sum().item())
    return Outcome(sums, _synchronized_time(model.device) - started)


def authors(model: PreTrainedModel, prompts: list[list[int]], responses: list[list[int]]) -> Outcome:
    """As in the DICE authors' code: pairs of a response and a dummy response, one pair in a batch.

    Both sequences are padded to one length, a multiple of 8, and all logits are cast to float32 (LLaMA-Factory's
    `concatenated_forward`).
    """
    sums = []
    started = _synchronized_time(model.device)
    with torch.inference_mode():
        for prompt, response in zip(prompts, responses, strict=True):
            rows = [[*prompt, *response], [*prompt, *DUMMY]]
            longest = -(-max(map(len, rows)) // 8) * 8
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=model.device)
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=model.device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
            logps = logits[:, :-1].log_softmax(dim=-1).gather(2, ids[:, 1:, None]).squeeze(2)
            sums.append(logps[0, len(prompt) - 1 : len(rows[0]) - 1].sum().item())
    return Outcome(sums, _synchronized_time(model.device) - started)


def trl_precompute(model: PreTrainedModel, prompts: list[list[int]], responses: list[list[int]], batch: int) -> Outcome:
    """TRL's `precompute_ref_log_probs` on the same tokens, in batches of `batch` pairs; only the pass is timed."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    seconds = 0.0

    class Timed(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # already tokens

        def _precompute_ref_logps(self, *args: Any) -> Any:
            nonlocal seconds
            started = _synchronized_time(self.model.device)
            dataset = super()._precompute_ref_logps(*args)
            seconds += _synchronized_time(self.model.device) - started
            return dataset

    half = len(responses) // 2
    if len(responses) % 2 or any(prompts[2 * i] != prompts[2 * i + 1] for i in range(half)):
        raise ValueError("TRL scores pairs, so every prompt needs an even number of responses")
    rows = {"prompt_ids": prompts[::2], "chosen_ids": responses[::2], "rejected_ids": responses[1::2]}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 2}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    with tempfile.TemporaryDirectory() as folder, weights_not_hashed():
        # On disk, since the pass caches its result in a file beside the data.
        Dataset.from_dict(rows).save_to_disk(f"{folder}/pairs")
        trainer = Timed(
            # The trainer changes the model's forward, so it gets a copy (the weights are shared).
            model=copy.copy(model),
            args=DPOConfig(
                output_dir=folder,
                precompute_ref_log_probs=True,
                precompute_ref_batch_size=batch,
                per_device_train_batch_size=batch,
                max_length=None,
                bf16=model.dtype == torch.bfloat16,
                use_cpu=model.device.type == "cpu",
                gradient_checkpointing=False,
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=model.device.type != "cpu",
            ),
            train_dataset=Dataset.load_from_disk(f"{folder}/pairs"),
            processing_class=tokenizer,
        )
        dataset = trainer.train_dataset
        sums = [0.0] * len(responses)
        sums[::2], sums[1::2] = list(dataset["ref_chosen_logps"]), list(dataset["ref_rejected_logps"])
    return Outcome(sums, seconds)


def _score(model: PreTrainedModel, prompts: list[list[int]], responses: list[list[int]], packs: bool) -> Outcome:
    scorer = Scorer(model, ScoreConfig())
    # The trial of the packed forward runs before the measurement, on one prompt.
    first = prompts[0]
    pair = [row for row in range(len(prompts)) if prompts[row] == first][:2]
    scorer.sums([prompts[row] for row in pair], [responses[row] for row in pair])
    if packs and not scorer.packs:
        raise RuntimeError("the model cannot be scored with packed attention")
    scorer.packs = packs
    scorer.take_work()
    started = _synchronized_time(model.device)
    sums = scorer.sums(prompts, responses)
    seconds = _synchronized_time(model.device) - started
    return Outcome(sums, seconds, scorer.take_work() | {"token_budget": scorer.budget.tokens})


def ours(model: PreTrainedModel, prompts: list[list[int]], responses: list[list[int]]) -> Outcome:
    """Packed rows: no padding, and each prompt once for its responses."""
    return _score(model, prompts, responses, packs=True)


def ours_padded(model: PreTrainedModel, prompts: list[list[int]], responses: list[list[int]]) -> Outcome:
    """Our way for models without packed attention: rows sorted by length and padded, the same head."""
    return _score(model, prompts, responses, packs=False)


def key_value_cache(model: PreTrainedModel, prompts: list[list[int]], responses: list[list[int]]) -> Outcome:
    """Computes each prompt once into a key/value cache, which is repeated for its responses.

    Prompts of similar length share a batch, then their responses of similar length; the head is ours.
    """
    config = ScoreConfig()
    scorer = Scorer(model, config)
    head = LogitHead(model, config.logit_chunk)
    budget = TokenBudget("auto", scorer.shape, model.dtype, model.device, lambda *_, **__: None).tokens
    device = model.device
    sums = [0.0] * len(responses)
    started = _synchronized_time(device)
    groups = group_rows(prompts, range(len(prompts)))
    with torch.inference_mode():
        for taken in batches_by_budget([len(group.prompt) for group in groups], budget // 4):
            batch = [groups[at] for at in taken]
            longest = max(len(group.prompt) for group in batch)
            ids = torch.zeros((len(batch), longest), dtype=torch.long)
            mask = torch.zeros((len(batch), longest), dtype=torch.long)
            for at, group in enumerate(batch):  # on the left, so that prompts end where responses begin
                ids[at, longest - len(group.prompt) :] = torch.from_numpy(np.asarray(group.prompt))
                mask[at, longest - len(group.prompt) :] = 1
            ids, mask = ids.to(device), mask.to(device)
            cache = DynamicCache()
            last = head.backbone(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
            kept = [(layer.keys, layer.values) for layer in cache.layers]
            rows = [(at, row) for at, group in enumerate(batch) for row in group.rows]
            for part in batches_by_budget([len(responses[row]) for _, row in rows], budget):
                picked = [rows[number] for number in part]
                at = torch.tensor([group for group, _ in picked], device=device)
                size = max(len(responses[row]) for _, row in picked)
                answers = torch.zeros((len(picked), size), dtype=torch.long)
                real = torch.zeros((len(picked), size), dtype=torch.long)
                for number, (_, row) in enumerate(picked):
                    answers[number, : len(responses[row])] = torch.tensor(responses[row])
                    real[number, : len(responses[row])] = 1
                answers, real = answers.to(device), real.to(device)
                repeated = DynamicCache()
                for number, (keys, values) in enumerate(kept):
                    repeated.update(keys[at], values[at], number)
                lengths = mask[at].sum(1, keepdim=True)
                hidden = head.backbone(
                    input_ids=answers,
                    attention_mask=torch.cat([mask[at], real], dim=1),
                    position_ids=lengths + torch.arange(size, device=device),
                    past_key_values=repeated,
                    use_cache=True,
                ).last_hidden_state
                before = torch.cat([last[at][:, None], hidden[:, :-1]], dim=1)
                logps = head.token_logps(before[real.bool()], answers[real.bool()])
                counts = real.sum(1)
                totals = np.diff(logps.cpu().double().cumsum(0)[counts.cpu().cumsum(0) - 1].numpy(), prepend=0.0)
                for (_, row), total in zip(picked, totals.tolist(), strict=True):
                    sums[row] = total
    return Outcome(sums, _synchronized_time(device) - started)


WAYS: dict[str, tuple[str, Way]] = {
    "ours": ("dice: packed, each prompt once", ours),
    "ours_padded": ("dice, padded rows sorted by length", ours_padded),
    "key_value_cache": ("a key/value cache for each prompt, same head", key_value_cache),
    "trl_precompute": ("TRL's precompute_ref_log_probs, 8 pairs in a batch", partial(trl_precompute, batch=8)),
    "trl_precompute_1": ("TRL's precompute_ref_log_probs, 1 pair in a batch", partial(trl_precompute, batch=1)),
    "authors": ("the DICE authors' way: one, and a dummy response", authors),
    "one_at_a_time": ("one sequence at a time, all logits", one_at_a_time),
}
