"""Settings that only the libraries can judge are refused before a run begins, by a sentence that names them."""

from __future__ import annotations

from pathlib import Path

import pytest
from broken_models import change_config, copy_of
from tiny_families import build
from tiny_models import make_llama, make_qwen2
from transformers import SchedulerType
from transformers.training_args import OptimizerNames

from dice_py.config.training import LoraConfig, TrainConfig
from dice_py.errors import UsageError
from dice_py.training.settings_check import check_training_settings


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("policy"))


def check(policy: Path, **settings: object) -> None:
    config = TrainConfig().model_copy(update=settings)
    check_training_settings(config, policy, section="round0", remote_code=False)


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_optimizers_of_torch_and_transformers_pass(policy: Path, name: str) -> None:
    check(policy, optim=name)


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_a_scheduler_passes_or_is_refused_by_name(policy: Path, name: str) -> None:
    alone = {"linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"}
    if name in alone | {"inverse_sqrt"}:
        check(policy, lr_scheduler_type=name)
        return
    with pytest.raises(UsageError, match=rf"round0\.lr_scheduler_type is '{name}'.* set round0\.lr_scheduler_type="):
        check(policy, lr_scheduler_type=name)


def test_schedulers_that_follow_a_metric_are_refused_as_such(policy: Path) -> None:
    with pytest.raises(UsageError, match="an evaluation during training, and there is none"):
        check(policy, lr_scheduler_type="reduce_lr_on_plateau")


@pytest.mark.parametrize("name", [kind.value for kind in OptimizerNames])
def test_every_optimizer_of_transformers_passes_or_is_refused_with_a_remedy(policy: Path, name: str) -> None:
    """No other error leaves the check, whichever packages are installed here."""
    try:
        check(policy, optim=name)
    except UsageError as error:
        assert str(error).startswith(f"round0.optim is {name!r}, which cannot be used here (")  # noqa: PT017
        assert str(error).endswith("set round0.optim=adamw_torch_fused")  # noqa: PT017


@pytest.mark.parametrize("setting", ["optim", "lr_scheduler_type"])
def test_unknown_names_list_the_known_ones(policy: Path, setting: str) -> None:
    with pytest.raises(UsageError, match=rf"round0\.{setting} is 'fastest'.* it knows .*(cosine|adafactor)"):
        check(policy, **{setting: "fastest"})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"foo": 1}, r"round0\.trainer_args: TRL's DPOConfig refuses it: .*unexpected keyword argument 'foo'"),
        ({"adam_epsilom": 1e-6}, "did you mean 'adam_epsilon'"),
        ({"adam_epsilon": "small"}, r"round0\.trainer_args\.adam_epsilon is 'small': Input should be a valid number"),
        ({"logging_first_step": 3}, r"trainer_args\.logging_first_step is 3: Input should be a valid boolean"),
        ({"optim_args": 3}, r"trainer_args\.optim_args is 3: Input should be a valid string"),
    ],
    ids=str,
)
def test_passed_options_that_trl_does_not_take(policy: Path, options: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        check(policy, trainer_args=options)


def test_passed_options_reach_optimizer_and_scheduler(policy: Path) -> None:
    check(policy, trainer_args={"adam_epsilon": 1e-6, "discopop_tau": 0.1})
    check(policy, lr_scheduler_type="cosine_with_min_lr", trainer_args={"lr_scheduler_kwargs": {"min_lr": 1e-8}})
    with pytest.raises(UsageError, match=r"trainer_args\.lr_scheduler_kwargs"):
        check(policy, lr_scheduler_type="cosine_with_min_lr")


def test_trackers(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"round0\.report_to has 'diary'.*it knows .*wandb"):
        check(policy, report_to=["diary"])
    where = "transformers.integrations.integration_utils.get_available_reporting_integrations"
    monkeypatch.setattr(where, lambda: ["tensorboard"])
    check(policy, report_to=["tensorboard"])
    with pytest.raises(UsageError, match=r"'wandb', which is not installed; add it with: pip install wandb"):
        check(policy, report_to=["tensorboard", "wandb"])
    with pytest.raises(UsageError, match=r"'trackio', .* add it with: pip install 'dice-align\[tracking\]'"):
        check(policy, report_to=["trackio"])
    with pytest.raises(UsageError, match="name the trackers"):
        check(policy, report_to=["all"])


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], ["q_proj", "down_proj"], ["self_attn.q_proj"]])
def test_adapters_that_fit(policy: Path, targets: list[str] | str) -> None:
    check(policy, lora=LoraConfig(target_modules=targets))


def test_adapters_where_config_json_names_a_kernel_that_is_not_here(policy: Path, tmp_path: Path) -> None:
    copy = change_config(copy_of(policy, tmp_path), attn_implementation="flash_attention_2")
    check(copy, lora=LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize("targets", [["q_prj"], ["q_proj", "v_prj"], ["proj"], [""]])
def test_a_target_that_matches_no_module(policy: Path, targets: list[str]) -> None:
    with pytest.raises(UsageError, match=r"round0\.lora\.target_modules has .* no module .*k_proj.*q_proj"):
        check(policy, lora=LoraConfig(target_modules=targets))


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["lm_head"]])
def test_an_adapter_on_the_head(policy: Path, targets: list[str]) -> None:
    """TRL's trainer refuses it, after all that comes before the training."""
    with pytest.raises(UsageError, match=r"round0\.lora\.target_modules has the head of .*'lm_head'.* leave it out"):
        check(policy, lora=LoraConfig(target_modules=targets))


def test_a_target_that_cannot_have_adapters(policy: Path) -> None:
    with pytest.raises(UsageError, match=r"round0\.lora cannot be put into .*q_proj"):
        check(policy, lora=LoraConfig(target_modules=["input_layernorm"]))


@pytest.mark.parametrize("targets", [["router"], ["q_proj", "feed_forward.router"]])
def test_an_adapter_on_a_router_that_returns_more_than_a_tensor(targets: list[str], tmp_path: Path) -> None:
    build("Llama4").save_pretrained(tmp_path)
    check(tmp_path, lora=LoraConfig())
    with pytest.raises(UsageError, match=r"target_modules has 'model\.layers\.\d\.feed_forward\.router' of"):
        check(tmp_path, lora=LoraConfig(target_modules=targets))


def test_layers_to_train_whole(policy: Path) -> None:
    check(policy, lora=LoraConfig(modules_to_save=["lm_head", "norm", "embed_tokens", "self_attn.o_proj"]))
    key = r"round0\.lora\.modules_to_save has"
    for names in (["lm_hea"], ["norm", ""], ["layernorm"]):
        with pytest.raises(UsageError, match=rf"{key} .* no module of .*lm_head.*q_proj"):
            check(policy, lora=LoraConfig(modules_to_save=names))
    for name in ("mlp", "act_fn"):
        with pytest.raises(UsageError, match=rf"{key} '{name}', but model\.layers\.0\.mlp.* is no single layer"):
            check(policy, lora=LoraConfig(modules_to_save=[name]))


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_tied_head_is_not_trained_whole(tmp_path: Path, name: str) -> None:
    tied = make_qwen2(tmp_path / "tied")
    check(tied, lora=LoraConfig(modules_to_save=["norm"]))
    with pytest.raises(UsageError, match=rf"'{name}', but .* ties its head to its embeddings .*leave it out"):
        check(tied, lora=LoraConfig(modules_to_save=[name]))
