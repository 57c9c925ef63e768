"""How often the host waits for a GPU while it scores: once for each batch, when it reads the log-probabilities."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from device_traffic import Traffic
from logp_oracle import shared
from tiny_sets import CPU

from dice_py.models.loading import load_model
from dice_py.models.packing import Packer
from dice_py.scoring.forwards import packed_logps, padded_logps
from dice_py.scoring.lm_head import LogitHead


@pytest.mark.parametrize("packed", [True, False])
def test_forward_reads_nothing_and_waits_for_no_copy(
    llama: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    """On the meta device: reading a value, or a shape that depends on values, raises an error."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type=None: False)  # which knows no meta device
    head = LogitHead(load_model(llama, CPU).to("meta"), chunk=7)
    prompts, responses = shared()
    tokens = sum(map(len, responses))
    with torch.inference_mode(), Traffic() as traffic:
        if packed:
            logps = packed_logps(head, Packer(prompts, responses).next_batch(10**6))
        else:  # transformers' sdpa reads once whether anything is masked
            head.model.set_attn_implementation("eager")
            logps = padded_logps(head, list(range(len(responses))), prompts, responses)
    assert (logps.device.type, logps.shape) == ("meta", (tokens,))
    assert len(traffic.copies) > traffic.copies.count("aten::lift_fresh") > 0
    assert traffic.blocking == []
