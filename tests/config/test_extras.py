"""The table of optional modules: every import of the project is in it or in the base, and a missing one is named."""

from __future__ import annotations

import re
import sys
import tomllib

import pytest
from places import ROOT

from dice_py.compute.failures import failure_fields
from dice_py.config.extras import EXTRAS, TRAINING, missing_module, require
from dice_py.errors import UsageError

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PACKAGES = {
    "huggingface_hub": "huggingface-hub",
    "markupsafe": "jinja2",
    "pydantic_core": "pydantic",
    "pynvml": "nvidia-ml-py",
    "safetensors": "transformers",
    "tokenizers": "transformers",
    "vl_convert": "vl-convert-python",
    "yaml": "pyyaml",
}
"""The packages that bring modules of another name."""
ELSEWHERE = {"vaderSentiment"}
"""Of `dice evidence`, which names the command that installs it (dice_py/evidence/oracle.py)."""


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=; ]", line)[0].lower() for line in requirements}


def imported() -> set[str]:
    """Top-level modules that the package and the command line import, anywhere in a file."""
    files = [*(ROOT / "dice_py").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]
    lines = (
        re.findall(r"^ *(?:from|import) (\w+)[\w.]*(?: import .+)?(?: as \w+)?$", file.read_text("utf-8"), re.MULTILINE)
        for file in files
    )
    found = {name for names in lines for name in names}
    return found - set(sys.stdlib_module_names) - {"dice_py", "cli"}


def package_of(module: str) -> str:
    return PACKAGES.get(module, module)


def test_every_import_is_of_the_base_or_of_an_extra() -> None:
    base = names(PROJECT["dependencies"])
    optional = {module for modules in EXTRAS.values() for module in modules}
    unknown = {module for module in imported() - optional - ELSEWHERE if package_of(module) not in base}
    assert unknown == set()
    assert {module for module in optional if package_of(module) in base} == set()


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_brings_what_it_is_named_for(extra: str) -> None:
    brought = names(PROJECT["optional-dependencies"][extra])
    assert [name for name in EXTRAS[extra] if package_of(name) not in brought] == []


def test_a_missing_module_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = "scipy is not installed; add it with: pip install 'dice-align[train]'"
    absent = ModuleNotFoundError("No module named 'scipy'", name="scipy.stats")
    assert str(missing_module(absent)) == said
    assert failure_fields(absent) == {"kind": "UsageError", "exit_code": 2, "text": said}  # in a worker
    with pytest.raises(UsageError, match=r"^torch, transformers, .* is not installed; .*'dice-align\[train\]'$"):
        require(*TRAINING, extra="train")


def test_other_import_errors_stay_as_they_are() -> None:
    for error in (
        ModuleNotFoundError("No module named 'numpy.absent'", name="numpy.absent"),  # numpy is installed
        ModuleNotFoundError("No module named 'of_a_user'", name="of_a_user"),
        ModuleNotFoundError("raised by hand"),
        ImportError("cannot import name", name="numpy"),
        ValueError("numpy"),
    ):
        assert missing_module(error) is None
    assert failure_fields(ModuleNotFoundError("No module named 'of_a_user'", name="of_a_user"))["kind"] == "bug"


def test_the_version_is_in_one_place() -> None:
    cargo = tomllib.loads((ROOT / "Cargo.toml").read_text(encoding="utf-8"))["workspace"]["package"]["version"]
    assert "version" not in PROJECT
    assert "version" in PROJECT["dynamic"]
    assert f"\nversion: {cargo}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
