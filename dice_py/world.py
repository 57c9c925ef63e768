"""The embedded default: a small synthetic world with an oracle, in which the whole loop can be measured.

Made on first use in the cache folder, from nothing but a seed: a tokenizer and chat template, a tiny Llama
trained from scratch (SFT), offline preference pairs of a noisy, length-biased annotator, DPO on them (the
policy that a run starts from), prompts for the rounds, and held-out prompts and pairs. The oracle labels the
offline set's annotator and the evaluation; no DICE round ever sees it.

A prompt names an operation and letters ("reverse : k b q"). A response is the answer, a full stop, and up to
six filler words. Fillers say nothing, and more than two cost a little; the annotator likes every one: that is
the length bias.
It is not a language model's world: it shows whether the loop does what it should, not how well on language.
"""

from __future__ import annotations

import itertools
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.artefacts import (
    PROMPTS,
    TRAINING_SET,
    Report,
    atomic,
    digest,
    no_report,
    read_json,
    versions,
    write_json,
    write_parquet,
)
from dice_py.config import ModelConfig, ScoreConfig, TrainConfig, WorldConfig
from dice_py.data import Message, Pair, pairs_frame, prompt_key, prompts_frame
from dice_py.remembered import cache_folder

LETTERS = "abcdefghijkl"
WORD = 3  # letters in a prompt
FILLERS = ("sure", "indeed", "so", "well", "fine", "okay")
FREE_FILLERS = 2  # courtesy; what comes beyond costs
# Each operation is an order in which the prompt's letters are written: the six orders of three letters.
OPERATIONS: dict[str, tuple[int, ...]] = {
    "copy": (0, 1, 2),
    "reverse": (2, 1, 0),
    "left": (1, 2, 0),
    "right": (2, 0, 1),
    "front": (1, 0, 2),
    "back": (0, 2, 1),
}
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %} {{ message['content'] }}"
    "{{ eos_token }}{% else %} {{ message['content'] }} ={% endif %}{% endfor %}"
)

# The two outputs that a wrong answer to each operation usually is: (the likelier 65 %, the other).
CONFUSED: dict[str, tuple[str, str]] = {
    "copy": ("front", "back"),
    "reverse": ("left", "right"),
    "left": ("right", "reverse"),
    "right": ("reverse", "left"),
    "front": ("back", "copy"),
    "back": ("copy", "front"),
}


def answer(operation: str, letters: tuple[str, ...]) -> tuple[str, ...]:
    """The right answer."""
    return tuple(letters[at] for at in OPERATIONS[operation])


def prompt_messages(operation: str, letters: tuple[str, ...]) -> list[Message]:
    """One user turn."""
    return [{"role": "user", "content": f"{operation} : {' '.join(letters)}"}]


def parse_prompt(messages: list[Message]) -> tuple[str, tuple[str, ...]]:
    """The operation and letters of a prompt of this world."""
    operation, _, letters = messages[-1]["content"].partition(" : ")
    return operation, tuple(letters.split())


def oracle(messages: list[Message], response: str) -> tuple[float, bool]:
    """(score, right) of a response's text.

    Score: 1 if the answer is right, else 0.3 × the share of matching letters; −0.03 for each filler beyond the
    second; −0.3 if the response is not of the form answer, full stop, fillers.
    """
    operation, letters = parse_prompt(messages)
    want = answer(operation, letters)
    words = response.split()
    stop = words.index(".") if "." in words else len(words)
    got, rest = tuple(words[:stop]), words[stop + 1 :]
    right = got == want
    matching = sum(left == right_ for left, right_ in zip(got, want, strict=False)) / len(want)
    formed = "." in words and len(got) == len(want) and all(word in FILLERS for word in rest)
    fillers = sum(word in FILLERS for word in words)
    score = (1.0 if right else 0.3 * matching) - 0.03 * max(0, fillers - FREE_FILLERS)
    return score - (0.0 if formed else 0.3), right


def sft_response(rng: random.Random, operation: str, letters: tuple[str, ...]) -> str:
    """What the SFT data answers: right 40 %, another operation's output 58 %, noise 2 %; then fillers."""
    draw = rng.random()
    if draw < 0.40:
        got = answer(operation, letters)
    elif draw < 0.98:
        likely, other = CONFUSED[operation]
        got = answer(likely if rng.random() < 0.65 else other, letters)
    else:
        got = tuple(rng.choice(LETTERS) for _ in letters)
    fillers = 0
    while fillers < len(FILLERS) and rng.random() < 0.4:
        fillers += 1
    return " ".join([*got, ".", *FILLERS[:fillers]])


def annotate(rng: random.Random, messages: list[Message], left: str, right: str) -> bool:
    """True when the annotator prefers `left`: Bradley-Terry on 4 × oracle + 0.25 × fillers, 5 % flipped."""

    def utility(text: str) -> float:
        return 4.0 * oracle(messages, text)[0] + 0.25 * sum(word in FILLERS for word in text.split())

    import math

    prefers = rng.random() < 1.0 / (1.0 + math.exp(utility(right) - utility(left)))
    return prefers != (rng.random() < 0.05)


@dataclass(frozen=True)
class World:
    """A made world's files."""

    folder: Path

    @property
    def policy(self) -> Path:
        """π_1: the SFT model after DPO on the offline pairs."""
        return self.folder / "policy" / "model"

    @property
    def reference(self) -> Path:
        """π_ref of round 1: the SFT model."""
        return self.folder / "sft"

    @property
    def prompts(self) -> Path:
        """Prompts for the rounds (schema PROMPTS)."""
        return self.folder / "prompts.parquet"

    @property
    def offline_pairs(self) -> Path:
        """The annotator's pairs as messages."""
        return self.folder / "offline_pairs.parquet"

    @property
    def eval_prompts(self) -> Path:
        """Held-out prompts."""
        return self.folder / "eval_prompts.parquet"

    @property
    def eval_pairs(self) -> Path:
        """Held-out pairs labelled by the oracle."""
        return self.folder / "eval_pairs.parquet"

    def info(self) -> dict[str, Any]:
        """What was made and measured: `world.json`."""
        return dict(read_json(self.folder / "world.json"))


def world_key(config: WorldConfig) -> str:
    """The key of a world: its config, the recipe, and what trains it."""
    recipe = [
        LETTERS,
        WORD,
        FILLERS,
        FREE_FILLERS,
        OPERATIONS,
        CONFUSED,
        TEMPLATE,
        _SFT,
        _DPO.model_dump(),
        _LLAMA,
        RECIPE,
    ]
    return digest("world", config.model_dump(), recipe, versions("torch", "transformers", "trl"))


RECIPE = 2  # counts up when the code above makes another world from the same config

_LLAMA: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
_SFT: dict[str, Any] = {"batch": 128, "learning_rate": 2e-3, "adam_beta2": 0.98}
_DPO = TrainConfig(
    learning_rate=3e-4,
    lr_scheduler="cosine",
    epochs=2.0,
    warmup_steps=0,
    batch_size=32,
    micro_batch_size=32,
    sft_weight=1.0,
    save_steps=None,
)
_BETA = 1.0


def find_world(config: WorldConfig) -> World | None:
    """The world of this config if it is in the cache, whole."""
    world = World(cache_folder() / "world" / world_key(config))
    return world if (world.folder / "world.json").is_file() else None


def _draw_prompts(config: WorldConfig, rng: random.Random) -> dict[str, list[list[Message]]]:
    """Disjoint sets of prompts: rounds, held-out prompts, held-out pairs, offline; the rest is SFT's."""
    every = [
        prompt_messages(operation, letters)
        for operation in OPERATIONS
        for letters in itertools.product(LETTERS, repeat=WORD)
    ]
    rng.shuffle(every)
    sizes = {
        "rounds": config.round_prompts,
        "eval": config.eval_prompts,
        "eval_pairs": config.eval_pairs,
        "offline": config.offline_pairs,
    }
    sets: dict[str, list[list[Message]]] = {}
    for name, size in sizes.items():
        sets[name], every = every[:size], every[size:]
    if len(every) < 500:
        from dice_py.errors import UsageError

        raise UsageError(
            f"world: {sum(sizes.values())} prompts are asked for, which leaves {len(every)} of "
            f"{len(OPERATIONS) * len(LETTERS) ** WORD} for SFT (at least 500); ask for fewer"
        )
    sets["sft"] = every
    return sets


def _make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [PAD, BOS, EOS, *LETTERS, *OPERATIONS, ":", "=", ".", *FILLERS]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS)
    fast.chat_template = TEMPLATE
    return fast


def _train_sft(config: WorldConfig, prompts: list[list[Message]], folder: Path, report: Report) -> None:
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from dice_py.models import encode_prompt

    tokenizer = _make_tokenizer()
    rng = random.Random(f"{config.seed} sft")
    drawn = [rng.choice(prompts) for _ in range(config.sft_steps * _SFT["batch"])]
    before = {prompt_key(messages): encode_prompt(tokenizer, messages) for messages in prompts}
    answers = [sft_response(rng, *parse_prompt(messages)) + EOS for messages in drawn]
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for messages, after in zip(drawn, tokenizer(answers, add_special_tokens=False)["input_ids"], strict=True):
        prompt = before[prompt_key(messages)]
        rows["input_ids"].append(prompt + after)
        rows["labels"].append([-100] * len(prompt) + after)
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **_LLAMA,
        )
    )

    class Progress(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            report("progress", stage="world: sft", done=state.global_step, total=state.max_steps, unit="steps")

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder.parent / "sft-trainer"),
            max_length=None,
            per_device_train_batch_size=_SFT["batch"],
            learning_rate=_SFT["learning_rate"],
            adam_beta2=_SFT["adam_beta2"],
            lr_scheduler_type="cosine",
            warmup_steps=20,
            max_steps=config.sft_steps,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            logging_steps=50,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=config.seed,
        ),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        callbacks=[Progress()],
    )
    trainer.train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.rmtree(folder.parent / "sft-trainer", ignore_errors=True)


def _offline_pairs(config: WorldConfig, prompts: list[list[Message]]) -> list[Pair]:
    rng = random.Random(f"{config.seed} offline")
    pairs: list[Pair] = []
    for messages in prompts:
        left, right = (sft_response(rng, *parse_prompt(messages)) for _ in range(2))
        if left == right:
            continue
        if not annotate(rng, messages, left, right):
            left, right = right, left
        pairs.append(_pair(messages, left, right))
    return pairs


def _pair(messages: list[Message], chosen: str, rejected: str) -> Pair:
    return {
        "prompt": messages,
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def _oracle_pairs(config: WorldConfig, prompts: list[list[Message]]) -> list[Pair]:
    rng = random.Random(f"{config.seed} eval pairs")
    pairs: list[Pair] = []
    for messages in prompts:
        texts = [sft_response(rng, *parse_prompt(messages)) for _ in range(2)]
        scores = [oracle(messages, text)[0] for text in texts]
        if scores[0] != scores[1]:
            best = 0 if scores[0] > scores[1] else 1
            pairs.append(_pair(messages, texts[best], texts[1 - best]))
    return pairs


def make_world(config: WorldConfig, *, report: Report = no_report) -> Path:
    """Makes the world of `config` in the cache (or finds it there) and returns its folder."""
    found = find_world(config)
    if found is not None:
        return found.folder
    from dice_py.evaluate import win_rate
    from dice_py.models import encode_pairs, load_tokenizer
    from dice_py.score import score_pairs
    from dice_py.train import train

    models = ModelConfig(device="cpu", dtype="float32")  # one machine's world is another's
    key = world_key(config)
    final = cache_folder() / "world" / key
    with atomic(final) as folder:
        folder.mkdir(parents=True)
        world = World(folder)
        sets = _draw_prompts(config, random.Random(f"{config.seed} prompts"))
        write_parquet(world.prompts, prompts_frame(sets["rounds"]), key=key, schema=PROMPTS)
        write_parquet(world.eval_prompts, prompts_frame(sets["eval"]), key=key, schema=PROMPTS)
        offline = _offline_pairs(config, sets["offline"])
        held_out = _oracle_pairs(config, sets["eval_pairs"])
        write_parquet(world.offline_pairs, pairs_frame(offline), key=key)
        write_parquet(world.eval_pairs, pairs_frame(held_out), key=key)
        _train_sft(config, sets["sft"], world.reference, report)
        tokenizer = load_tokenizer(world.reference, models)
        encoded = encode_pairs(pairs_frame(offline), tokenizer, [int(tokenizer.eos_token_id)])
        logps = score_pairs(ScoreConfig(), models, policy=world.reference, pairs=encoded, report=report)
        training = encoded.hstack(logps).rename(
            {"chosen_logp": "ref_chosen_logps", "rejected_logp": "ref_rejected_logps"}
        )
        training_set = folder / "dpo_training_set.parquet"
        write_parquet(training_set, training.with_columns(source=pl.lit("offline")), key=key, schema=TRAINING_SET)
        counts = train(
            _DPO,
            models,
            policy=world.reference,
            training_set=training_set,
            out=folder / "policy",
            beta=_BETA,
            seed=config.seed,
            key=key,
            report=lambda event, **fields: report(event, **{**fields, "stage": "world: dpo"}),
        )
        # Shares of all pairs, ties counted half.
        texts = [(p["prompt"], p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in offline]
        agree = sum(win_rate([([oracle(x, a)[0]], [oracle(x, b)[0]]) for x, a, b in texts]))
        longer = sum(win_rate([([float(len(a))], [float(len(b))]) for _, a, b in texts]))
        write_json(
            folder / "world.json",
            {
                "key": key,
                "config": config.model_dump(),
                "sft_prompts": len({prompt_key(messages) for messages in sets["sft"]}),
                "round_prompts": len(sets["rounds"]),
                "offline_pairs": len(offline),
                "annotator_agrees_with_oracle": agree / len(offline),
                "annotator_prefers_longer": longer / len(offline),
                "eval_prompts": len(sets["eval"]),
                "eval_pairs": len(held_out),
                "dpo": counts,
            },
        )
    return final
