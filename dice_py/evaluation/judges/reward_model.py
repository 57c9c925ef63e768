"""A reward model as a judge: a sequence classifier of transformers with one label, which scores a conversation.

The conversation is rendered by the chat template of the model's own tokenizer, so the policy may have another. Nothing
is cut off: a conversation that is too long for the model is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl

from dice_py.compute.failures import is_out_of_memory
from dice_py.config.judges import RewardModelConfig
from dice_py.config.shared import ModelConfig
from dice_py.errors import DataError
from dice_py.evaluation.judges.base import ScoringJudge, conversations
from dice_py.events import Report, no_report
from dice_py.models.identity import model_identity
from dice_py.models.limits import check_positions
from dice_py.models.loading import release, release_held
from dice_py.models.sources import resolve_classifier
from dice_py.models.template_time import check_time_is_set
from dice_py.models.tokenization import encode_conversation, load_tokenizer
from dice_py.storage.keys import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class RewardModelJudge(ScoringJudge):
    """Scores responses by a reward model."""

    name: ClassVar[str] = "reward_model"

    model: Path
    """The folder."""
    config: RewardModelConfig
    models: ModelConfig
    """dtype, device, attention implementation, whether code of the model may run, and the template's time."""

    @staticmethod
    def of(config: RewardModelConfig, models: ModelConfig) -> RewardModelJudge:
        """The judge of a config section. It finds the model, and downloads it if it is an id of the hub.

        Raises:
            DataError: there is no such sequence classifier.
            UsageError: its chat template prints the time, and model.template_time is not set.
        """
        folder = resolve_classifier(config.model, config.revision, role="evaluate.judges.reward_model")
        check_time_is_set(models, folder, "evaluate.judges.reward_model")
        return RewardModelJudge(folder, config, models)

    def key_fields(self) -> dict[str, Any]:
        """The model, its precision, and what the template prints."""
        return {
            "model": model_identity(self.model),
            "precision": self.models.model_dump(include={"dtype", "device", "attn_implementation", "template_time"}),
            "versions": versions("torch", "transformers"),
        }

    def scores(self, prompts: pl.DataFrame, samples: pl.DataFrame, report: Report = no_report) -> pl.Series:
        """The model's score of each response, Float64.

        Raises:
            DataError: the template refuses a conversation, one is too long, or a score is not finite.
        """
        from dice_py.models.classifier import classifier_positions, load_classifier

        tokenizer = load_tokenizer(self.model, self.models, generates=False)
        ids = [
            encode_conversation(tokenizer, prompt, response, where)
            for where, prompt, response in conversations(prompts, samples)
        ]
        release_held()  # a policy of the stage before would take the memory
        model = load_classifier(self.model, self.models)
        check_positions(
            map(len, ids),
            classifier_positions(model),
            where="the responses to judge",
            model="the reward model",
            remedy="nothing is cut off: leave it out, sample shorter responses, or use a model with more positions",
            noun="response",
        )
        scores = [0.0] * len(ids)
        done = 0
        for rows, values in _batches(model, ids, self.config.token_budget, report):
            for row, value in zip(rows, values, strict=True):
                scores[row] = value
            done += len(rows)
            report("progress", stage="reward model", done=done, total=len(ids), unit="responses")
        device = model.device
        del model
        release(device)
        result = pl.Series(scores, dtype=pl.Float64)
        wrong = (~result.is_finite()).arg_true()
        if len(wrong):
            raise DataError(
                f"the reward model {self.model} gives response {wrong[0]} a score of {scores[wrong[0]]}, which is no "
                f"finite number ({len(wrong)} such); try --set model.dtype=float32"
            )
        return result


def _batches(
    model: PreTrainedModel, ids: Sequence[list[int]], token_budget: int, report: Report
) -> Iterator[tuple[list[int], list[float]]]:
    """Row numbers and scores, batch by batch, the longest first. A batch for which memory is too small is halved."""
    from dice_py.models.packing import batches_by_budget

    remaining = list(range(len(ids)))
    while remaining:
        # Batches are cut anew each time: the budget may have been halved.
        first = next(batches_by_budget([len(ids[row]) for row in remaining], token_budget))
        rows = [remaining[at] for at in first]
        try:
            values = _forward(model, [ids[row] for row in rows])
        except Exception as error:
            if not is_out_of_memory(error) or len(rows) == 1:
                raise
            values = None
        if values is None:  # outside the handler, whose traceback holds the tensors of the failed forward
            token_budget = len(rows) * len(ids[rows[0]]) // 2
            report("note", text=f"out of memory with {2 * token_budget} tokens in a batch; continuing with half of it")
            release(model.device)
            continue
        scored = set(rows)
        remaining = [row for row in remaining if row not in scored]
        yield rows, values


def _forward(model: PreTrainedModel, ids: Sequence[list[int]]) -> list[float]:
    """The scores of sequences, padded on the right."""
    import torch

    settings = model.config.get_text_config()
    own = settings.pad_token_id
    padding = own if own is not None else _unused_end(ids, settings.vocab_size)
    longest = max(map(len, ids))
    tokens = torch.full((len(ids), longest), padding)
    mask = torch.zeros((len(ids), longest), dtype=torch.long)
    for row, sequence in enumerate(ids):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    try:
        settings.pad_token_id = padding
        with torch.inference_mode():
            logits = model(input_ids=tokens.to(model.device), attention_mask=mask.to(model.device)).logits
    finally:
        settings.pad_token_id = own
    values: list[float] = logits[:, 0].double().tolist()
    return values


def _unused_end(ids: Sequence[list[int]], vocabulary: int) -> int:
    """A token with which none of the sequences ends.

    Decoders score at the last token that is no padding. A model without a padding token scores the last one, and so it
    must remain: a token that ends a sequence (the end-of-sequence token, usually) cannot be the padding.
    """
    ends = {sequence[-1] for sequence in ids}
    return next(token for token in range(vocabulary) if token not in ends)
