"""A config of a run on an own model, and the message with which a change of it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from dice_py.config.loading import resolve
from dice_py.errors import UsageError

OWN = {
    "model": {"policy": "policy-folder", "reference": "reference-folder"},
    "data": {"prompts": "prompts.jsonl", "replay": "pairs.jsonl"},
}


def refused(*assignments: str, files: tuple[Path, ...] = ()) -> str:
    """The message with which `--set` assignments (or files) are refused."""
    with pytest.raises(UsageError) as caught:
        resolve(files, assignments)
    assert caught.value.exit_code == 2
    return str(caught.value)
