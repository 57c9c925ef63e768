"""What methods make of labels, and what is refused; the sign of R-DPO's length term; step 0 for every method."""

from __future__ import annotations

import inspect
import math
import re
from pathlib import Path
from typing import Any, get_args

import polars as pl
import pytest
import torch
from tiny_sets import CPU, scored_pairs, token_pairs
from tiny_training import Stage
from trl import DPOTrainer

from dice_py.config.loss import MINING_LABELS, LossTerm, LossType, MethodName
from dice_py.config.stages import ScoreConfig
from dice_py.config.training import TrainConfig
from dice_py.errors import DataError, UsageError
from dice_py.scoring.pairs import score_pairs
from dice_py.storage.digests import content_digest
from dice_py.storage.parquet import write_parquet
from dice_py.training.methods.registry import METHODS
from dice_py.training.pair_terms import label_note, load_pairs
from dice_py.training.trainer import trainer_arguments

ROWS: dict[str, Any] = {
    "prompt_ids": [[1, 2], [3], [3]],
    "chosen_ids": [[4, 5], [6], [6, 7, 8]],
    "rejected_ids": [[7], [8, 9], [9]],
    "ref_chosen_logps": [-1.0, -2.0, -3.0],
    "ref_rejected_logps": [-3.0, -4.0, -5.0],
}
LABELS: dict[str, Any] = {
    "chosen_win_rate": [0.9, 0.75, None],
    "rejected_win_rate": [0.1, 0.5, None],
    "soft_label": [0.9, 0.5, None],
    "difficulty": ["easy", "hard", None],
    "consistency": [0.5, 0.75, None],
}


def loaded(folder: Path, beta: float = 0.5, meta: Any = None, rows: Any = None, **settings: Any) -> pl.DataFrame:
    frame = pl.DataFrame(ROWS | LABELS | (rows or {}), strict=False)
    file = write_parquet(folder / "training_set.parquet", frame, key="key", meta=meta)
    return load_pairs(file, TrainConfig(**settings), beta)[0]


@pytest.mark.parametrize(
    ("settings", "terms"),
    [
        ({}, {}),
        (
            {"method": "rdpo", "length_weight": 0.25},
            {"chosen_shift": [-1.0, -0.5, -1.5], "rejected_shift": [-0.5, -1.0, -0.5]},
        ),
        ({"method": "sppo"}, {"chosen_shift": [-0.2, -0.5, 0.0], "rejected_shift": [0.2, 1.0, 0.0]}),
        ({"method": "cream"}, {"label": [0.625, 0.625, 1.0]}),
        ({"method": "cream", "consistency": "prompt"}, {"label": [0.5, 0.75, 1.0]}),
        ({"method": "spa"}, {"label": [1.0, 0.9, 1.0]}),
        ({"method": "soft"}, {"label": [0.9, 0.5, 1.0]}),
        ({"weight_column": "soft_label"}, {"weight": [0.9 / 0.7, 0.5 / 0.7, 1.0]}),
    ],
    ids=str,
)
def test_terms(tmp_path: Path, settings: dict[str, Any], terms: dict[str, list[float]]) -> None:
    pairs = loaded(tmp_path, **settings)
    assert set(pairs.columns) == {*ROWS, *terms}
    for name, values in terms.items():
        assert pairs[name].to_list() == pytest.approx(values)


def test_equal_weights_are_one_to_the_bit(tmp_path: Path) -> None:
    pairs = loaded(tmp_path, rows={"w": [0.1, 0.1, 0.1]}, weight_column="w")
    assert pairs["weight"].to_list() == [1.0, 1.0, 1.0]


def test_a_weight_column_with_the_name_of_a_term_is_no_term(tmp_path: Path) -> None:
    for name in ("label", "chosen_shift", "weight"):
        pairs = loaded(tmp_path, rows={name: [1.0, 2.0, 3.0]}, weight_column=name)
        assert set(pairs.columns) == {*ROWS, "weight"}
        assert pairs["weight"].to_list() == [0.5, 1.0, 1.5]


@pytest.mark.parametrize(
    ("settings", "rows", "error", "says"),
    [
        ({"method": "sppo"}, {"chosen_win_rate": [0.9, 1.5, None]}, DataError, "'chosen_win_rate' is 1.5 in row 1"),
        ({"method": "soft"}, {"soft_label": ["a", "b", "c"]}, DataError, "'soft_label' has dtype String"),
        ({"method": "soft"}, {"soft_label": [math.nan, 0.5, 0.5]}, DataError, "'soft_label' is nan in row 0"),
        ({"method": "spa"}, {"difficulty": ["easy", "odd", None]}, DataError, "'difficulty' is 'odd' in row 1"),
        ({"weight_column": "w"}, {}, DataError, "no column 'w', which train.weight_column=w reads"),
        ({"weight_column": "w"}, {"w": [1.0, -1.0, 1.0]}, DataError, "'w' is -1.0 in row 1"),
        ({"weight_column": "w"}, {"w": [0.0, 0.0, None]}, DataError, "no weight above zero"),
        ({"weight_column": "w"}, {"w": ["x", "y", "z"]}, DataError, "must hold weights"),
        ({"ld_alpha": 0.5}, {}, DataError, "no column 'ref_chosen_shared_logps', which train.ld_alpha reads"),
        ({"method": "rdpo"}, {}, UsageError, "the training set names no penalty per token"),
    ],
    ids=str,
)
def test_what_is_refused(tmp_path: Path, settings: Any, rows: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=re.escape(says)):
        loaded(tmp_path, rows=rows, **settings)


def test_a_missing_label_names_what_mining_must_add(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "training_set.parquet", pl.DataFrame(ROWS), key="key")
    for method, label in [("sppo", "win_rates"), ("soft", "soft_labels"), ("spa", "difficulty"), ("cream", "second")]:
        with pytest.raises(DataError, match=rf"train\.method={method} reads: mine with mine\.{label}"):
            load_pairs(file, TrainConfig(method=method), 0.1)


def test_labels_below_one_half_are_said(tmp_path: Path) -> None:
    rows = {"consistency": [0.25, 0.5, None]}
    config = TrainConfig(method="cream")
    note = label_note(loaded(tmp_path, rows=rows, method="cream"), config)
    assert note is not None
    assert "the labels of 2 pairs have the mean 0.375" in note
    assert label_note(loaded(tmp_path, method="cream"), config) is None
    assert label_note(loaded(tmp_path), TrainConfig()) is None


def test_labels_that_do_nothing_are_said(tmp_path: Path) -> None:
    nothing = {name: [None] * 3 for name in LABELS}
    for method in ("cream", "soft", "spa"):
        note = label_note(loaded(tmp_path, rows=nothing, method=method), TrainConfig(method=method))
        assert note is not None
        assert f"train.method={method} is DPO here" in note
    config = TrainConfig(method="sppo")
    assert "no pair has a win rate" in str(label_note(loaded(tmp_path, rows=nothing, method="sppo"), config))
    assert label_note(loaded(tmp_path, method="sppo"), config) is None


def test_every_method_is_in_both_tables() -> None:
    assert set(METHODS) == set(get_args(MethodName))
    assert set(MINING_LABELS) <= set(METHODS)


def test_loss_types_are_those_of_trl(tmp_path: Path) -> None:
    source = inspect.getsource(DPOTrainer._compute_loss)
    assert set(re.findall(r'loss_type == "(\w+)"', source)) == set(get_args(LossType))
    for name in get_args(LossType):
        settings = {"label_smoothing": 0.01} if name == "exo_pair" else {}
        others = [{"type": "sigmoid"}] if name == "sft" else []
        config = TrainConfig(loss=[{"type": name, "weight": 0.5}, *others], **settings)
        arguments = trainer_arguments(config, CPU, tmp_path, 0.1, 0, pairs=4)
        assert (arguments.loss_type[0], arguments.loss_weights[0]) == (name, 0.5)


def test_the_length_term_of_rdpo_is_added() -> None:
    """On two responses, the optimum of E[r − α|y|] − β·KL minimizes the R-DPO loss under r's own preferences."""
    beta, alpha = 0.7, 0.3
    rewards, lengths = torch.tensor([1.0, 0.4]).double(), torch.tensor([5.0, 2.0]).double()
    reference = torch.tensor([0.35, 0.65]).double().log()
    optimum = torch.log_softmax(reference + (rewards - alpha * lengths) / beta, dim=0)  # closed form under KL
    better = torch.sigmoid(rewards[0] - rewards[1])  # Bradley–Terry, of the true reward

    def minimum(sign: float) -> torch.Tensor:
        logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            ratio = torch.log_softmax(logits, dim=0) - reference
            margin = beta * (ratio[0] - ratio[1]) + sign * alpha * (lengths[0] - lengths[1])
            signs = torch.stack([margin, -margin])
            loss = -(torch.stack([better, 1 - better]) * torch.nn.functional.logsigmoid(signs)).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return torch.log_softmax(logits.detach(), dim=0)

    found = {sign: minimum(sign) for sign in (1.0, -1.0)}
    torch.testing.assert_close(found[1.0], optimum, rtol=1e-4, atol=1e-5)
    assert (found[-1.0] - optimum).abs().max() > 0.5


# --- trainings ----------------------------------------------------------------------------------------------


def labels_for(count: int) -> dict[str, pl.Series]:
    values = {"chosen_win_rate": 0.8, "rejected_win_rate": 0.3, "soft_label": 0.7, "consistency": 0.6}
    numbers = {name: pl.Series(name, [value] * count, dtype=pl.Float32) for name, value in values.items()}
    return numbers | {"difficulty": pl.Series(["hard", "easy"] * (count // 2))}


SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {},
    "rdpo": {"method": "rdpo", "length_weight": 0.05},
    **{name: {"method": name} for name in ("sppo", "cream", "spa", "soft")},
    "ld_alpha": {"ld_alpha": 0.5},
    "wpo": {"use_weighting": True},
    "mixture": {"loss": [LossTerm(type="ipo", weight=0.5), LossTerm(type="hinge")]},
}


@pytest.fixture(scope="module")
def all_labels(llama: Path) -> pl.DataFrame:
    pairs = token_pairs(8, seed=3).filter(pl.all_horizontal(pl.all().list.len() > 2))
    pairs = pl.concat([pairs] * 4).head(8)
    return with_logps(llama, pairs).with_columns(**labels_for(8))


def with_logps(policy: Path, pairs: pl.DataFrame) -> pl.DataFrame:
    logps = score_pairs(ScoreConfig(), CPU, policy=policy, pairs=pairs, shared=True)
    return pairs.hstack(logps.rename(lambda name: f"ref_{name}s"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_step_0_passes_and_fails_on_a_shifted_mask(
    llama: Path, all_labels: pl.DataFrame, tmp_path: Path, name: str
) -> None:
    run = Stage(llama, all_labels, tmp_path)
    counts = run(all_labels, **SETTINGS[name], max_steps=1)
    assert counts["step0_loss"] == pytest.approx(math.log(2), abs=1e-3)
    # A scorer whose mask begins one token late: the prompt has the response's first token.
    first, rest = pl.col("chosen_ids").list.head(1), pl.col("chosen_ids").list.slice(1)
    moved = all_labels.with_columns(prompt_ids=pl.concat_list("prompt_ids", first), chosen_ids=rest)
    wrong = with_logps(llama, moved.select("prompt_ids", "chosen_ids", "rejected_ids"))["ref_chosen_logps"]
    with pytest.raises(DataError, match="at step 0"):
        run(all_labels.with_columns(wrong), **SETTINGS[name], max_steps=1, key="another")
    assert not (run.out / "checkpoints").exists() or not list((run.out / "checkpoints").glob("checkpoint-*"))


@pytest.mark.slow
def test_wrong_sums_over_the_shared_length_stop_at_step_0(
    llama: Path, all_labels: pl.DataFrame, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="at step 0"):
        Stage(llama, all_labels, tmp_path)(
            all_labels.with_columns(pl.col("ref_chosen_shared_logps") - 1), ld_alpha=0.5, max_steps=1
        )


@pytest.mark.slow
def test_rdpo_without_a_penalty_is_dpo_to_the_bit(llama: Path, all_labels: pl.DataFrame, tmp_path: Path) -> None:
    weights = {}
    for name, settings in {
        "dpo": {},
        "zero": {"method": "rdpo", "length_weight": 0.0},
        "rdpo": SETTINGS["rdpo"],
    }.items():
        run = Stage(llama, all_labels, tmp_path / name)
        run(all_labels, **settings, max_steps=2)
        weights[name] = content_digest(run.model / "model.safetensors")
    assert weights["zero"] == weights["dpo"] != weights["rdpo"]


@pytest.mark.slow
def test_another_reference_than_the_policy(llama: Path, other: Path, tmp_path: Path) -> None:
    """With train.reference=initial, step 0 compares with the policy's own log-probabilities."""
    pairs = scored_pairs(llama, 8)
    of_other = scored_pairs(other, 8)
    both = pairs.rename({f"ref_{side}_logps": f"start_{side}_logps" for side in ("chosen", "rejected")}).with_columns(
        of_other["ref_chosen_logps"], of_other["ref_rejected_logps"]
    )
    run = Stage(llama, both, tmp_path)
    counts = run(both, max_steps=1, logging_steps=1)
    assert counts["step0_loss"] == pytest.approx(math.log(2), abs=1e-3)
    ratio = pl.col("start_chosen_logps") - pl.col("ref_chosen_logps")
    other_ratio = pl.col("start_rejected_logps") - pl.col("ref_rejected_logps")
    assert both.select((ratio - other_ratio).abs().mean()).item() > 0.1
    assert abs(counts["final_chosen_change"]) < 1e-3  # of the first step, from the start and not from the reference
    with pytest.raises(DataError, match="at step 0"):
        run(both.with_columns(pl.col("start_chosen_logps") + 1), max_steps=1, key="another")
