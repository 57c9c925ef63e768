"""What an ablation measured (`ablation.json`), as its page and the terminal show it: values, metrics, verdicts.

An interval is a 95 % interval of the mean over seeds, or over prompts where there is one seed only.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dice_py.config.loading import resolve
from dice_py.config.run import RunConfig
from dice_py.errors import DataError
from dice_py.runs.stored_config import CONFIG_FILE

VERSION = 1
"""Of ablation.json, as it is read here."""
START = 0
"""The place of the policy that the rounds start from, among the numbers of rounds."""
_RATE = "_win_rate"
_KL = "kl_to_start"
_LENGTH = "mean_response_tokens"
_OWN_SAMPLES = "on_policy_reward_accuracy"


@dataclass(frozen=True)
class Measured:
    """A value with its interval, and of each seed; None where something was not measured."""

    mean: float
    low: float | None
    high: float | None
    by_seed: tuple[float | None, ...]

    @property
    def ends(self) -> list[float]:
        """The mean, and the ends of the interval where there is one that is no point."""
        ends = [end for end in (self.mean, self.low, self.high) if end is not None]
        return ends if self.low != self.high else ends[:1]

    def text(self, places: int | None = None, *, signs: bool = False) -> str:
        """As a person reads it: 0.543 (0.512 to 0.574), or of a difference +0.021 (-0.004 to +0.046).

        Args:
            places: decimals; None: three significant digits.
            signs: whether the value is a difference.
        """
        places = column_places([self]) if places is None else places
        mean, *interval = ((signed if signs else fixed)(end, places) for end in self.ends)
        return f"{mean} ({interval[0]} to {interval[1]})" if interval else mean


def checked(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """The results, if they are of the version that is read here.

    Raises:
        DataError: they are of another one.
    """
    if results.get("version") != VERSION:
        raise DataError(
            f"ablation.json is of version {results.get('version')!r}, and this dice reads version {VERSION}: repeat "
            "`dice ablate` with the same --out, which makes it again from the runs that are there"
        )
    return results


def unfinished_runs(results: Mapping[str, Any]) -> list[str]:
    """The runs that are not complete, with what they failed on, if they did."""
    failures = results.get("failures", {})
    return [f"{name}: {failures[name]}" if name in failures else name for name in results["unfinished"]]


def gap_texts(results: Mapping[str, Any]) -> list[str]:
    """What was not measured in single runs: their arms lack it."""
    return [f"{gap}: not measured in this run, and so missing from its arm" for gap in results.get("gaps", ())]


def measured(value: Any) -> Measured | None:
    """A value of ablation.json; None where it is absent or no number."""
    if not isinstance(value, Mapping) or (mean := _finite(value.get("mean"))) is None:
        return None
    low, high = (_finite(end) for end in value.get("ci95") or (None, None))
    if low is None or high is None:
        low = high = None
    return Measured(mean, low, high, tuple(_finite(each) for each in value.get("by_seed") or ()))


def history(arm: Mapping[str, Any], metric: str) -> dict[int, Measured]:
    """A metric of an arm by round; `START` is the start, where it was measured."""
    found = {START: measured(arm["start"].get(metric))}
    found |= {each["round"]: measured(each["metrics"].get(metric)) for each in arm["rounds"]}
    return {number: value for number, value in found.items() if value is not None}


def shown_metrics(results: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """(metrics that are plotted, with their titles; words for those that no arm has).

    First that by which claims are judged, then the judge's other metrics, mean length, KL to the start, and the
    accuracy of the reward on the policy's own samples.
    """
    quality, judge = results["quality"], _judge(results)
    own = "accuracy of the reward on own samples"
    groups: list[tuple[str, dict[str, str]]] = [
        (quality, {quality: f"{_words(quality)}{' over the start' if quality.endswith(_RATE) else ''}"}),
        ("a judge's accuracy and score", {name: _words(name) for name in (f"{judge}_accuracy", score(results))}),
        ("mean length", {_LENGTH: "mean response length (tokens)"}),
        ("KL to the start", {_KL: "KL to the start (nats a response)"}),
        (own, dict.fromkeys((_OWN_SAMPLES, f"{judge}_{_OWN_SAMPLES}"), own)),
    ]
    present = {name for arm in results["arms"] for each in arm["rounds"] for name in each["metrics"]}
    shown: dict[str, str] = {}
    absent = []
    for words, titles in groups:
        here = {name: title for name, title in titles.items() if name in present}
        shown |= here
        if not here:
            absent.append(words)
    return shown, absent


def score(results: Mapping[str, Any]) -> str:
    """The metric of the judge that gives one response a score."""
    return f"{_judge(results)}_score"


def _judge(results: Mapping[str, Any]) -> str:
    quality: str = results["quality"]
    return quality.removesuffix(_RATE) if quality.endswith(_RATE) else "oracle"


def frontier_metrics(results: Mapping[str, Any]) -> tuple[str, str] | None:
    """(KL to the start, what is drawn against it: the judge's score, else the quality); None without both."""
    present = {name for arm in results["arms"] for each in arm["rounds"] for name in each["metrics"]}
    against = next((name for name in (score(results), results["quality"]) if name in present), None)
    return None if against is None or _KL not in present else (_KL, against)


def verdict_text(contrast: Mapping[str, Any]) -> str:
    """The verdict on a claim, and where the interval lies; – where nothing is claimed."""
    verdict, difference = contrast["verdict"], measured(contrast["difference"])
    if verdict is None:
        return "–"
    if difference is None or difference.low is None or difference.high is None:
        return f"{verdict}: no interval"
    where = "above 0" if difference.low > 0 else "below 0" if difference.high < 0 else "both sides of 0"
    return f"{verdict}: {where}"


def claims_by_metric(results: Mapping[str, Any]) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """(the contrasts that are shown first, all others), by metric.

    First those of the metric by which claims are judged, and those in which the mean length is claimed to differ.
    """
    first: dict[str, list[Any]] = {}
    others: dict[str, list[Any]] = {}
    for contrast in results["contrasts"]:
        metric = contrast["metric"]
        is_first = metric == results["quality"] or (metric == _LENGTH and contrast["verdict"] is not None)
        (first if is_first else others).setdefault(metric, []).append(contrast)
    return first, others


def place_text(number: int) -> str:
    """A round, or the start, in words."""
    return "start" if number == START else f"round {number}"


def seeds_of_contrast(results: Mapping[str, Any], contrast: Mapping[str, Any]) -> list[int]:
    """The seeds of both arms of a contrast, in order: differences are within a seed."""
    seeds = {arm["arm"]: arm["seeds"] for arm in results["arms"]}
    theirs = set(seeds.get(contrast["against_arm"], ()))
    return [seed for seed in seeds.get(contrast["arm"], ()) if seed in theirs]


def intervals_text(results: Mapping[str, Any]) -> str:
    """What the intervals are of."""
    if results["interval"] == "prompts":
        return "95 % intervals over the prompts of one seed: they do not tell what another seed would give"
    return "95 % intervals over seeds (Student's t)"


def setting_text(value: Any) -> str:
    """A setting's value, as --set takes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def command(results: Mapping[str, Any], out: Path) -> str:
    """The command that makes the ablation again, in a folder of its own.

    Args:
        out: the ablation's folder. Of a model of the user's own, models and data are named by the config of one of its
            runs.
    """
    settings = [arm["settings"] for arm in results["arms"]]
    debiases = _unique(each["mine.debias"] for each in settings if each.get("mine.debias", "none") != "none")
    options = {
        "--arms": _unique(arm["arm"].partition("-")[0] for arm in results["arms"]),
        "--debias": debiases,
        "--methods": _unique(each["train.method"] for each in settings if "train.method" in each),
        "--losses": _unique(each["train.loss"][0]["type"] for each in settings if "train.loss" in each),
        "--rounds": [results["rounds"]],
        "--seeds": results["seeds"],
    }
    words = [f"{name} {shlex.quote(','.join(map(str, values)))}" for name, values in options.items() if values]
    if results["is_world"]:
        shared = {name: setting_text(value) for name, value in results["settings"].items()}
        words += [f"--set {shlex.quote(f'{name}={value}')}" for name, value in shared.items()]
    else:
        words.insert(0, f"-c {shlex.quote(str(_config_of_a_run(results, out.absolute())))}")
    folder = out.absolute()
    return " ".join(["dice ablate", *words, "--out", shlex.quote(str(folder.with_name(folder.name + "-again")))])


def _config_of_a_run(results: Mapping[str, Any], out: Path) -> Path:
    """The config of a run in which `replay.gamma` is that of all arms that replay, and the tolerances of `matched`
    that of all arms that have it, as far as there is one."""
    arms = results["arms"]

    def own(arm: Mapping[str, Any]) -> tuple[bool, bool]:
        settings = arm["settings"]
        return "replay.gamma" not in settings, "mine.length_tolerance" not in settings

    arm = max(arms, key=own)
    return run_folder(out, arm["arm"], results["seeds"][0]) / CONFIG_FILE


def run_folder(out: Path, arm: str, seed: int) -> Path:
    """Where the run of an arm with a seed is."""
    return out / "runs" / arm / f"seed-{seed}"


def base_setting(results: Mapping[str, Any], name: str) -> str:
    """A setting that an arm leaves as all arms share it; – where it is not known."""
    shared = results["settings"]
    if name in shared:
        return setting_text(shared[name])
    value: Any = (resolve() if results["is_world"] else RunConfig.model_construct()).model_dump(mode="json")
    for key in name.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return "–"
        value = value[key]
    return setting_text(value)


def column_texts(values: Sequence[Measured | None], *, signs: bool = False) -> list[str]:
    """The texts of a column of a table, with as many decimals each; – where something was not measured.

    Args:
        signs: whether the values are differences.
    """
    places = column_places(values)
    return ["–" if value is None else value.text(places, signs=signs) for value in values]


def seed_texts(
    value: Measured | None, seeds: Sequence[int], all_seeds: Sequence[int], places: int, *, signs: bool = False
) -> list[str]:
    """The value of each of `all_seeds`; – where it is not known.

    Args:
        seeds: those that the value's numbers are of, in their order.
        places: decimals.
        signs: whether the values are differences.
    """
    if value is None or len(value.by_seed) != len(seeds):
        return ["–" for _ in all_seeds]
    known = dict(zip(seeds, value.by_seed, strict=True))
    numbers = [known.get(seed) for seed in all_seeds]
    form = signed if signs else fixed
    return ["–" if number is None else form(number, places) for number in numbers]


def column_places(values: Sequence[Measured | None]) -> int:
    """Decimals that give the largest mean three significant digits; three at most where an interval is beyond 0.01."""
    known = [value for value in values if value is not None]
    means = max((abs(value.mean) for value in known), default=0.0)
    ends = max((abs(end) for value in known for end in value.ends), default=0.0)
    if not ends:
        return 3
    return min(max(2 - math.floor(math.log10(means or ends)), 0), 3 if ends >= 0.01 else 6)


def fixed(value: float, places: int) -> str:
    """A number with so many decimals."""
    return f"{round(value, places) + 0.0:,.{places}f}"


def signed(value: float, places: int) -> str:
    """A difference with its sign; zero has none."""
    text = fixed(value, places)
    return f"+{text}" if float(text.replace(",", "")) > 0 else text


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _words(name: str) -> str:
    return name.replace("_", " ")


def _finite(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None
