"""Stage 1: its shards and their keys, which shards are kept and which are sampled again, and its errors."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from broken_models import change_weights, copy_of
from tiny_generation import CONFIG, Stage, questions, shard
from tiny_models import MAX_POSITIONS, make_llama, make_mistral, make_tokenizer
from transformers import LlamaConfig

from dice_py.config.shared import ModelConfig
from dice_py.config.stages import GenerateConfig
from dice_py.errors import DataError, UsageError
from dice_py.generation.engines.transformers import TransformersEngine
from dice_py.generation.limits import cut_off_note
from dice_py.generation.shard import ShardWriter
from dice_py.models.limits import positions_limit
from dice_py.storage.parquet import parquet_key
from dice_py.storage.schemas import GENERATIONS


@pytest.fixture
def run(llama: Path, tmp_path: Path) -> Stage:
    return Stage(llama, tmp_path / "generate")


def test_shards_and_counts(run: Stage, llama: Path) -> None:
    result = run()
    assert [file.name for file, _ in result.files] == [shard(0), shard(1), shard(2)]
    assert [parquet_key(file) for file, _ in result.files] == [key for _, key in result.files]
    assert len({key for _, key in result.files}) == 3
    frame = run.frame()
    assert dict(frame.schema) == dict(GENERATIONS)
    assert frame["prompt_id"].to_list() == [n for n in range(10, 15) for _ in range(3)]
    assert frame["sample_id"].to_list() == [0, 1, 2] * 5
    assert frame["response_tokens"].to_list() == frame["token_ids"].list.len().to_list()
    assert frame["response_chars"].to_list() == frame["response"].str.len_chars().to_list()
    assert frame["sampled_logp"].is_finite().all()
    assert not frame["response"].str.contains(r"<\|im_end\|>|</s>|<pad>").any()
    assert frame["token_ids"].n_unique() == 15
    assert result.counts == {
        "engine": "transformers",
        "prompts": 5,
        "prompts_too_long": 0,
        "responses": 15,
        "cut_off": (frame["finish_reason"] == "length").sum(),
        "response_tokens": frame["response_tokens"].sum(),
    }
    progress = [fields for event, fields in run.events if event == "progress"]
    assert (progress[-1]["done"], progress[-1]["total"]) == (15, 15)
    assert any("engine: transformers" in fields["text"] for event, fields in run.events if event == "note")


def test_a_cut_off_shard_is_warned_of_once_and_at_once(run: Stage) -> None:
    run(CONFIG.model_copy(update={"max_new_tokens": 1}))
    events = [fields.get("text", event) for event, fields in run.events if event in ("note", "shard")]
    warnings = [text for text in events if text.startswith("warning: ")]
    first = pl.read_parquet(run.out / run.written()[0])["finish_reason"] == "length"
    assert warnings == [cut_off_note(run.written()[0], int(first.sum()), len(first), 1)]
    assert events[events.index("shard") + 1] == warnings[0]
    # Shards that are there already were warned of when they were sampled.
    run(CONFIG.model_copy(update={"max_new_tokens": 1}))
    assert not any("warning" in fields.get("text", "") for _, fields in run.events)


def test_the_warning_has_the_figure_and_the_remedy() -> None:
    note = cut_off_note("generations-00000.parquet", 7, 8, 64)
    assert note is not None
    assert "7 of 8 responses of generations-00000.parquet (88%) were cut off at generate.max_new_tokens=64" in note
    assert "raise generate.max_new_tokens" in note
    assert cut_off_note("generations-00000.parquet", 4, 8, 64) is None


def test_prompt_is_the_template_with_one_bos(run: Stage, llama: Path) -> None:
    run()
    tokenizer = make_tokenizer("chatml")
    for prompt_id, ids in run.frame().select("prompt_id", "prompt_token_ids").iter_rows():
        text = f"<s><|im_start|>user\n{'why? ' * (prompt_id - 9)}<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(ids) == text
        assert ids.count(tokenizer.bos_token_id) == 1


def test_second_call_samples_nothing(run: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run()
    times = [file.stat().st_mtime_ns for file in run.files()]
    monkeypatch.setattr(
        "dice_py.generation.sampler.build_engine", lambda *_: pytest.fail("the model was loaded for nothing")
    )
    assert run() == first
    assert [file.stat().st_mtime_ns for file in run.files()] == times
    assert run.written() == []
    assert run.events[-1][1]["done"] == 15


def test_only_the_missing_shard_is_sampled_and_is_the_same(run: Stage) -> None:
    first = run()
    before = run.frame()
    times = [file.stat().st_mtime_ns for file in run.files()]
    run.files()[1].unlink()
    assert run() == first
    assert run.written() == [shard(1)]
    assert [run.files()[n].stat().st_mtime_ns for n in (0, 2)] == [times[0], times[2]]
    assert run.frame().drop("sampled_logp").equals(before.drop("sampled_logp"))


def test_options_that_are_passed_on_are_in_the_keys_and_only_where_they_count(run: Stage) -> None:
    plain = run()
    key = run.job().key()
    without = run.job().key_fields()["generate"]
    assert "sampling_params" not in without
    assert "engine_args" not in without["vllm"]
    limited = CONFIG.model_copy(update={"sampling_params": {"min_p": 0.2}})
    assert run.job(limited).key() != key
    sampled = run(limited)
    assert not {key for _, key in sampled.files} & {key for _, key in plain.files}
    # The other engine's options change no sample.
    vllm = CONFIG.vllm.model_copy(update={"engine_args": {"quantization": "fp8"}})
    others = CONFIG.model_copy(update={"vllm": vllm})
    assert run.job(others).key() != key
    assert run(others).files == plain.files


def test_a_stop_string_ends_the_stored_response(run: Stage) -> None:
    run()
    free = run.frame()
    stop = free["response"].str.slice(1, 2).filter(free["response"].str.len_chars() > 4)[0]
    run(CONFIG.model_copy(update={"sampling_params": {"stop": [stop]}}))
    frame = run.frame()
    tokenizer = make_tokenizer("chatml")
    cut = 0
    for one, whole in zip(frame.iter_rows(named=True), free.iter_rows(named=True), strict=True):
        assert one["response"] == tokenizer.decode(one["token_ids"], skip_special_tokens=True)
        assert one["token_ids"] == whole["token_ids"][: one["response_tokens"]]
        if one["response_tokens"] < whole["response_tokens"]:
            cut += 1
            assert one["finish_reason"] == "stop"
            assert stop in one["response"]
    assert cut


def test_a_stage_alone_refuses_wrong_options_before_it_samples(run: Stage) -> None:
    wrong = CONFIG.model_copy(update={"sampling_params": {"min_p": 2.0}})
    with pytest.raises(UsageError, match=r"generate\.sampling_params: min_p is 2\.0: Input should be less than"):
        run(wrong, is_alone=True)
    assert run.written() == []


def test_broken_or_foreign_shard_is_sampled_again(run: Stage) -> None:
    first = run()
    files = run.files()
    files[0].write_bytes(files[0].read_bytes()[:100])
    pl.DataFrame({"a": [1]}).write_parquet(files[2])
    assert run() == first
    assert sorted(run.written()) == [shard(0), shard(2)]


@pytest.mark.parametrize(
    "changed",
    [
        {"temperature": 0.9},
        {"top_p": 0.8},
        {"top_k": 5},
        {"max_new_tokens": 9},
        {"samples": 4},
        {"token_budget": 500},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_changed_config_samples_all_again(run: Stage, changed: dict[str, Any]) -> None:
    run()
    run(CONFIG.model_copy(update=changed))
    assert len(run.written()) == 3


@pytest.mark.parametrize("changed", [{"seed": 1}, {"round_number": 2}], ids=lambda changed: next(iter(changed)))
def test_changed_seed_or_round_samples_all_again(run: Stage, changed: dict[str, Any]) -> None:
    run()
    before = run.frame()
    run(**changed)
    assert len(run.written()) == 3
    assert run.frame()["token_ids"].to_list() != before["token_ids"].to_list()


def test_changed_model_samples_all_again(run: Stage, tmp_path: Path) -> None:
    run()
    run(policy=make_llama(tmp_path / "other", seed=1))
    assert len(run.written()) == 3


def test_same_model_in_another_folder_samples_nothing(run: Stage, llama: Path, tmp_path: Path) -> None:
    run()
    run(policy=Path(shutil.copytree(llama, tmp_path / "copy")))
    assert run.written() == []


def test_settings_of_the_other_engine_sample_nothing(run: Stage) -> None:
    run()
    run(GenerateConfig.model_validate({**CONFIG.model_dump(), "vllm": {"max_num_seqs": 3}}))
    assert run.written() == []


def test_one_changed_prompt_samples_its_shard_again(run: Stage) -> None:
    run()
    run(prompts=pl.concat([questions(3), questions(1, first=7), questions(1, first=4)]))
    assert run.written() == [shard(1)]


def test_shard_size_changes_no_sample_and_leaves_no_stale_file(run: Stage) -> None:
    run()
    before = run.frame()
    result = run(CONFIG.model_copy(update={"shard_prompts": 4}))
    assert sorted(file.name for file in run.out.iterdir()) == [shard(0), shard(1)]
    assert len(result.files) == 2
    assert run.frame().drop("sampled_logp").equals(before.drop("sampled_logp"))


def test_order_of_prompts_changes_no_sample(run: Stage) -> None:
    run()
    before = run.frame().sort("prompt_id", "sample_id").drop("sampled_logp")
    run(prompts=questions(5).reverse())
    assert run.frame().sort("prompt_id", "sample_id").drop("sampled_logp").equals(before)


def test_interrupted_call_keeps_complete_shards(run: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    write, kept = ShardWriter.write, []

    def interrupt(shard: ShardWriter, *rest: Any) -> None:
        if kept:
            raise KeyboardInterrupt
        kept.append(shard.file)
        write(shard, *rest)

    monkeypatch.setattr(ShardWriter, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert sorted(run.out.glob("*.parquet")) == kept
    assert not list(run.out.glob(".*"))
    monkeypatch.undo()
    run()
    assert set(run.written()) == {shard(0), shard(1), shard(2)} - {kept[0].name}


def test_engine_is_closed_after_success_and_failure(run: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    close = TransformersEngine.close
    monkeypatch.setattr(TransformersEngine, "close", lambda self: (closed.append(True), close(self)))
    run()
    assert closed == [True]
    monkeypatch.setattr(TransformersEngine, "step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(seed=1)
    assert closed == [True, True]


def test_too_long_prompts_are_left_out_and_counted(run: Stage) -> None:
    run()
    lengths = {row[0]: len(row[1]) for row in run.frame().select("prompt_id", "prompt_token_ids").iter_rows()}
    result = run(max_prompt_tokens=lengths[12])  # inclusive
    assert [result.counts[name] for name in ("prompts", "prompts_too_long", "responses")] == [3, 2, 9]
    assert sorted(set(run.frame()["prompt_id"])) == [10, 11, 12]
    assert any("2 prompts are longer than" in fields.get("text", "") for _, fields in run.events)


def test_no_prompt_left(run: Stage) -> None:
    with pytest.raises(DataError, match="none of the 5 prompts has at most 3 tokens"):
        run(max_prompt_tokens=3)


def test_other_template_without_padding_token(tmp_path: Path) -> None:
    run = Stage(make_mistral(tmp_path / "model"), tmp_path / "out")
    run(CONFIG.model_copy(update={"max_new_tokens": 24}))
    frame = run.frame()
    tokenizer = make_tokenizer("mistral")
    assert tokenizer.decode(frame["prompt_token_ids"][0].to_list()) == "<s>[INST] why?  [/INST]"
    ends = [tokens[-1] == tokenizer.eos_token_id for tokens in frame["token_ids"].to_list()]
    assert ends == (frame["finish_reason"] == "stop").to_list()
    assert 0 < sum(ends) < len(ends)


def test_template_that_rejects_a_role(tmp_path: Path) -> None:
    run = Stage(make_mistral(tmp_path / "model"), tmp_path / "out")
    prompts = pl.DataFrame({"prompt_id": [10], "messages": [[{"role": "system", "content": "Be kind."}]]})
    with pytest.raises(DataError, match="prompt 10: the chat template refuses these messages: only user and"):
        run(prompts=prompts)


def test_tokenizer_without_template(tmp_path: Path) -> None:
    policy = make_llama(tmp_path / "model")
    (policy / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="no chat template"):
        Stage(policy, tmp_path / "out")()


def test_prompt_and_response_beyond_the_models_positions(run: Stage) -> None:
    with pytest.raises(UsageError, match=r"generate\.max_new_tokens .*data\.max_prompt_tokens") as caught:
        run(CONFIG.model_copy(update={"max_new_tokens": MAX_POSITIONS}))
    assert f"has {MAX_POSITIONS} positions" in str(caught.value)


def test_positions_up_to_the_last_are_used(run: Stage) -> None:
    run()
    longest = run.frame()["prompt_token_ids"].list.len().max()
    assert isinstance(longest, int)
    run(CONFIG.model_copy(update={"max_new_tokens": MAX_POSITIONS - longest}), prompts=questions(1, first=4))
    with pytest.raises(UsageError):
        run(CONFIG.model_copy(update={"max_new_tokens": MAX_POSITIONS - longest + 1}))


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 100),
        ({"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, 400),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 25, "rope_theta": 1e4},
            100,
        ),
    ],
    ids=["default", "linear", "yarn"],
)
def test_positions_of_scaled_rope(rope: dict[str, Any], positions: int) -> None:
    assert positions_limit(LlamaConfig(max_position_embeddings=100, rope_parameters=rope)) == positions


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    policy = make_llama(tmp_path / "model", vocab_size=80)
    with pytest.raises(DataError, match="vocabulary has 80 entries"):
        Stage(policy, tmp_path / "out")()


def test_vllm_is_configured_but_not_installed(run: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find(name, *rest))
    with pytest.raises(UsageError, match=r"pip install 'dice-align\[vllm\]'.*generate\.engine=transformers"):
        run(CONFIG.model_copy(update={"engine": "vllm"}))
    assert not run.out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_device_that_does_not_exist(run: Stage) -> None:
    with pytest.raises(UsageError, match=r"model\.device is 'cuda:0'"):
        run(models=ModelConfig(device="cuda:0"))


def test_samples_of_logits_that_are_not_numbers(llama: Path, tmp_path: Path) -> None:
    """Activations that float16 cannot hold: each token would be the first of the vocabulary, with exit 0."""
    policy = copy_of(llama, tmp_path)
    change_weights(policy, lambda weights: [weight.mul_(1e4) for name, weight in weights.items() if "mlp" in name])
    run = Stage(policy, tmp_path / "generate")
    with pytest.raises(DataError, match=r"prompt 1\d: the policy's log-probabilities are NaN.* if it is float16"):
        run(models=ModelConfig(device="cpu", dtype="float16"))
    assert run.files() == []
    run(models=ModelConfig(device="cpu", dtype="float32"))
    assert run.frame()["sampled_logp"].is_finite().all()
