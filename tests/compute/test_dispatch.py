"""Shards over groups: every one whole or an error, whatever a group does, and no process left behind."""

from __future__ import annotations

import functools
import os
import sys
import types
from pathlib import Path
from typing import Any

import group_work
import pytest
from group_dispatch import Heard, deal, three
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import gone

from dice_py.compute.devices import Group
from dice_py.compute.process_pool import GroupWork
from dice_py.config.shared import DevicesConfig
from dice_py.errors import DataError, InterruptedRunError, OutOfMemoryError


def makers(folder: Path, items: list[int]) -> list[str]:
    return [(folder / f"item-{number}").read_text().strip() for number in items]


def tries(folder: Path, number: int) -> list[str]:
    return group_work.lines(folder / f"tries-{number}")


def statuses(heard: Heard) -> list[tuple[int, str]]:
    return [(fields["number"], fields["status"]) for event, fields in heard if event == "group"]


def notes(heard: Heard) -> str:
    return "\n".join(fields["text"] for event, fields in heard if event == "note")


# --- dealing -----------------------------------------------------------------------------------------------


def test_every_item_is_made_once(tmp_path: Path) -> None:
    items = [4, 0, 7, 1, 2, 9]
    heard = deal(tmp_path, "planned", items=items, plan={})
    assert makers(tmp_path, items) == [tries(tmp_path, number)[0] for number in items]
    assert all(len(tries(tmp_path, number)) == 1 for number in items)
    assert sum(fields["count"] for event, fields in heard if event == "advance") == len(items)
    assert sorted(statuses(heard)) == [(1, "started"), (2, "started"), (3, "started")]
    assert not [event for event, _ in heard if event in ("shard_complete", "receive")]


def test_none_is_returned_at_once_without_wait_and_later_with_it(tmp_path: Path) -> None:
    deal(tmp_path, "together", items=[0, 1], groups=three(2), of=2, then="ok")
    assert group_work.lines(tmp_path / "second") == ["None", "None"]  # while both items were in hand
    assert [len(tries(tmp_path, number)) for number in (0, 1)] == [1, 1]


@pytest.mark.parametrize("then", ["kill", "exit", "raise", "oom"])
def test_a_group_that_is_done_waits_and_takes_a_failed_item_over(tmp_path: Path, then: str) -> None:
    heard = deal(tmp_path, "together", items=[0, 1], groups=three(2), of=2, then=then)
    first, second = tries(tmp_path, 0)
    assert [second] == tries(tmp_path, 1) != [first]
    assert makers(tmp_path, [0, 1]) == [second, second]
    assert statuses(heard)[2:] == [(int(first) + 1, "dead")]


def test_more_is_taken_without_wait_while_there_is_more(tmp_path: Path) -> None:
    deal(tmp_path, "planned", items=[0, 1, 2, 3, 4], groups=three(2), plan={}, hold=3)
    assert len(makers(tmp_path, [0, 1, 2, 3, 4])) == 5


def test_a_group_with_room_for_all_leaves_others_their_share(tmp_path: Path) -> None:
    deal(tmp_path, "greedy", items=list(range(10)), of=3)
    assert sorted(group_work.lines(tmp_path / "taken")) == ["2", "4", "4"]
    assert len(makers(tmp_path, list(range(10)))) == 10


def test_no_more_processes_than_items(tmp_path: Path) -> None:
    heard = deal(tmp_path, "planned", items=[0, 1], plan={})
    assert statuses(heard) == [(1, "started"), (2, "started")]


def test_a_group_in_reserve_starts_when_an_item_comes_back(tmp_path: Path) -> None:
    heard = deal(tmp_path, "planned", items=[0], plan={0: ["kill"]})
    assert statuses(heard) == [(1, "started"), (1, "dead"), (2, "started")]
    assert makers(tmp_path, [0]) == ["1"]


def test_nothing_to_do_starts_nothing(tmp_path: Path) -> None:
    assert deal(tmp_path, "fails_at_once", items=[], how="raise") == []


def test_events_carry_their_group(tmp_path: Path) -> None:
    heard = deal(tmp_path, "describe", items=[0], groups=[Group(5, ("GPU-7", "GPU-8"), needs_process=True)])
    events = dict(heard)
    assert [event for event, _ in heard] == ["group", "note", "throughput", "shard", "advance", "process"]
    assert events["group"] == {"number": 5, "gpus": ["GPU-7", "GPU-8"], "status": "started", "text": ""}
    assert events["note"] == {"text": "group 5: a note", "group": 5}
    assert events["throughput"] == {"stage": "describe", "file": "item-0", "tokens": 5, "group": 5}
    assert events["advance"] == {"count": 3}
    assert events["shard"]["file"] == "item-0"
    assert events["shard"]["environment"]["CUDA_VISIBLE_DEVICES"] == "GPU-7,GPU-8"
    assert events["process"]["work"] == "group_work:describe"
    assert events["process"]["group"] == 5
    seconds = events["process"]["seconds"]
    assert seconds["load"] >= 0.05
    assert seconds["total"] == pytest.approx(sum(seconds.values()) - seconds["total"], abs=0.005)
    assert "printed by the group" in (tmp_path / "logs" / "group-5.log").read_text()


def test_threads_are_limited_before_torch_is_imported_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = deal(tmp_path, "describe", items=[0], groups=[Group(1, threads=3), Group(2, threads=3)])
    environment = dict(heard)["shard"]["environment"]
    assert (environment["OMP_NUM_THREADS"], environment["MKL_NUM_THREADS"]) == ("3", "3")
    told: list[int] = []
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(set_num_threads=told.append))
    work = functools.partial(group_work.fails_at_once, folder=tmp_path, how="raise")
    with pytest.raises(ValueError, match="a bug at -1"):
        GroupWork(work, threads=3)(report=lambda event, **fields: None)
    assert told == [3]


def test_a_group_that_is_still_loading_is_ended_when_all_is_made(tmp_path: Path) -> None:
    heard = deal(tmp_path, "load_long", items=[0, 1, 2, 3], groups=three(2))
    assert makers(tmp_path, [0, 1, 2, 3]) == ["0"] * 4
    assert gone(int(group_work.lines(tmp_path / "loading")[0]))
    assert (2, "dead") not in statuses(heard)


# --- groups that fail --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["raise", "oom", "kill", "terminate", "exit", "lie", "elsewhere", "return"])
def test_an_item_that_failed_is_made_by_another_group(tmp_path: Path, how: str) -> None:
    heard = deal(tmp_path, "planned", items=[0, 1, 2, 3], plan={2: [how]})
    assert len(makers(tmp_path, [0, 1, 2, 3])) == 4
    first, second = tries(tmp_path, 2)
    assert first != second
    assert makers(tmp_path, [2]) == [second]
    ((number, gpus, text),) = [
        (fields["number"], fields["gpus"], fields["text"])
        for event, fields in heard
        if event == "group" and fields["status"] in ("dead", "retry")
    ]
    assert (number, gpus) == (int(first) + 1, [first])
    said = {
        "raise": "ValueError: a bug at 2",
        "oom": "no room for 2",
        "kill": "signal 9",
        "terminate": "signal 15",
        "exit": "exit code 0",
        "lie": "reported shard 2 as complete, and it is not",
        "elsewhere": "reported shard 102 as complete, which it does not hold",
        "return": "returned before every shard was complete",
    }[how]
    assert said in text
    if how not in ("lie", "elsewhere", "return"):
        assert f"    about to {how} at 2" in text  # the end of its log
    assert f"group {number} (GPU {first}) failed while it held shard 2" in notes(heard)
    assert said in notes(heard)


@pytest.mark.parametrize(
    ("how", "kind"),
    [("raise", RuntimeError), ("oom", OutOfMemoryError), ("kill", OutOfMemoryError), ("lie", RuntimeError)],
)
def test_an_item_that_fails_everywhere_ends_the_stage(tmp_path: Path, how: str, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        deal(tmp_path, "planned", items=[0, 1, 2, 3, 4], plan={3: [how] * 9})
    one, other = (f"group {int(gpu) + 1} (GPU {gpu})" for gpu in tries(tmp_path, 3))
    assert one != other
    text = str(caught.value)
    assert (
        f"shard 3 failed on {one} and {other}, as many as devices.shard_attempts allows (2); the last, {other}" in text
    )
    assert how == "lie" or f"    about to {how} at 3" in text
    assert how != "raise" or "Traceback" in text
    assert "group_work is imported" in text
    if kind is OutOfMemoryError:
        assert caught.value.exit_code == 4
    assert not (tmp_path / "item-3").exists()


def test_attempts_end_with_the_groups(tmp_path: Path) -> None:
    devices = DevicesConfig(shard_attempts=9)
    with pytest.raises(
        OutOfMemoryError, match=r"shard 0 failed on .* and .* and .*, and no other group is left; the last"
    ):
        deal(tmp_path, "planned", items=[0, 1, 2], plan={0: ["kill"] * 9}, devices=devices)
    assert sorted(tries(tmp_path, 0)) == ["0", "1", "2"]


def test_one_attempt_is_all_there_may_be(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"shard 1 failed on group \d \(GPU \d\), as many as"):
        deal(
            tmp_path,
            "planned",
            items=[0, 1],
            plan={1: ["exit"]},
            devices=DevicesConfig(shard_attempts=1),
        )


def test_all_items_in_work_count_as_failed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"shard 1 failed on group 1 \(GPU 0\), and no other group is left"):
        # Shard 0, made before the failure, has not failed.
        deal(
            tmp_path,
            "planned",
            items=[0, 1],
            groups=[Group(1, ("0",), needs_process=True)],
            plan={1: ["raise"]},
            hold=2,
        )
    folder = tmp_path / "second"
    folder.mkdir()
    deal(folder, "planned", items=[0, 1, 2], groups=three(2), plan={0: ["kill"]}, hold=3)
    both = [number for number in (0, 1, 2) if len(tries(folder, number)) == 2]
    assert 0 in both
    assert all(tries(folder, number) == tries(folder, 0) for number in both)


@pytest.mark.parametrize(
    ("how", "kind", "code", "said"),
    [("data", DataError, 3, "row 1 is bad"), ("interrupt", InterruptedRunError, 5, "interrupted")],
)
def test_what_no_other_group_can_mend_ends_the_stage_at_once(
    tmp_path: Path, how: str, kind: type[DataError], code: int, said: str
) -> None:
    with pytest.raises(kind) as caught:
        deal(tmp_path, "planned", items=[0, 1, 2, 3], plan={1: [how]})
    assert (str(caught.value), caught.value.exit_code) == (said, code)
    assert len(tries(tmp_path, 1)) == 1
    assert all(gone(int(pid)) for file in tmp_path.glob("starts-*") for pid in group_work.lines(file))


def test_a_failed_worker_stops_the_stage_where_that_is_set(tmp_path: Path) -> None:
    devices = DevicesConfig(on_worker_failure="abort")
    with pytest.raises(
        OutOfMemoryError, match=r"devices\.on_worker_failure is 'abort'(.|\n)*signal 9(.|\n)*about to kill at 1"
    ):
        deal(tmp_path, "planned", items=[0, 1, 2, 3], plan={1: ["kill"]}, devices=devices)
    assert len(tries(tmp_path, 1)) == 1
    assert all(gone(int(pid)) for file in tmp_path.glob("starts-*") for pid in group_work.lines(file))


def test_a_group_that_raised_after_an_item_gets_a_new_process(tmp_path: Path) -> None:
    devices = DevicesConfig(on_worker_failure="abort")  # it is not dead
    heard = deal(tmp_path, "fails_second", items=list(range(5)), groups=three(2), how="raise", devices=devices)
    assert [pair for pair in statuses(heard) if pair[0] == 1] == [(1, "started"), (1, "retry"), (1, "started")]
    (failed,) = map(int, group_work.lines(tmp_path / "failed"))
    assert tries(tmp_path, failed) == ["0", "1"]  # not on the group that it failed on
    assert len(makers(tmp_path, list(range(5)))) == 5
    log = (tmp_path / "logs" / "group-1.log").read_text()
    assert log.count("group_work is imported") == 2


def test_a_group_that_was_killed_after_an_item_is_dead(tmp_path: Path) -> None:
    heard = deal(tmp_path, "fails_second", items=list(range(5)), groups=three(2), how="kill")
    assert [pair for pair in statuses(heard) if pair[0] == 1] == [(1, "started"), (1, "dead")]
    assert len(group_work.lines(tmp_path / "starts-0")) == 1
    assert "1" in makers(tmp_path, list(range(5)))


@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [
        ("raise", RuntimeError, "ValueError: a bug at -1"),
        ("oom", OutOfMemoryError, "no room for -1"),
        ("exit", RuntimeError, "exit code 0"),
    ],
)
def test_when_every_group_fails_before_an_item_the_last_error_is_raised(
    tmp_path: Path, how: str, kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=rf"no group of devices is left to work; the last, group \d(.|\n)*{said}"):
        deal(tmp_path, "fails_at_once", items=[0, 1, 2], how=how)


def test_a_failure_after_the_last_item_is_reported(tmp_path: Path) -> None:
    heard = deal(tmp_path, "fails_at_the_end", items=[0, 1, 2], groups=three(2))
    assert "failed after every shard was complete: ValueError: a bug at the end" in notes(heard)
    assert len(makers(tmp_path, [0, 1, 2])) == 3


HOWS = ["ok", "ok", "ok", "raise", "oom", "kill", "exit", "lie", "return"]


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    plan=st.dictionaries(st.integers(0, 5), st.lists(st.sampled_from(HOWS), min_size=1, max_size=3), max_size=4),
    count=st.integers(2, 3),
    hold=st.integers(1, 2),
    attempts=st.integers(1, 3),
    dead=st.sampled_from(["continue", "continue", "abort"]),
)
def test_whatever_happens_all_is_complete_or_an_error_is_raised(
    tmp_path_factory: pytest.TempPathFactory,
    plan: dict[int, list[str]],
    count: int,
    hold: int,
    attempts: int,
    dead: Any,
) -> None:
    folder = tmp_path_factory.mktemp("groups")
    items = list(range(6))
    devices = DevicesConfig(shard_attempts=attempts, on_worker_failure=dead)
    try:
        deal(folder, "planned", items=items, groups=three(count), plan=plan, hold=hold, devices=devices)
    except (RuntimeError, OutOfMemoryError):
        failures = [
            tries(folder, n) for n in items if any(how != "ok" for how in plan.get(n, [])[: len(tries(folder, n))])
        ]
        assert failures
    else:
        assert makers(folder, items) == [tries(folder, number)[-1] for number in items]
    for number in items:
        tried = tries(folder, number)
        assert len(tried) == len(set(tried)) <= attempts
    assert all(gone(int(pid)) for file in folder.glob("starts-*") for pid in group_work.lines(file))


# --- one group, here ---------------------------------------------------------------------------------------


def test_one_group_works_in_this_process(tmp_path: Path) -> None:
    heard = deal(tmp_path, "describe", items=[2, 1], groups=[Group(1)])
    assert [event for event, _ in heard] == ["note", "throughput", "shard", "advance"] * 2
    assert [fields["file"] for event, fields in heard if event == "shard"] == ["item-2", "item-1"]
    assert heard[0][1] == {"text": "a note"}
    assert makers(tmp_path, [1, 2]) == [str(os.getpid())] * 2


def test_one_group_sees_its_gpus_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    deal(tmp_path, "planned", items=[0], groups=[Group(1, ("4",))], plan={})
    assert makers(tmp_path, [0]) == ["4"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5"
    started = types.SimpleNamespace(cuda=types.SimpleNamespace(is_initialized=lambda: True))
    monkeypatch.setitem(sys.modules, "torch", started)
    deal(tmp_path, "planned", items=[1], groups=[Group(1, ("4",))], plan={})
    assert makers(tmp_path, [1]) == ["4,5"]


def test_one_groups_errors_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    alone = [Group(1)]
    with pytest.raises(ValueError, match="a bug at 1"):
        deal(tmp_path, "planned", items=[0, 1], groups=alone, plan={1: ["raise"]})
    with pytest.raises(RuntimeError, match="shard 3 was reported as complete, and it is not"):
        deal(tmp_path, "planned", items=[3], groups=alone, plan={3: ["lie"]})
    with pytest.raises(RuntimeError, match="the stage has ended, but shard 5 is not complete"):
        deal(tmp_path, "planned", items=[4, 5], groups=alone, plan={5: ["return"]})
