"""DPOTrainer on stored tokens and reference log-probabilities, with the pairs of a step in packed rows.

A packed step is one batch of Trainer's: all of this process's pairs. `PairTrainer` splits it into rows
(training/packed_rows.py), and adds up their gradients. A row's loss is TRL's on the row's pairs, weighted by their
share of the step, so the step's loss is the mean over its pairs. The SFT loss is a mean over tokens, and is weighted
by them. The losses that sort a batch (`_SORTED`) need the log-probabilities of the complete step: with several rows,
a first pass without gradients computes those and the loss's gradient, which the second pass carries into the weights.

On padded rows a step is Trainer's own: forwards of `per_device_train_batch_size` pairs, averaged.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from trl import DPOTrainer

from dice_py.compute.failures import is_out_of_memory
from dice_py.events import Report, no_report
from dice_py.models.packed_attention import use_packed_attention
from dice_py.models.transfer import to_device
from dice_py.storage.schemas import START_LOGPS
from dice_py.training.lean_layers import use_lean_layers
from dice_py.training.packed_forward import add_packed_forward
from dice_py.training.packed_rows import Pair, pack, row_tokens, split_step
from dice_py.training.pair_loss import Outputs, inputs_of_trl, pair_loss
from dice_py.training.pair_terms import PAIR_TERMS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SORTED = ("aot", "aot_unpaired")
_FURTHER = (*START_LOGPS, *PAIR_TERMS)
"""Columns of the training set that TRL does not know."""


@dataclasses.dataclass
class Step:
    """A packed step's batch, opaque to Trainer and accelerate."""

    pairs: list[Pair]


class PairTrainer(DPOTrainer):  # type: ignore[misc]
    """DPOTrainer on token ids with stored reference log-probabilities.

    Args:
        packed_tokens: tokens of a packed row; None for padded rows.
        report: receives a note when memory runs out.
        arguments: of DPOTrainer.
    """

    data_collator: Any
    loss_types: list[str]
    loss_weights: list[float]
    ld_alpha: float | None
    _signature_columns: list[str]
    aux_loss_enabled: bool
    pair_weights: torch.Tensor | None = None
    """(pairs,), of the batch whose loss is being computed (training/pair_loss.py)."""
    sft_weights: torch.Tensor | None = None
    """The same for the sft loss."""

    def __init__(self, *, packed_tokens: int | None = None, report: Report = no_report, **arguments: Any) -> None:
        self._fsdp = False
        self.packed_tokens = packed_tokens
        self.report = report
        self.packing: list[dict[str, Any]] = []
        """For each step: its number, and the pairs and tokens of its rows."""
        # The hash of all weights is the cache key of TRL's reference pass, which is not needed here.
        with (
            mock.patch("trl.trainer.dpo_trainer.hash_module", return_value=None),
            mock.patch("trl.trainer.dpo_trainer.add_fused_lm_head", add_packed_forward),
        ):
            super().__init__(**arguments)
        self.is_fsdp_enabled = self._fsdp
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            # Log-probabilities are summed in float32, and so are gradients over the ranks.
            plugin.mixed_precision_policy = dataclasses.replace(
                plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
            )
        self.collator_of_trl = self.data_collator
        self.data_collator = self.padded_collator
        if packed_tokens is not None:
            self.data_collator = lambda pairs: {"step": Step(pairs)}
            if self._can_be_lean():
                use_lean_layers(self.base_model)

    def _can_be_lean(self) -> bool:
        """Whether training is in float32, on a CPU, in one process (training/lean_layers.py)."""
        alone = self.accelerator.num_processes == 1 and not self.is_fsdp_enabled
        plain = self.base_model.dtype == torch.float32 and not (self.args.bf16 or self.args.fp16)
        return alone and plain and self.accelerator.device.type == "cpu"

    # --- hooks of TRL that do nothing here --------------------------------------------------------------------

    def _validate_args(self) -> None:
        super()._validate_args()
        # Under FSDP, TRL would load a reference model for its reference pass. Trainer has placed the policy by now,
        # so nothing else reads the flag until the trainer is built.
        self._fsdp, self.is_fsdp_enabled = self.is_fsdp_enabled, False

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        del processing_class, args, dataset_name
        return dataset  # The rows are token ids already.

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        del name, batch_size
        return dataset  # The score stage computed them.

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *_FURTHER]))

    # --- forwards ---------------------------------------------------------------------------------------------

    @property
    def base_model(self) -> PreTrainedModel:
        """The transformers model, without the wrappers of accelerate and PEFT."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "peft_config") else model

    def padded_collator(self, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
        """TRL's padded batch of pairs, and what else the training set says of them: (pairs,) float32 each."""
        batch: dict[str, torch.Tensor] = self.collator_of_trl(list(pairs))
        further = [name for name in _FURTHER if name in pairs[0]]
        return batch | {name: torch.tensor([float(pair[name]) for pair in pairs]) for name in further}

    def split(self, pairs: Sequence[Pair]) -> list[list[Pair]]:
        """The pairs of each forward: of a packed row, or of a padded micro-batch."""
        if self.packed_tokens is None:
            size = self.args.per_device_train_batch_size
            return [list(pairs[start : start + size]) for start in range(0, len(pairs), size)]
        return [[pairs[number] for number in row] for row in split_step(pairs, self.packed_tokens)]

    def inputs_of(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        """TRL's inputs for a forward of these pairs on this process's device; `packed` is the packed row, if any."""
        device = self.accelerator.device
        inputs = {name: to_device(value, device) for name, value in self.padded_collator(pairs).items()}
        if self.packed_tokens is not None:
            inputs["packed"] = pack(pairs, device)
        return inputs

    def packed_attention(self, inputs: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
        """The attention of a forward of `inputs`, and of its backward pass, which recomputes with checkpointing."""
        if "packed" not in inputs:
            return contextlib.nullcontext()
        return use_packed_attention(self.base_model, inputs["packed"].layout)

    def token_logps(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """(2 × pairs, longest sequence − 1) float32 in nats, zero outside of the responses: chosen, then rejected."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        row = {"packed": inputs["packed"]} if "packed" in inputs else {"attention_mask": inputs["attention_mask"]}
        with self.packed_attention(inputs), self.compute_loss_context_manager():
            logps: torch.Tensor = model(
                input_ids=inputs["input_ids"], labels=labels, use_cache=False, fused_lm_head=True, **row
            ).log_probs
        return logps

    def count_on_all_ranks(self, count: int) -> int:
        """The largest `count` of a rank. With sharded weights every rank must make as many forwards."""
        if self.accelerator.num_processes == 1:
            return count
        counts = self.accelerator.gather(torch.tensor([count], device=self.accelerator.device))
        return int(counts.max())

    # --- the step ---------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Trainer's step on padded rows; else all rows of a packed step. Returns the loss, which is a mean over pairs.

        A row that runs out of memory is split: the step starts again with rows of half the tokens, and so do all later
        ones. With several processes the error is raised, since the others wait in a collective operation.
        """
        if "step" not in inputs:
            loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
            return loss
        pairs = inputs["step"].pairs
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()
        while True:
            rows = self.split(pairs)
            recorded = {name: list(values) for name, values in self._metrics["train"].items()}
            try:
                loss = self._packed_step(model, rows)
                break
            except Exception as error:
                splits = any(len(row) > 1 for row in rows) and self.accelerator.num_processes == 1
                if not is_out_of_memory(error) or not splits:
                    raise
            # Outside the handler, whose traceback holds the tensors of the failed forward.
            self._metrics["train"] = defaultdict(list, recorded)
            self._halve(model, rows)
        self._record_packing(rows)
        return loss

    def _halve(self, model: Any, rows: list[list[Pair]]) -> None:
        largest = max(row_tokens(row) for row in rows if len(row) > 1)
        self.packed_tokens = max(1, largest // 2)
        self.report(
            "note",
            text=f"out of memory with {largest} tokens in a packed row; training goes on with {self.packed_tokens}",
        )
        model.zero_grad(set_to_none=True)
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()

    def _record_packing(self, rows: list[list[Pair]]) -> None:
        sizes = {"pairs": [len(row) for row in rows], "tokens": [row_tokens(row) for row in rows]}
        self.packing.append({"step": self.state.global_step + 1, **sizes})

    def _packed_step(self, model: Any, rows: list[list[Pair]]) -> torch.Tensor:
        """Adds the gradients of all rows to those of the weights; returns the step's loss."""
        number = len(rows)
        if self.is_fsdp_enabled:
            rows = rows + [rows[0]] * (self.count_on_all_ranks(number) - number)  # forwards whose weight is 0
        shares = self._shares(rows, number)
        if number > 1 and any(name in _SORTED for name in self.loss_types):
            return self._sorted_step(model, rows, number)
        total = torch.zeros((), device=self.accelerator.device)
        weights = list(self.loss_weights)
        try:
            for at, (row, share) in enumerate(zip(rows, shares, strict=True)):
                inputs = self.inputs_of(row)
                self.loss_weights = [weight * part for weight, part in zip(weights, share, strict=True)]
                last = at == len(rows) - 1
                with self._synchronized(model, last), self.packed_attention(inputs):
                    with self.compute_loss_context_manager():
                        loss = self._compute_loss(model, inputs, False, record=at < number)
                    self.accelerator.backward(loss)
                total += loss.detach()
        finally:
            self.loss_weights = weights
        return total

    def _shares(self, rows: list[list[Pair]], number: int) -> list[list[float]]:
        """For each row, the factor of each loss type: its share of the step's pairs, or for `sft` of chosen tokens."""
        pairs = sum(len(row) for row in rows[:number])
        chosen = [sum(len(pair["chosen_ids"]) for pair in row) for row in rows]
        tokens = float(sum(chosen[:number]))
        if "sft" in self.loss_types and self.accelerator.num_processes > 1:
            # Gradients are averaged over the ranks, and the SFT loss over the tokens of all.
            counts = self.accelerator.gather(torch.tensor([tokens], device=self.accelerator.device))
            tokens = counts.mean().item()
        return [
            [chosen[at] / tokens if name == "sft" else len(row) / pairs for name in self.loss_types]
            if at < number
            else [0.0] * len(self.loss_types)
            for at, row in enumerate(rows)
        ]

    def _synchronized(self, model: Any, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients are exchanged between the ranks in the last backward pass of a step."""
        context: contextlib.AbstractContextManager[Any] = self.accelerator.no_sync(model)
        return contextlib.nullcontext() if last else context

    def _sorted_step(self, model: Any, rows: list[list[Pair]], number: int) -> torch.Tensor:
        """A step of a loss that depends on which pairs are in a batch, in two passes."""
        inputs = [self.inputs_of(row) for row in rows]
        with torch.no_grad():
            parts = [self.token_logps(model, part) for part in inputs]
        whole = self.padded_collator([pair for row in rows[:number] for pair in row])
        whole = {name: to_device(value, self.accelerator.device) for name, value in whole.items()}
        width = whole["input_ids"].shape[1] - 1
        padded = [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts[:number]]
        chosen, rejected = zip(*(part.chunk(2) for part in padded), strict=True)
        logps = torch.cat([*chosen, *rejected]).requires_grad_()
        loss = self._compute_loss(lambda **_: Outputs(logps), whole, False)
        loss.backward()
        assert logps.grad is not None
        sizes = [len(row) for row in rows[:number]]
        gradients = [half.split(sizes) for half in logps.grad.chunk(2)]
        for at, part in enumerate(inputs):
            with self._synchronized(model, at == len(inputs) - 1), self.packed_attention(part):
                again = self.token_logps(model, part)
                carried = torch.zeros_like(again)
                if at < number:
                    carried = torch.cat([half[at] for half in gradients])[:, : again.shape[1]]
                self.accelerator.backward((again * carried).sum())
        return loss.detach()

    # --- loss and metrics -------------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool, *, record: bool = True) -> Any:
        """TRL's loss. Its parts are recorded on the device, and are read when they are logged."""
        if return_outputs:
            return super()._compute_loss(model, inputs_of_trl(self, inputs), return_outputs)
        loss, parts = pair_loss(self, model, inputs)
        if record:
            values = {name: value.detach() for name, value in parts.items()}
            chosen, rejected = (self.beta * values[f"{side}_logratios"] for side in ("chosen", "rejected"))
            recorded = {
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/accuracies": (chosen > rejected).float(),
                "rewards/margins": chosen - rejected,
                "logps/chosen": values["chosen_logps"],
                "logps/rejected": values["rejected_logps"],
            }
            start = inputs.get(START_LOGPS[0])
            if start is None or self.ld_alpha is None:  # with ld_alpha, sums of the start are not of the same tokens
                change = values["chosen_logratios"] if start is None else values["chosen_logps"] - start
                recorded["logps/chosen_change"] = change
            metrics = self._metrics["train" if self.model.training else "eval"]
            for name, value in recorded.items():
                metrics[name].append(value)
            metrics["num_tokens"].append(inputs["attention_mask"].sum()[None])
        return loss

    def count_tokens_on(self, log: list[dict[str, Any]]) -> None:
        """A resumed training counts its tokens on from the log of its checkpoint, where TRL begins at 0."""
        self._total_train_tokens = int(next((each["num_tokens"] for each in reversed(log) if "num_tokens" in each), 0))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's logging, of means over the pairs of all ranks since the last one; `num_tokens` is a running sum."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name in list(metrics):
            if not metrics[name] or not isinstance(metrics[name][0], torch.Tensor):
                continue
            values = torch.cat(metrics[name]).double()
            own = torch.stack([values.sum(), values.new_tensor(len(values))])
            total = self.accelerator.gather(own[None]).sum(dim=0)
            if name == "num_tokens":
                self._total_train_tokens += int(total[0])
                metrics[name] = [self._total_train_tokens]
            else:
                metrics[name] = [(total[0] / total[1]).item()]
        super().log(logs, start_time)
