"""Stage 2 of MPO in two processes: the model of one process, with replicated and with sharded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_reinforcement import CONFIG, MPO, Stage

from dice_py.config.training import TrainConfig
from dice_py.errors import UsageError
from dice_py.stages import reinforce
from dice_py.training import ranks
from dice_py.training.parallelism import ProcessLayout

pytestmark = pytest.mark.slow

NEAR = 2e-6
"""Sums in another order, after three steps of SGD at 1. (AdamW's first steps have one size, whatever the gradient.)"""


def sgd(**changed: Any) -> TrainConfig:
    return CONFIG.model_copy(update={"optim": "sgd", "mpo": MPO.model_copy(update={"learning_rate": 1.0}), **changed})


@pytest.fixture
def stage(llama: Path, other: Path, tmp_path: Path) -> Stage:
    return Stage(llama, other, tmp_path)


@pytest.fixture
def sharded(forked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes two processes use FSDP2."""
    launch = ranks.launch

    def with_shards(command: list[str], *rest: Any, **named: Any) -> Any:
        return launch([*command[:-1], "sharded_on_cpu"], *rest, **named)

    monkeypatch.setattr(ranks, "launch", with_shards)
    monkeypatch.setattr(reinforce, "lay_out", lambda *_: ProcessLayout(2, "fsdp2"))


@pytest.mark.parametrize("kind", ["forked", "sharded"])
def test_two_processes_train_the_same_model(
    stage: Stage, kind: str, request: pytest.FixtureRequest, llama: Path, other: Path, tmp_path: Path
) -> None:
    (tmp_path / "alone").mkdir()
    alone = Stage(llama, other, tmp_path / "alone")
    expected = alone(config=sgd())
    request.getfixturevalue(kind)
    counts = stage(config=sgd(processes=2))
    one, two = (load_file(each.model / "model.safetensors") for each in (alone, stage))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < NEAR
    assert counts["response_tokens"] == expected["response_tokens"]
    # KL and entropy are logged as means of the means of forwards, which are others here.
    for name in ("first_reward", "final_reward", "first_kl", "final_tokens", "final_cut_off"):
        assert counts[name] == pytest.approx(expected[name], abs=1e-4)


def test_weights_that_no_process_has_are_refused(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reinforce, "lay_out", lambda *_: ProcessLayout(2, "zero3"))
    with pytest.raises(UsageError, match=r"zero3 does not give them: set train.strategy=fsdp2 or ddp"):
        stage(config=CONFIG.model_copy(update={"processes": 2}))
