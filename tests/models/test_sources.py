"""What is fetched of a model on the Hugging Face hub."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from broken_models import as_bin, copy_of
from huggingface_hub.errors import LocalEntryNotFoundError

from dice_py.errors import DataError
from dice_py.models.sources import resolve_model


@pytest.fixture
def hub(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a repository, which is served under any name."""
    repository, snapshot = copy_of(llama, tmp_path), tmp_path / "snapshot"

    def download(name: str, *, revision: Any, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        for file in (each for each in repository.rglob("*") if each.is_file()):
            path = file.relative_to(repository)
            if any(fnmatch(str(path), each) for each in allow_patterns) and not any(
                fnmatch(str(path), each) for each in ignore_patterns
            ):
                (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, snapshot / path)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return repository


def names(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_weights_are_fetched_in_one_layout(hub: Path) -> None:
    for name in ("pytorch_model.bin", "consolidated.safetensors", "original/params.json", "x.gguf", "optimizer.pt"):
        (hub / name).parent.mkdir(exist_ok=True)
        (hub / name).write_bytes(b"x")
    (hub / "modeling_own.py").write_text("")
    folder = resolve_model("owner/name", None, role="model.policy")
    assert names(folder) >= {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}
    assert names(folder) - names(hub) == set()
    assert {"pytorch_model.bin", "consolidated.safetensors", "original/params.json", "x.gguf"} & names(folder) == set()
    assert "modeling_own.py" in names(folder)


def test_a_model_with_binary_weights_alone(hub: Path) -> None:
    as_bin(hub)
    folder = resolve_model("owner/name", None, role="model.policy")
    assert "pytorch_model.bin" in names(folder)


def test_a_model_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(DataError, match=r"model\.policy: owner/name is not a local folder, and cannot be downloaded"):
        resolve_model("owner/name", None, role="model.policy")
