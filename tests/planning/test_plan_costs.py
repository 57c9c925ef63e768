"""Estimates of stages by hand, from counts and measured costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plan_data import COSTS, MACHINE, SIZE, changed, estimated, small

from dice_py.config.loading import resolve
from dice_py.planning.calibration import calibrated_costs
from dice_py.planning.costs import Estimator
from dice_py.planning.counts import count_rounds
from dice_py.planning.pair_costs import mining_labels
from dice_py.planning.plan import not_estimated
from dice_py.runs.measured_costs import EvaluateCosts


def test_estimates_by_hand() -> None:
    config, run_data = small()
    found = estimated(config, run_data)
    assert list(found) == [
        f"round-01/{stage}" for stage in ("generate", "score", "mine", "replay", "inspect", "train", "evaluate")
    ]
    generate, score, mine, replay, inspect, train, evaluate = found.values()
    # Tokenizer 0.2, 4 prompts; 0.5 once; 5 steps, 40 tokens, 8 responses; a load.
    assert generate["work_seconds"] == pytest.approx(0.2 + 0.04 + 0.5 + 0.5 + 0.4 + 0.008)
    assert (generate["startup_seconds"], generate["tokens"], generate["disk_bytes"]) == (1.0, 80, 80)
    assert generate["seconds"] == pytest.approx(generate["work_seconds"] + 1.0)
    # The reference's 80 tokens, and the gate's: 8 responses with their prompts.
    assert score["tokens"] == 80 + 8 * 15
    assert score["work_seconds"] == pytest.approx(0.75 + 0.2)
    assert score["startup_seconds"] == 2.0
    assert mine["seconds"] == pytest.approx(0.008)
    # Four pairs of 30 tokens; γ = 0.5.
    assert replay["tokens"] == 120
    assert replay["work_seconds"] == pytest.approx(0.2 + 0.25 + 0.04 + 0.12)
    assert replay["disk_bytes"] == 8 * 20
    # Six minings of 8 responses; all 8 pairs of 30 tokens under both models, with 2 candidates of 10 bytes each.
    assert (inspect["pairs"], inspect["tokens"], inspect["startup_seconds"]) == (8, 2 * 240, 2.0)
    assert inspect["work_seconds"] == pytest.approx(6 * 0.008 + 0.2 + 0.25 + 0.48)
    assert inspect["disk_bytes"] == 2**15 + 8 * 2 * 10 + 16 * 240
    # 8 pairs of 30 tokens are checked, then 2 steps of 4 pairs with an update, a checkpoint each.
    assert (train["steps"], train["checkpoints"], train["tokens"]) == (2, 2, 240)
    assert train["work_seconds"] == pytest.approx(2.0 + 0.24 + 2 * (0.36 + 0.14) + 2 * 0.25)
    assert (train["disk_bytes"], train["transient_disk_bytes"]) == (4200, 1400)
    # Two draws of 2 responses, whose 30 tokens the first policy scores; 6 pairs of 30 tokens under the new policy, the
    # first one, which is still loaded, and the reference.
    assert evaluate["tokens"] == 2 * (20 + 10) + 30 + 3 * 6 * 30
    assert evaluate["startup_seconds"] == 2 * 1.0 + 1.0 + 2 * 1.0
    draws = 2 * (0.2 + 0.02 + 0.5 + 0.1 + 0.002)
    assert evaluate["work_seconds"] == pytest.approx(0.5 + draws + 12 * 0.1 + 0.03 + 0.2 + 0.06 + 0.25 + 0.54)


def test_given_responses_are_tokenized_and_load_no_model() -> None:
    config, run_data = small()
    generate = estimated(config, replace(run_data, given=6))["round-01/generate"]
    # The tokenizer, 4 prompts and 6 responses.
    assert generate["work_seconds"] == pytest.approx(0.2 + (4 + 6) * 0.01)
    assert (generate["startup_seconds"], generate["tokens"], generate["engine"]) == (0.0, 0, "given")
    assert (generate["responses"], generate["disk_bytes"], generate["peak_memory_bytes"]) == (6, 60, 1000)


def test_without_credit_no_model_is_run_to_inspect() -> None:
    config, run_data = small("report.token_credit=false", "report.pairs=3")
    inspect = estimated(config, run_data)["round-01/inspect"]
    assert (inspect["pairs"], inspect["tokens"], inspect["startup_seconds"]) == (3, 0, 0.0)
    assert inspect["disk_bytes"] == 2**15 + 3 * 2 * 10
    config, _ = small("report.pairs=0")
    assert estimated(config, run_data)["round-01/inspect"]["disk_bytes"] == 2**15


def test_an_extrapolation_evaluates_each_candidate() -> None:
    plain = estimated(*small())["round-01/evaluate"]
    config, run_data = small("extrapolate.alphas=[0.3, 0.5]")
    found = estimated(config, run_data)
    assert list(found)[-2:] == ["round-01/extrapolate", "round-01/evaluate"]
    stage, evaluate = found["round-01/extrapolate"], found["round-01/evaluate"]
    assert stage["candidates"] == 3
    # The start's samples and the log-probabilities of the two other models are made once: a candidate has one draw of
    # 2 responses, which are scored by one model, and 6 pairs of 30 tokens.
    assert stage["tokens"] == plain["tokens"] + 2 * (20 + 10 + 30 + 6 * 30)
    draw = 0.2 + 0.02 + 0.5 + 0.1 + 0.002
    scoring = 0.2 + 0.06 + 0.25 + 0.18 + 0.03
    assert stage["work_seconds"] == pytest.approx(plain["work_seconds"] + 2 * (0.5 + draw + 12 * 0.1 + scoring))
    assert stage["startup_seconds"] == plain["startup_seconds"] + 2 * (1.0 + 1.0 + 1.0)
    assert stage["disk_bytes"] == plain["disk_bytes"] + 4200 + 2 * (2 * 10 + 16 * 6)
    assert stage["transient_disk_bytes"] == 4200
    assert evaluate["tokens"] == 30  # scored: the samples are there
    assert evaluate["work_seconds"] == pytest.approx(0.5 + 12 * 0.1 + 0.03 + 0.2 + 0.06 + 0.25)


def test_a_failed_gate_adds_the_policys_pass() -> None:
    config, run_data = small()
    failed = changed(COSTS, "score", gate_passed=False)
    assert estimated(config, run_data, failed)["round-01/score"]["tokens"] == 2 * 80 + 8 * 15
    always, run_data = small("score.policy_logps=recompute")
    assert estimated(always, run_data)["round-01/score"]["tokens"] == 2 * 80


def test_earlier_rounds_of_a_pool_are_scored_again() -> None:
    config, run_data = small("rounds=2", "mine.pool_rounds=2")
    two = replace(run_data, rounds=run_data.rounds * 2, offline=[1000, 1000])
    # Both rounds under the reference, the first round's also under the policy, and the gate.
    assert estimated(config, two)["round-02/score"]["tokens"] == 160 + 80 + 8 * 15


def test_later_rounds_reuse_what_is_stored_of_the_start() -> None:
    config, run_data = small("rounds=2")
    two = replace(run_data, rounds=run_data.rounds * 2, offline=[1000, 1000])
    found = estimated(config, two)
    # One draw, which two models score, and only the new policy's log-probabilities of the pairs.
    assert found["round-02/evaluate"]["tokens"] == 3 * (20 + 10) + 6 * 30
    assert found["round-02/evaluate"]["startup_seconds"] == 1.0 + 2.0 + 1.0
    config, _ = small("rounds=2", "evaluate.kl_to_start=false")
    assert estimated(config, two)["round-02/evaluate"]["tokens"] == 2 * (20 + 10) + 6 * 30


def test_a_step_costs_by_its_tokens_and_an_update_whatever_they_are() -> None:
    def work(batch: int) -> float:
        config, run_data = small("train.save_steps=null", f"train.batch_size={batch}")
        seconds: float = estimated(config, run_data)["round-01/train"]["work_seconds"]
        return seconds

    # 8 pairs in one step or in two: as many tokens, one update more.
    assert work(4) - work(8) == pytest.approx(0.14)


def test_only_so_many_pairs_are_checked_at_step_zero() -> None:
    config, run_data = small("train.step0_pairs=3")
    fewer = estimated(config, run_data)["round-01/train"]["work_seconds"]
    assert estimated(*small())["round-01/train"]["work_seconds"] - fewer == pytest.approx(5 * 30 * 0.001)


def test_a_separate_cost_of_prompts() -> None:
    config, run_data = small()
    found = [estimated(config, run_data, changed(COSTS, "generate", per_prompt_token=cost)) for cost in (0.0, 0.01)]
    generate, evaluate = ([stages[f"round-01/{name}"]["work_seconds"] for stages in found] for name in
                          ("generate", "evaluate"))  # fmt: skip
    assert generate[1] - generate[0] == pytest.approx(40 * 0.01)
    assert evaluate[1] - evaluate[0] == pytest.approx(2 * 20 * 0.01)  # held-out prompts under two policies


def test_without_checkpoints_only_the_model_needs_disk() -> None:
    config, run_data = small("train.save_steps=null")
    train = estimated(config, run_data)["round-01/train"]
    assert (train["transient_disk_bytes"], train["checkpoints"]) == (0, 0)


KEPT_BY_PLAIN_LAYERS = 80 * 2 * (8 * 8 + 8 * 16)
"""Bytes for 80 tokens in 2 layers of 8 and 16 values, which lean layers do not keep: on a CPU, in one process."""


def test_groups_share_the_shards_and_gpus_are_counted() -> None:
    config, run_data = small()
    two = replace(MACHINE, cuda=True, groups=2, gpus=2, processes=2, shards=2, gpu_bytes=10**6)
    costs = COSTS.model_copy(update={"startup": dict.fromkeys(COSTS.startup, 3.0)})
    one, both = estimated(config, run_data, costs), estimated(config, run_data, costs, two)
    generate = both["round-01/generate"]
    # A shard each: 20 tokens and 4 responses less; processes of their own to start, 3 s.
    saved = 20 * 0.01 + 4 * 0.001
    assert generate["work_seconds"] == pytest.approx(one["round-01/generate"]["work_seconds"] - saved + 3.0)
    assert generate["gpu_hours"] == pytest.approx(2 * generate["seconds"] / 3600)
    assert both["round-01/mine"]["gpu_hours"] == 0.0
    assert all(stage["gpu_hours"] == 0.0 for stage in one.values())
    # States of one of two processes, in the GPU's memory alone. The 50 logits of 80 tokens are there twice on a CPU; on
    # a GPU once, and the gradient of the head's 50 × 8 weights stands beside them in float32.
    state, alone = both["round-01/train"]["peak_memory_bytes"], one["round-01/train"]["peak_memory_bytes"]
    assert alone - state == 8_000 + 2 * MACHINE.base_memory + 4 * 80 * 50 - 4 * 50 * 8 - KEPT_BY_PLAIN_LAYERS


def test_processes_on_the_host_add_up() -> None:
    config, run_data = small()
    found = estimated(config, run_data, machine=replace(MACHINE, processes=2))["round-01/train"]
    one = estimated(config, run_data)["round-01/train"]
    assert found["peak_memory_bytes"] - 1000 == 2 * (one["peak_memory_bytes"] - 1000 + KEPT_BY_PLAIN_LAYERS)


def test_the_measured_peak_counts_where_it_is_higher() -> None:
    config, run_data = small()
    costs = changed(COSTS, "score", peak_bytes=10**12)
    assert estimated(config, run_data, costs)["round-01/score"]["peak_memory_bytes"] == 10**12 + 1000


def test_lora_needs_less() -> None:
    (config, run_data), (lora, _) = small(), small("train.lora.r=1")
    large = replace(SIZE, parameters=10**9)
    counts = count_rounds(config, run_data)
    full, less = (Estimator(c, COSTS, MACHINE, large, large, run_data).estimate(counts, None) for c in (config, lora))
    assert less["round-01/train"]["peak_memory_bytes"] < full["round-01/train"]["peak_memory_bytes"] / 3


def test_the_check_of_the_users_data_is_part_of_the_first_stage() -> None:
    config, run_data = small()
    costs = COSTS.model_copy(update={"startup": COSTS.startup | {"generate": 5.0}})
    without, found = estimated(config, run_data, costs), estimated(config, run_data, costs, check=2.0)
    # Its process is started with the check, which takes 2 of its 5 seconds. On two cores both take half as long again.
    assert found["round-01/generate"]["seconds"] == pytest.approx(without["round-01/generate"]["seconds"] + 1.0)
    run = costs.model_copy(update={"source": "run"})  # whose seconds have that in them
    without, found = estimated(config, run_data, run), estimated(config, run_data, run, check=2.0)
    assert found["round-01/generate"]["seconds"] == pytest.approx(without["round-01/generate"]["seconds"])


def test_costs_of_a_run_are_used_as_they_are() -> None:
    config, run_data = small()
    seen = EvaluateCosts(workload=(2, 1, 6), work=[9.0, 4.0], load=[2.0, 1.0])
    run = changed(COSTS, "generate", warm_up=0.0, per_prompt=0.1).model_copy(update={"source": "run", "evaluate": seen})
    found = estimated(config, run_data, run)
    assert found["round-01/generate"]["work_seconds"] == pytest.approx(0.4 + 0.5 + 0.4 + 0.008)
    assert (found["round-01/evaluate"]["work_seconds"], found["round-01/evaluate"]["startup_seconds"]) == (9.0, 2.0)
    # Other counts: estimated from the costs of sampling and scoring.
    other = changed(run, "evaluate", workload=(2, 1, 7))
    assert estimated(config, run_data, other)["round-01/evaluate"]["work_seconds"] < 4.0


def test_later_rounds_than_the_runs_cost_as_its_last() -> None:
    config, run_data = small("rounds=3")
    three = replace(run_data, rounds=run_data.rounds * 3, offline=[1000] * 3)
    seen = EvaluateCosts(workload=(2, 1, 6), work=[9.0, 4.0], load=[2.0, 1.0])
    found = estimated(config, three, COSTS.model_copy(update={"source": "run", "evaluate": seen}))
    work = [found[f"round-{number:02d}/evaluate"]["work_seconds"] for number in (1, 2, 3)]
    assert work == pytest.approx([9.0, 4.0, 4.0])


def test_costs_of_a_calibration() -> None:
    costs = calibrated_costs(COSTS.generate, COSTS.score, COSTS.train, {"generate": 5.0, "train": 6.0})
    assert costs.startup == {"generate": 5.0, "score": 5.0, "replay": 5.0, "train": 6.0, "evaluate": 5.0}
    assert (costs.source, costs.generate, costs.evaluate) == ("calibration", COSTS.generate, None)


def test_round_zero_scores_and_trains_on_all_offline_pairs() -> None:
    sft = resolve([], ["model.sft=s", "data.replay=y.jsonl", "rounds=1", "train.batch_size=4", "train.save_steps=null",
                       "round0.num_train_epochs=3", "generate.samples=2"])  # fmt: skip
    _, run_data = small()
    found = estimated(sft, replace(run_data, round_zero_pairs=10), check=4.0)
    assert list(found)[:3] == ["round-00/replay", "round-00/train", "round-01/generate"]
    replay, train = found["round-00/replay"], found["round-00/train"]
    # Ten pairs of 30 tokens.
    assert (replay["tokens"], replay["replayed"], replay["disk_bytes"]) == (300, 10, 200)
    assert replay["work_seconds"] == pytest.approx(0.2 + 0.25 + 10 * 0.01 + 0.3)
    assert replay["startup_seconds"] == 1.0 + 4.0  # the check comes first
    # Three steps an epoch, three epochs.
    assert (train["pairs"], train["steps"]) == (10, 9)
    assert train["work_seconds"] == pytest.approx(2.0 + 0.3 + 9 * 0.5)
    assert found["round-01/train"]["steps"] == 2  # as in a run without it


def test_cream_scores_an_earlier_model_from_the_second_round_on() -> None:
    config, run_data = small("rounds=2", "train.method=cream")
    two = replace(run_data, rounds=run_data.rounds * 2, offline=[1000, 1000])
    found = estimated(config, two)
    assert found["round-01/score"]["tokens"] == 80 + 8 * 15
    assert found["round-02/score"]["tokens"] == 2 * 80 + 8 * 15
    assert found["round-02/score"]["startup_seconds"] == found["round-01/score"]["startup_seconds"] + 1.0


def test_another_reference_and_shared_lengths_score_more_pairs() -> None:
    first = "train.reference=initial"
    config, run_data = small("rounds=2", first)
    two = replace(run_data, rounds=run_data.rounds * 2, offline=[1000, 1000])
    found = estimated(config, two)
    # Four replayed pairs of 30 tokens under both models; in round 2 the four mined ones under the first reference.
    assert found["round-01/replay"]["tokens"] == 2 * 120
    assert found["round-02/replay"]["tokens"] == 2 * 120 + 120
    kept, _ = small("rounds=2", first, "reward_reference=initial")
    assert estimated(kept, two)["round-02/replay"]["tokens"] == 2 * 120
    # All eight pairs under the policy, with the start of the longer response.
    shared, run_data = small("train.ld_alpha=0.5")
    assert estimated(shared, run_data)["round-01/replay"]["tokens"] == 1.5 * 240


def test_judges_and_a_benchmark_are_not_estimated() -> None:
    assert not_estimated(small()[0]) == []
    config, _ = small("evaluate.command=bench", "evaluate.judges.reward_model.model=m")
    assert not_estimated(config) == ["evaluate.judges.reward_model", "evaluate.command"]


def test_labels_of_mining_are_named() -> None:
    named = {method: mining_labels(small(f"train.method={method}")[0]) for method in ("dpo", "sppo", "cream", "spa")}
    assert named == {"dpo": [], "sppo": ["win rates"], "cream": ["consistency"], "spa": ["difficulty"]}


MPO = (
    "train.method=mpo",
    "train.mpo.batch_size=4",
    "train.mpo.num_generations=2",
    "train.mpo.per_device_train_batch_size=2",
)


def test_both_stages_of_mpo() -> None:
    config, run_data = small(*MPO)
    found = estimated(config, run_data)
    assert list(found)[-3:] == ["round-01/train", "round-01/reinforce", "round-01/evaluate"]
    train, reinforce = found["round-01/train"], found["round-01/reinforce"]
    # Half of the 4 mined pairs are hard.
    assert (train["pairs"], train["steps"]) == (6, 2)
    assert (reinforce["hard_prompts"], reinforce["steps"], reinforce["responses"]) == (2, 1, 4)
    # One step of 4 responses of 5 tokens to 2 prompts of 10: sampled; scored by both models, with each prompt once;
    # then by the reference of the KL, and trained on, with the prompts of all.
    sampling, rewards, kl, update = 0.5 + 0.2 + 0.004, 2 * 0.04, 0.06, 0.18 + 0.14
    assert reinforce["work_seconds"] == pytest.approx(2.0 + 0.5 + 0.25 + sampling + rewards + kl + update + 0.25)
    assert reinforce["tokens"] == 40 + 60
    assert reinforce["startup_seconds"] == 1.0 + 1.0 + 2 * 1.0
    assert (reinforce["disk_bytes"], reinforce["transient_disk_bytes"]) == (4200, 700)


@pytest.mark.parametrize(("share", "pairs", "hard"), [(0, 8, 0), (1, 0, 4)])
def test_mpo_without_hard_or_easy_prompts(share: int, pairs: int, hard: int) -> None:
    config, run_data = small(*MPO, f"mine.difficulty_quantile={share}")
    found = estimated(config, run_data)
    assert found["round-01/train"]["pairs"] == pairs
    assert (found["round-01/train"]["steps"] > 0) == (pairs > 0)
    assert found["round-01/reinforce"]["hard_prompts"] == hard
    assert (found["round-01/reinforce"]["steps"] > 0) == (hard > 0)
