"""The trial that decides whether a model can be trained on packed rows.

A model's layers may ignore the attention interface, or mix neighboring tokens of a row outside attention. Neither is
visible in its config, so the packed forward is compared with the plain one on one pair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl
import torch

from dice_py.compute.failures import is_out_of_memory
from dice_py.models.packed_attention import use_packed_attention
from dice_py.training.packed_forward import packed_output
from dice_py.training.packed_rows import Pair, pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = 256  # of a response, unless a sliding window is longer: the trial takes seconds on a CPU with a large model


def why_padded(model: PreTrainedModel, pairs: pl.DataFrame, arguments: Any) -> str | None:
    """Why the model cannot be trained on packed rows; None when it can. The same on every rank.

    The first rank tries, on the longest pair: under FSDP2 the others have no weights yet.

    Args:
        model: as loaded, before adapters and wrappers.
        pairs: with the columns of `load_training_set`.
        arguments: TRL's DPOConfig, with which the processes have been joined.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    reason = [_reason(model, pairs, arguments) if arguments.process_index == 0 else None]
    if distributed:
        torch.distributed.broadcast_object_list(reason, src=0)
    return reason[0]


def _reason(model: PreTrainedModel, pairs: pl.DataFrame, arguments: Any) -> str | None:
    name = type(model).__name__
    if arguments.deepspeed is not None or arguments.deepspeed_plugin is not None:
        return "DeepSpeed accumulates gradients by itself, one padded batch at a time"
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return f"{name} has a loss that balances its experts, over the tokens of a padded batch"
    if not getattr(model, "_supports_attention_backend", False):
        return f"{name} does not support other attention implementations than its own"
    pair = _longest(model, pairs)
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    try:
        packed, plain = _both(model, pair, dtype)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        first_line = next(iter(str(error).splitlines()), "")
        return f"{name} does not run with the packed attention ({type(error).__name__}: {first_line})"
    # A wrong mask moves most tokens by tenths of a nat; rounding to 16 bits moves a token by some hundredths.
    difference = (packed - plain).abs()
    tolerance = 1e-3 if dtype is None and model.dtype == torch.float32 else 0.1
    if not float(difference.mean()) <= tolerance:
        return f"with the packed attention {name} gives tokens other log-probabilities, by {difference.mean():.3g} nats"
    return None


def _longest(model: PreTrainedModel, pairs: pl.DataFrame) -> Pair:
    window = getattr(model.config.get_text_config(), "sliding_window", None) or 0
    sizes = pairs.select(pl.sum_horizontal(pl.col("prompt_ids", "chosen_ids", "rejected_ids").list.len())).to_series()
    pair = pairs.row(sizes.arg_max() or 0, named=True)
    limit = max(_TOKENS, 2 * window)
    return pair | {name: pair[name][:limit] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}


def _both(model: PreTrainedModel, pair: Pair, dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(response tokens,) log-probabilities of a pair by the packed forward, and by a plain one of each sequence."""
    row = pack([pair], model.device)
    autocast = torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None)
    with torch.no_grad(), autocast:
        with use_packed_attention(model, row.layout):
            packed = packed_output(model, row).log_probs
        plain = torch.zeros_like(packed)
        for at, side in enumerate(("chosen_ids", "rejected_ids")):
            ids = torch.tensor([*pair["prompt_ids"], *pair[side]], device=model.device)
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
            logps = logits.log_softmax(dim=-1).gather(1, ids[1:, None])[:, 0]
            start = len(pair["prompt_ids"]) - 1
            plain[at, start : len(logps)] = logps[start:]
    return packed[packed != 0], plain[packed != 0]
