"""Config sections of the judges of an evaluation (evaluation/judges/). Each is off by default."""

from __future__ import annotations

from dice_py.config.shared import Section


class JudgesConfig(Section):
    """Judges that compare the new policy with the start and with the policy of the round before."""
