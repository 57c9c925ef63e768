"""Makes the synthetic world: its models, prompts and pairs."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.config.shared import ModelConfig
from dice_py.config.stages import ScoreConfig, WorldConfig
from dice_py.data import Message, pairs_frame, prompt_key, prompts_frame
from dice_py.evaluation.metrics import win_rate
from dice_py.events import Report, no_report
from dice_py.models.saving import share_weights
from dice_py.models.tokenization import encode_pairs, load_tokenizer
from dice_py.scoring.pairs import score_pairs
from dice_py.stages.job import Job, StageFile, StageResult
from dice_py.stages.train import TrainJob
from dice_py.storage.cache import cache_folder
from dice_py.storage.files import atomic, make_folder, remove_temporaries
from dice_py.storage.integrity import set_aside, write_stamp
from dice_py.storage.lock import exclusive_lock
from dice_py.storage.parquet import write_parquet
from dice_py.storage.schemas import PROMPTS, TRAINING_SET
from dice_py.synthetic.pairs import draw_prompts, offline_pairs, oracle_pairs
from dice_py.synthetic.task import oracle, parse_prompt, sft_response
from dice_py.synthetic.tokenizer import EOS, make_tokenizer
from dice_py.synthetic.world import BETA, SFT, WORLD_STAMP, World, dpo, find_world, llama, world_key


def _train_sft(config: WorldConfig, prompts: list[list[Message]], folder: Path, report: Report) -> None:
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from dice_py.models.tokenization import encode_prompt

    tokenizer = make_tokenizer()
    rng = random.Random(f"{config.seed} sft")
    drawn = [rng.choice(prompts) for _ in range(config.sft_steps * SFT["batch"])]
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
            **llama(config),
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
            per_device_train_batch_size=SFT["batch"],
            learning_rate=SFT["learning_rate"],
            adam_beta2=SFT["adam_beta2"],
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
    share_weights(folder)
    shutil.rmtree(folder.parent / "sft-trainer", ignore_errors=True)


@dataclass(frozen=True)
class WorldJob(Job):
    """Makes the world of a config, unless the cache has it. Its folder is the only file of the result.

    The counts are those of `world.json`: of the prompts, the pairs and the DPO training.
    """

    config: WorldConfig

    def key_fields(self) -> dict[str, Any]:
        """The config, the recipe, and the versions of the libraries that train it, as the world's key."""
        return {"world": self.key()}

    def key(self) -> str:
        """The key of the world."""
        return world_key(self.config)

    def incomplete(self, files: Sequence[StageFile]) -> list[Path]:
        """The folder, unless the world is in the cache."""
        return [] if find_world(self.config) is not None else [file for file, _ in files]

    def run(self, report: Report = no_report) -> StageResult:
        """Makes the world, or returns the one in the cache. Of several processes one makes it, and the others wait."""
        world = find_world(self.config) or self._made(report)
        return StageResult([(world.folder, self.key())], world.info())

    def _made(self, report: Report) -> World:
        key = self.key()
        final = cache_folder() / "world" / key
        make_folder(final.parent)
        with exclusive_lock(final.parent / f".{key}.lock"):
            world = find_world(self.config)  # another process may have made it meanwhile
            if world is not None:
                return world
            remove_temporaries(final.parent, key)
            if final.exists():
                set_aside(final, report)
            with atomic(final) as folder:
                folder.mkdir(parents=True)
                self._make(World(folder), key, report)
            return World(final)

    def _make(self, world: World, key: str, report: Report) -> None:
        config = self.config
        sets = draw_prompts(config, random.Random(f"{config.seed} prompts"))
        write_parquet(world.prompts, prompts_frame(sets["rounds"]), key=key, schema=PROMPTS)
        write_parquet(world.eval_prompts, prompts_frame(sets["eval"]), key=key, schema=PROMPTS)
        offline = offline_pairs(config, sets["offline"])
        held_out = oracle_pairs(config, sets["eval_pairs"])
        write_parquet(world.offline_pairs, pairs_frame(offline), key=key)
        write_parquet(world.eval_pairs, pairs_frame(held_out), key=key)
        _train_sft(config, sets["sft"], world.reference, report)
        counts = self._train_dpo(world, pairs_frame(offline), key, report)
        # Shares of all pairs, ties counted half.
        texts = [(p["prompt"], p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in offline]
        agree = sum(win_rate([([oracle(x, a)[0]], [oracle(x, b)[0]]) for x, a, b in texts]))
        longer = sum(win_rate([([float(len(a))], [float(len(b))]) for _, a, b in texts]))
        write_stamp(
            world.folder,
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
            WORLD_STAMP,
        )

    def _train_dpo(self, world: World, offline: pl.DataFrame, key: str, report: Report) -> dict[str, Any]:
        """π_1, by DPO from the SFT model on the annotator's pairs."""
        models = ModelConfig(device="cpu", dtype="float32")  # the world is the same on every machine
        tokenizer = load_tokenizer(world.reference, models)
        encoded = encode_pairs(offline, tokenizer, [int(tokenizer.eos_token_id)])
        logps = score_pairs(ScoreConfig(), models, policy=world.reference, pairs=encoded, report=report)
        training = encoded.hstack(logps).rename(
            {"chosen_logp": "ref_chosen_logps", "rejected_logp": "ref_rejected_logps"}
        )
        training_set = world.folder / "dpo_training_set.parquet"
        write_parquet(training_set, training.with_columns(source=pl.lit("offline")), key=key, schema=TRAINING_SET)
        job = TrainJob(
            config=dpo(self.config),
            models=models,
            policy=world.reference,
            training_set=training_set,
            training_set_key=key,
            out=world.policy.parent,
            beta=BETA,
            seed=self.config.seed,
        )
        return job.run(lambda event, **fields: report(event, **{**fields, "stage": "world: dpo"})).counts
