"""`generate.sampling_params` on the transformers engine: changed logits against plain Python, and where responses end.

tests/generation/test_vllm_options.py compares the same options with vLLM's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from chi_square import chi_square
from engine_rig import CPU, Rig, of_prompt
from sampling_rule import OPTIONS, changed_logits, kept_tokens
from tiny_models import make_mistral

from dice_py.config.loading import resolve
from dice_py.config.sampling_options import SamplingOptions
from dice_py.config.stages import GenerateConfig, ScoreConfig
from dice_py.errors import UsageError
from dice_py.generation.engines.base import Request, Sample
from dice_py.generation.engines.decoding import SeededSampling
from dice_py.generation.engines.logits import LogitChanges, MinP
from dice_py.generation.engines.stop_strings import StopStrings
from dice_py.generation.engines.transformers_options import check_options
from dice_py.models.tokenization import load_tokenizer
from dice_py.scoring.scorer import Scorer
from dice_py.storage.keys import seed_for

STOPS = [0, 3]


def config(**params: Any) -> GenerateConfig:
    return GenerateConfig(
        engine="transformers", temperature=1.0, max_new_tokens=16, token_budget=400, sampling_params=params
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_changed_logits_by_hand(name: str) -> None:
    """Rows leave and join between the draws, as in a batch."""
    options, vocabulary = SamplingOptions.model_validate(OPTIONS[name]), 50
    numbers = torch.Generator().manual_seed(1)
    prompts = [[4, 5, 6], [7, 7], [8], [1, 2, 3, 4]]
    batches = [LogitChanges(options, STOPS, part, CPU_DEVICE) for part in (prompts[:3], prompts[3:])]
    history: list[list[int]] = [[] for _ in prompts]
    rows = [[0, 1, 2], [3]]
    for step in range(4):
        for changes, numbered in zip(batches, rows, strict=True):
            logits = torch.randn(len(numbered), vocabulary, generator=numbers) * 3
            before = logits.clone()
            changed = changes.apply(logits, torch.full((len(numbered),), step))
            assert torch.equal(logits, before)
            for at, row in enumerate(numbered):
                wanted = changed_logits(options, STOPS, prompts[row], history[row], logits[at].double().tolist())
                assert changed[at].tolist() == pytest.approx(wanted, rel=1e-5)
            drawn = torch.randint(0, 12, (len(numbered), 1), generator=numbers)
            changes.add(drawn)
            for row, token in zip(numbered, drawn[:, 0].tolist(), strict=True):
                history[row].append(token)
        if step == 1:
            batches[0].select(torch.tensor([2, 0]))
            batches[0].join(batches.pop())
            rows = [[2, 0, 3]]


CPU_DEVICE = torch.device("cpu")


def test_min_p_by_hand() -> None:
    logits = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)) * 2
    kept = MinP(0.2)(torch.empty(0), logits).isfinite()
    probabilities = logits.double().softmax(dim=1)
    assert torch.equal(kept, probabilities >= 0.2 * probabilities.amax(dim=1, keepdim=True))
    assert 1 < kept.sum(dim=1).double().mean() < 15
    assert MinP(1.0)(torch.empty(0), logits).isfinite().sum(dim=1).tolist() == [1] * 20


@pytest.mark.parametrize("name", OPTIONS)
def test_second_token_has_the_distribution_of_the_options(llama: Path, name: str) -> None:
    two = {"max_new_tokens": 2, "top_p": 0.9, "token_budget": 2**20}
    settings = config(**OPTIONS[name], min_p=0.05).model_copy(update=two)
    rig = Rig(llama, settings)
    prompt = rig.prompts[0][:3]
    samples = rig.sample([Request(prompt, seed_for(4, n)) for n in range(4000)])
    firsts = torch.bincount(torch.tensor([s.token_ids[0] for s in samples if len(s.token_ids) == 2]))
    first = int(firsts.argmax())
    with torch.inference_mode():
        logits = rig.engine.model(torch.tensor([[*prompt, first]])).logits[0, -1].double().tolist()
    options = settings.transformers_options()
    changed = changed_logits(options, rig.stops, prompt, [first], logits)
    exact = torch.tensor(kept_tokens(changed, min_p=0.05, top_p=0.9), dtype=torch.float64)
    seconds = [s.token_ids[1] for s in samples if s.token_ids[0] == first]
    assert len(seconds) > 80
    assert chi_square(torch.bincount(torch.tensor(seconds), minlength=len(exact)), exact) < 4


def scored(rig: Rig, requests: list[Request], samples: list[Sample]) -> list[float]:
    prompts = [request.prompt_token_ids for request in requests]
    return Scorer(rig.engine.model, ScoreConfig()).sums(prompts, [sample.token_ids for sample in samples])


ALL: dict[str, Any] = {
    "min_p": 0.02, "repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.3,
    "logit_bias": {"70": 1.0}, "min_tokens": 2, "stop": ["e", "t"], "stop_token_ids": [80, 81, 82, 83],
}  # fmt: skip


@pytest.mark.parametrize("shares_prefill", [True, False], ids=["rows", "generate"])
def test_log_probabilities_are_of_the_raw_logits_and_no_neighbor_counts(llama: Path, shares_prefill: bool) -> None:
    rig = Rig(llama, config(**ALL))
    rig.engine.shares_prefill = shares_prefill
    requests = of_prompt(rig, 12, 4)
    samples = rig.sample(requests)
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    assert [sample.logp for sample in samples] == pytest.approx(scored(rig, requests, samples), abs=1e-4)
    # Stop strings and penalties of a row do not depend on the rows beside it, nor on how they are decoded.
    rig.engine.shares_prefill = True
    alone = [rig.sample([request])[0] for request in requests[::5]]
    assert [sample.token_ids for sample in alone] == [sample.token_ids for sample in samples[::5]]
    assert [sample.finish_reason for sample in alone] == [sample.finish_reason for sample in samples[::5]]


@pytest.mark.parametrize(("make", "min_tokens"), [(None, 5), (make_mistral, 0)], ids=["llama", "mistral"])
def test_a_response_ends_with_the_token_that_completes_a_stop_string(
    make: Any, min_tokens: int, llama: Path, tmp_path: Path
) -> None:
    folder = llama if make is None else make(tmp_path / "model")
    tokenizer = load_tokenizer(folder, CPU)
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "abcdefghijklmnop"]
    allowed = [*letters, *Rig(folder, config()).stops]
    free = Rig(folder, config(min_tokens=min_tokens, allowed_token_ids=allowed))
    requests = free.requests(150)
    unstopped = free.sample(requests)
    texts = [tokenizer.decode(sample.token_ids, skip_special_tokens=True) for sample in unstopped]
    longest = max(texts, key=len)
    stop = ["e", longest[2:4], longest[5:8]]  # two of them are made by several tokens
    settings = config(stop=stop, min_tokens=min_tokens, allowed_token_ids=allowed)
    stopped = Rig(folder, settings).sample(requests)
    ended = 0
    for one, whole in zip(stopped, unstopped, strict=True):
        assert one.token_ids == whole.token_ids[: len(one.token_ids)]
        pieces = [
            tokenizer.decode(whole.token_ids[:count], skip_special_tokens=True)
            for count in range(min_tokens, len(whole.token_ids) + 1)
        ]
        counts = [[piece.count(text) for text in stop] for piece in pieces]
        first = next((at for at in range(1, len(counts)) if counts[at] > counts[at - 1]), None)
        if whole.token_ids[-1] in free.stops and first is not None and first == len(pieces) - 1:
            first = None
        assert len(one.token_ids) == (len(whole.token_ids) if first is None else first + min_tokens)
        assert one.finish_reason == (whole.finish_reason if first is None else "stop")
        ended += first is not None
    assert 5 < ended < 150


def test_stop_strings_over_several_tokens(llama: Path) -> None:
    """Characters of several bytes, strings that begin in an earlier token, and special tokens."""
    tokenizer = load_tokenizer(llama, CPU)

    def ends(stop: list[str], text: str, **params: Any) -> int | None:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        strings = StopStrings(SamplingOptions(stop=stop, **params), tokenizer, [[5, 6]])
        found = [strings.add([token], [True])[0] for token in tokens]
        return None if True not in found else len(tokenizer.decode(tokens[: found.index(True) + 1]))

    assert ends(["b"], "abcb") == 2
    assert ends(["cb"], "abcb") == 4
    assert ends(["zz"], "abcb") is None
    assert ends(["Σσ"], "aΣσb") == 3
    assert ends(["y", "bc"], "abcy") == 3
    assert ends(["</s>"], "a</s>b") is None
    assert ends(["</s>"], "a</s>b", skip_special_tokens=False) == len("a</s>")
    assert ends(["a", "b"], "ab", min_tokens=1) == 2
    assert ends(["ab"], "ab", min_tokens=2) is None
    strings = StopStrings(SamplingOptions(stop=["a"]), tokenizer, [[5]])
    (a,) = tokenizer.encode("a", add_special_tokens=False)
    assert strings.add([a], [False]) == [False]


def test_an_empty_mapping_changes_no_sample(llama: Path) -> None:
    plain = Rig(llama, config())
    requests = plain.requests(12)
    samples = plain.sample(requests)
    neutral = config(min_p=0.0, repetition_penalty=1.0, min_tokens=0, stop=None, stop_token_ids=None, logit_bias=None)
    assert Rig(llama, neutral).sample(requests) == samples
    sampling = SeededSampling([1], neutral, [0], CPU_DEVICE)
    assert sampling.changes is None
    assert sampling.strings is None


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"bad_words": ["a"]}, "engine transformers has no bad_words, but allowed_token_ids, min_tokens, "),
        ({"bad_words": ["a"], "min_p": 0.1}, "; set generate.engine=vllm, or leave it out"),
        ({"min_pp": 0.1}, "engine transformers has no min_pp (did you mean 'min_p'?), but "),
        ({"min_p": 1.5}, "min_p is 1.5: Input should be less than or equal to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0: Input should be greater than 0"),
        ({"presence_penalty": 3}, "presence_penalty is 3: Input should be less than or equal to 2"),
        ({"logit_bias": {"a": 1}}, "logit_bias is {'a': 1}: Input should be a valid integer"),
        ({"logit_bias": {"-1": 1}}, "logit_bias is {'-1': 1}: Input should be greater than or equal to 0"),
        ({"allowed_token_ids": []}, "allowed_token_ids is []: List should have at least 1 item"),
        ({"stop": ["a", ""]}, "stop is ['a', '']: String should have at least 1 character"),
        ({"stop": 3}, "stop is 3: Input should be a valid list"),
        ({"stop_token_ids": ["x"]}, "stop_token_ids is ['x']: Input should be a valid integer"),
        ({"min_tokens": 17}, "min_tokens is 17, but generate.max_new_tokens is 16"),
    ],
)
def test_what_the_engine_refuses(llama: Path, params: dict[str, Any], message: str) -> None:
    assignments = [f"generate.sampling_params={params!r}", "generate.max_new_tokens=16"]
    with pytest.raises(UsageError) as caught:
        resolve([], [*assignments, "generate.engine=transformers"])
    assert str(caught.value).startswith("config: generate: sampling_params: ")
    assert message in str(caught.value)
    # With engine=auto it is known only when the engine is.
    settings = resolve([], assignments).generate
    with pytest.raises(UsageError) as caught:
        check_options(settings, CPU, llama)
    assert str(caught.value).startswith("generate.sampling_params: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "params", [{"stop_token_ids": [9999]}, {"allowed_token_ids": [9999]}, {"logit_bias": {"9999": 1}}]
)
def test_token_ids_beyond_the_vocabulary_are_refused(llama: Path, params: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"names token 9999, but the vocabulary of .* has \d+ entries"):
        Rig(llama, config(**params))
