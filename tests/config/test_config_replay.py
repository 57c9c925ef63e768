"""The section `replay`: buffers, weights and strata, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from own_config import OWN, refused

from dice_py.config.loading import dump, load_resolved, resolve
from dice_py.config.run import RunConfig
from dice_py.errors import UsageError


def test_buffers_are_named_by_their_keys(yaml_file, tmp_path: Path) -> None:
    first = yaml_file("replay: {buffers: {uf: {path: uf.jsonl, share: 2}, hh: {path: hh.jsonl}}}\n")
    config = resolve([first], ["replay.buffers.hh.share=0.5", "replay.buffers.hh.half_life=2"], OWN)
    assert list(config.replay.buffers) == ["uf", "hh"]
    assert [(b.path, b.share, b.half_life) for b in config.replay.buffers.values()] == [
        ("uf.jsonl", 2.0, None),
        ("hh.jsonl", 0.5, 2.0),
    ]
    path = tmp_path / "stored.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load_resolved(path) == config
    assert list(load_resolved(path).replay.buffers) == ["uf", "hh"]


def test_by_default_replay_is_uniform() -> None:
    config = RunConfig().replay
    assert (config.margin_power, config.half_life, config.stratify_by) == (0.0, None, "none")
    assert (config.buffers, config.buffer) == ({}, None)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (
            ["replay.buffers.uf.path=a", "replay.buffers.uf.shar=1"],
            "unknown key 'replay.buffers.uf.shar'; did you mean 'replay.buffers.uf.share'?",
        ),
        (["replay.buffers.uf.share=1"], "replay.buffers.uf.path: Field required"),
        (
            ["replay.buffers.uf.path=a", "replay.buffers.uf.share=0"],
            "replay.buffers.uf.share: Input should be greater than 0 (got 0)",
        ),
        (["replay.buffers.rounds.path=a"], "replay: a buffer is named 'rounds': use letters, digits and underscores"),
        (["replay.buffers.a/b.path=a"], "replay: a buffer is named 'a/b'"),
        (["replay.buffer.capacity=0"], "replay.buffer.capacity: Input should be greater than or equal to 1"),
        (["replay.buffer.capacty=1"], "did you mean 'replay.buffer.capacity'?"),
        (["replay.half_life=0"], "replay.half_life: Input should be greater than 0"),
        (["replay.margin_power=-1"], "replay.margin_power: Input should be greater than or equal to 0"),
        (["replay.margin_power=.inf"], "replay.margin_power: Input should be a finite number"),
        (["replay.share=0"], "replay.share: Input should be greater than 0"),
        (["replay.stratify_by=lenght"], "replay.stratify_by: Input should be 'none', 'length' or 'source'"),
        (["replay.allocation=even"], "replay.allocation: Input should be 'proportional' or 'equal'"),
        (["replay.length_buckets=0"], "replay.length_buckets: Input should be greater than or equal to 1"),
    ],
)
def test_replay_settings_that_are_refused(assignments: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve([], assignments, OWN)
    assert message in str(caught.value)


def test_settings_that_the_world_does_not_support() -> None:
    for assignment in ("replay.margin_power=1", "replay.half_life=1", "replay.stratify_by=source"):
        assert "the synthetic world's offline pairs have no margin, round or source" in refused(assignment)
    assert "replay.buffers given without model.policy" in refused("replay.buffers.uf.path=a")
    # Pairs that its rounds mine have all of these columns.
    config = resolve([], ["replay.buffer.margin_power=1", "replay.buffer.half_life=1", "replay.stratify_by=length"])
    assert config.replay.buffer is not None


def test_sources_of_replay() -> None:
    given = {"model": OWN["model"], "data": {"prompts": "prompts.jsonl"}}
    assert resolve([], ["replay.buffer.capacity=9"], given).replay.buffers == {}
    assert resolve([], ["replay.buffers.uf.path=a"], given).replay.buffer is None
    with pytest.raises(UsageError, match=r"weight the pairs of data\.replay, which is not given"):
        resolve([], ["replay.buffers.uf.path=a", "replay.half_life=1"], given)
