"""What transformers' save_pretrained leaves undone."""

from __future__ import annotations

from pathlib import Path


def share_weights(folder: Path) -> None:
    """Gives the weights in a folder the permissions of its config.json, which follow the umask.

    safetensors writes its files for their owner alone, so that a colleague could read everything but the weights.
    """
    share_mode(folder, folder / "config.json")


def share_mode(folder: Path, other: Path) -> None:
    """Gives the safetensors files in a folder the permissions of another file."""
    mode = other.stat().st_mode & 0o777
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)
