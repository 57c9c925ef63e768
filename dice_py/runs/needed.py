"""Which models and samples of complete rounds a later stage of the run reads.

Let M_t be the policy that round t ended with. Round t+1 samples from M_t. Its reference is M_{t−1} (`reward_reference:
previous`), and with `mine.second_reward: previous` it scores one model before that. The start of the run is no round's:
every evaluation compares with it.
"""

from __future__ import annotations

from dataclasses import dataclass

from dice_py.config.run import RunConfig


@dataclass(frozen=True)
class Needed:
    """What is needed of the rounds 1 to `through`, which are complete. Round numbers below 1 mean nothing."""

    config: RunConfig
    through: int
    again: tuple[int, ...] = ()
    """Those of which a resume does a stage again."""

    @property
    def depth(self) -> int:
        """How many rounds before the policy that a round starts from the oldest model of its scores is."""
        config = self.config
        return int(config.reward_reference == "previous") + int(config.mine.second_reward == "previous")

    @property
    def _is_last(self) -> bool:
        return self.through >= self.config.rounds.count

    def models(self) -> set[int]:
        """The rounds whose policy the next round, or a stage that is done again, reads; the last one's always."""
        needed = {self.through}
        if not self._is_last:
            needed |= {self.through - back for back in range(self.depth + 1)}
        for number in self.again:
            needed |= {number - back for back in range(self.depth + 2)}
        return needed

    def samples(self) -> set[int]:
        """The rounds whose generations the next round's pool has, or a stage that is done again reads."""
        pool = self.config.mine.pool_rounds
        needed = set() if self._is_last else {self.through + 1 - back for back in range(pool)}
        for number in self.again:
            needed |= {number - back for back in range(pool)}
        return needed

    def scores(self) -> set[int]:
        """The rounds whose scores a stage that is done again reads."""
        return set(self.again)
