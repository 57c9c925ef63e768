"""The workflows of the code host: actions are pinned, and only the step that publishes may publish."""

from __future__ import annotations

import re
import stat
from typing import Any

import pytest
import yaml
from places import ROOT

FOLDER = ROOT / ".github" / "workflows"
WORKFLOWS: dict[str, Any] = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in FOLDER.iterdir()}
RELEASE = WORKFLOWS["release"]["jobs"]


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_actions_are_pinned_by_commit(name: str) -> None:
    text = (FOLDER / f"{name}.yml").read_text(encoding="utf-8")
    used = re.findall(r"uses: (.*)", text)
    assert used
    assert [line for line in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)] == []
    assert WORKFLOWS[name]["permissions"] == {"contents": "read"}


def test_ci_runs_the_projects_own_command() -> None:
    assert [step["run"] for step in steps(WORKFLOWS["ci"]) if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & stat.S_IXUSR


def test_one_wheel_for_each_platform() -> None:
    targets = {entry["target"] for entry in RELEASE["wheel"]["strategy"]["matrix"]["include"]}
    assert targets == {"x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu", "aarch64-apple-darwin"}


def test_each_artifact_is_tried_before_it_is_kept() -> None:
    for job in ("wheel", "sdist"):
        names = [step.get("uses", step.get("run", "")) for step in RELEASE[job]["steps"]]
        (tried,) = (at for at, name in enumerate(names) if ".ci/try_wheel.py" in name)
        (kept,) = (at for at, name in enumerate(names) if name.startswith("actions/upload-artifact"))
        assert tried < kept
    assert (ROOT / ".ci" / "try_wheel.py").is_file()


def test_only_a_tag_is_published_and_only_after_all_else() -> None:
    assert RELEASE["publish"]["if"] == "github.event_name == 'push'"
    assert WORKFLOWS["release"][True]["push"] == {"tags": ["v*"]}  # YAML 1.1 reads `on` as true
    assert RELEASE["publish"]["needs"] == ["attest"]
    assert RELEASE["attest"]["needs"] == ["wheel", "sdist"]
    assert "id-token" not in str([RELEASE[job] for job in ("wheel", "sdist")])
    assert RELEASE["publish"]["permissions"] == {"id-token": "write"}
