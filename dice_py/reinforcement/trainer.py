"""GRPOTrainer and RLOOTrainer on stored prompts, with this project's sampler and rewards.

Prompts are token ids, and stay so. The responses of a step are sampled at once, by the engine on transformers' models
(reinforcement/sampler.py) or by vLLM, which TRL keeps in the trainer's process; and they are rewarded in one call.
A step is made of responses that its own policy sampled, so that every ratio is 1 before the update.

This package relies on the following parts of TRL, of both trainers (tests/reinforcement/test_trl_contract.py):

    _tokenize_prompts(prompts)       token ids of the prompts, and no images
    _generate_single_turn(prompt_ids, …)
                                     token ids of the responses; GRPO also log-probabilities, which may be None
    reward functions                 are called with all responses of a step on this process, and `log_metric`; None
                                     is no reward
    _generate_and_score_completions  calls all of them, once a step where steps_per_generation is
                                     gradient_accumulation_steps
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl
import torch

from dice_py.events import Report
from dice_py.models.thinking import decode_responses
from dice_py.reinforcement.rewards import CUT_OFF, Responses, Rewards
from dice_py.reinforcement.sampler import PolicySampler
from dice_py.storage.keys import seed_for
from dice_py.training.step0 import computing_dtype, rounded_otherwise

with warnings.catch_warnings():
    # TRL says it again to a trainer that uses vLLM.
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM")
    from trl import GRPOTrainer, RLOOTrainer

if TYPE_CHECKING:
    from dice_py.generation.engines.base import Sample

_MEASURED = 16
"""Responses of each process, at most, whose log-probabilities are compared before the first step."""


class FirstRatio(NamedTuple):
    """How far the trainer's log-probabilities of the first responses are from those that they were sampled with.

    Attributes:
        max_abs_difference: of a response's log π, in nats.
        rms_difference: root mean square over the responses, in nats.
        spread: the same between two ways of rounding; 0 in float32 (training/step0.py).
        responses: that were compared.
    """

    max_abs_difference: float
    rms_difference: float
    spread: float
    responses: int


@dataclass(frozen=True)
class Rollouts:
    """What the responses of a training are sampled and rewarded with.

    Attributes:
        prompts: `prompt` (messages) and `prompt_ids`; the rows of the trainer's data set have their numbers.
        rewards: called once a step.
        sampler: None: TRL's vLLM.
        stops: token ids that end a response.
        max_new_tokens: most tokens of a response.
        thinking: the delimiters of thinking, which texts keep.
        seed: of the training; the responses of a step follow from it alone.
    """

    prompts: pl.DataFrame
    rewards: Rewards
    sampler: PolicySampler | None
    stops: frozenset[int]
    max_new_tokens: int
    thinking: list[str] | None
    seed: int


class OnPolicy:
    """What both trainers get: prompts that are token ids, the sampler, and the first ratio.

    Args:
        rollouts: what responses are sampled and rewarded with.
        on_first: receives the ratio before the first step, unless vLLM has sampled.
        report: receives what judges report.
        arguments: of the trainer of TRL's, without reward functions.
    """

    accelerator: Any
    model: Any
    model_wrapped: Any
    state: Any
    args: Any
    processing_class: Any
    compute_loss_context_manager: Callable[[], Any]
    add_callback: Any
    remove_callback: Any
    train: Any

    def __init__(
        self, *, rollouts: Rollouts, on_first: Callable[[FirstRatio], None], report: Report, **arguments: Any
    ) -> None:
        self.rollouts, self.on_first, self.report = rollouts, on_first, report
        self.packing: list[Any] = []
        """No step is packed."""
        self.sampled: list[Sample] = []
        """The responses of this process's last step."""
        super().__init__(reward_funcs=[self.reward], **arguments)  # type: ignore[call-arg]
        # Responses that were cut off have no reward, by design; TRL would warn of them at every step.
        logging.getLogger(type(self).__mro__[2].__module__).setLevel(logging.ERROR)

    @property
    def base_model(self) -> Any:
        """The model without the wrapper of several processes."""
        return self.accelerator.unwrap_model(self.model)

    # --- sampling ---------------------------------------------------------------------------------------------

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return prompts, None, {}

    def _generate_single_turn(self, prompt_ids: list[list[int]], *further: Any, **named: Any) -> Any:
        sampler = self.rollouts.sampler
        if sampler is None:
            return super()._generate_single_turn(prompt_ids, *further, **named)  # type: ignore[misc]
        sampler.update(self.base_model)
        step = self.state.global_step
        first = self.accelerator.process_index * len(prompt_ids)
        seeds = [seed_for(self.rollouts.seed, step, first + row) for row in range(len(prompt_ids))]
        self.sampled = sampler.sample(prompt_ids, seeds)
        ids = [sample.token_ids for sample in self.sampled]
        return (ids, None) if isinstance(self, GRPOTrainer) else ids

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        if self.state.global_step == 0 and self.rollouts.sampler is not None:
            self.on_first(self._first_ratio([row["prompt"] for row in inputs]))
        return output

    # --- rewards ----------------------------------------------------------------------------------------------

    def reward(
        self, *, completion_ids: list[list[int]], number: list[int], log_metric: Callable[[str, float], None], **_: Any
    ) -> list[float | None]:
        """The reward of each response of this process; None for those that were cut off, or cannot be rewarded.

        Args:
            completion_ids: token ids of the responses.
            number: of each one's prompt.
            log_metric: TRL's; it logs means over processes and steps.
        """
        texts = decode_responses(self.processing_class, completion_ids, self.rollouts.thinking)
        usable = [
            row for row, ids in enumerate(completion_ids) if len(ids) < self.rollouts.max_new_tokens or self._stops(ids)
        ]
        # TRL's own share of them knows the end-of-sequence token alone, and no other stop.
        log_metric(CUT_OFF, 1 - len(usable) / len(number))
        rewards: list[float | None] = [None] * len(number)
        if not usable:
            return rewards
        prompt_ids = self.rollouts.prompts["prompt_ids"]
        sampled = Responses(
            prompts=[prompt_ids[number[row]].to_list() for row in usable],
            responses=[completion_ids[row] for row in usable],
            texts=[texts[row] for row in usable],
            of_prompt=[number[row] for row in usable],
            messages=self.rollouts.prompts["prompt"],
        )
        for row, value in zip(usable, self.rollouts.rewards(sampled, self.report), strict=True):
            rewards[row] = value if math.isfinite(value) else None
        return rewards

    def _stops(self, ids: list[int]) -> bool:
        return bool(ids) and ids[-1] in self.rollouts.stops

    # --- the first ratio --------------------------------------------------------------------------------------

    def _first_ratio(self, prompts: list[list[int]]) -> FirstRatio:
        """Compares the trainer's own forward with the sampler, on the raw logits of both."""
        dtype = computing_dtype(self)
        differences, spreads = [], []
        for prompt, sample in list(zip(prompts, self.sampled, strict=True))[:_MEASURED]:
            logp = self._logp(prompt, sample.token_ids)
            differences.append(logp - sample.logp)
            if dtype != torch.float32:
                with rounded_otherwise(self.model_wrapped, dtype):
                    spreads.append(self._logp(prompt, sample.token_ids) - logp)
        own = torch.tensor(
            [[_squares(differences), _squares(spreads), len(differences), max(map(abs, differences))]],
            dtype=torch.float64,
            device=self.accelerator.device,
        )
        everyone = self.accelerator.gather(own)
        squares, spread_squares, count, _ = everyone.sum(dim=0).tolist()
        return FirstRatio(
            max_abs_difference=everyone[:, 3].max().item(),
            rms_difference=math.sqrt(squares / count),
            spread=math.sqrt(spread_squares / count),
            responses=int(count),
        )

    def _logp(self, prompt: list[int], response: list[int]) -> float:
        ids = torch.tensor([prompt + response], device=self.accelerator.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = self.model_wrapped(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        logps = torch.log_softmax(logits.float(), dim=-1)
        return float(logps.gather(1, ids[0, len(prompt) :, None]).double().sum().item())


def _squares(values: list[float]) -> float:
    return sum(value**2 for value in values)


class GrpoOnPolicy(OnPolicy, GRPOTrainer):  # type: ignore[misc]
    """Group relative policy optimization (Shao et al., arXiv 2402.03300), as TRL has it."""


class RlooOnPolicy(OnPolicy, RLOOTrainer):  # type: ignore[misc]
    """REINFORCE with a leave-one-out baseline (Ahmadian et al., arXiv 2402.14740), as TRL has it."""


TRAINERS = {"grpo": GrpoOnPolicy, "rloo": RlooOnPolicy}
"""By `train.mpo.trainer`."""
