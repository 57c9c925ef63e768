"""Training methods in the config: the labels they switch on, what does not fit together, and keys of older runs."""

from __future__ import annotations

from typing import Any

import pytest

from dice_py.config.loading import dump, load_resolved, reassigned, resolve
from dice_py.config.run import RunConfig
from dice_py.config.training import TrainConfig
from dice_py.errors import UsageError


@pytest.mark.parametrize(
    ("method", "mine", "reward_reference"),
    [
        ("dpo", {}, "previous"),
        ("rdpo", {}, "previous"),
        ("sppo", {"win_rates": True}, "previous"),
        ("soft", {"soft_labels": True}, "previous"),
        ("spa", {"difficulty_quantile": 0.1}, "initial"),
        ("cream", {"second_reward": "previous"}, "previous"),
    ],
)
def test_a_method_switches_on_what_it_needs(
    method: str, mine: dict[str, Any], reward_reference: str, tmp_path: Any
) -> None:
    config = resolve([], [f"train.method={method}"])
    plain = resolve([])
    assert config.mine == plain.mine.model_copy(update=mine)
    assert config.reward_reference == reward_reference
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load_resolved(tmp_path / "config.yaml") == config
    changed = reassigned(plain, [f"train.method={method}", f"reward_reference={reward_reference}"])
    assert changed == config  # a resume with another method, too


def test_labels_that_are_set_stay() -> None:
    config = resolve([], ["train.method=spa", "mine.difficulty_quantile=0.3"])
    assert config.mine.difficulty_quantile == 0.3
    config = resolve([], ["train.method=cream", "mine.second_reward=logp"])
    assert config.mine.in_round(1) == config.mine.in_round(2) == config.mine


def test_the_second_reward_of_the_first_round_is_the_references() -> None:
    mine = resolve([], ["train.method=cream"]).mine
    assert [mine.in_round(number).options().second_reward_column for number in (1, 2)] == [
        "ref_logp", "previous_reward",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("assignments", "says"),
    [
        (["train.method=foo"], "train.method: Input should be 'dpo', 'rdpo', 'sppo'"),
        (["train.method=rdpo", "mine.debias=bucket"], "set mine.debias=linear and mine.length=tokens"),
        (["train.method=rdpo", "mine.length=chars"], "set mine.debias=linear and mine.length=tokens"),
        (["train.length_weight=0.1"], "length_weight is for method rdpo"),
        (["train.method=rdpo", "train.loss=[ipo]"], "which the loss ipo is no function of"),
        (["train.method=sppo", "train.loss=[hinge]"], "method sppo has its own squared loss"),
        (["train.method=soft", "train.loss=[aot]"], "sorts the responses of a batch"),
        (["train.weight_column=margin", "train.loss=[aot_unpaired]"], "weight_column says something of each pair"),
        (["train.method=spa", "reward_reference=previous"], "set reward_reference=initial"),
        (["train.loss=[sigmoid, sigmoid]"], "sigmoid more than once"),
        (["train.loss=[sigmoid, sft]", "train.sft_weight=0.1"], "sft more than once"),
        (["train.loss=[sft]", "train.sft_weight=0"], "sft alone"),
        (["train.loss=[{type: sigmoid, weight: 0}]"], "train.loss.0.weight: Input should be greater than 0"),
        (["train.label_smoothing=0.1"], "TRL would ignore it"),
        (["train.loss=[exo_pair]"], "needs label_smoothing above 0"),
        (["train.method=spa", "train.loss=[robust]"], "use another loss type"),
        (["train.use_weighting=true"], "weighs the loss of each pair, which sft has not"),  # the world's sft_weight
        (["train.method=sppo", "train.f_divergence_type=forward_kl"], "set f_divergence_type=reverse_kl"),
        (["train.weight_column=foo"], "which no stage of a run writes"),
        (["train.weight_column=soft_label"], "a label that mining adds with mine.soft_labels"),
        (["train.trainer_args={bf16: true}"], "bf16 cannot be passed on: it is model.dtype"),
        (["train.trainer_args.learning_rate=1"], "it is train.learning_rate"),
    ],
    ids=str,
)
def test_what_does_not_fit_together(assignments: list[str], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve([], assignments)
    assert says in str(caught.value)


def test_shorthands_of_the_loss() -> None:
    config = resolve([], ["train.loss=[hinge, {type: ipo, weight: 0.25}]"])
    assert config.train.loss is not None
    assert [(term.type, term.weight) for term in config.train.loss] == [("hinge", 1.0), ("ipo", 0.25)]


def test_keys_of_older_runs_stay() -> None:
    fields = TrainConfig().key_fields()
    assert set(fields) == {
        "learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs", "batch_size", "packed",
        "packed_tokens", "per_device_train_batch_size", "sft_weight", "weight_decay", "max_grad_norm", "optim",
        "adam_beta2", "lora", "gradient_checkpointing", "max_length", "save_steps", "logging_steps", "report_to",
        "save_dtype", "step0_pairs", "step0_tolerance",
    }  # fmt: skip
    assert TrainConfig(method="soft").key_fields() == fields | {"method": "soft"}


def test_round_zero_is_dpo() -> None:
    config = RunConfig.model_validate(
        {
            "model": {"sft": "folder"},
            "data": {"replay": "pairs.jsonl"},
            "train": {"method": "sppo", "reference": "initial", "learning_rate": 1e-5},
            "round0": {"max_steps": 3},
        }
    )
    training = config.round0.training(config.train)
    assert (training.method, training.reference, training.max_steps) == ("dpo", "policy", 3)
    assert training.learning_rate == 1e-5
