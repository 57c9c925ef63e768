"""Config keys under other names: those of version 0.1 are refused with the new name, foreign ones with ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dice_py.config.loading import dump, known_keys, load_resolved, resolve
from dice_py.config.renamed import ALIASES, ANSWERS, RENAMED_KEYS, RENAMED_VALUES, foreign_name, renaming
from dice_py.errors import UsageError

RENAMINGS = [
    ("train.epochs=2", "train.epochs is now train.num_train_epochs"),
    ("train.micro_batch_size=4", "train.micro_batch_size is now train.per_device_train_batch_size"),
    ("train.lr_scheduler=cosine", "train.lr_scheduler is now train.lr_scheduler_type"),
    (
        "devices.on_dead_group=stop",
        "devices.on_dead_group is now devices.on_worker_failure ('stop' is now 'abort')",
    ),
    (
        "devices.on_dead_group=go_on",
        "devices.on_dead_group is now devices.on_worker_failure ('go_on' is now 'continue')",
    ),
    ("devices.on_worker_failure=stop", "devices.on_worker_failure: 'stop' is now 'abort'"),
    ("devices.on_worker_failure=go_on", "devices.on_worker_failure: 'go_on' is now 'continue'"),
    ("score.policy_logps=gate", "score.policy_logps: 'gate' is now 'reuse_if_equal'"),
    ("score.policy_logps=scored", "score.policy_logps: 'scored' is now 'recompute'"),
]

OLD_CONFIG = Path(__file__).parent / "config_version_0_1.yaml"
"""The `config.yaml` of a run on the synthetic world, as version 0.1 wrote it."""


def refused(*assignments: str, files: tuple[Path, ...] = ()) -> str:
    with pytest.raises(UsageError) as caught:
        resolve(files, assignments)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(("assignment", "message"), RENAMINGS)
def test_an_old_name_is_refused_with_the_new_one(tmp_path: Path, assignment: str, message: str) -> None:
    assert refused(assignment) == f"config: {message}"
    key, value = assignment.split("=")
    section, name = key.split(".")
    path = tmp_path / "old.yaml"
    path.write_text(f"{section}: {{{name}: {value}}}\n")
    assert refused(files=(path,)) == f"config: {message}"


def test_all_old_names_are_reported_at_once() -> None:
    message = refused(*(assignment for assignment, _ in RENAMINGS[:4]))
    assert all(part in message for _, part in RENAMINGS[:4])


def test_the_tables_lead_to_keys_and_values_of_today() -> None:
    keys = known_keys()
    assert not set(RENAMED_KEYS) & set(keys)
    assert set(RENAMED_KEYS.values()) | set(RENAMED_VALUES) | set(ALIASES.values()) <= set(keys)
    assert not set(ALIASES) & set(ANSWERS)
    # An entry for a key that exists under the same dotted name would never be read.
    assert not {name for name in (*ALIASES, *ANSWERS) if "." in name} & set(keys)
    for key, values in RENAMED_VALUES.items():
        for new in values.values():
            resolve([], [f"{key}={new}"])


def test_a_value_or_key_that_was_not_renamed() -> None:
    assert renaming("train.num_train_epochs", 1.0) is None
    assert renaming("score.policy_logps", "recompute") is None
    assert renaming("score.policy_logps", ["gate"]) is None
    assert foreign_name("train.learning_rte") is None


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("train.gradient_accumulation_steps", "it follows from train.batch_size"),
        ("train.rpo_alpha", "here it is 'train.sft_weight'"),
        ("train.bf16", "model.dtype=bfloat16"),
        ("train.fp16", "model.dtype=float16"),
        ("train.beta", "here it is 'beta'"),
        ("train.peft_config", "here it is 'train.lora.r'"),
        ("train.lora_r", "here it is 'train.lora.r'"),
        ("train.use_peft", "here it is 'train.lora.r'"),
        ("train.seed", "here it is 'seed'"),
        ("train.output_dir", "dice run --run-dir FOLDER"),
        ("train.eval_strategy", "evaluate.prompts"),
        ("train.warmup_ratio", "train.warmup_steps"),
        ("generate.num_return_sequences", "here it is 'generate.samples'"),
        ("generate.n", "here it is 'generate.samples'"),
        ("generate.max_tokens", "here it is 'generate.max_new_tokens'"),
        ("generate.max_completion_length", "here it is 'generate.max_new_tokens'"),
        ("generate.max_length", "here it is 'generate.max_new_tokens'"),
        ("generate.tensor_parallel_size", "here it is 'generate.vllm.tensor_parallel_size'"),
        ("generate.gpu_memory_utilization", "here it is 'generate.vllm.gpu_memory_utilization'"),
        ("generate.max_model_len", "here it is 'generate.vllm.max_model_len'"),
        ("generate.batch_size", "generate.token_budget"),
        ("model.torch_dtype", "here it is 'model.dtype'"),
        ("model.model_name_or_path", "here it is 'model.policy'"),
        ("model.ref_model", "here it is 'model.reference'"),
        ("model.model_ref", "here it is 'model.reference'"),
        ("data.dataset_name", "here it is 'data.prompts'"),
        ("data.dataset_path", "here it is 'data.prompts'"),
        # In any section, in none, and with hyphens.
        ("dataset_name", "here it is 'data.prompts'"),
        ("generate.lora-r", "here it is 'train.lora.r'"),
    ],
)
def test_names_of_other_libraries_are_answered_with_ours(key: str, message: str) -> None:
    answer = refused(f"{key}=1")
    assert answer.startswith(f"config: unknown key '{key}'; ")
    assert message in answer


def test_a_run_of_an_earlier_version() -> None:
    with pytest.raises(UsageError) as caught:
        load_resolved(OLD_CONFIG)
    assert str(caught.value) == (
        f"{OLD_CONFIG}: this run was made by an earlier version of dice, in which config keys had other names "
        "(devices.on_dead_group is now devices.on_worker_failure ('go_on' is now 'continue'); "
        "score.policy_logps: 'gate' is now 'reuse_if_equal'; train.lr_scheduler is now train.lr_scheduler_type; "
        "and 2 more). Start a new run, or finish this one with version 0.1 (pip install 'dice-align<0.2')"
    )


@pytest.mark.parametrize(("new", "old"), [(new, old) for old, new in RENAMED_KEYS.items()])
def test_one_old_key_alone_tells_an_earlier_version(tmp_path: Path, new: str, old: str) -> None:
    stored = yaml.safe_load(dump(resolve()))
    section, name = new.split(".")
    stored[section][old.split(".")[1]] = stored[section].pop(name)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(stored))
    with pytest.raises(UsageError, match="made by an earlier version") as caught:
        load_resolved(path)
    assert f"({old} is now {new})" in str(caught.value)
    assert " more)" not in str(caught.value)
