"""Whether a plan fits: the first stage that would fail, and why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from plan_data import OWN, estimated, small

from dice_py.config.loading import resolve
from dice_py.planning.feasibility import Room, first_failure, peak_disk
from dice_py.planning.freed import add_freed


def entries() -> dict[str, dict[str, Any]]:
    def entry(memory: int, disk: int, transient: int = 0) -> dict[str, Any]:
        return {"peak_memory_bytes": memory, "disk_bytes": disk, "transient_disk_bytes": transient}

    return {
        "round-01/generate": entry(50, 10),
        "round-01/train": entry(80, 20, 30),
        "round-02/generate": entry(50, 10),
        "round-02/train": entry(80, 20, 30),
    }


@pytest.mark.parametrize(
    ("disk", "memory", "want"),
    [
        (90, 80, None),
        (89, 80, ("round-02/train", "disk", 90, 89, "train.save_steps")),
        (59, 80, ("round-01/train", "disk", 60, 59, "train.save_steps")),
        (9, 80, ("round-01/generate", "disk", 10, 9, "rounds")),
        (90, 79, ("round-01/train", "memory", 80, 79, "train.lora")),
        # The first in order of work is named.
        (9, 49, ("round-01/generate", "memory", 50, 49, "generate.token_budget")),
    ],
)
def test_the_first_stage_that_would_fail(disk: int, memory: int, want: tuple[Any, ...] | None) -> None:
    found = first_failure(entries(), Room(disk, memory, "memory"))
    if want is None:
        assert found is None
    else:
        assert found is not None
        assert tuple(found[name] for name in ("stage", "what", "needed", "available", "setting")) == want
        assert found["remedy"]
        assert want[0] in found["text"]
    assert peak_disk(entries()) == 90


def freed(*assignments: str) -> tuple[list[int], int]:
    """Bytes that end with each of five rounds of 1 (generate), 2 (score) and 4 bytes (train), and the peak."""
    stages = {
        f"round-{number:02d}/{stage}": {"disk_bytes": size, "transient_disk_bytes": 0, "peak_memory_bytes": 0}
        for number in range(1, 6)
        for stage, size in (("generate", 1), ("score", 2), ("train", 4), ("evaluate", 0))
    }
    add_freed(stages, resolve([], [*OWN, "rounds=5", *assignments]))
    assert all("freed_disk_bytes" not in stage for name, stage in stages.items() if not name.endswith("/evaluate"))
    return [stages[f"round-{number:02d}/evaluate"]["freed_disk_bytes"] for number in range(1, 6)], peak_disk(stages)


@pytest.mark.parametrize(
    ("assignments", "bytes_by_round", "peak"),
    [
        ([], [0, 0, 0, 0, 0], 35),
        # A round starts from the policy of the one before, whose reference is one round older.
        (["rounds.keep_models=1"], [0, 0, 4, 4, 8], 27),
        (["rounds.keep_models=3"], [0, 0, 0, 4, 4], 31),
        (["rounds.keep_models=1", "reward_reference=initial"], [0, 4, 4, 4, 4], 23),
        # The first round stands for the best.
        (["rounds.keep_models=best", "reward_reference=initial"], [0, 0, 4, 4, 4], 27),
        (["rounds.keep_samples=false"], [3, 3, 3, 3, 3], 23),
        (["rounds.keep_samples=false", "mine.pool_rounds=3"], [2, 2, 3, 3, 5], 25),
    ],
)
def test_what_rounds_free_is_there_for_the_next(assignments: list[str], bytes_by_round: list[int], peak: int) -> None:
    assert freed(*assignments) == (bytes_by_round, peak)


def test_a_run_fits_by_keeping_fewer_models() -> None:
    stages = entries()
    found = first_failure(stages, Room(80, 80, "memory"))
    assert found is not None
    assert "rounds.keep_models=1" in found["remedy"]
    stages["round-01/train"] |= {"freed_disk_bytes": 20}
    assert first_failure(stages, Room(70, 80, "memory")) is None
    assert peak_disk(stages) == 70


def test_training_can_do_with_less_than_its_peak() -> None:
    stages = entries()
    stages["round-01/train"] |= {"least_memory_bytes": 60, "remedy": lambda free: f"there are {free}"}
    assert first_failure(stages, Room(90, 79, "memory")) is not None  # round 2's, which has no such figure
    stages["round-02/train"] |= {"least_memory_bytes": 60}
    assert first_failure(stages, Room(90, 60, "memory")) is None
    found = first_failure(stages, Room(90, 59, "memory"))
    assert found is not None
    assert [found[name] for name in ("stage", "needed", "remedy")] == ["round-01/train", 60, "there are 59"]


def test_vllm_has_another_setting() -> None:
    stages = entries()
    stages["round-01/generate"]["engine"] = "vllm"
    found = first_failure(stages, Room(90, 49, "GPU memory"))
    assert found is not None
    assert found["setting"] == "generate.vllm.gpu_memory_utilization"
    assert "GPU memory" in found["text"]


def test_mining_needs_memory_of_the_host_only() -> None:
    stages = {"round-01/mine": {"peak_memory_bytes": 50, "disk_bytes": 1, "transient_disk_bytes": 0}}
    found = first_failure(stages, Room(90, 49, "memory"))
    assert found is not None
    assert found["setting"] == "data.prompts_per_round"
    assert found["remedy"]
    assert first_failure(stages, Room(90, 49, "GPU memory")) is None


def test_too_few_pairs() -> None:
    config, run_data = small("replay.on_shortfall=error")
    plenty = Room(10**15, 10**15, "memory")
    assert first_failure(estimated(config, run_data), plenty) is None
    found = first_failure(estimated(config, replace(run_data, offline=[3])), plenty)
    assert found is not None
    assert [found[name] for name in ("stage", "what", "needed", "available", "setting")] == [
        "round-01/replay", "data", 4, 3, "replay.gamma",
    ]  # fmt: skip
    recorded, _ = small()
    assert first_failure(estimated(recorded, replace(run_data, offline=[3])), plenty) is None
    nothing, _ = small("replay.gamma=0")
    found = first_failure(estimated(nothing, replace(run_data, usable=0.0)), plenty)
    assert found is not None
    assert (found["stage"], found["what"]) == ("round-01/train", "data")
