"""A run on tiny models from which models and samples were removed: what it can still do, and what it says."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from damage import results
from own_run import Events, own_config
from tiny_models import make_mistral

from dice_py.errors import RemovedError
from dice_py.models.identity import model_identity
from dice_py.reporting.cards.write import write_cards
from dice_py.reporting.html import write_report
from dice_py.runs import loop
from dice_py.runs.keeping import clean
from dice_py.runs.verify import verify_run
from dice_py.storage.files import read_json
from dice_py.storage.removed import RECORD

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("inline_stages")]

ROUNDS = 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, inline_stages: None) -> Path:
    """A run that keeps everything."""
    folder = tmp_path_factory.mktemp("kept")
    config = own_config(
        folder, make_mistral, f"rounds={ROUNDS}", "data.prompts_per_round=8", "train.max_steps=2",
        "evaluate.pairs=2", "evaluate.prompts=1", "report.token_credit=false",
    )  # fmt: skip
    loop.run(config, folder / "run")
    return folder / "run"


@pytest.fixture
def cleaned(whole: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    clean(folder, models=1, samples=False)
    return folder


def stages(folder: Path, *assignments: str) -> dict[str, str]:
    """What became of each stage in a resume."""
    events = Events()
    loop.resume(folder, events, assignments=assignments)
    return dict(events.stages())


def test_a_cleaned_run_is_as_finished_as_before(cleaned: Path, whole: Path, dice: Any) -> None:
    model = Path("round-01/train/model")
    assert not list((cleaned / model).glob("*.safetensors"))
    assert model_identity(cleaned / model) == model_identity(whole / model)
    assert set(stages(cleaned).values()) == {"kept"}
    left, before = results(cleaned), results(whole)
    gone = before.keys() - left.keys()
    assert {Path(name).name[:5] for name in gone} == {"model", "gener", "score"}
    assert not [name for name in left.keys() & before.keys() if left[name] != before[name]]

    # Settings that cannot be tried any more leave those of before as good as they were.
    with pytest.raises(RemovedError, match=r"round-01/generate/generations-00000.parquet was removed"):
        loop.resume(cleaned, assignments=["score.allow_same_model=true"])
    assert set(stages(cleaned, "score.allow_same_model=false").values()) == {"kept"}

    # Without its manifest as well: what the stages have read is not there to be read again.
    (cleaned / "manifest.json").unlink()
    kept = stages(cleaned)
    assert {stage for stage, status in kept.items() if status != "kept"} <= {"round-03/train", "round-03/evaluate"}
    found = verify_run(cleaned)
    assert (found["damaged"], found["missing"], len(found["removed"])) == ([], [], 2 * ROUNDS + 2)

    write_report(cleaned)
    assert "round-01/train/model: its weights were removed by dice clean --keep-models 1" in (
        cleaned / "report.html"
    ).read_text(encoding="utf-8")
    write_cards(cleaned, lambda *_, **__: None)
    card = (cleaned / model / "README.md").read_text(encoding="utf-8")
    assert "removed by dice clean" in card
    assert "from_pretrained" not in card
    assert "from_pretrained" in (cleaned / "round-03/train/model/README.md").read_text(encoding="utf-8")
    assert dice("samples", cleaned, "--round", "1")[0] == 0

    # The record of a damaged removal is damage, too.
    record = cleaned / model / RECORD
    record.write_bytes(record.read_bytes().replace(b"dice clean", b"dice cleam"))
    assert str(record) in verify_run(cleaned)["damaged"]


def test_what_needs_a_removed_model_says_so(cleaned: Path, whole: Path, refused: Any, tmp_path: Path) -> None:
    first, second = (cleaned / f"round-0{number}/train/model" for number in (1, 2))
    said = refused(3, "extrapolate", first, cleaned / "round-03/train/model", "-o", tmp_path / "o", "--alpha", "0.3")
    assert "was removed to free its space (by dice clean --keep-models 1)" in said
    said = refused(3, "audit", "--run", cleaned, "--round", "2")
    assert f"{second} was removed" in said
    shard, models = cleaned / "round-01/generate/generations-00000.parquet", [first, second]
    policy, reference = (whole / model.relative_to(cleaned) for model in models)
    said = refused(3, "score", shard, "-o", tmp_path / "o", "--policy", policy, "--reference", reference)
    assert "generations-00000.parquet was removed" in said

    # One more round has the policy of round 2 as its reference. The message says how to have that made again.
    with pytest.raises(RemovedError, match=rf"delete {second}, and resume"):
        loop.resume(cleaned, assignments=["rounds=4"])
    shutil.rmtree(second)
    with pytest.raises(RemovedError, match=rf"delete {first}, and resume"):
        loop.resume(cleaned)
    shutil.rmtree(first)
    made = {stage for stage, status in stages(cleaned).items() if status != "kept"}
    assert made == {"round-01/train", "round-02/train", *(stage for stage in made if stage.startswith("round-04/"))}
    name = "round-02/train/model/model.safetensors"
    assert (cleaned / name).read_bytes() == (whole / name).read_bytes()
    assert read_json(cleaned / "manifest.json")["stages"]["round-04/train"]["status"] == "done"
