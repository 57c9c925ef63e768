"""The stage inspect: what people look at before a round trains: a sample of its pairs, and what mining did to lengths.

It stands between replay and train, so that pairs can be read before hours of training are spent on them. No other stage
reads what it makes, and the run goes on without it if it fails (runs/folder.py).

Of each pair of the sample: prompt and responses, rewards before and after the correction for length, labels, all
candidates of the prompt as mining ranked them, and the credit of each token (scoring/credit.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.compute.failures import is_out_of_memory
from dice_py.config.report import ReportConfig
from dice_py.config.shared import ModelConfig
from dice_py.config.stages import ScoreConfig
from dice_py.errors import DamagedError, DataError
from dice_py.events import Report, no_report
from dice_py.mining.distributions import mining_distributions
from dice_py.mining.labels import finite
from dice_py.mining.ranking import ranking_scores
from dice_py.models.checkpoint import check_checkpoint
from dice_py.models.identity import model_identity
from dice_py.stages.inspected_pairs import SIDES, draw_round, fitted, mined_pairs, replayed_pairs
from dice_py.stages.inspected_shards import sample_of_shards
from dice_py.stages.job import Job, StageFile, StageResult, model_key_fields
from dice_py.stages.mine import MineJob
from dice_py.stages.token_credit import with_credit
from dice_py.storage.files import read_sealed, write_sealed
from dice_py.storage.integrity import check_intact, is_kept
from dice_py.storage.keys import versions
from dice_py.storage.parquet import parquet_meta, read_parquet, write_parquet
from dice_py.storage.schemas import INSPECTED_PAIRS

CREDIT_FAILURE = "credit_failure"
"""The count that says why no token has a credit."""
_FORM = 1
"""Of the two files. Those of earlier forms are made again."""


@dataclass(frozen=True)
class InspectJob(Job):
    """Writes `out/distributions.json` (mining/distributions.py) and, if `config.pairs` is not 0, `out/pairs.parquet`.

    The pairs (INSPECTED_PAIRS) are a stratified sample: mining/pair_sample.py has the rule. Of a round that is mined as
    a stream, both files are about some of its shards (stages/inspected_shards.py). Of mined pairs rewards are
    those of their scores; of replayed ones they are the sums of the credits, and null without credits.

    The counts are `pairs`, `sources` (pairs by source), `tokens` that both models were run over, and of the mined pairs
    `largest_difference`: of the sum of a response's credits from its stored reward, with `reward_std`, the standard
    deviation of all stored rewards. Where the models could not be run, `credit_failure` says why: the pairs have no
    credits, and the next call tries again.
    """

    config: ReportConfig
    score_config: ScoreConfig
    models: ModelConfig
    policy: Path
    """π of the round's reward."""
    reference: Path
    """π_ref of the round's reward."""
    beta: float
    mine: MineJob
    """That mined the pairs: its shards and options."""
    mined: StageFile
    training_set: StageFile
    prompts: Path
    """The prompts that were sampled on."""
    out: Path
    seed: int
    round_number: int

    @property
    def needs_process(self) -> bool:
        """Only credits need models."""
        return bool(self.config.pairs and self.config.token_credit)

    @property
    def distributions_file(self) -> Path:
        """What mining did to lengths and margins, as JSON."""
        return self.out / "distributions.json"

    @property
    def pairs_file(self) -> Path:
        """The sample of pairs."""
        return self.out / "pairs.parquet"

    def key_fields(self) -> dict[str, Any]:
        """The mined pairs and the training set, the models of the reward, the settings, the seed and versions."""
        return {
            "pairs": [self.mined[1], self.training_set[1]],
            "report": self.config.model_dump(),
            "form": _FORM,
            "score": self.score_config.model_dump(),
            "model": model_key_fields(self.models),
            "policy": model_identity(self.policy),
            "reference": model_identity(self.reference),
            "beta": self.beta,
            "round": self.round_number,
            "seed": self.seed,
            "versions": versions("torch", "transformers", "polars"),
        }

    def incomplete(self, files: Sequence[StageFile]) -> list[Path]:
        """As of every stage; also a file that a failed stage did not write, and pairs that lack their credits."""
        missing = super().incomplete(files)
        made = [file for file, _ in files]
        wanted = [self.distributions_file, *([self.pairs_file] if self.config.pairs else [])]
        missing += [file for file in wanted if file not in made]
        if not missing and self.config.pairs and _has_failed(self.pairs_file):
            missing.append(self.pairs_file)
        return missing

    def run(self, report: Report = no_report) -> StageResult:
        """Makes both files, unless they are there."""
        key = self.key()
        files = [self.distributions_file, *([self.pairs_file] if self.config.pairs else [])]
        kept = [is_kept(file, key, report) for file in files]  # all are looked at: some may be set aside
        made: list[StageFile] = [(file, key) for file in files]
        if self.config.pairs and all(kept) and not _has_failed(self.pairs_file):
            return StageResult(made, dict(parquet_meta(self.pairs_file)))
        every = self.mine
        check_intact([self.mined[0], self.training_set[0], self.prompts, *every.generations, *every.scores])
        options = every.config.options(every.seed)
        mine, mined = sample_of_shards(every, read_parquet(self.mined[0]), self.seed)
        if mine is not every:
            shards = f"{len(mine.generations)} of {len(every.generations)} shards"
            report("note", text=f"the round is large: its pairs to read are of {shards}")
        scored = mine.frame(options)
        alpha = self._alpha()
        write_sealed(self.distributions_file, mining_distributions(scored, mined, options, alpha), key)
        if not self.config.pairs:
            return StageResult(made, {"pairs": 0})
        rewards = scored[options.reward_column]
        pairs = self._pairs(mine, mined, rewards, ranking_scores(scored, options, alpha))
        del scored
        pairs, counts = self._with_credit(pairs, report)
        counts = {"pairs": pairs.height, "sources": _counted(pairs["source"]), **counts}
        if "largest_difference" in counts:
            spread = rewards.filter(rewards.is_finite()).std(ddof=0)
            counts["reward_std"] = None if spread is None else finite(float(spread))  # type: ignore[arg-type]
        write_parquet(self.pairs_file, fitted(pairs), key=key, schema=INSPECTED_PAIRS, meta=counts)
        return StageResult(made, counts)

    def _alpha(self) -> float | None:
        """The penalty that mining found.

        Raises:
            DamagedError: mining's summary is not the one of these pairs.
        """
        file = self.mine.out / "mining.json"
        summary = read_sealed(file, self.mine.key())
        if summary is None:
            raise DamagedError(f"{file} is damaged, or not of the pairs in {self.mined[0]}")
        alpha: float | None = summary.get("alpha")
        return alpha

    def _pairs(self, mine: MineJob, mined: pl.DataFrame, rewards: pl.Series, ranking: pl.Series) -> pl.DataFrame:
        """The sample of the pairs of some shards, with token ids and without credits."""
        from_mined, from_replay = draw_round(
            mined, mine.generations, self.training_set[0], self.config.pairs, self.seed
        )
        parts = [
            mined_pairs(
                mined,
                from_mined,
                generations=mine.generations,
                scores=mine.scores,
                prompts=self.prompts,
                rewards=rewards,
                ranking=ranking,
                round_number=self.round_number,
            ),
            replayed_pairs(self.training_set[0], from_replay, self.round_number),
        ]
        return pl.concat(parts)

    def _with_credit(self, pairs: pl.DataFrame, report: Report) -> tuple[pl.DataFrame, dict[str, Any]]:
        """The pairs with credits, and the counts about them; without credits where the models cannot be run."""
        if not self.config.token_credit:
            return pairs, {}
        try:
            check_intact([self.policy, self.reference])
            for role, folder in (("policy", self.policy), ("reference", self.reference)):
                check_checkpoint(folder, role, self.models)
            credited = with_credit(
                pairs,
                config=self.score_config,
                models=self.models,
                policy=self.policy,
                reference=self.reference,
                beta=self.beta,
                report=report,
            )
        except DamagedError:
            raise  # the run makes the model again
        except Exception as error:
            if not (isinstance(error, DataError) or is_out_of_memory(error)):
                raise
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            why = f"out of memory: {first}" if is_out_of_memory(error) else first
            return pairs, {CREDIT_FAILURE: why}
        return self._with_rewards(credited.pairs, credited.rewards), {
            "tokens": credited.tokens,
            "largest_difference": _largest_difference(credited.pairs, credited.rewards),
        }

    def _with_rewards(self, pairs: pl.DataFrame, rewards: pl.DataFrame) -> pl.DataFrame:
        """The pairs with rewards and margins from the credits where nothing is stored."""
        pairs = pairs.with_columns(pl.col(f"{side}_reward").fill_null(rewards[side].cast(pl.Float32)) for side in SIDES)
        return pairs.with_columns(pl.col("margin").fill_null(rewards["chosen"] - rewards["rejected"]))


def _has_failed(pairs: Path) -> bool:
    meta = parquet_meta(pairs)
    return isinstance(meta, dict) and CREDIT_FAILURE in meta


def _counted(sources: pl.Series) -> dict[str, int]:
    return dict(sources.value_counts().sort("source").iter_rows())


def _largest_difference(pairs: pl.DataFrame, rewards: pl.DataFrame) -> float | None:
    """Of the summed credits from the stored rewards, in units of reward; None where no reward is stored."""
    differences = pl.concat([(pairs[f"{side}_reward"].cast(pl.Float64) - rewards[side]).abs() for side in SIDES])
    largest = differences.drop_nulls().max()
    return None if largest is None else finite(float(largest))  # type: ignore[arg-type]
