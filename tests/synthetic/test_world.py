"""The synthetic task and its data: oracle, annotator, prompts, pairs, tokens. No model is trained here."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dice_py.config.stages import WorldConfig
from dice_py.data import prompt_key
from dice_py.errors import UsageError
from dice_py.models.tokenization import encode_prompt, encode_response
from dice_py.storage.integrity import write_stamp
from dice_py.synthetic import world
from dice_py.synthetic.pairs import draw_prompts, offline_pairs, oracle_pairs
from dice_py.synthetic.task import (
    CONFUSED,
    FILLERS,
    FREE_FILLERS,
    LETTERS,
    OPERATIONS,
    WORD_LENGTH,
    annotate,
    answer,
    oracle,
    parse_prompt,
    prompt_messages,
    sft_response,
)
from dice_py.synthetic.tokenizer import BOS, EOS, PAD, make_tokenizer
from dice_py.synthetic.world import LLAMA, RECIPE, SFT, find_world, world_key

ABC = ("a", "b", "c")
REVERSE = prompt_messages("reverse", ABC)


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("copy", "a b c"),
        ("reverse", "c b a"),
        ("left", "b c a"),
        ("right", "c a b"),
        ("front", "b a c"),
        ("back", "a c b"),
    ],
)
def test_answers(operation: str, expected: str) -> None:
    assert " ".join(answer(operation, ABC)) == expected


def test_operations_are_all_orders() -> None:
    assert len(OPERATIONS) == math.factorial(WORD_LENGTH)
    assert {tuple(sorted(order)) for order in OPERATIONS.values()} == {tuple(range(WORD_LENGTH))}
    assert len(set(OPERATIONS.values())) == len(OPERATIONS)


def test_confused_operations_are_distinct() -> None:
    assert CONFUSED.keys() == OPERATIONS.keys()
    for operation, pair in CONFUSED.items():
        assert len({operation, *pair}) == 3
        assert set(pair) <= OPERATIONS.keys()


def test_parse_prompt_inverts_prompt_messages() -> None:
    for operation in OPERATIONS:
        assert parse_prompt(prompt_messages(operation, ABC)) == (operation, ABC)


@pytest.mark.parametrize(
    ("response", "score", "right"),
    [
        ("c b a .", 1.0, True),
        ("c b a . sure indeed", 1.0, True),
        ("c b a . sure indeed so", 0.97, True),
        ("c b a . sure indeed so well fine okay", 0.88, True),
        ("c b a", 0.7, True),  # no full stop
        ("c b a . a", 0.7, True),  # a letter where fillers belong
        ("a b c .", 0.1, False),  # one letter matches
        ("a c b .", 0.0, False),
        ("a b c . sure indeed so", 0.07, False),
        ("c b .", 0.3 * 2 / 3 - 0.3, False),
        ("c b a c .", 0.0, False),
        ("sure .", -0.3, False),
        (".", -0.3, False),
        ("", -0.3, False),
    ],
)
def test_oracle(response: str, score: float, right: bool) -> None:
    computed, is_right = oracle(REVERSE, response)
    assert computed == pytest.approx(score)
    assert is_right is right


def test_oracle_scores_right_answers_above_wrong_ones() -> None:
    right = min(oracle(REVERSE, " ".join(["c b a .", *FILLERS[:n]]))[0] for n in range(len(FILLERS) + 1))
    wrong = max(oracle(REVERSE, f"{' '.join(answer(operation, ABC))} .")[0] for operation in CONFUSED["reverse"])
    assert right > wrong


def preferred(left: str, right: str, draws: int = 4000) -> float:
    rng = random.Random(0)
    return sum(annotate(rng, REVERSE, left, right) for _ in range(draws)) / draws


@pytest.mark.parametrize(
    ("left", "right", "utility_difference"),
    [
        ("c b a . sure indeed", "c b a .", 0.25 * 2),  # equal oracle scores: length bias alone
        ("c b a .", "a b c .", 4 * 0.9),
        ("c b a .", "c b a .", 0.0),
        ("a b c .", "c b a .", -4 * 0.9),
    ],
)
def test_annotator_is_noisy_and_prefers_fillers(left: str, right: str, utility_difference: float) -> None:
    probability = 1 / (1 + math.exp(-utility_difference))
    assert preferred(left, right) == pytest.approx(0.95 * probability + 0.05 * (1 - probability), abs=0.03)


def test_annotator_prefers_fillers_that_the_oracle_charges_for() -> None:
    for count in range(1, len(FILLERS) + 1):
        longer, shorter = (" ".join(["c b a .", *FILLERS[:n]]) for n in (count, count - 1))
        charged = 0.03 if count > FREE_FILLERS else 0.0
        assert oracle(REVERSE, shorter)[0] - oracle(REVERSE, longer)[0] == pytest.approx(charged)
        assert 0.25 - 4 * charged > 0


def test_sft_responses() -> None:
    rng = random.Random(0)
    drawn = [sft_response(rng, "reverse", ABC) for _ in range(4000)]
    outputs = Counter(text.partition(" .")[0] for text in drawn)
    assert outputs["c b a"] / 4000 == pytest.approx(0.38, abs=0.02)
    likely, other = CONFUSED["reverse"]
    rare = [name for name in OPERATIONS if name not in ("reverse", likely, other)]
    for name, share in {likely: 0.30, other: 0.25, **dict.fromkeys(rare, 0.15)}.items():
        assert outputs[" ".join(answer(name, ABC))] / 4000 == pytest.approx(0.60 * share, abs=0.02)
    fillers = [sum(word in FILLERS for word in text.split()) for text in drawn]
    assert set(fillers) == set(range(len(FILLERS) + 1))
    assert fillers.count(0) / 4000 == pytest.approx(0.6, abs=0.03)
    assert all(oracle(REVERSE, text)[0] >= -0.03 * (len(FILLERS) - FREE_FILLERS) for text in drawn)  # well formed


def draw(**changed: Any) -> dict[str, list[Any]]:
    config = WorldConfig(**changed)
    return draw_prompts(config, random.Random(f"{config.seed} prompts"))


def test_sets_of_prompts_are_disjoint() -> None:
    config, sets = WorldConfig(), draw()
    keys = [prompt_key(messages) for prompts in sets.values() for messages in prompts]
    assert len(keys) == len(set(keys)) == len(OPERATIONS) * len(LETTERS) ** WORD_LENGTH
    assert {name: len(prompts) for name, prompts in sets.items() if name != "sft"} == {
        "rounds": config.round_prompts,
        "eval": config.eval_prompts,
        "eval_pairs": config.eval_pairs,
        "offline": config.offline_pairs,
    }
    assert len(sets["sft"]) >= 500
    for prompts in sets.values():
        assert {parse_prompt(messages)[0] for messages in prompts} == set(OPERATIONS)


def test_sets_of_prompts_come_from_the_seed() -> None:
    assert draw() == draw()
    assert draw(seed=1)["eval"] != draw()["eval"]


def test_too_many_prompts_are_an_error() -> None:
    with pytest.raises(UsageError, match="for SFT"):
        draw(round_prompts=9000)


def test_offline_pairs_are_labeled_by_the_annotator() -> None:
    config = WorldConfig()
    pairs = offline_pairs(config, draw()["offline"])
    assert pairs == offline_pairs(config, draw()["offline"])
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
    longer = shorter = agrees = differs = 0
    for pair in pairs:
        chosen, rejected = pair["chosen"][0]["content"], pair["rejected"][0]["content"]
        if chosen.partition(" .")[0] == rejected.partition(" .")[0]:  # they differ only in fillers
            longer += len(chosen) > len(rejected)
            shorter += len(chosen) < len(rejected)
        scores = oracle(pair["prompt"], chosen)[0], oracle(pair["prompt"], rejected)[0]
        agrees += scores[0] > scores[1]
        differs += scores[0] != scores[1]
    assert longer > 1.2 * shorter  # biased
    assert 0.7 < agrees / differs < 0.95  # noisy, and no worse


def test_held_out_pairs_are_labeled_by_the_oracle() -> None:
    pairs = oracle_pairs(WorldConfig(), draw()["eval_pairs"])
    assert len(pairs) > 300
    for pair in pairs:
        chosen, rejected = (oracle(pair["prompt"], pair[side][0]["content"])[0] for side in ("chosen", "rejected"))
        assert chosen > rejected


def test_vocabulary_has_no_duplicates() -> None:
    words = [PAD, BOS, EOS, *LETTERS, *OPERATIONS, ":", "=", ".", *FILLERS]
    assert [word for word, count in Counter(words).items() if count > 1] == []
    vocabulary = make_tokenizer().get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(words)))
    assert vocabulary.keys() == set(words)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_template_round_trip(operation: str) -> None:
    tokenizer = make_tokenizer()
    messages = prompt_messages(operation, ABC)
    ids = encode_prompt(tokenizer, messages)
    assert tokenizer.convert_ids_to_tokens(ids) == [BOS, operation, ":", *ABC, "="]
    text = " ".join([*answer(operation, ABC), ".", *FILLERS])
    response = [{"role": "assistant", "content": text}]
    after = encode_response(tokenizer, messages, response, [tokenizer.eos_token_id])
    assert tokenizer.convert_ids_to_tokens(after) == [*text.split(), EOS]
    assert tokenizer.decode(after, skip_special_tokens=True) == text
    # SFT encodes the text and EOS as one string, to the same ids.
    assert tokenizer(text + EOS, add_special_tokens=False)["input_ids"] == after
    assert len(ids) + len(after) <= LLAMA["max_position_embeddings"]


def test_world_key(monkeypatch: pytest.MonkeyPatch) -> None:
    key = world_key(WorldConfig())
    assert world_key(WorldConfig()) == key
    sizes = ("sft_steps", "offline_pairs", "round_prompts", "eval_prompts", "eval_pairs")
    changed = [WorldConfig(seed=1), *(WorldConfig(**{name: 100}) for name in sizes)]
    assert len({key, *map(world_key, changed)}) == 1 + len(changed)
    for name, value in (
        ("RECIPE", RECIPE + 1),
        ("FILLERS", FILLERS[:3]),
        ("SFT", {**SFT, "batch": 1}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(world, name, value)
            assert world_key(WorldConfig()) != key


def test_find_world_ignores_incomplete_worlds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICE_CACHE", str(tmp_path))
    folder = tmp_path / "world" / world_key(WorldConfig())
    assert find_world(WorldConfig()) is None
    folder.mkdir(parents=True)
    assert find_world(WorldConfig()) is None
    (folder / "world.json").write_text("{}")
    assert find_world(WorldConfig()) is None
    write_stamp(folder, {"key": world_key(WorldConfig())}, "world.json")
    world = find_world(WorldConfig())
    assert world is not None
    assert world.folder == folder
    assert find_world(WorldConfig(seed=1)) is None
