"""The cards of a round's model and training set; and that both load with nothing but Hugging Face's own libraries."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from faked_stages import faked_stages
from hostile_texts import HOSTILE, obeyed
from huggingface_hub import DatasetCard, ModelCard
from own_run import Events, own_config
from places import ROOT
from tiny_models import make_llama
from tiny_sets import scored_pairs

from dice_py.compute.stage_process import run_in_subprocess
from dice_py.models.identity import model_identity
from dice_py.reporting.cards import facts
from dice_py.reporting.cards.write import CARD, write_cards
from dice_py.reporting.foreign_text import markdown_text
from dice_py.runs import loop
from dice_py.runs.folder import Run
from dice_py.runs.status import run_status
from dice_py.runs.verify import verify_run
from dice_py.stages.evaluate import EvaluateJob
from dice_py.stages.job import Job, StageResult
from dice_py.stages.replay import ReplayJob
from dice_py.stages.train import TrainJob
from dice_py.storage.digests import stored_digest
from dice_py.storage.files import Manifest, write_sealed
from dice_py.storage.integrity import damaged_in, write_stamp
from dice_py.storage.parquet import write_parquet
from dice_py.storage.schemas import TRAINING_SET, fit

PAIRS = 8
METRICS = {"accuracy": 0.25, "accuracy_ci95": [0.125, 0.5], "judges": 3, "kl_and_entropy": "a | note"}


def said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def training_set(policy: Path) -> pl.DataFrame:
    tokens = scored_pairs(policy, PAIRS)
    messages = {
        "prompt": [said("user", f"question {number}") for number in range(PAIRS)],
        "chosen": [said("assistant", f"good {number}") for number in range(PAIRS)],
        "rejected": [said("assistant", f"a bad answer {number}") for number in range(PAIRS)],
        "source": ["mined"] * (PAIRS - 2) + ["replay", "replay:old|pairs"],
    }
    return fit(tokens.with_columns(pl.Series(name, values) for name, values in messages.items()), TRAINING_SET)


class Carded:
    """A run of one round with a real model and training set, whose stages run no model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder / "the *run* [x](y) <b>"
        self.policy = folder / "policy"
        self.metrics = dict(METRICS)
        with pytest.MonkeyPatch.context() as patch:
            given = faked_stages(patch, self.evaluated)
            spawn = Run.spawn

            def spawn_whole(run: Run, job: Job, folder: Path, **options: Any) -> StageResult:
                if isinstance(job, ReplayJob):
                    file = job.out / "training_set.parquet"
                    write_parquet(file, training_set(self.policy), key=job.key())
                    return StageResult([(file, job.key())], {"mined": PAIRS - 2, "replay": 2})
                result = spawn(run, job, folder, **options)
                if isinstance(job, TrainJob):
                    shutil.copytree(self.policy, job.target, dirs_exist_ok=True)
                    write_stamp(job.target, {"key": job.key(), "counts": {}, "start": model_identity(self.policy)})
                return result

            patch.setattr(Run, "spawn", spawn_whole)
            loop.run(own_config(folder, make_llama, "report.pairs=0"), self.run, Events())
            assert given
        self.model, self.pairs = self.run / "round-01/train/model", self.run / "round-01/replay"
        self.identity = model_identity(self.model)
        self.write()

    def evaluated(self, job: EvaluateJob) -> StageResult:
        write_sealed(job.out / "metrics.json", self.metrics, job.key())
        return StageResult([(job.out / "metrics.json", job.key())], self.metrics)

    def write(self) -> list[str]:
        """Writes the cards; returns the notes."""
        events = Events()
        write_cards(self.run, events)
        return [fields["text"] for _, fields in events.events]


@pytest.fixture(scope="module")
def carded(tmp_path_factory: pytest.TempPathFactory) -> Carded:
    return Carded(tmp_path_factory.mktemp("carded"))


@pytest.fixture
def restored(carded: Carded) -> Iterator[Carded]:
    """A test may change cards, metrics and the policy's folder."""
    yield carded
    for path in (carded.model / CARD, carded.pairs / CARD, carded.policy / CARD):
        path.unlink(missing_ok=True)
    carded.metrics = dict(METRICS)
    set_metrics(carded, METRICS)
    carded.write()


def set_metrics(carded: Carded, metrics: dict[str, Any]) -> None:
    write_sealed(carded.run / "round-01/evaluate/metrics.json", metrics, "any")


def test_a_models_card_says_what_it_is_and_where_it_comes_from(carded: Carded) -> None:
    card = ModelCard.load(carded.model / CARD)
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert {"dice", "dpo", "arxiv:2406.09760"} <= set(data["tags"])
    assert "license" not in data  # nobody has said
    assert "base_model" not in data  # a folder has no name on the Hub
    manifest = Manifest(carded.run / "manifest.json").data
    for identity in (carded.identity, manifest["policy"]["identity"], manifest["reference"]["identity"]):
        assert identity in card.text
    for digest in [*manifest["others"].values(), stored_digest(carded.pairs / "training_set.parquet")]:
        assert f"| {digest} |" in card.text
    assert "| accuracy | 0.25 (0.125 to 0.5) |" in card.text
    assert "a \\| note" in card.text
    assert "6 pairs were mined" in card.text
    assert "2 pairs were replayed" in card.text
    assert "| learning rate | 0.001 |" in card.text
    for line in card.text.splitlines():
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") in (3, 4)


def test_a_card_is_no_part_of_the_model(carded: Carded) -> None:
    assert model_identity(carded.model) == carded.identity == model_identity(carded.policy)
    assert damaged_in(carded.model) == []
    found = verify_run(carded.run)
    assert (found["damaged"], found["missing"]) == ([], [])
    assert run_status(carded.run)["state"] == "finished"


def test_the_name_of_the_run_is_only_text(carded: Carded) -> None:
    for folder in (carded.model, carded.pairs):
        title = next(line for line in (folder / CARD).read_text().splitlines() if line.startswith("# "))
        assert "the \\*run\\* \\[x\\](y) &lt;b&gt;, round-01" in title


def test_a_card_changes_with_the_metrics_and_only_then(restored: Carded) -> None:
    card = restored.model / CARD
    before, stamp = card.read_text(), card.stat().st_mtime_ns
    assert restored.write() == []
    assert card.stat().st_mtime_ns == stamp
    set_metrics(restored, METRICS | {"accuracy": 0.375})
    assert restored.write() == []
    assert card.read_text() != before
    assert "| accuracy | 0.375 (0.125 to 0.5) |" in card.read_text()


def test_a_readme_of_the_owners_stays(restored: Carded) -> None:
    """One of another origin, and one of ours that was edited."""
    edited = (restored.model / CARD).read_text().replace("# How to load it", "# How I load it")
    (restored.model / CARD).write_text(edited)
    (restored.pairs / CARD).write_text("mine")
    set_metrics(restored, METRICS | {"accuracy": 0.375})
    notes = restored.write()
    assert len(notes) == 2
    assert all("stays as it is" in note for note in notes)
    assert (restored.model / CARD).read_text() == edited
    assert (restored.pairs / CARD).read_text() == "mine"


def test_license_and_base_are_those_of_the_policys_card(restored: Carded) -> None:
    (restored.policy / CARD).write_text("---\nlicense: llama3\nbase_model: owner/base\n---\n# A model\n")
    restored.write()
    data = ModelCard.load(restored.model / CARD).data.to_dict()
    assert (data["license"], data["base_model"], data["base_model_relation"]) == ("llama3", "owner/base", "finetune")


@pytest.mark.parametrize(
    "text",
    ["---\nlicense: [a]\nbase_model: ../x\n---\n", "---\n{{{\n---\n", "\x00\x1b[2J", "---\nlicense: 'a b\n  c'\n---\n"],
)
def test_a_card_of_the_policys_that_says_nothing_usable(restored: Carded, text: str) -> None:
    (restored.policy / CARD).write_text(text)
    assert restored.write() == []
    data = ModelCard.load(restored.model / CARD).data.to_dict()
    assert not {"license", "base_model"} & set(data)


@pytest.mark.parametrize(
    ("named", "base"),
    [
        ({"policy": "meta-llama/Llama-3-8B"}, "meta-llama/Llama-3-8B"),
        ({"policy": "owner/tuned", "sft": "owner/sft"}, "owner/sft"),
        ({"policy": "/models/llama"}, None),
        ({"policy": "owner/x\nlicense: mit"}, None),
        ({"policy": None}, None),
    ],
)
def test_the_base_model_is_a_name_of_the_hub(carded: Carded, named: dict[str, Any], base: str | None) -> None:
    config = own_model_config(carded, **named)
    assert facts.base_model(config) == base


def own_model_config(carded: Carded, **named: Any) -> Any:
    from dice_py.runs.stored_config import stored_config

    config = stored_config(carded.run)[0]
    return config.model_copy(update={"model": config.model.model_copy(update={"sft": None} | named)})


def test_a_card_that_cannot_be_written_is_a_note(restored: Carded, tmp_path: Path) -> None:
    (restored.model / CARD).unlink()
    (restored.model / CARD).mkdir()
    (note,) = restored.write()
    assert str(restored.model / CARD) in note
    (restored.model / CARD).rmdir()
    events = Events()
    write_cards(tmp_path / "none", events)
    assert "no cards are written" in events.events[0][1]["text"]


@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_names_are_safe_in_a_card(restored: Carded, text: str) -> None:
    shown = markdown_text(text, 300)
    assert not obeyed(shown)
    assert "<" not in shown
    assert "\n" not in shown
    assert len(markdown_text(text * 100_000, 300)) < 3000
    set_metrics(restored, {**METRICS, text: 1.0})
    assert restored.write() == []
    card = ModelCard.load(restored.model / CARD)
    assert card.data.to_dict()["library_name"] == "transformers"
    assert not obeyed(card.text)
    assert f"| {markdown_text(text.replace('_', ' '), 300)} | 1 |" in card.text


def test_a_datasets_card_names_its_file_columns_and_sources(carded: Carded) -> None:
    card = DatasetCard.load(carded.pairs / CARD)
    assert card.data.to_dict()["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "training_set.parquet"}]}
    ]
    assert card.data.to_dict()["size_categories"] == "n<1K"
    for column in TRAINING_SET:
        assert f"| `{column}` |" in card.text
    assert "| mined | 6 |" in card.text
    assert "| replay:old\\|pairs | 1 |" in card.text
    assert stored_digest(carded.pairs / "training_set.parquet") in card.text


# With nothing but the libraries of others


@pytest.mark.slow
def test_the_training_set_loads_with_plain_datasets(carded: Carded, tmp_path: Path) -> None:
    from datasets import load_dataset

    # Under a plain name: datasets takes the run's for a pattern. The card names the file, so that others do no harm.
    folder = shutil.copytree(carded.pairs, tmp_path / "replay")
    (folder / "other.parquet").write_bytes(b"PAR1 not a table")
    file = folder / "training_set.parquet"
    of_folder = load_dataset(str(folder), split="train", cache_dir=str(tmp_path))
    of_file = load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path))
    assert of_folder.to_list() == of_file.to_list() == pl.read_parquet(file).to_dicts()


@pytest.mark.slow
def test_the_python_of_the_page_runs(carded: Carded, tmp_path: Path) -> None:
    """Model, tokenizer and pairs load, and TRL's own trainer trains, from ln 2 on, since the start is the reference."""
    page = (ROOT / "docs" / "cards.md").read_text(encoding="utf-8")
    load, train = [block.split("```")[0] for block in page.split("```python\n")[1:]]
    folder = tmp_path / "round-02"  # a plain name: datasets takes the run's for a pattern
    shutil.copytree(carded.model, folder / "train" / "model")
    shutil.copytree(carded.pairs, folder / "replay")
    load = load.replace('"RUN/', f'"{tmp_path}/').replace(
        'split="train"', f'split="train", cache_dir="{tmp_path}/cache"'
    )
    names: dict[str, Any] = {}
    exec(compile(load, "docs/cards.md", "exec"), names)
    messages = said("user", "hello")
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    inputs = names["tokenizer"].apply_chat_template(messages, **options)
    made = names["model"].generate(**inputs, max_new_tokens=4, do_sample=False)
    assert made.shape[1] > inputs["input_ids"].shape[1]
    assert names["pairs"].num_rows == PAIRS

    model, out = f'"{folder}/train/model"', f'output_dir="{tmp_path}/out", use_cpu=True, bf16=False, report_to="none"'
    short = (
        f"{out}, max_steps=1, logging_steps=1, per_device_train_batch_size=2, save_strategy='no', learning_rate=1e-3"
    )
    train = train.replace('"MODEL"', model).replace('output_dir="out"', short)
    train = train.replace("DPOTrainer(model", "trainer = DPOTrainer(model").replace(".train()", "; trainer.train()")
    exec(compile(train, "docs/cards.md", "exec"), names)
    trained = names["trainer"]
    assert trained.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    start = names["model"].state_dict()
    assert any(not torch.equal(start[name], value) for name, value in trained.model.state_dict().items())


def sampled_by_vllm(folder: Path, report: Any) -> list[int]:
    """In a process of its own: what plain vLLM samples from the folder."""
    from vllm import LLM, SamplingParams

    model = LLM(str(folder), dtype="float32", max_model_len=128, enforce_eager=True, kv_cache_memory_bytes=2**27)
    (output,) = model.chat([said("user", "hello")], SamplingParams(max_tokens=4, temperature=0.0), use_tqdm=False)
    return list(output.outputs[0].token_ids)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="its options are those of vLLM's CPU build")
def test_the_model_loads_with_plain_vllm(carded: Carded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    folder = shutil.copytree(carded.model, tmp_path / "model")  # vLLM takes the run's name for a pattern
    tokens = run_in_subprocess(
        partial(sampled_by_vllm, folder), log=tmp_path / "worker.log", remedy="", report=lambda *_, **__: None
    )
    assert 0 < len(tokens) <= 4
