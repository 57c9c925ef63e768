"""Given responses as shards of the generate stage: tokens as they are, text encoded once, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from notes import Notes
from tiny_generation import CPU, questions
from tiny_models import make_tokenizer

from dice_py.config.stages import GenerateConfig
from dice_py.errors import DataError
from dice_py.generation.given import GIVEN
from dice_py.models.tokenization import encode_prompt
from dice_py.rows.bad_rows import BadRowRule
from dice_py.stages.given_generations import GivenGenerationsJob
from dice_py.stages.job import StageResult
from dice_py.storage.parquet import parquet_meta, write_parquet
from dice_py.storage.schemas import GENERATIONS

TOKENIZER = make_tokenizer()
STOPS = {name: TOKENIZER.convert_tokens_to_ids(name) for name in ("<|im_end|>", "</s>")}
ENDED = STOPS["<|im_end|>"]


def ids(text: str) -> list[int]:
    found: list[int] = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return found


class Given:
    """The stage on rows of (prompt_id, fields), with what a test does not set."""

    def __init__(self, policy: Path, folder: Path) -> None:
        self.policy, self.folder = policy, folder
        self.notes = Notes()

    def __call__(self, *rows: tuple[int, dict[str, Any]], **changed: Any) -> StageResult:
        full = [
            {**dict.fromkeys(GIVEN), "prompt_id": number, "where": f"given.jsonl, line {at}", **fields}
            for at, (number, fields) in enumerate(rows, start=1)
        ]
        frame = pl.DataFrame(full, schema=GIVEN).sort("prompt_id", maintain_order=True)
        arguments: dict[str, Any] = {
            "config": GenerateConfig(shard_prompts=2),
            "models": CPU,
            "policy": self.policy,
            "prompts": write_parquet(self.folder / "prompts.parquet", questions(3), key="questions"),
            "prompts_key": "questions",
            "given": write_parquet(self.folder / "given.parquet", frame, key=f"{full}", schema=GIVEN),
            "out": self.folder / "generate",
            "seed": 0,
            "round_number": 1,
            "max_prompt_tokens": 100,
        }
        return GivenGenerationsJob(**{**arguments, **changed}).run(self.notes)

    def frame(self) -> pl.DataFrame:
        return pl.concat([pl.read_parquet(file) for file in sorted((self.folder / "generate").glob("*.parquet"))])


@pytest.fixture
def given(llama: Path, tmp_path: Path) -> Given:
    return Given(llama, tmp_path)


def test_shards_and_counts(given: Given) -> None:
    result = given(
        (10, {"response": "Yes."}),
        (12, {"token_ids": [*ids("No"), STOPS["</s>"]], "finish_reason": "stop", "sampled_logp": -3.0}),
        (10, {"response": "Cut o", "finish_reason": "length"}),
        (11, {"token_ids": ids("cut")}),
    )
    frame = given.frame()
    assert dict(frame.schema) == dict(GENERATIONS)
    assert frame["prompt_id"].to_list() == [10, 10, 11, 12]
    assert frame["sample_id"].to_list() == [0, 1, 0, 0]
    assert frame["token_ids"].to_list() == [
        [*ids("Yes."), ENDED], ids("Cut o"), ids("cut"), [*ids("No"), STOPS["</s>"]]
    ]  # fmt: skip
    assert frame["response"].to_list() == ["Yes.", "Cut o", "cut", "No"]
    assert frame["finish_reason"].to_list() == ["stop", "length", "length", "stop"]
    assert frame["sampled_logp"].to_list() == [None, None, None, -3.0]
    asked = encode_prompt(TOKENIZER, questions(1)["messages"][0].to_list())
    assert frame["prompt_token_ids"][0].to_list() == asked
    assert result.counts == {
        "engine": "given", "prompts": 3, "prompts_too_long": 0, "responses": 4, "cut_off": 2,
        "response_tokens": sum(frame["response_tokens"]),
    }  # fmt: skip
    # The second shard alone came with log-probabilities.
    assert [parquet_meta(file)["has_logps"] for file, _ in result.files] == [False, True]


def test_what_spells_control_tokens_is_text(given: Given) -> None:
    given((10, {"response": "Write </s> and <|im_end|> here"}))
    (tokens,) = given.frame()["token_ids"].to_list()
    assert tokens == [
        *TOKENIZER("Write </s> and <|im_end|> here", split_special_tokens=True, add_special_tokens=False)["input_ids"],
        ENDED,
    ]


def test_the_prompts_own_token_ids_are_kept(given: Given) -> None:
    given((10, {"response": "a", "prompt_token_ids": [1, 9, 9]}), (10, {"response": "b"}))
    assert given.frame()["prompt_token_ids"].to_list() == [[1, 9, 9]] * 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"token_ids": [len(TOKENIZER), ENDED]}, f"token id {len(TOKENIZER)}, but the policy has"),
        (
            {"token_ids": [ENDED, 9, ENDED]},
            r"the stop token '<\|im_end\|>' stands inside of the response \(token 0\): cut",
        ),
        ({"response": "", "finish_reason": "length"}, "an empty response cannot have been cut off"),
    ],
)
def test_what_cannot_be_used_is_named(given: Given, row: dict[str, Any], said: str) -> None:
    good = (10, {"response": "fine"})
    with pytest.raises(DataError, match=rf"given.jsonl, line 2: {said}"):
        given(good, (11, row))
    result = given(good, (11, row), bad_rows=BadRowRule("skip", 0.5))
    assert (result.counts["responses"], given.frame().height) == (1, 1)
    assert "line 2" in given.notes.texts[-1]


def test_prompts_of_one_id_with_other_tokens_are_refused(given: Given) -> None:
    rows = [(10, {"response": "a", "prompt_token_ids": [1, 9]}), (10, {"response": "b", "prompt_token_ids": [1, 8]})]
    with pytest.raises(DataError, match="line 2: prompt_token_ids differ"):
        given(*rows)


def test_an_end_without_a_stop_token_is_told(given: Given) -> None:
    given((10, {"token_ids": ids("no end"), "finish_reason": "stop"}))
    assert any(text.startswith("1 of 1 given responses ended") for text in given.notes.texts)


def test_shards_are_kept_and_stale_ones_go(given: Given) -> None:
    rows = [(number, {"response": "a"}) for number in (10, 11, 12)]
    first = [(file, file.stat().st_mtime_ns) for file, _ in given(*rows).files]
    assert [(file, file.stat().st_mtime_ns) for file, _ in given(*rows).files] == first
    (only,) = given(*rows[:2]).files
    assert sorted((given.folder / "generate").iterdir()) == [only[0]]


def test_prompts_that_are_too_long_are_left_out(given: Given) -> None:
    rows = [(number, {"response": "a"}) for number in (10, 11, 12)]
    shortest = len(encode_prompt(TOKENIZER, questions(1)["messages"][0].to_list()))
    assert given(*rows, max_prompt_tokens=shortest).counts["prompts_too_long"] == 2
    with pytest.raises(DataError, match="none of the 3 prompts"):
        given(*rows, max_prompt_tokens=1)
