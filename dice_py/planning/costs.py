"""Estimates of each stage's seconds, tokens, disk and memory, from counts and measured costs.

Arithmetic only: nothing is measured here. Seconds are wall clock; the costs are those of runs/measured_costs.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from dice_py.config.run import RunConfig
from dice_py.config.training import TrainConfig
from dice_py.models.memory import TrainingMemory, checkpoint_bytes, generate_memory, host_memory, score_memory
from dice_py.models.sizes import ModelSize
from dice_py.planning.cluster import spread
from dice_py.planning.counts import Data, RoundCounts, count_round_zero
from dice_py.planning.decoding import decode_steps, draw_lengths
from dice_py.planning.estimate import Estimate
from dice_py.planning.machine import Machine
from dice_py.planning.pair_costs import pair_passes, replay_shortage
from dice_py.planning.reinforcement import reinforce
from dice_py.planning.timeline import Task, shared_speed, timeline
from dice_py.runs.measured_costs import StageCosts

_PAIR_BYTES = 64  # of a mined pair's row
_MINING_JSON = 2**14  # bytes of mining.json, mostly the curve
_DISTRIBUTIONS_JSON = 2**15  # bytes of distributions.json
_MININGS = 6  # of the same rewards by the stage inspect, under other settings
_CREDIT_BYTES = 16  # of a token's credit, compressed
_SAME_IMPORTS = {"extrapolate": "evaluate", "inspect": "replay", "reinforce": "train"}
"""Stages whose processes import what those of other stages do, and start in the same time."""


class Estimator:
    """Estimates the stages of one run."""

    def __init__(
        self,
        config: RunConfig,
        costs: StageCosts,
        machine: Machine,
        policy: ModelSize,
        reference: ModelSize,
        data: Data,
    ) -> None:
        self.config, self.costs, self.machine, self.data = config, costs, machine, data
        self.policy, self.reference = policy, reference
        # The costs of a run have the tokenization in them.
        self.tokenizer = 0.0 if costs.source == "run" else machine.tokenizer_seconds
        per_prompt = costs.generate.per_prompt
        self.encode = machine.encode_seconds if per_prompt is None else per_prompt
        self._stored_logps: set[str] = set()  # models whose log-probabilities of the held-out pairs are stored

    # --- parts that stages share

    def decoding(self, lengths: list[int], prompt_tokens: float) -> float:
        """Seconds to sample responses of these lengths to prompts of so many tokens in all."""
        costs = self.costs.generate
        steps = decode_steps(lengths, max(1, costs.rows), costs.continuous)
        prefill = costs.per_prompt_token * prompt_tokens
        return prefill + costs.per_step * steps + costs.per_token * sum(lengths) + costs.per_response * len(lengths)

    def scoring(self, tokens: float, responses: float) -> float:
        """Seconds of a forward of one model over so many tokens."""
        return self.costs.score.per_token * tokens + self.costs.score.per_response * responses

    def _memory(self, formula: int, measured: int, copies: int) -> int:
        """Peak bytes of one GPU, or of the host: all processes that hold a model, and the one started ahead."""
        if self.machine.cuda:
            return max(formula, measured)
        base = self.machine.base_memory
        return host_memory(max(formula, measured - base), base, copies)

    def _groups(self, shards: int) -> int:
        return max(1, min(self.machine.groups, shards))

    def _group_startup(self, groups: int) -> float:
        """Seconds until the processes of several groups are ready; they are not started ahead."""
        return self.costs.startup["generate"] if groups > 1 else 0.0

    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that is not left out."""
        longest = max((self.data.tokens[number] for ids in self.data.rounds for number in ids), default=1)
        return min(longest, self.config.data.max_prompt_tokens)

    # --- stages

    def generate(self, counts: RoundCounts) -> Estimate:
        """Tokenization, then the shards of the group that has most of them."""
        config, costs, machine = self.config, self.costs.generate, self.machine
        groups = self._groups(counts.shards)
        shards = math.ceil(counts.shards / groups)
        prompts = min(counts.prompts, shards * config.generate.shard_prompts)
        prompt_tokens = counts.prompt_tokens * prompts / max(1, counts.prompts)
        decoding = self.decoding(counts.lengths[: prompts * config.generate.samples], prompt_tokens)
        encoding = self.tokenizer + self.encode * (counts.prompts + counts.prompts_too_long)
        if counts.responses and not counts.lengths:  # given responses: no model is loaded, and text is tokenized
            return Estimate(
                work=encoding + self.encode * counts.responses,
                tokens=0,
                disk=costs.bytes_per_response * counts.responses,
                memory=machine.base_memory,
                counts=counts.sampled("given"),
            )
        formula = generate_memory(
            self.policy, config, machine.engine, machine.dtype, self.longest_prompt(), machine.gpu_bytes
        )
        return Estimate(
            work=encoding + costs.warm_up + decoding + self._group_startup(groups),
            load=costs.load,
            tokens=counts.prompt_tokens + counts.response_tokens,
            disk=costs.bytes_per_response * counts.responses,
            memory=self._memory(formula, costs.peak_bytes, groups),
            devices=machine.gpus if groups > 1 else max(1, machine.gpus // max(1, machine.groups)),
            counts=counts.sampled(machine.engine),
        )

    def score(self, counts: RoundCounts, number: int) -> Estimate:
        """The passes of the reference, of an earlier model for `mine.second_reward=previous`, of the gate, and of the
        policy where its log-probabilities are not reused."""
        config, costs = self.config, self.costs.score
        all_tokens = counts.pool_tokens * costs.token_ratio
        own_tokens = (counts.prompt_tokens + counts.response_tokens) * costs.token_ratio
        gate = 0.0
        if config.score.policy_logps == "reuse_if_equal":
            responses = min(config.score.gate_responses, counts.responses)
            mean = counts.prompt_tokens / max(1, counts.prompts) + counts.response_tokens / max(1, counts.responses)
            gate = responses * mean
        policy_tokens = all_tokens - own_tokens if gate and costs.gate_passed else all_tokens
        earlier = int(config.mine.second_reward == "previous" and number > 1)
        groups = self._groups(counts.shards)
        formula = score_memory([self.policy, self.reference], config, self.machine.dtype, self.machine.cuda)
        work = costs.warm_up + costs.fixed + self._group_startup(groups) * ((2 if policy_tokens else 1) + earlier)
        work += self.scoring(gate, 0)
        tokens = all_tokens * (1 + earlier) + policy_tokens
        work += self.scoring(tokens / groups, counts.pool_responses * (1 + earlier) / groups)
        return Estimate(
            work=work,
            load=costs.load * ((2 if gate or policy_tokens else 1) + earlier),
            tokens=round(tokens + gate),
            disk=costs.bytes_per_response * counts.pool_responses,
            memory=self._memory(formula, costs.peak_bytes, groups),
            devices=groups if self.machine.cuda else 0,
            counts={"shards": counts.shards, "responses": counts.pool_responses, "gate_passes": costs.gate_passed},
        )

    def mine(self, counts: RoundCounts) -> Estimate:
        """In the run's own process."""
        return Estimate(
            work=self.machine.mine_seconds * counts.pool_responses,
            disk=_PAIR_BYTES * counts.mined + _MINING_JSON,
            memory=self.machine.base_memory + 64 * counts.pool_responses,
            has_process=False,
            counts={"responses": counts.pool_responses, "pairs": counts.mined},
        )

    def replay(self, counts: RoundCounts, number: int) -> Estimate:
        """Tokenizes the replayed pairs, and scores what has no log-probabilities (planning/pair_costs.py)."""
        costs = self.costs.score
        formula = score_memory([self.policy], self.config, self.machine.dtype, self.machine.cuda)
        work = load = 0.0
        if counts.replay:
            work = self.tokenizer + costs.warm_up + costs.per_pair * counts.replay
        mined = min(counts.mined, counts.pairs)
        total = counts.replay + mined
        passes, tokens, sequences = pair_passes(self.config, counts, mined, number)
        if tokens:
            work += self.scoring(tokens, sequences)
            load = costs.load * passes
        return Estimate(
            work=work,
            load=load,
            tokens=round(tokens),
            disk=costs.bytes_per_pair * total,
            memory=self._memory(formula, costs.peak_bytes, 1),
            devices=1 if self.machine.cuda else 0,
            counts={"pairs": total, "replayed": counts.replay, "wanted": counts.replay_requested},
            lacking=replay_shortage(self.config, counts),
        )

    def inspect(self, counts: RoundCounts) -> Estimate:
        """Mining under other settings, and both models over the pairs that are kept for people to read."""
        config, costs = self.config, self.costs.score
        work = _MININGS * self.machine.mine_seconds * counts.pool_responses
        pairs = min(config.report.pairs, counts.pairs)
        disk = _DISTRIBUTIONS_JSON + pairs * config.generate.samples * self.costs.generate.bytes_per_response
        if not (pairs and config.report.token_credit):
            memory = self.machine.base_memory
            return Estimate(work=work, disk=disk, memory=memory, has_process=False, counts={"pairs": pairs})
        tokens = counts.pair_tokens * pairs
        formula = score_memory([self.policy, self.reference], config, self.machine.dtype, self.machine.cuda)
        return Estimate(
            work=work + self.tokenizer + costs.warm_up + 2 * self.scoring(tokens, 2 * pairs),
            load=2 * costs.load,
            tokens=round(2 * tokens),
            disk=disk + _CREDIT_BYTES * tokens,
            memory=self._memory(formula, costs.peak_bytes, 1),
            devices=1 if self.machine.cuda else 0,
            counts={"pairs": pairs},
        )

    def train(self, counts: RoundCounts, config: RunConfig | None = None) -> Estimate:
        """Optimizer steps, each by its tokens; checkpoints; the model at the end. `config`: if not the run's."""
        config, costs, machine = config or self.config, self.costs.train, self.machine
        train = config.train
        pairs = counts.trained
        if not pairs and counts.hard_prompts:  # skipped: all of them are the second stage's
            return Estimate(memory=machine.base_memory, counts={"pairs": 0, "steps": 0, "checkpoints": 0})
        batch = min(train.batch_size, pairs) if pairs else train.batch_size
        step = costs.per_token * counts.pair_tokens * batch + costs.per_update
        checked = min(train.step0_pairs, pairs) * counts.pair_tokens
        saves = 0
        if train.save_steps is not None:
            saves = counts.steps // train.save_steps + (counts.steps % train.save_steps > 0)
        kept = min(saves, 2) + (saves > 2)  # two are kept, and the next is written before the oldest is removed
        lacking = None
        if not counts.pairs:
            lacking = {
                "setting": "generate.max_new_tokens",
                "needed": 1,
                "available": 0,
                "text": "no prompt of the calibration had enough usable responses, so that no pair could be mined",
                "remedy": "raise generate.max_new_tokens or generate.samples, or loosen the mine.* filters",
            }
        return Estimate(
            work=costs.fixed + costs.check_per_token * checked + step * counts.steps + costs.save * saves,
            load=costs.load,
            tokens=round(counts.pair_tokens * batch * counts.steps),
            disk=self.policy.stored_bytes,
            transient=(costs.checkpoint_bytes or checkpoint_bytes(self.policy, train)) * kept,
            **self.training_memory(train),
            devices=machine.processes if machine.cuda else 0,
            counts={"pairs": pairs, "steps": counts.steps, "checkpoints": saves},
            lacking=lacking,
        )

    def training_memory(self, train: TrainConfig) -> dict[str, Any]:
        """The fields of an estimate that are about the memory of training."""
        machine = self.machine
        needs = TrainingMemory(
            self.policy, train, machine.dtype, self.longest_prompt(), max(self.data.lengths, default=1),
            machine.processes, machine.shards, machine.cuda,
        )  # fmt: skip
        copies = 1 if machine.cuda else machine.processes
        return {
            "memory": self._memory(needs.peak(), self.costs.train.peak_bytes, copies),
            "least_memory": self._memory(needs.least(), 0, copies),
            "remedy": needs.remedy,
        }

    def extrapolate(self, number: int) -> Estimate:
        """The evaluation of the trained policy, and of the model of each α. The seconds to write it are not known."""
        tried = len(self.config.extrapolate.tried)
        total = self.evaluate(number)
        for _ in range(tried):
            self._stored_logps.discard(f"policy {number}")
            each = self.evaluate(number, draws=1)
            total.work += each.work
            total.load += each.load
            total.tokens += each.tokens
            total.disk += each.disk
        total.disk += self.policy.stored_bytes
        total.transient = self.policy.stored_bytes * (tried > 1)  # the best so far, and the next one
        total.counts |= {"candidates": 1 + tried}
        return total

    def evaluate(self, number: int, draws: int | None = None) -> Estimate:
        """Samples of held-out prompts (in round 1 also the start's), and both they and held-out pairs scored.

        Judges and a benchmark of the user's are not part of it: what they take is not known.

        `draws`: models that sample; None: those of a round's first evaluation.
        """
        first = draws is None
        draws = (2 if number == 1 else 1) if draws is None else draws
        config, scoring, machine = self.config, self.costs.score, self.machine
        stage = Estimate(devices=1 if machine.cuda else 0)
        prompts = [n for n in self.data.eval_prompts if n <= config.data.max_prompt_tokens][: config.evaluate.prompts]
        responses = len(prompts) * config.evaluate.samples
        pairs = min(config.evaluate.pairs, self.data.eval_pairs)
        scored = 0.0  # tokens
        if responses:
            scored += self._add_sampling(stage, number, draws, prompts)
        models = 0
        if pairs:
            models, tokens = self._add_pairs(stage, number, pairs, sampled=scored > 0)
            scored += tokens
        stage.work += self.scoring(scored, 2 * models * pairs) + (scoring.warm_up if scored or pairs else 0.0)
        stage.tokens += round(scored)
        formula = score_memory([self.policy, self.reference], config, machine.dtype, machine.cuda)
        measured = scoring.peak_bytes
        if responses:
            longest = max(prompts)
            sampling = generate_memory(self.policy, config, machine.engine, machine.dtype, longest, machine.gpu_bytes)
            formula, measured = max(formula, sampling), max(measured, self.costs.generate.peak_bytes)
        stage.memory = self._memory(formula, measured, 1)
        stage.counts = {"prompts": len(prompts), "responses": responses, "pairs": pairs}
        known, workload = self.costs.evaluate, (len(prompts), config.evaluate.samples if prompts else 0, pairs)
        if known is not None and draws and known.workload == workload:
            at = min(number if first else number + 1, len(known.work)) - 1
            stage.work, stage.load = known.work[at], known.load[at]
        return stage

    def _reward_reference(self, number: int) -> str:
        """π_ref of the reward after round `number`."""
        return f"policy {number - 1}" if self.config.reward_reference == "previous" else "reference"

    def _add_sampling(self, stage: Estimate, number: int, draws: int, prompts: list[int]) -> float:
        """Adds the sampling of held-out prompts (by their tokens) by `draws` models.

        Returns the tokens to score, by the models that rewards and KL need.
        """
        config, costs = self.config, self.costs.generate
        responses = len(prompts) * config.evaluate.samples
        lengths = draw_lengths(self.data.lengths, responses)
        each = self.tokenizer + self.encode * len(prompts) + self.decoding(lengths, sum(prompts))
        intervals = 16 if config.is_world else 12
        stage.work += costs.warm_up + draws * each + self.machine.bootstrap_seconds * intervals
        stage.load += draws * costs.load
        stage.disk += draws * costs.bytes_per_response * responses
        stage.tokens += draws * (sum(prompts) + sum(lengths))
        models = {self._reward_reference(number), f"policy {number - 1}"}
        models |= {"policy 0"} if config.evaluate.kl_to_start else set()
        models |= {"reference"} if config.evaluate.kl_to_reference else set()
        models |= {f"policy {number}"} if config.score.policy_logps == "recompute" else set()
        stage.load += len(models) * self.costs.score.load
        return len(models) * (sum(prompts) + sum(lengths)) * self.costs.score.token_ratio

    def _add_pairs(self, stage: Estimate, number: int, pairs: int, sampled: bool) -> tuple[int, float]:
        """Adds the held-out pairs; returns (models that score them, tokens to score).

        `sampled`: samples were scored before, in round 1 by the start last, which is still loaded.
        """
        before = {self._reward_reference(number), f"policy {number - 1}"}
        new = {f"policy {number}", *before, "policy 0", "reference"} - self._stored_logps
        held = sampled and "policy 0" in new
        self._stored_logps |= new
        prompt, chosen, rejected = self.data.pair_tokens or (0.0, 0.0, 0.0)
        stage.load += (len(new) - held) * self.costs.score.load
        stage.work += self.tokenizer + self.costs.score.per_pair * pairs
        stage.disk += 16 * len(new) * pairs
        return len(new), len(new) * pairs * (2 * prompt + chosen + rejected)

    # --- the run

    def estimate(self, rounds: list[RoundCounts], check: float | None) -> dict[str, dict[str, Any]]:
        """The entries of all stages, by name ("round-01/generate"), in order of work.

        Args:
            check: seconds of the process that checks the user's models and data; None where there is none. It is
                part of the first stage.
        """
        cluster = self.machine.cluster
        stages = self._round_zero() if self.config.has_round_zero else {}
        for number, counts in enumerate(rounds, start=1):
            for kind, stage in self._round(number, counts):
                stages[f"round-{number:02d}/{kind}"] = stage
        tasks = [] if check is None else [Task(0.0, check, prepares=True)]
        for name, stage in stages.items():
            kind = name.rpartition("/")[2]
            if cluster is not None:
                spread(kind, stage, self.config, self.costs, self.machine, self.policy)
            prepares = stage.has_process and name != f"round-{len(rounds):02d}/evaluate"
            startup = self.costs.startup[_SAME_IMPORTS.get(kind, kind)] if stage.has_process else None
            tasks.append(Task(startup, stage.work + stage.load, prepares))
        alone = self.costs.source == "calibration" and not self.machine.cuda
        times = timeline(tasks, shared_speed(self.machine.cores) if alone else 1.0)
        before = 0.0 if check is None else times.pop(0)[0]
        entries = {}
        for (name, stage), (seconds, wait) in zip(stages.items(), times, strict=True):
            all_gpus = None if cluster is None else cluster.all_gpus
            entries[name] = stage.entry(seconds, wait, before, cuda=self.machine.cuda, all_gpus=all_gpus)
            before = 0.0
        return entries

    def _round(self, number: int, counts: RoundCounts) -> Iterator[tuple[str, Estimate]]:
        """The stages of a round by name, in order of work."""
        yield "generate", self.generate(counts)
        yield "score", self.score(counts, number)
        yield "mine", self.mine(counts)
        yield "replay", self.replay(counts, number)
        yield "inspect", self.inspect(counts)
        yield "train", self.train(counts)
        if self.config.train.method == "mpo":
            yield "reinforce", reinforce(self, counts)
        if self.config.extrapolate.tried:
            yield "extrapolate", self.extrapolate(number)
            yield "evaluate", self.evaluate(number, draws=0)  # the samples are there
        else:
            yield "evaluate", self.evaluate(number)

    def _round_zero(self) -> dict[str, Estimate]:
        """The stages of round 0: all offline pairs, under the SFT model and its training."""
        config = self.config.model_copy(update={"train": self.config.round0.training(self.config.train)})
        counts = count_round_zero(config, self.data, self.machine.processes)
        return {"round-00/replay": self.replay(counts, 0), "round-00/train": self.train(counts, config)}
