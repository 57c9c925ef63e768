"""Where the project's files are, and how subprocesses of tests import them."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUPPORT = Path(__file__).parent


def child_environment(**changes: str) -> dict[str, str]:
    """The environment of a subprocess that starts in any folder and imports the package and tests/support."""
    paths = [str(SUPPORT), str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **changes}
