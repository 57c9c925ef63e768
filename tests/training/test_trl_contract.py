"""What training/trainer.py relies on in the installed TRL: one test for each hook, name and output.

A version of TRL that fails one of these tests breaks training. Widen its range in pyproject.toml only if all pass.
"""

from __future__ import annotations

import inspect
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import trl
from packaging.requirements import Requirement
from places import ROOT
from tiny_sets import CPU, scored_pairs
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaModel, Trainer
from trl import DPOConfig, DPOTrainer
from trl.kernels import chunked_logprob
from trl.trainer import dpo_trainer
from trl.trainer import utils as trl_utils

from dice_py.config.training import LoraConfig, TrainConfig
from dice_py.training.dataset import COLUMNS
from dice_py.training.loss import FIRST_METRIC, LOSS_PARTS, loss_of_trl
from dice_py.training.pair_trainer import PairTrainer
from dice_py.training.trainer import build_trainer, trainer_arguments

CONFIG = TrainConfig(batch_size=4, per_device_train_batch_size=4, save_steps=None, warmup_steps=0)


@pytest.fixture(scope="module")
def pairs(llama: Path) -> pl.DataFrame:
    return scored_pairs(llama, 5)


def build(llama: Path, pairs: pl.DataFrame, out: Path, lora: LoraConfig | None = None) -> DPOTrainer:
    config = CONFIG.model_copy(update={"lora": lora})
    return build_trainer(config, CPU, policy=llama, pairs=pairs, folder=out, beta=0.1, seed=0)


@pytest.fixture(scope="module")
def trainer(llama: Path, pairs: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> DPOTrainer:
    return build(llama, pairs, tmp_path_factory.mktemp("trainer"))


def test_version_is_in_the_pinned_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = {Requirement(line).name: Requirement(line) for line in project["optional-dependencies"]["train"]}
    assert {bound.operator for bound in pinned["trl"].specifier} == {">=", "<"}
    assert trl.__version__ in pinned["trl"].specifier
    for name in ("torch", "transformers"):
        assert pinned[name].specifier.contains(version(name).partition("+")[0])


@pytest.mark.parametrize(
    ("hook", "parameters"),
    [
        ("_prepare_dataset", ["self", "dataset", "processing_class", "args", "dataset_name"]),
        ("_precompute_ref_logps", ["self", "dataset", "name", "batch_size"]),
        ("compute_loss_context_manager", ["self"]),
        ("_validate_args", ["self"]),
    ],
)
def test_hooks_have_their_parameters(hook: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(DPOTrainer, hook)).parameters) == parameters
    assert list(inspect.signature(getattr(PairTrainer, hook)).parameters) == parameters


def test_arguments_exist(tmp_path: Path) -> None:
    arguments = trainer_arguments(CONFIG, CPU, tmp_path, 0.1, 0, pairs=4)
    assert isinstance(arguments, DPOConfig)
    assert arguments.precompute_ref_log_probs
    assert arguments.max_length is None
    assert arguments.disable_dropout  # else the loss at step 0 is not ln 2
    assert arguments.loss_type == ["sigmoid"]
    weighted = trainer_arguments(CONFIG.model_copy(update={"sft_weight": 0.5}), CPU, tmp_path, 0.1, 0, pairs=4)
    assert (weighted.loss_type, weighted.loss_weights) == (["sigmoid", "sft"], [1.0, 0.5])


def test_dataset_is_unchanged(trainer: DPOTrainer, pairs: pl.DataFrame) -> None:
    assert trainer.train_dataset.column_names == COLUMNS
    assert pl.DataFrame(trainer.train_dataset.to_dict(), schema=pairs.schema).equals(pairs)


def test_batches_hold_the_stored_tokens_and_logps(trainer: DPOTrainer, pairs: pl.DataFrame) -> None:
    batch = trainer.padded_collator([trainer.train_dataset[row] for row in range(pairs.height)])
    assert set(batch) == {
        "input_ids",
        "attention_mask",
        "completion_mask",
        "ref_chosen_logps",
        "ref_rejected_logps",
    }
    prompts = pairs["prompt_ids"].to_list()
    answers = pairs["chosen_ids"].to_list() + pairs["rejected_ids"].to_list()  # the chosen come first
    for row, (prompt, answer) in enumerate(zip(prompts * 2, answers, strict=True)):
        seen = batch["attention_mask"][row].bool()
        assert seen.int().diff().le(0).all()  # padded on the right
        assert batch["input_ids"][row][seen].tolist() == prompt + answer
        assert batch["completion_mask"][row].tolist()[len(prompt) :][: len(answer)] == [1] * len(answer)
        assert batch["completion_mask"][row].sum() == len(answer)
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert batch[name].dtype == torch.float32
        assert batch[name].tolist() == pairs[name].to_list()


def test_batches_of_the_loader_are_the_collators(trainer: DPOTrainer, pairs: pl.DataFrame) -> None:
    logps = [pair["ref_chosen_logps"] for batch in trainer.get_train_dataloader() for pair in batch["step"].pairs]
    assert sorted(logps) == sorted(pairs["ref_chosen_logps"].to_list())


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoraConfig(r=2)], ids=["full", "lora"])
def test_no_reference_pass_and_no_tokenization(
    llama: Path,
    pairs: pl.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lora: LoraConfig | None,
) -> None:
    forward = LlamaModel.forward
    shapes: list[torch.Size] = []

    def spy(self: LlamaModel, *args: Any, **named: Any) -> Any:
        shapes.append(named["input_ids"].shape)
        return forward(self, *args, **named)

    trainer = build(llama, pairs, tmp_path, lora)
    monkeypatch.setattr(LlamaModel, "forward", spy)
    tokenizer = type(trainer.processing_class)
    for name in ("__call__", "apply_chat_template", "encode"):
        monkeypatch.setattr(tokenizer, name, lambda *_, **__: pytest.fail("something is tokenized again"))
    assert trainer.ref_model is None
    trainer.train()
    assert trainer.state.global_step == 2
    tokens = pairs.select(pl.sum_horizontal(pl.col("prompt_ids", "chosen_ids", "rejected_ids").list.len())).sum().item()
    assert [rows for rows, _ in shapes] == [1, 1]  # one packed row for each step
    assert sum(length for _, length in shapes) == tokens


def test_fused_head_gives_log_probabilities(trainer: DPOTrainer, pairs: pl.DataFrame) -> None:
    batch = trainer.padded_collator([trainer.train_dataset[row] for row in range(pairs.height)])
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    with torch.no_grad(), trainer.compute_loss_context_manager():
        logps = trainer.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=labels,
            use_cache=False,
            fused_lm_head=True,
        ).log_probs
    assert logps.shape == (2 * pairs.height, batch["input_ids"].shape[1] - 1)
    assert (logps[batch["completion_mask"][:, 1:] == 0] == 0).all()
    stored = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
    torch.testing.assert_close(logps.sum(dim=1), stored, rtol=0, atol=1e-4)


def test_hash_of_the_weights_is_made_for_the_reference_pass_alone(trainer: DPOTrainer) -> None:
    # PairTrainer replaces `hash_module` while it is built. The hash is read only by the hook `_precompute_ref_logps`,
    # which it overrides.
    assert callable(dpo_trainer.hash_module)
    assert trainer._precompute_model_hash is None
    source = inspect.getsource(dpo_trainer)
    assert source.count("hash_module(") == 1
    assert source.count("_precompute_model_hash") == 2
    assert "_precompute_model_hash" in inspect.getsource(DPOTrainer._precompute_ref_logps)


def test_what_reads_is_fsdp_enabled_while_the_trainer_is_built(trainer: DPOTrainer) -> None:
    # PairTrainer hides FSDP from the end of Trainer's `_validate_args` on, so that DPOTrainer loads no reference model.
    built = inspect.getsource(Trainer.__init__)
    after = built[built.index("self._validate_args()") :]
    assert "is_fsdp_enabled" not in after
    assert "self.place_model_on_device" not in after  # The model is on its device by then.
    own = inspect.getsource(DPOTrainer.__init__)
    read = [line.strip() for line in own.splitlines() if "is_fsdp_enabled" in line]
    assert read == [
        "if is_peft_model(self.model) or (args.precompute_ref_log_probs and not self.is_fsdp_enabled):",
        "elif self.is_fsdp_enabled:",  # Of an existing reference model.
        "if self.is_fsdp_enabled and ref_model is None:",
    ]
    assert trainer.is_fsdp_enabled is False


def test_logits_are_projected_in_tiles(trainer: DPOTrainer, pairs: pl.DataFrame) -> None:
    # The largest tensor of the head's forward and backward is one tile, whatever the batch.
    assert trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE == 32768
    assert chunked_logprob.TOKEN_CHUNK_SIZE == 4096
    positions, vocabulary, hidden = 64, 100, 8
    torch.manual_seed(0)
    states = torch.randn(positions, hidden, requires_grad=True)
    head = torch.randn(vocabulary, hidden, requires_grad=True)
    labels = torch.randint(vocabulary, (positions,))
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes() // tensor.element_size())
            return result

    with pytest.MonkeyPatch.context() as patch, Watch():
        patch.setattr(chunked_logprob, "TOKEN_CHUNK_SIZE", 16)
        logps, *_ = chunked_logprob.ChunkedLogProbFunction.apply(states, head, None, labels, 1.0, 25, None, 1.0, ())
        logps.sum().backward()
    assert largest == max(16 * 25, vocabulary * hidden)
    assert largest < positions * vocabulary
    want = torch.log_softmax(states @ head.T, dim=1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(logps, want, rtol=1e-5, atol=1e-5)


def test_the_loss_comes_before_the_metrics(trainer: DPOTrainer, pairs: pl.DataFrame) -> None:
    # training/loss.py compiles the method again up to the first metric, and returns these variables.
    source = inspect.getsource(DPOTrainer._compute_loss)
    loss, metrics = source.split("        # Log the metrics\n")
    assert f"{FIRST_METRIC} = outputs.entropy" in metrics.strip().splitlines()[1]
    assert "loss +=" not in metrics
    assert "loss =" not in metrics
    assert all(f"{name}" in loss for name in LOSS_PARTS)
    assert ".item()" not in loss.split("if self.aux_loss_enabled:\n            aux_loss")[0]
    assert ".item()" in metrics
    batch = trainer.inputs_of([trainer.train_dataset[row] for row in range(pairs.height)])
    with trainer.packed_attention(batch), torch.no_grad():
        loss_value, parts = loss_of_trl()(trainer, trainer.model, batch, False)
    assert loss_value.item() == pytest.approx(0.6931, abs=1e-3)
    assert list(parts) == list(LOSS_PARTS)
    assert all(part.shape == (pairs.height,) for part in parts.values())
