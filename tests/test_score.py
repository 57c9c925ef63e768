"""Stage 2: sums of log-probabilities against a plain forward, and its shards, keys and resume."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_llama, make_mistral, make_qwen2
from tiny_sets import CPU, IDS, LAST, draw_ids, token_pairs
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
)

from dice_py import score as stage
from dice_py.artefacts import SCORES, parquet_key, parquet_meta, write_parquet
from dice_py.config import ScoreConfig
from dice_py.errors import DataError
from dice_py.models import load_model
from dice_py.score import LogitHead, batches_by_budget, score, score_pairs, sequence_logps

BETA = 0.25


def mixed(count: int = 12, longest: int = 30) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses whose lengths go from one token up, in no order."""
    rng = random.Random(0)
    lengths = [(1, 1), (longest, 1), (1, longest)]
    lengths += [(rng.randint(1, longest), rng.randint(1, longest)) for _ in range(count - len(lengths))]
    return [draw_ids(rng, n) for n, _ in lengths], [draw_ids(rng, n) for _, n in lengths]


@torch.no_grad()
def plain(model: PreTrainedModel, prompts: list[list[int]], responses: list[list[int]]) -> list[float]:
    """One sequence at a time, no padding, all logits, log-softmax: what the scorer must agree with."""
    sums = []
    for prompt, response in zip(prompts, responses, strict=True):
        logits = model(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits[0].float()
        logps = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
        sums.append(logps.gather(1, torch.tensor(response)[:, None]).double().sum().item())
    return sums


def apart(left: list[float], right: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture
def model(llama: Path) -> PreTrainedModel:
    return load_model(llama, CPU)


@pytest.mark.parametrize("make", [make_llama, make_mistral, make_qwen2])
def test_sums_are_those_of_a_plain_forward(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    model = load_model(make(tmp_path / "model"), CPU)
    prompts, responses = mixed()
    want = plain(model, prompts, responses)
    for token_budget in (1, 100, 16384):
        for logit_chunk in (1, 7, 4096):
            config = ScoreConfig(token_budget=token_budget, logit_chunk=logit_chunk)
            assert apart(sequence_logps(model, prompts, responses, config), want) < 1e-4


def _shape() -> dict[str, Any]:
    return {
        "vocab_size": LAST + 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def gemma2() -> PreTrainedModel:
    return Gemma2ForCausalLM(Gemma2Config(**_shape(), head_dim=16, final_logit_softcapping=2.0))


def granite() -> PreTrainedModel:
    return GraniteForCausalLM(GraniteConfig(**_shape(), logits_scaling=4.0))


def cohere() -> PreTrainedModel:
    return CohereForCausalLM(CohereConfig(**_shape(), logit_scale=0.25))


@pytest.mark.parametrize("build", [gemma2, granite, cohere])
def test_logits_that_the_model_caps_or_scales(build: Callable[[], PreTrainedModel]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    prompts, responses = mixed(6, longest=20)
    head = LogitHead(model, 8)
    assert head.scale != 1.0 or head.cap
    got = sequence_logps(model, prompts, responses, ScoreConfig(logit_chunk=8))
    assert apart(got, plain(model, prompts, responses)) < 1e-4
    head.scale, head.cap = 1.0, None  # and without what it knows of the model it refuses it
    with pytest.raises(DataError, match="changes its logits"):
        head.check([*prompts[2], *responses[2]])


class ScaledLlama(LlamaForCausalLM):
    """Does to its logits what no entry of its config says."""

    def forward(self, *args: Any, **named: Any) -> Any:
        output = super().forward(*args, **named)
        output.logits = 1.01 * output.logits
        return output


def test_model_that_changes_its_logits_is_refused(llama: Path) -> None:
    model = ScaledLlama.from_pretrained(llama).eval()
    with pytest.raises(DataError, match="ScaledLlama changes its logits in a way that the scorer does not know"):
        sequence_logps(model, [[6, 7, 8]], [[9, 10]], ScoreConfig())


def test_logits_that_are_not_numbers_are_refused(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(DataError, match="nan"):
        sequence_logps(model, [[6, 7, 8]], [[9, 10]], ScoreConfig())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_batches_by_budget(lengths: list[int], budget: int) -> None:
    batches = list(batches_by_budget(lengths, budget))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[row] for row in batch)
        assert lengths[batch[0]] == longest  # what the scorer pads to
        assert len(batch) == 1 or len(batch) * longest <= budget
    assert [lengths[row] for batch in batches for row in batch] == sorted(lengths, reverse=True)


def test_stop_token_is_in_the_sum(model: PreTrainedModel) -> None:
    stop = model.config.eos_token_id
    prompt, response = [6, 7, 8], [9, 10, 11]
    without, whole = sequence_logps(model, [prompt] * 2, [response, [*response, stop]], ScoreConfig())
    (alone,) = sequence_logps(model, [[*prompt, *response]], [[stop]], ScoreConfig())
    assert alone < -0.01
    assert whole == pytest.approx(without + alone, abs=1e-4)


def test_on_batch_counts_every_sequence(model: PreTrainedModel) -> None:
    prompts, responses = mixed()
    seen: list[int] = []
    sequence_logps(model, prompts, responses, ScoreConfig(token_budget=100), seen.append)
    assert sum(seen) == len(prompts)
    assert len(seen) > 1


def test_nothing_to_score(model: PreTrainedModel) -> None:
    assert sequence_logps(model, [], [], ScoreConfig()) == []


@pytest.mark.parametrize(
    ("prompt", "response", "sentence"),
    [
        ([], [7], "row 1: an empty prompt"),
        ([7], [], "row 1: an empty response"),
        ([7], [LAST + 1], "row 1: a token id lies outside the model's vocabulary of 262"),
        ([LAST + 1], [7], "row 1: a token id lies outside"),
        ([7], [-1], "row 1: a token id lies outside"),
    ],
)
def test_what_cannot_be_scored(model: PreTrainedModel, prompt: list[int], response: list[int], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        sequence_logps(model, [[6], prompt], [[6], response], ScoreConfig())


def test_score_pairs(llama: Path, model: PreTrainedModel) -> None:
    pairs = token_pairs(5)
    scored = score_pairs(ScoreConfig(), CPU, policy=llama, pairs=pairs)
    assert dict(scored.schema) == {"chosen_logp": pl.Float32, "rejected_logp": pl.Float32}
    for side in ("chosen", "rejected"):
        want = plain(model, pairs["prompt_ids"].to_list(), pairs[f"{side}_ids"].to_list())
        assert apart(scored[f"{side}_logp"].to_list(), want) < 1e-4


# The stage: shards, keys, resume.

KEYS = ["key of shard 0", "key of shard 1"]


class Stage:
    """The stage on two shards of generations, with everything but what a test is about."""

    def __init__(self, policy: Path, reference: Path, folder: Path) -> None:
        self.policy, self.reference, self.out = policy, reference, folder / "score"
        self.generations = [folder / "generations-00000.parquet", folder / "generations-00001.parquet"]
        prompts, responses = mixed(9, longest=12)
        responses[4] = []  # a model may stop at once
        frame = pl.DataFrame(
            {"prompt_token_ids": prompts, "token_ids": responses},
            schema={"prompt_token_ids": IDS, "token_ids": IDS},
        )
        self.frames = [frame[:5], frame[5:]]
        for file, part in zip(self.generations, self.frames, strict=True):
            write_parquet(file, part, key="generated")
        self.files = [self.out / "scores-00000.parquet", self.out / "scores-00001.parquet"]
        self.halves = [self.out / "policy-logps-00000.parquet", self.out / "policy-logps-00001.parquet"]
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, **changed: Any) -> list[Path]:
        self.events.clear()
        arguments: dict[str, Any] = {
            "policy": self.policy,
            "reference": self.reference,
            "generations": self.generations,
            "out": self.out,
            "keys": KEYS,
            "beta": BETA,
            **changed,
        }
        return score(
            ScoreConfig(token_budget=60),
            CPU,
            **arguments,
            report=lambda event, **fields: self.events.append((event, fields)),
        )

    def written(self) -> list[str]:
        """Names of the shards that the last call wrote."""
        return [fields["file"] for event, fields in self.events if event == "shard"]


@pytest.fixture
def run(llama: Path, other: Path, tmp_path: Path) -> Stage:
    return Stage(llama, other, tmp_path)


def refuse(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Loading one of `folders` as a model raises KeyboardInterrupt."""

    def load(folder: Path, *rest: Any) -> PreTrainedModel:
        if folder in folders:
            raise KeyboardInterrupt
        return load_model(folder, *rest)

    monkeypatch.setattr(stage, "load_model", load)


def test_shards_are_aligned_with_the_generations(run: Stage, llama: Path, other: Path) -> None:
    assert run() == run.files
    policy, reference = load_model(llama, CPU), load_model(other, CPU)
    for file, frame, key in zip(run.files, run.frames, KEYS, strict=True):
        scores = pl.read_parquet(file)
        assert dict(scores.schema) == dict(SCORES)
        assert parquet_key(file) == key
        assert parquet_meta(file) == {"beta": BETA}
        assert scores.height == frame.height
        for row, (prompt, response) in enumerate(frame.iter_rows()):
            logp, ref_logp, reward = scores.row(row)
            if not response:
                assert (logp, ref_logp, reward) == (0.0, 0.0, 0.0)
                continue
            assert logp == pytest.approx(plain(policy, [prompt], [response])[0], abs=1e-4)
            assert ref_logp == pytest.approx(plain(reference, [prompt], [response])[0], abs=1e-4)
            assert reward == pytest.approx(BETA * (logp - ref_logp), abs=1e-4)
    assert sorted(run.out.iterdir()) == run.files
    progress = [fields for event, fields in run.events if event == "progress"]
    assert progress[-1]["done"] == progress[-1]["total"] == 2 * 9


def test_reward_is_zero_where_the_models_are_one(run: Stage) -> None:
    run(reference=run.policy)
    for file, frame in zip(run.files, run.frames, strict=True):
        assert pl.read_parquet(file)["reward"].to_list() == [0.0] * frame.height


def test_second_call_does_nothing_again(run: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    times = [file.stat().st_mtime_ns for file in run.files]
    refuse(monkeypatch, run.policy, run.reference)
    assert run() == run.files
    assert [file.stat().st_mtime_ns for file in run.files] == times
    assert run.written() == []


def test_only_the_shard_of_another_key_is_scored_again(run: Stage) -> None:
    run()
    time = run.files[0].stat().st_mtime_ns
    run(keys=[KEYS[0], "another"])
    assert run.written() == ["scores-00001.parquet"]
    assert run.files[0].stat().st_mtime_ns == time
    assert parquet_key(run.files[1]) == "another"


def test_resume_takes_the_kept_half(run: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    whole = [file.read_bytes() for file in run.files]
    for file in run.files:
        file.unlink()
    refuse(monkeypatch, run.reference)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert sorted(run.out.iterdir()) == run.halves
    assert [parquet_key(half) for half in run.halves] == KEYS
    refuse(monkeypatch, run.policy)
    run()
    assert [file.read_bytes() for file in run.files] == whole
    assert sorted(run.out.iterdir()) == run.files


def test_kept_half_of_another_key_is_not_taken(run: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, run.reference)
    with pytest.raises(KeyboardInterrupt):
        run(keys=["another", KEYS[1]])
    refuse(monkeypatch, run.policy)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.undo()
    run()
    assert [parquet_key(file) for file in run.files] == KEYS
    assert sorted(run.out.iterdir()) == run.files


def test_columns_by_other_names(run: Stage) -> None:
    run()
    want = [pl.read_parquet(file) for file in run.files]
    for file, frame in zip(run.generations, run.frames, strict=True):
        write_parquet(file, frame.rename({"prompt_token_ids": "p", "token_ids": "y"}), key="generated")
    run(keys=["a", "b"], prompt_column="p", response_column="y")
    assert all(pl.read_parquet(file).equals(frame) for file, frame in zip(run.files, want, strict=True))


def test_missing_column(run: Stage) -> None:
    with pytest.raises(DataError, match="tokens"):
        run(response_column="tokens")


def test_text_instead_of_tokens(run: Stage) -> None:
    text = run.frames[1].with_columns(token_ids=pl.lit("well"))
    write_parquet(run.generations[1], text, key="generated")
    with pytest.raises(DataError, match=r"00001\.parquet: column 'token_ids' is String, not a list of token ids"):
        run()
    assert not any(file.exists() for file in run.files)


def test_token_of_another_vocabulary(run: Stage) -> None:
    foreign = pl.DataFrame({"prompt_token_ids": [[7]], "token_ids": [[999]]}, schema=run.frames[0].schema)
    write_parquet(run.generations[0], foreign, key="generated")
    with pytest.raises(DataError, match="outside the model's vocabulary"):
        run()
