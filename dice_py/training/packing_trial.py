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
_SPREADS = 4.0  # the packed forward may be off by this many times the difference of two plain ones


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
        difference, spread = _differences(model, pair, dtype)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        first_line = next(iter(str(error).splitlines()), "")
        return f"{name} does not run with the packed attention ({type(error).__name__}: {first_line})"
    # In float32 rounding is far smaller. In 16 bits it depends on the weights: two plain ways are its measure.
    tolerance = 1e-3 if dtype is None and model.dtype == torch.float32 else max(0.02, _SPREADS * spread)
    if not difference <= tolerance:
        return (
            f"with the packed attention {name} gives tokens other log-probabilities (root mean square {difference:.3g} "
            f"nats, where rounding explains {spread:.3g})"
        )
    return None


def _longest(model: PreTrainedModel, pairs: pl.DataFrame) -> Pair:
    window = getattr(model.config.get_text_config(), "sliding_window", None) or 0
    sizes = pairs.select(pl.sum_horizontal(pl.col("prompt_ids", "chosen_ids", "rejected_ids").list.len())).to_series()
    pair = pairs.row(sizes.arg_max() or 0, named=True)
    limit = max(_TOKENS, 2 * window)
    return pair | {name: pair[name][:limit] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}


def _differences(model: PreTrainedModel, pair: Pair, dtype: torch.dtype | None) -> tuple[float, float]:
    """Root mean squares over the response tokens of a pair, in nats, of differences from the plain forward.

    Returns:
        The difference of the packed forward, and that of the plain one with another attention kernel.
    """
    row = pack([pair], model.device)
    autocast = torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None)
    before = model.config._attn_implementation
    with torch.no_grad(), autocast:
        with use_packed_attention(model, row.layout):
            packed = packed_output(model, row).log_probs
        plain = _plain(model, pair)
        model.set_attn_implementation("sdpa" if before == "eager" else "eager")
        try:
            again = _plain(model, pair)
        finally:
            model.set_attn_implementation(before)
    packed = packed[row.sequences, row.columns]
    difference, spread = ((other - plain).square().mean().sqrt().item() for other in (packed, again))
    return difference, spread


def _plain(model: PreTrainedModel, pair: Pair) -> torch.Tensor:
    """(response tokens,) log-probabilities of chosen, then rejected, by a forward of each."""
    logps = []
    for side in ("chosen_ids", "rejected_ids"):
        ids = torch.tensor([*pair["prompt_ids"], *pair[side]], device=model.device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, len(pair["prompt_ids"]) - 1 : -1].float()
        logps.append(logits.log_softmax(dim=-1).gather(1, ids[-len(pair[side]) :, None])[:, 0])
    return torch.cat(logps)
