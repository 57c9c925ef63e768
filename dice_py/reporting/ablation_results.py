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

VERSION = 1
"""Of ablation.json, as it is read here."""
START = 0
"""The place of the policy that the rounds start from, among the numbers of rounds."""
_RATE = "_win_rate"
_KL = "kl_to_start"
_LENGTH = "mean_response_tokens"
_OWN_SAMPLES = "on_policy_reward_accuracy"
_VERDICTS = {
    "shown": "shown: the interval lies above 0",
    "refuted": "refuted: the interval lies below 0",
    "open": "open: the interval has 0 in it",
}


@dataclass(frozen=True)
class Measured:
    """A value with its interval, and of each seed; None where something was not measured."""

    mean: float
    low: float | None
    high: float | None
    by_seed: tuple[float | None, ...]

    @property
    def ends(self) -> list[float]:
        """The mean, and the ends of the interval where there is one."""
        return [end for end in (self.mean, self.low, self.high) if end is not None]

    def text(self, places: int | None = None, *, signs: bool = False) -> str:
        """As a person reads it: 0.543 (0.512 to 0.574), or of a difference +0.021 (-0.004 to +0.046).

        Args:
            places: decimals; None: three significant digits.
            signs: whether the value is a difference.
        """
        places = _places(self.ends) if places is None else places
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


def measured(value: Any) -> Measured | None:
    """A value of ablation.json; None where it is absent or no number."""
    if not isinstance(value, Mapping) or (mean := _finite(value.get("mean"))) is None:
        return None
    low, high = (_finite(end) for end in value.get("ci95") or (None, None))
    if low is None or high is None:
        low = high = None
    return Measured(mean, low, high, tuple(_finite(each) for each in value.get("by_seed") or ()))


def history(arm: Mapping[str, Any], metric: str) -> dict[int, Measured]:
    """A metric of an arm by round; `START` is the start, where it was measured or is known.

    A policy is as good as itself, so a win rate over the start is 0.5 there, and the KL to it is 0.
    """
    start = measured(arm.get("start", {}).get(metric))
    found = {} if start is None else {START: start}
    for each in arm["rounds"]:
        if (value := measured(each["metrics"].get(metric))) is not None:
            found[each["round"]] = value
    by_definition = 0.5 if metric.endswith(_RATE) else 0.0 if metric == _KL else None
    if found and START not in found and by_definition is not None:
        found = {START: Measured(by_definition, None, None, ())} | found
    return found


def shown_metrics(results: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """(metrics that are plotted, with their titles; words for those that no arm has).

    First that by which claims are judged, then the judge's other metrics, mean length, KL to the start, and the
    accuracy of the reward on the policy's own samples.
    """
    quality = results["quality"]
    judge = quality.removesuffix(_RATE) if quality.endswith(_RATE) else "oracle"
    own = "accuracy of the reward on own samples"
    groups: list[tuple[str, dict[str, str]]] = [
        (quality, {quality: f"{_words(quality)}{' over the start' if quality.endswith(_RATE) else ''}"}),
        (f"{_words(judge)} accuracy and score", {name: _words(name) for name in (f"{judge}_accuracy", score(results))}),
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
    quality: str = results["quality"]
    return f"{quality.removesuffix(_RATE) if quality.endswith(_RATE) else 'oracle'}_score"


def frontier_metrics(results: Mapping[str, Any]) -> tuple[str, str] | None:
    """(KL to the start, what is drawn against it: the judge's score, else the quality); None without both."""
    present = {name for arm in results["arms"] for each in arm["rounds"] for name in each["metrics"]}
    against = next((name for name in (score(results), results["quality"]) if name in present), None)
    return None if against is None or _KL not in present else (_KL, against)


def verdict_text(contrast: Mapping[str, Any]) -> str:
    """The verdict on a claim in words."""
    verdict = str(contrast["verdict"])
    difference = measured(contrast["difference"])
    if verdict == "open" and (difference is None or difference.low is None):
        return "open: there is no interval"
    return _VERDICTS.get(verdict, verdict)


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
        out: the ablation's folder.
    """
    arms = [arm["settings"] for arm in results["arms"]]
    penalties = _unique(each["mine.debias"] for each in arms if _has_penalty(each))
    gammas = _unique(each["replay.gamma"] for each in arms if each.get("replay.gamma"))
    methods = _unique(each["train.method"] for each in arms if "train.method" in each)
    losses = _unique(_loss_text(each["train.loss"]) for each in arms if each.get("train.loss"))
    usual = (resolve() if results["is_world"] else RunConfig.model_construct()).replay.gamma
    settings = {name: setting_text(value) for name, value in results["settings"].items()}
    if len(gammas) == 1 and gammas[0] != usual:
        settings["replay.gamma"] = setting_text(gammas[0])
    options = {
        "--arms": _unique(_base_arm(each) for each in arms),
        "--debias": penalties,
        "--methods": methods,
        "--losses": losses,
        "--rounds": [results["rounds"]],
        "--seeds": results["seeds"],
    }
    words = [f"{name} {shlex.quote(','.join(map(str, values)))}" for name, values in options.items() if values]
    words += [f"--set {shlex.quote(f'{name}={value}')}" for name, value in settings.items()]
    folder = out.absolute()
    return " ".join(["dice ablate", *words, "--out", shlex.quote(str(folder.with_name(folder.name + "-again")))])


def column_texts(values: Sequence[Measured | None]) -> list[str]:
    """The texts of a column of a table, with as many decimals each; – where something was not measured."""
    ends = [end for value in values if value is not None for end in value.ends]
    places = _places(ends) if ends else 0
    return ["–" if value is None else value.text(places) for value in values]


def seed_texts(
    value: Measured | None, seeds: Sequence[int], all_seeds: Sequence[int], *, signs: bool = False
) -> list[str]:
    """The value of each of `all_seeds`; – where it is not known.

    Args:
        seeds: those that the value's numbers are of, in their order.
        signs: whether the values are differences.
    """
    known = {}
    if value is not None and len(value.by_seed) == len(seeds):
        known = dict(zip(seeds, value.by_seed, strict=True))
    numbers = [known.get(seed) for seed in all_seeds]
    form = signed if signs else fixed
    return ["–" if number is None else form(number) for number in numbers]


def fixed(value: float, places: int | None = None) -> str:
    """A number with so many decimals; with three significant digits by default."""
    places = _places([value]) if places is None else places
    return f"{round(value, places) + 0.0:,.{places}f}"


def signed(value: float, places: int | None = None) -> str:
    """A difference with its sign; zero has none."""
    text = fixed(value, places)
    return f"+{text}" if float(text.replace(",", "")) > 0 else text


def _base_arm(settings: Mapping[str, Any]) -> str:
    replays = bool(settings.get("replay.gamma"))
    if _has_penalty(settings):
        return "both" if replays else "length"
    return "replay" if replays else "neither"


def _has_penalty(settings: Mapping[str, Any]) -> bool:
    return bool(settings.get("mine.debias", "none") != "none")


def _loss_text(loss: Any) -> str:
    """A loss as --losses takes it: the names of its types."""
    return loss if isinstance(loss, str) else "+".join(str(term["type"]) for term in loss)


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _words(name: str) -> str:
    return name.replace("_", " ")


def _finite(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _places(values: Sequence[float]) -> int:
    """Decimals that give the largest of the values three significant digits; three of them from 0.01 on."""
    largest = max(map(abs, values))
    if not largest:
        return 3
    return min(max(2 - math.floor(math.log10(largest)), 0), 3 if largest >= 0.01 else 6)
