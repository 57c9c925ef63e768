"""`import dice_py`: the public names, the version, and which modules they load."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

import dice_py

LOADED = """
import sys
import dice_py
assert "polars" not in sys.modules, "importing the package alone must stay quick"
for name in dice_py.__all__:
    getattr(dice_py, name)
print(*sorted(sys.modules))
"""


def modules_after(code: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_public_names_load_no_model_library() -> None:
    loaded = modules_after(LOADED)
    assert {"polars", "pyarrow", "pydantic", "dice_py._native"} <= loaded
    top_level = {name.partition(".")[0] for name in loaded}
    assert not top_level & {"torch", "transformers", "trl", "vllm", "accelerate", "datasets", "peft", "typer", "rich"}
    packages = {name.split(".")[1] for name in loaded if name.startswith("dice_py.")}
    assert not packages & {"compute", "models", "stages", "runs", "generation", "scoring", "training", "planning"}


def test_every_public_name_is_the_object_of_its_module() -> None:
    assert dice_py.__all__ == sorted(dice_py.__all__)
    assert set(dice_py.__all__) <= set(dir(dice_py))
    for name in set(dice_py.__all__) - {"__version__"}:
        assert getattr(dice_py, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'dice_py' has no attribute 'mine'"):
        dice_py.mine  # noqa: B018


def test_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dice_py.__version__ == importlib.metadata.version("dice-align")

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert dice_py.__version__ == "0+unknown"
