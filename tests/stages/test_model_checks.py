"""Every stage refuses a model that cannot be used, for each model that it reads, before it writes anything."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from broken_models import change_config, change_weights, copy_of
from own_run import Events, own_config
from tiny_models import make_llama
from tiny_sets import CPU

from dice_py.config.run import RunConfig
from dice_py.config.stages import EvaluateConfig, GenerateConfig, ReplayConfig, ScoreConfig
from dice_py.config.training import TrainConfig
from dice_py.data import Message, Pair, pairs_frame, prompts_frame
from dice_py.errors import DataError, DiceError, UsageError
from dice_py.generation.engines.factory import EngineEntry
from dice_py.models.tokenization import load_tokenizer
from dice_py.stages import generate, reward_check
from dice_py.stages.evaluate import EvaluateJob
from dice_py.stages.generate import GenerateJob
from dice_py.stages.job import Job
from dice_py.stages.preflight import PreflightJob
from dice_py.stages.replay import ReplayJob
from dice_py.stages.reward_check import warn_of_rewards
from dice_py.stages.score import ScoreJob
from dice_py.stages.train import TrainJob
from dice_py.storage.parquet import write_parquet

STAGES = {
    "generate": ["policy"],
    "score": ["policy", "reference"],
    "replay": ["policy"],
    "train": ["policy"],
    "evaluate": ["policy", "start", "reference", "initial_reference"],
    "preflight": ["policy", "reference"],
}
EACH = [(stage, role) for stage, roles in STAGES.items() for role in roles]
UP = "model.layers.0.mlp.up_proj.weight"


def job_of(stage: str, models: dict[str, Path], folder: Path, config: RunConfig) -> Job:
    """A job whose models are `models` by role, and whose other inputs do not matter."""
    out, absent = folder / "out", folder / "absent.parquet"
    shared: dict[str, Any] = {"out": out, "seed": 0, **models}
    limits: dict[str, Any] = {"max_prompt_tokens": 100}
    score = ScoreConfig()
    if stage == "generate":
        engine = GenerateConfig(engine="transformers")
        return GenerateJob(engine, CPU, prompts=absent, prompts_key="", round_number=1, **shared, **limits)
    if stage == "score":
        return ScoreJob(score, CPU, generations=[absent], generation_keys=["k"], out=out, beta=0.1, **models)
    if stage == "replay":
        files: dict[str, Any] = {"mined": None, "generations": [], "scores": [], "prompts": None, "offline": absent}
        return ReplayJob(ReplayConfig(), score, CPU, input_keys=[], **files, **shared)
    if stage == "train":
        return TrainJob(TrainConfig(), CPU, training_set=absent, training_set_key="k", beta=0.1, **shared)
    if stage == "preflight":
        return PreflightJob(config, prompts=[absent], pairs=[], data_key="k", **models)
    held_out: dict[str, Any] = {"prompts": absent, "pairs": None, "input_keys": [], "shared": out, "judges": ()}
    held_out |= {"previous": models["start"], "previous_samples": out / "before"}
    return EvaluateJob(EvaluateConfig(), GenerateConfig(), score, CPU, **held_out, **shared, **limits)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return own_config(tmp_path_factory.mktemp("own"), make_llama)


def models_of(stage: str, config: RunConfig) -> dict[str, Path]:
    policy, reference = Path(str(config.model.policy)), Path(str(config.model.reference))
    return {role: policy if role in ("policy", "start") else reference for role in STAGES[stage]}


@pytest.mark.parametrize(("stage", "role"), EACH)
@pytest.mark.parametrize("fault", ["missing", "nan", "quantized"])
def test_each_model_of_each_stage(stage: str, role: str, fault: str, config: RunConfig, tmp_path: Path) -> None:
    models = models_of(stage, config)
    broken = models[role] = copy_of(models[role], tmp_path)
    if fault == "missing":
        change_weights(broken, lambda weights: weights.pop(UP))
    elif fault == "nan":
        change_weights(broken, lambda weights: weights[UP].fill_(float("nan")))
    else:
        change_config(broken, quantization_config={"quant_method": "awq"})
    with pytest.raises(DataError) as caught:
        job_of(stage, models, tmp_path, config).run()
    said = str(caught.value)
    assert role.replace("_", " ") in said.split(":")[0]
    assert str(broken) in said
    assert {"missing": f"1 missing ({UP})", "nan": "NaN", "quantized": "(awq)"}[fault] in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_before_an_engine_is_chosen(
    engine: Any, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "choose_engine", lambda *_: pytest.fail("an engine was chosen"))
    broken = change_weights(
        copy_of(Path(str(config.model.policy)), tmp_path), lambda weights: weights[UP].fill_(float("inf"))
    )
    job = GenerateJob(
        GenerateConfig(engine=engine),
        CPU,
        policy=broken,
        prompts=prompts_frame([[{"role": "user", "content": "hello"}]]),
        prompts_key="",
        out=tmp_path / "out",
        seed=0,
        round_number=1,
        max_prompt_tokens=100,
    )
    with pytest.raises(DataError, match=f"1 tensors hold NaN or infinite numbers \\({UP}\\)"):
        job.run()


@pytest.mark.parametrize("stage", ["score", "evaluate", "preflight"])
def test_policy_and_reference_are_one_model(stage: str, config: RunConfig, tmp_path: Path) -> None:
    models = models_of(stage, config)
    models["reference"] = copy_of(models["policy"], tmp_path)
    with pytest.raises(UsageError, match="policy and reference are the same model"):
        job_of(stage, models, tmp_path, config).run()


def test_the_start_of_an_evaluation_may_be_any(config: RunConfig, tmp_path: Path) -> None:
    """The start is its own reference in `dice evaluate`, and the policy before a run has trained it."""
    models = models_of("evaluate", config)
    for start in (models["reference"], models["policy"]):
        with pytest.raises(DiceError, match=r"absent\.parquet"):  # it came to the data
            job_of("evaluate", {**models, "start": start}, tmp_path, config).run()


@pytest.mark.usefixtures("release_models")
@pytest.mark.parametrize("stage", ["score", "evaluate", "preflight"])
def test_models_without_a_history_are_warned_of(stage: str, config: RunConfig, tmp_path: Path) -> None:
    events = Events()
    models = models_of(stage, config)
    if stage == "score":
        tokens = pl.DataFrame({name: [[7, 8]] for name in ("prompt_token_ids", "token_ids")})
        write_parquet(tmp_path / "absent.parquet", tokens, key="k")
    with contextlib.suppress(DiceError):  # of the data, of which there is none
        job_of(stage, models, tmp_path, config).run(events)
    texts = [fields["text"] for event, fields in events.events if event == "note"]
    assert sum("policy and reference seem to share no history" in text for text in texts) == 1


@pytest.mark.usefixtures("release_models")
def test_a_reference_of_a_smaller_vocabulary(config: RunConfig, tmp_path: Path, cache_folder: Path) -> None:
    """It lacks tokens that the policy can sample, though no prompt has them; a padded one has more than it needs."""
    frame = prompts_frame([[{"role": "user", "content": "a"}]])
    prompts = [write_parquet(tmp_path / "prompts.parquet", frame, key="k")]
    policy = Path(str(config.model.policy))
    for size in (261, 262, 320):
        reference = make_llama(tmp_path / str(size), seed=2, vocab_size=size)
        job = PreflightJob(config, policy=policy, reference=reference, prompts=prompts, pairs=[], data_key="k")
        if size < 262:
            with pytest.raises(DataError, match=r"can sample token ids? (up to )?261|vocabulary has 261"):
                job.run()
        else:
            job.run()


# --- the engine


@pytest.mark.usefixtures("release_models")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling_params": {"min_p": 2.0}}, "generate.sampling_params: min_p is 2.0: Input should be less than"),
        ({"sampling_params": {"stop_token_ids": [9999]}}, "generate.sampling_params names token 9999, but the voc"),
        ({"sampling_params": {"bad_words": ["a"]}}, "no engine can be used that has all of these options"),
        ({"engine": "vllm"}, "vLLM is not installed"),
    ],
)
def test_the_engine_and_its_options_are_checked_before_a_run(
    config: RunConfig,
    tmp_path: Path,
    cache_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(EngineEntry, "is_installed", property(lambda entry: entry.package is None))
    frame = prompts_frame([[{"role": "user", "content": "a"}]])
    prompts = [write_parquet(tmp_path / "prompts.parquet", frame, key="k")]
    changed = config.model_copy(update={"generate": GenerateConfig.model_validate(settings)})
    models = models_of("preflight", config)
    with pytest.raises(UsageError) as caught:
        PreflightJob(changed, prompts=prompts, pairs=[], data_key="k", **models).run()
    assert message in str(caught.value)


# --- rewards of a few pairs


@pytest.fixture
def tuned(llama: Path, tmp_path: Path) -> Path:
    """`llama`, made to like what is chosen: its start prefers nothing, so the reward's accuracy is 1."""
    folder = Path(shutil.copytree(llama, tmp_path / "tuned"))
    good = load_tokenizer(llama, CPU).convert_tokens_to_ids("g")
    return change_weights(folder, lambda weights: weights["lm_head.weight"][good, 0].add_(3.0))


def offline(model: Path, count: int) -> pl.DataFrame:
    """Pairs whose chosen answers are of the letter that `tuned` likes."""
    tokenizer = load_tokenizer(model, CPU)
    good, bad = (tokenizer.convert_tokens_to_ids(letter) for letter in "gb")
    prompts = [tokenizer(f"question {number}", add_special_tokens=False)["input_ids"] for number in range(count)]
    columns = {"prompt_ids": prompts, "chosen_ids": [[good] * 4] * count, "rejected_ids": [[bad] * 4] * count}
    return pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.List(pl.Int32)))


def warnings_of(config: RunConfig, policy: Path, reference: Path, pairs: pl.DataFrame) -> list[str]:
    events = Events()
    warn_of_rewards(config, policy, reference, pairs, events)
    return [fields["text"] for _, fields in events.events]


@pytest.mark.usefixtures("release_models")
def test_swapped_models(config: RunConfig, llama: Path, tuned: Path, cache_folder: Path) -> None:
    pairs = offline(llama, 20)
    assert not [text for text in warnings_of(config, tuned, llama, pairs) if "swapped" in text]
    (said,) = [text for text in warnings_of(config, llama, tuned, pairs) if "swapped" in text]
    assert said.startswith("warning: the implicit reward ranks only 0.0")
    assert "of 20 offline pairs right, far below one half: policy and reference are probably swapped" in said
    assert not [text for text in warnings_of(config, llama, tuned, pairs[:5]) if "swapped" in text]


@pytest.mark.usefixtures("release_models")
def test_before_round_zero_only_the_loss_of_the_sft_model_is_looked_at(
    config: RunConfig, llama: Path, cache_folder: Path
) -> None:
    """Policy and reference are one folder then, so that no reward is right."""
    (said,) = warnings_of(config, llama, llama, offline(llama, 20))
    assert said.startswith("warning: the policy's mean loss on chosen answers is")  # its weights are random


@pytest.mark.usefixtures("release_models")
def test_swapped_models_in_an_evaluation(llama: Path, tuned: Path, tmp_path: Path) -> None:
    def turns(role: str, text: str) -> list[Message]:
        return [{"role": role, "content": text}]

    pairs: list[Pair] = [
        {
            "prompt": turns("user", f"question {number}"),
            "chosen": turns("assistant", "gggg"),
            "rejected": turns("assistant", "bbbb"),
        }
        for number in range(20)
    ]
    file = write_parquet(tmp_path / "pairs.parquet", pairs_frame(pairs), key="pairs")

    def notes(policy: Path, reference: Path, name: str) -> list[str]:
        events = Events()
        EvaluateJob(
            EvaluateConfig(prompts=0),
            GenerateConfig(),
            ScoreConfig(),
            CPU,
            policy=policy,
            start=reference,
            previous=reference,
            previous_samples=tmp_path / name / "before",
            reference=reference,
            initial_reference=reference,
            prompts=None,
            pairs=file,
            input_keys=[],
            out=tmp_path / name,
            shared=tmp_path / name,
            seed=0,
            max_prompt_tokens=100,
            judges=(),
        ).run(events)
        return [fields["text"] for event, fields in events.events if event == "note"]

    assert not [text for text in notes(tuned, llama, "right") if "swapped" in text]
    (said,) = [text for text in notes(llama, tuned, "swapped") if "swapped" in text]
    assert "of 20 offline pairs right" in said


@pytest.mark.usefixtures("release_models")
def test_pairs_that_are_too_long_for_the_reference_are_not_looked_at(
    config: RunConfig, llama: Path, tuned: Path, cache_folder: Path
) -> None:
    """The policy has more positions, so that they are offline pairs of the run all the same."""
    pairs = offline(llama, 20).with_columns(pl.Series("prompt_ids", [[7] * 60] * 20, dtype=pl.List(pl.Int32)))
    short = Path(shutil.copytree(tuned, tuned.with_name("short")))
    change_config(short, max_position_embeddings=66)
    assert warnings_of(config, llama, short, pairs) == []
    change_config(short, max_position_embeddings=68)
    assert any("swapped" in text for text in warnings_of(config, llama, short, pairs))


@pytest.mark.usefixtures("release_models")
def test_the_figures_are_kept(
    config: RunConfig, llama: Path, tuned: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = offline(llama, 20)
    first = warnings_of(config, llama, tuned, pairs)
    assert first
    monkeypatch.setattr(reward_check, "score_pairs", lambda *_, **__: pytest.fail("scored again"))
    assert warnings_of(config, llama, tuned, pairs) == first


@pytest.mark.usefixtures("release_models")
def test_random_weights(config: RunConfig, llama: Path, tuned: Path, cache_folder: Path) -> None:
    """A head of zeros gives every token the same probability: a loss of ln(vocabulary), which is 5.57."""
    blank = Path(shutil.copytree(llama, tuned.with_name("blank")))
    change_weights(blank, lambda weights: weights["lm_head.weight"].zero_())
    said = warnings_of(config, tuned, blank, offline(llama, 12))
    assert any(text.startswith("warning: the reference's mean loss on chosen answers is 5.57 nats") for text in said)


@pytest.mark.usefixtures("release_models")
def test_before_round_zero_only_the_loss_counts(config: RunConfig, llama: Path, cache_folder: Path) -> None:
    blank = copy_of(llama, cache_folder)
    change_weights(blank, lambda weights: weights["lm_head.weight"].zero_())
    (said,) = warnings_of(config, blank, blank, offline(llama, 12))
    assert said.startswith("warning: the policy's mean loss on chosen answers is 5.57 nats")


def test_large_models_on_a_cpu_are_left_out(
    config: RunConfig, llama: Path, tuned: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_check, "CPU_WORK", 1.0)
    monkeypatch.setattr(reward_check, "score_pairs", lambda *_, **__: pytest.fail("scored"))
    assert warnings_of(config, llama, tuned, offline(llama, 12)) == []
