"""Stage 1 without sampling: responses that were sampled elsewhere, as the artifacts of the generate stage.

Token ids are taken as they are. Text is tokenized once, by the policy's tokenizer, as it stands after the rendered
prompt; a stop token follows, the one with which the chat template ends an answer, unless the response was cut off. A
file that does not say how a response ended is believed where its last token is a stop token; text then counts as ended,
and token ids without a stop token at their end as cut off.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.errors import DataError
from dice_py.events import Report, no_report
from dice_py.generation.shard import Prompt
from dice_py.models.answer_tokens import answer_end, encode_sampled_text
from dice_py.models.checkpoint import check_checkpoint
from dice_py.models.identity import model_identity
from dice_py.models.sizes import model_size
from dice_py.models.thinking import decode_responses, find_delimiters
from dice_py.models.tokenization import encode_prompts, load_tokenizer, stop_token_ids
from dice_py.rows.bad_rows import BadRows
from dice_py.stages.generate import GenerateJob
from dice_py.stages.job import StageResult, model_key_fields
from dice_py.storage.integrity import check_intact, is_kept
from dice_py.storage.keys import digest, versions
from dice_py.storage.parquet import parquet_key, parquet_meta, read_parquet, write_parquet
from dice_py.storage.schemas import GENERATIONS, PLACE


@dataclass(frozen=True, kw_only=True)
class GivenGenerationsJob(GenerateJob):
    """Writes given responses in shards `generations-NNNNN.parquet` under `out`, with the columns of `GENERATIONS`.

    `sampled_logp` is null where the file does not have it. The counts are those of `GenerateJob`; `engine` is "given".

    Raises, when run:
        DataError: an unusable policy, a response that cannot be used, with its file and row, or no response is left.
    """

    given: Path
    """Responses with the schema `generation.given.GIVEN`; `prompts` has all prompts that they answer."""

    def key_fields(self) -> dict[str, Any]:
        """The responses, the prompts, the policy and what tokenizes them."""
        return {
            "responses": parquet_key(self.given),
            "prompts": self.prompts_key,
            "model": model_key_fields(self.models),
            "policy": model_identity(self.policy),
            "thinking": self.config.thinking,
            "versions": versions("transformers"),
            "data": {"max_prompt_tokens": self.max_prompt_tokens},
        }

    def run(self, report: Report = no_report) -> StageResult:
        """Encodes what is text, checks what is tokens, and writes the shards that are not there."""
        check_checkpoint(self.policy, "policy", self.models)
        assert isinstance(self.prompts, Path)
        check_intact([self.policy, self.prompts, self.given])
        responses = _Responses(self, report)
        files, metas, total, fields = [], [], responses.count, self.key_fields()
        done = 0
        for number, (prompts, rows) in enumerate(responses.shards(self.config.shard_prompts)):
            file = self.out / f"generations-{number:05d}.parquet"
            key = digest("given", fields, prompts)  # the prompts tell which of the given responses are in the shard
            if not is_kept(file, key, report):
                frame = responses.encoded(prompts, rows)
                meta = {
                    "cut_off": int((frame["finish_reason"] == "length").sum()),
                    "response_tokens": int(frame["response_tokens"].sum()),
                    "prompts": frame["prompt_id"].n_unique(),
                    "has_logps": bool(frame["sampled_logp"].is_not_null().all()),
                }
                if frame.is_empty():
                    continue
                write_parquet(file, frame, key=key, schema=GENERATIONS, meta=meta)
                report("shard", file=file.name, key=key, rows=frame.height)
            files.append((file, key))
            metas.append(parquet_meta(file))
            done += rows.height
            report("progress", stage="generate", done=done, total=total, unit="responses")
        responses.finish()
        if not files:
            raise DataError("none of the given responses can be used")
        for stale in set(self.out.glob("generations-*.parquet")) - {file for file, _ in files}:
            stale.unlink()
        counts = {
            "engine": "given",
            "prompts": sum(meta["prompts"] for meta in metas),
            "prompts_too_long": responses.too_long,
            "responses": sum(pl.scan_parquet(file, glob=False).select(pl.len()).collect().item() for file, _ in files),
            "cut_off": sum(meta["cut_off"] for meta in metas),
            "response_tokens": sum(meta["response_tokens"] for meta in metas),
        }
        return StageResult(files, counts)


class _Responses:
    """The given responses, and the token ids of their prompts."""

    def __init__(self, job: GivenGenerationsJob, report: Report) -> None:
        self.job, self.report = job, report
        self.tokenizer = load_tokenizer(job.policy, job.models)
        self.stops = stop_token_ids(job.policy, self.tokenizer)
        self.end = answer_end(self.tokenizer, self.stops)
        self.delimiters = find_delimiters(self.tokenizer, job.config.thinking)
        self.ids_below = min(len(self.tokenizer), model_size(job.policy).vocabulary or len(self.tokenizer))
        self.rows = read_parquet(job.given)
        self.count = self.rows.height
        self.bad = BadRows(job.bad_rows, "the given responses", "responses")
        self.without_stop = self.spelled = 0
        self.prompts, self.too_long = self._encode_prompts()

    def shards(self, size: int) -> Iterator[tuple[list[Prompt], pl.DataFrame]]:
        """The prompts of each shard, and the responses to them."""
        for start in range(0, len(self.prompts), size):
            prompts = self.prompts[start : start + size]
            numbers = [number for number, _ in prompts]
            yield prompts, self.rows.filter(pl.col("prompt_id").is_in(numbers))

    def encoded(self, prompts: list[Prompt], rows: pl.DataFrame) -> pl.DataFrame:
        """The rows of a shard with the schema `GENERATIONS`; samples are numbered in the order of the files."""
        asked, samples = dict(prompts), dict.fromkeys([number for number, _ in prompts], 0)
        found: list[dict[str, Any]] = []
        for row in rows.iter_rows(named=True):
            prompt = asked[row["prompt_id"]]
            with self.bad.row():
                ids, reason = self._tokens(row, prompt)
                sample = samples[row["prompt_id"]]
                if sample > 65535:
                    raise DataError(f"{row[PLACE]}: prompt {row['prompt_id']} has more than 65536 responses")
                samples[row["prompt_id"]] += 1
                found.append(
                    {
                        "prompt_id": row["prompt_id"],
                        "sample_id": sample,
                        "prompt_token_ids": prompt,
                        "token_ids": ids,
                        "response": row["response"],
                        "response_tokens": len(ids),
                        "finish_reason": reason,
                        "sampled_logp": row["sampled_logp"],
                    }
                )
        texts = decode_responses(self.tokenizer, [row["token_ids"] for row in found], self.delimiters)
        for row, text in zip(found, texts, strict=True):
            row["response"] = text if row["response"] is None else row["response"]
            row["response_chars"] = len(row["response"])
        return pl.DataFrame(found, schema=GENERATIONS)

    def finish(self) -> None:
        """Reports what was left out, and what is taken as it is."""
        self.bad.finish(self.report)
        if self.without_stop:
            self.report(
                "note",
                text=f"{self.without_stop} of {self.count} given responses ended (finish_reason stop) without a stop "
                "token among their token ids: they are taken as they are, and training on them does not teach to stop",
            )

    def _tokens(self, row: dict[str, Any], prompt: list[int]) -> tuple[list[int], str]:
        """Token ids of a response, and how it ended."""
        where, reason = row[PLACE], row["finish_reason"]
        if row["token_ids"] is None:
            ids = encode_sampled_text(self.tokenizer, prompt, row["response"], self.delimiters, where)
            self._check_stops(ids, where, "its text spells it; remove it from the text")
            ended = reason != "length"
            if not ids and not ended:
                raise DataError(f"{where}: an empty response cannot have been cut off by the token limit")
            return ([*ids, self.end], "stop") if ended else (ids, "length")
        ids = row["token_ids"]
        self._check_ids(ids, where)
        self._check_stops(ids[:-1], where, "cut the response after it")
        has_stop = ids[-1] in self.stops
        self.without_stop += reason == "stop" and not has_stop
        return ids, reason or ("stop" if has_stop else "length")

    def _check_ids(self, ids: list[int], where: str) -> None:
        if max(ids) >= self.ids_below:
            raise DataError(
                f"{where}: token id {max(ids)}, but the policy has {self.ids_below} tokens; these responses were "
                "sampled with another tokenizer: give their text instead"
            )

    def _check_stops(self, ids: list[int], where: str, remedy: str) -> None:
        at = next((at for at, token in enumerate(ids) if token in self.stops), None)
        if at is not None:
            name = self.tokenizer.convert_ids_to_tokens(ids[at])
            raise DataError(f"{where}: the stop token {name!r} stands inside of the response (token {at}): {remedy}")

    def _encode_prompts(self) -> tuple[list[Prompt], int]:
        """The prompts that are not too long, by their own token ids where the files have them."""
        assert isinstance(self.job.prompts, Path)
        given = self._given_prompts()
        prompts = read_parquet(self.job.prompts)
        prompts = prompts.filter(pl.col("prompt_id").is_in(self.rows["prompt_id"].unique().implode()))
        others = prompts.filter(~pl.col("prompt_id").is_in(list(given)))
        encoded = encode_prompts(others, self.tokenizer, rule=self.job.bad_rows, report=self.report)
        both = sorted([*given.items(), *encoded])
        kept = [(number, ids) for number, ids in both if len(ids) <= self.job.max_prompt_tokens]
        if not kept:
            raise DataError(
                f"none of the {len(both)} prompts of the given responses has at most {self.job.max_prompt_tokens} "
                "tokens; raise data.max_prompt_tokens"
            )
        if len(kept) < len(both):
            text = f"{len(both) - len(kept)} prompts are longer than {self.job.max_prompt_tokens} tokens: left out"
            self.report("note", text=text)
        return kept, len(both) - len(kept)

    def _given_prompts(self) -> dict[int, list[int]]:
        """The token ids of prompts that the files have: all responses to a prompt answer the same ones."""
        found: dict[int, list[int]] = {}
        rows = self.rows.filter(pl.col("prompt_token_ids").is_not_null())
        for number, ids, where in rows.select("prompt_id", "prompt_token_ids", PLACE).iter_rows():
            if found.setdefault(number, ids) != ids:
                raise DataError(
                    f"{where}: prompt_token_ids differ from those of an earlier response to the same prompt, so that "
                    "the two cannot form a pair; give one of the prompts another text"
                )
            self._check_ids(ids, where)
        return found
