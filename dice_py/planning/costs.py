"""From counts and figures to each stage's seconds, tokens, disk and memory. Arithmetic alone; seconds of wall clock.

The figures of a shape on a device, as they are remembered (`record`), all in seconds unless named otherwise:

    start       of each stage, until its process has imported what it needs, alone
    starts      speed of each of two imports at one time, as a share of what it has alone
    beside      of each stage: speeds of its work and of an import beside it, as shares of what each has alone
    generate    load; first (paid once); per_step and per_token of decoding; per_response of writing; rows decoded at
                one time; joins; bytes_per_response; peak (bytes)
    score       load; first; fixed (each time); per_token; per_response; token_ratio (tokens run over tokens with each
                prompt once); gate_passed; bytes_per_response; per_pair of tokenising; bytes_per_pair; peak
    train       load; fixed; per_step; step_tokens; save (of a checkpoint); checkpoint_bytes; peak
    evaluate    None, or of a run: `work` and `load` of each of its rounds, and `of` what (prompts, samples, pairs)

Of a run, `first` is 0, `generate` has per_prompt (all but the decoding), and tokenising is in what it belongs to.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from typing import Any

from dice_py.config.run import RunConfig
from dice_py.models.sizes import ModelSize
from dice_py.planning.counts import Data, RoundCounts
from dice_py.planning.memory import checkpoint_bytes, generate_memory, score_memory, train_memory
from dice_py.planning.timeline import Task, decode_steps, draw_lengths, fit_decoding, timeline


def make_record(
    generate: dict[str, Any], score: dict[str, Any], train: dict[str, Any], starts: dict[str, float]
) -> dict[str, Any]:
    """The figures of a calibration: what was measured, and the starts of the three processes."""
    runs = [
        (decode_steps(run["lengths"], generate["rows"], generate["joins"]), sum(run["lengths"]), run["seconds"])
        for run in generate["runs"]
    ]
    per_step, per_token = fit_decoding(runs)

    def beside(measured: dict[str, float] | None) -> dict[str, float]:
        if measured is None:
            return {"work": 1.0, "start": 1.0}
        if "start" in measured:
            return measured
        return {"work": measured["work"], "start": min(1.0, starts["score"] / max(measured["seconds"], 1e-3))}

    sampling, scoring = beside(generate["beside"]), beside(score["beside"])
    return {
        "source": "calibration",
        "when": time.time(),
        # Replay imports what score does, and evaluation what generate and score do.
        "start": {
            "generate": starts["generate"],
            "score": starts["score"],
            "replay": starts["score"],
            "train": starts["train"],
            "evaluate": max(starts["generate"], starts["score"]),
        },
        "starts": min(1.0, len(os.sched_getaffinity(0)) / 2),
        "beside": {
            "generate": sampling,
            "evaluate": sampling,
            "score": scoring,
            "replay": scoring,
            "train": scoring,
        },
        "generate": {
            **{name: value for name, value in generate.items() if name not in ("runs", "beside")},
            "per_step": per_step,
            "per_token": per_token,
        },
        "score": {name: value for name, value in score.items() if name != "beside"},
        "train": train,
        "evaluate": None,
    }


_PAIR_BYTES = 64  # of a mined pair's row
_MINING_JSON = 2**14  # mostly the curve


@dataclass(frozen=True)
class Machine:
    """Where the run works, as far as figures do not say."""

    engine: str
    dtype: str
    cuda: bool
    cores: int
    groups: int
    gpus: int
    processes: int
    """Of the training."""
    shards: int
    """Processes that the training's states are split over."""
    gpu_bytes: int | None
    base_memory: int
    """Of a process with its libraries, on the host."""
    encode_seconds: float
    """Of a prompt."""
    tokenizer_seconds: float
    mine_seconds: float
    """Of a response."""
    bootstrap_seconds: float


@dataclass
class _Stage:
    """What becomes an entry of the plan."""

    work: float = 0.0
    load: float = 0.0
    tokens: int = 0
    disk: float = 0.0
    transient: float = 0.0
    memory: int = 0
    devices: int = 0
    counts: dict[str, Any] | None = None


class Estimator:
    """Prices the rounds of one run."""

    def __init__(
        self,
        config: RunConfig,
        record: dict[str, Any],
        machine: Machine,
        policy: ModelSize,
        reference: ModelSize,
        data: Data,
    ) -> None:
        self.config, self.record, self.machine, self.data = config, record, machine, data
        self.policy, self.reference = policy, reference
        whole = record["source"] == "run"  # its figures have the tokenizing in them
        self.tokenizer = 0.0 if whole else machine.tokenizer_seconds
        self.encode = record["generate"]["per_prompt"] if whole else machine.encode_seconds
        self._known_logps: set[str] = set()  # models whose log-probabilities of the held-out pairs are kept

    # --- parts that stages share

    def _decoding(self, lengths: list[int]) -> float:
        figures = self.record["generate"]
        steps = decode_steps(lengths, max(1, int(figures["rows"])), bool(figures["joins"]))
        return float(
            figures["per_step"] * steps + figures["per_token"] * sum(lengths) + figures["per_response"] * len(lengths)
        )

    def _scoring(self, tokens: float, responses: float) -> float:
        figures = self.record["score"]
        return float(figures["per_token"] * tokens + figures["per_response"] * responses)

    def _memory(self, formula: int, measured: float, copies: int) -> int:
        """Of the device: of one GPU, or of the host with all processes that hold a model, and the one started ahead."""
        if self.machine.cuda:
            return max(formula, int(measured))
        each = max(formula + self.machine.base_memory, int(measured))
        return each * copies + self.machine.base_memory

    def _groups(self, shards: int) -> int:
        return max(1, min(self.machine.groups, shards))

    def _apart(self, groups: int) -> float:
        """Start-up of the processes of several groups, which is not done ahead."""
        return float(self.record["start"]["generate"]) if groups > 1 else 0.0

    # --- stages

    def generate(self, counts: RoundCounts) -> _Stage:
        """Encoding, then the slowest group's shards."""
        config, figures, machine = self.config, self.record["generate"], self.machine
        groups = self._groups(counts.shards)
        shards = math.ceil(counts.shards / groups)
        most = min(counts.prompts, shards * config.generate.shard_prompts) * config.generate.samples
        encoding = self.tokenizer + self.encode * (counts.prompts + counts.prompts_too_long)
        longest = max((self.data.tokens[number] for ids in self.data.rounds for number in ids), default=1)
        longest = min(longest, config.data.max_prompt_tokens)
        formula = generate_memory(self.policy, config, machine.engine, machine.dtype, longest, machine.gpu_bytes)
        return _Stage(
            work=encoding + figures["first"] + self._decoding(counts.lengths[:most]) + self._apart(groups),
            load=figures["load"],
            tokens=counts.prompt_tokens + counts.response_tokens,
            disk=figures["bytes_per_response"] * counts.responses,
            memory=self._memory(formula, figures["peak"], groups),
            devices=machine.gpus if groups > 1 else max(1, machine.gpus // max(1, machine.groups)),
            counts={
                "shards": counts.shards,
                "prompts": counts.prompts,
                "prompts_too_long": counts.prompts_too_long,
                "responses": counts.responses,
                "prompt_tokens": counts.prompt_tokens,
                "response_tokens": counts.response_tokens,
                "engine": machine.engine,
            },
        )

    def score(self, counts: RoundCounts) -> _Stage:
        """The reference's pass, the gate, and the policy's pass over what the gate does not leave out."""
        config, figures = self.config, self.record["score"]
        all_tokens = counts.pool_tokens * figures["token_ratio"]
        own_tokens = (counts.prompt_tokens + counts.response_tokens) * figures["token_ratio"]
        tokens, gate = all_tokens, 0.0
        if config.score.policy_logps == "reuse_if_equal":
            gated = min(config.score.gate_responses, counts.responses)
            mean = counts.prompt_tokens / max(1, counts.prompts) + counts.response_tokens / max(1, counts.responses)
            gate = gated * mean
        passes = all_tokens - own_tokens if gate and figures["gate_passed"] else all_tokens
        groups = self._groups(counts.shards)
        formula = score_memory([self.policy, self.reference], config, self.machine.dtype, self.machine.cuda)
        work = figures["first"] + figures["fixed"] + self._apart(groups) * (2 if passes else 1)
        work += self._scoring(gate, 0) + self._scoring((tokens + passes) / groups, counts.pool_responses / groups)
        return _Stage(
            work=work,
            load=figures["load"] * (2 if gate or passes else 1),
            tokens=round(tokens + passes + gate),
            disk=figures["bytes_per_response"] * counts.pool_responses,
            memory=self._memory(formula, figures["peak"], groups),
            devices=groups if self.machine.cuda else 0,
            counts={"shards": counts.shards, "responses": counts.pool_responses, "gate_passes": figures["gate_passed"]},
        )

    def mine(self, counts: RoundCounts) -> _Stage:
        """In the run's own process."""
        return _Stage(
            work=self.machine.mine_seconds * counts.pool_responses,
            tokens=0,
            disk=_PAIR_BYTES * counts.mined + _MINING_JSON,
            memory=self.machine.base_memory + 64 * counts.pool_responses,
            counts={"responses": counts.pool_responses, "pairs": counts.mined},
        )

    def replay(self, counts: RoundCounts) -> _Stage:
        """Tokenises and scores the replayed pairs under the policy."""
        figures = self.record["score"]
        formula = score_memory([self.policy], self.config, self.machine.dtype, self.machine.cuda)
        scored = counts.replay > 0
        lacking = None
        if counts.replay < counts.replay_wanted and self.config.replay.on_shortfall == "error":
            lacking = {
                "setting": "replay.gamma",
                "needed": counts.replay_wanted,
                "available": counts.replay,
                "text": f"{counts.replay_wanted} pairs are to be replayed, and {counts.replay} are there on prompts "
                "that are not sampled",
                "remedy": "lower replay.gamma, give more offline pairs, or set replay.on_shortfall=record",
            }
        work = self.tokenizer + figures["first"] + figures["per_pair"] * counts.replay
        total = counts.replay + min(counts.mined, counts.pairs)
        return _Stage(
            work=work + self._scoring(counts.replay_tokens, 2 * counts.replay) if scored else 0.0,
            load=figures["load"] if scored else 0.0,
            tokens=counts.replay_tokens,
            disk=figures["bytes_per_pair"] * total,
            memory=self._memory(formula, figures["peak"], 1),
            devices=1 if self.machine.cuda else 0,
            counts={"pairs": total, "replayed": counts.replay, "wanted": counts.replay_wanted, "lacking": lacking},
        )

    def train(self, counts: RoundCounts) -> _Stage:
        """Steps of pairs as long as the calibration's, or longer in proportion; checkpoints; the model at the end."""
        config, figures, machine = self.config, self.record["train"], self.machine
        train = config.train
        batch = min(train.batch_size, counts.pairs) if counts.pairs else train.batch_size
        step = figures["per_step"] * counts.pair_tokens * batch / max(1.0, figures["step_tokens"])
        saves = 0
        if train.save_steps is not None:
            saves = counts.steps // train.save_steps + (counts.steps % train.save_steps > 0)
        kept = min(saves, 2) + (saves > 2)  # two are kept, and the next is written before the oldest goes
        bytes_of_one = figures["checkpoint_bytes"] or checkpoint_bytes(self.policy, config)
        longest = max((self.data.tokens[number] for ids in self.data.rounds for number in ids), default=1)
        longest = min(longest, config.data.max_prompt_tokens) + max(self.data.lengths, default=1)
        longest = min(longest, train.max_length or longest)
        formula = train_memory(self.policy, config, machine.dtype, longest, machine.shards)
        lacking = None
        if not counts.pairs:
            lacking = {
                "setting": "generate.max_new_tokens",
                "needed": 1,
                "available": 0,
                "text": "no prompt of the calibration had enough usable responses, so that no pair could be mined",
                "remedy": "raise generate.max_new_tokens or generate.samples, or loosen the mine.* filters",
            }
        return _Stage(
            work=figures["fixed"] + step * counts.steps + figures["save"] * saves,
            load=figures["load"],
            tokens=round(counts.pair_tokens * batch * counts.steps),
            disk=self.policy.stored_bytes,
            transient=bytes_of_one * kept,
            memory=self._memory(formula, figures["peak"], 1 if machine.cuda else machine.processes),
            devices=machine.processes if machine.cuda else 0,
            counts={"pairs": counts.pairs, "steps": counts.steps, "checkpoints": saves, "lacking": lacking},
        )

    def evaluate(self, number: int, rounds: int) -> _Stage:
        """Samples of held-out prompts (in round 1 of the start too), rewards, and held-out pairs under three models."""
        config, machine = self.config, self.machine
        sampling, scoring = self.record["generate"], self.record["score"]
        stage = _Stage(devices=1 if machine.cuda else 0)
        prompts = [n for n in self.data.eval_prompts if n <= config.data.max_prompt_tokens][: config.evaluate.prompts]
        responses = len(prompts) * config.evaluate.samples
        tokens_of_pairs = tokens = 0.0
        held = False
        if responses:
            lengths = draw_lengths(self.data.lengths, responses)
            draws = 2 if number == 1 else 1
            each = self.tokenizer + self.encode * len(prompts) + self._decoding(lengths)
            stage.work += sampling["first"] + draws * each + machine.bootstrap_seconds * (4 if config.is_world else 1)
            stage.load += draws * sampling["load"]
            stage.disk += draws * sampling["bytes_per_response"] * responses
            stage.tokens += draws * (sum(prompts) + sum(lengths))
            if config.is_world:
                held = True
                tokens = 2 * (sum(prompts) + sum(lengths)) * scoring["token_ratio"]
                stage.load += 2 * scoring["load"]
        pairs = min(config.evaluate.pairs, self.data.eval_pairs)
        models = 0
        if pairs:
            before = f"policy {number - 1}" if config.reward_reference == "previous" else "reference"
            new = {f"policy {number}", before, "reference"} - self._known_logps
            self._known_logps |= new
            models = len(new)
            prompt, chosen, rejected = self.data.pair_tokens or (0.0, 0.0, 0.0)
            tokens_of_pairs = models * pairs * (2 * prompt + chosen + rejected)
            stage.load += (models - held) * scoring["load"]
            stage.work += self.tokenizer + scoring["per_pair"] * pairs
            stage.disk += 16 * models * pairs
        if responses or pairs:
            stage.work += scoring["first"] if tokens or pairs else 0.0
            stage.work += self._scoring(tokens + tokens_of_pairs, 2 * models * pairs)
        stage.tokens += round(tokens + tokens_of_pairs)
        longest = max(prompts, default=1)
        formulas = (
            generate_memory(self.policy, config, machine.engine, machine.dtype, longest, machine.gpu_bytes),
            score_memory([self.policy, self.reference], config, machine.dtype, machine.cuda),
        )
        measured = max(sampling["peak"], scoring["peak"]) if responses else scoring["peak"]
        stage.memory = self._memory(max(formulas) if responses else formulas[1], measured, 1)
        stage.counts = {"prompts": len(prompts), "responses": responses, "pairs": pairs}
        seen = self.record["evaluate"]
        if seen is not None and seen["of"] == [len(prompts), config.evaluate.samples if prompts else 0, pairs]:
            # The last round's is not beside the start of another process.
            at = -1 if number == rounds else min(number, max(1, len(seen["work"]) - 1)) - 1
            stage.work, stage.load = seen["work"][at], seen["load"][at]
        return stage

    # --- the run

    def price(self, rounds: list[RoundCounts], check: float | None) -> dict[str, dict[str, Any]]:
        """The entries of all stages, by name, in order of work.

        Args:
            check: seconds of the process that looks at the user's models and data; None where there is none. It is
                part of the first stage.
        """
        named: list[tuple[str, _Stage, Task]] = []
        start = self.record["start"]
        if check is not None:
            named.append(("check", _Stage(), Task("check", 0.0, check, prepares=True)))
        for number, counts in enumerate(rounds, start=1):
            for kind, stage in (
                ("generate", self.generate(counts)),
                ("score", self.score(counts)),
                ("mine", self.mine(counts)),
                ("replay", self.replay(counts)),
                ("train", self.train(counts)),
                ("evaluate", self.evaluate(number, len(rounds))),
            ):
                spawned = kind != "mine"
                beside = self.record["beside"].get(kind, {"work": 1.0, "start": 1.0})
                task = Task(
                    kind,
                    start[kind] if spawned else None,
                    stage.work + stage.load,
                    prepares=spawned and (kind != "evaluate" or number < len(rounds)),
                    work_beside=beside["work"],
                    start_beside=beside["start"],
                )
                named.append((f"round-{number:02d}/{kind}", stage, task))
        times = timeline([task for _, _, task in named], self.record["starts"])
        found: dict[str, dict[str, Any]] = {}
        before = 0.0
        for (name, stage, _), (seconds, wait) in zip(named, times, strict=True):
            if name == "check":
                before = seconds
                continue
            counts_of = dict(stage.counts or {})
            lacking = counts_of.pop("lacking", None)
            found[name] = {
                "seconds": seconds + before,
                "startup_seconds": wait + stage.load + before,
                "work_seconds": seconds - wait - stage.load,
                "gpu_hours": stage.devices * (seconds + before) / 3600 if self.machine.cuda else 0.0,
                "tokens": int(stage.tokens),
                "disk_bytes": round(stage.disk),
                "transient_disk_bytes": round(stage.transient),
                "peak_memory_bytes": int(stage.memory),
                **counts_of,
                **({"lacking": lacking} if lacking else {}),
            }
            before = 0.0
        return found
