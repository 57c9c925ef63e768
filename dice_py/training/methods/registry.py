"""The table of training methods. A method is one file beside this one, and one line here.

Its name and the mining labels that it switches on are in config/loss.py.
"""

from __future__ import annotations

from dice_py.training.methods import cream, dpo, mpo, rdpo, soft, spa, sppo
from dice_py.training.methods.base import Method

METHODS: dict[str, Method] = {
    method.name: method
    for method in (dpo.METHOD, rdpo.METHOD, sppo.METHOD, cream.METHOD, spa.METHOD, soft.METHOD, mpo.METHOD)
}
"""By name."""
