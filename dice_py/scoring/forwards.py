"""Log-probabilities of one batch of tokens, summed or by token: the packed forward and the padded one.

Neither chooses its batch nor handles a lack of memory; scoring/scorer.py does both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dice_py.models.packed_attention import use_packed_attention
from dice_py.models.packing import Batch, Tokens
from dice_py.models.transfer import to_device
from dice_py.scoring.lm_head import LogitHead


def packed_sums(head: LogitHead, batch: Batch) -> list[float]:
    """Σ_t log π(y_t | x, y_<t) in nats for each response, in the order of `batch.rows`, by one packed forward."""
    return _response_sums(packed_logps(head, batch), batch.layout.responses[:, 1])


def packed_token_logps(head: LogitHead, batch: Batch) -> list[np.ndarray]:
    """log π(y_t | x, y_<t) in nats, (tokens,) float32 for each response in the order of `batch.rows`."""
    return _by_response(packed_logps(head, batch), batch.layout.responses[:, 1])


def packed_logps(head: LogitHead, batch: Batch) -> torch.Tensor:
    """(response tokens,) float32 in nats, of all responses in the order of `batch.rows`, by one packed forward."""
    device = head.model.device
    ids, positions, predicting, targets = (
        to_device(part, device) for part in (batch.tokens, batch.positions, batch.predicting, batch.targets)
    )
    with use_packed_attention(head.model, batch.layout):
        output = head.backbone(input_ids=ids[None], position_ids=positions[None], use_cache=False)
    hidden = output.last_hidden_state[0]
    return head.token_logps(hidden[predicting], targets)


def padded_sums(
    head: LogitHead, rows: list[int], prompts: Sequence[Tokens], responses: Sequence[Tokens]
) -> list[float]:
    """Σ_t log π(y_t | x, y_<t) in nats for each of `rows`, by one forward of sequences padded on the right."""
    logps = padded_logps(head, rows, prompts, responses)
    return _response_sums(logps, np.array([len(responses[row]) for row in rows]))


def padded_token_logps(
    head: LogitHead, rows: list[int], prompts: Sequence[Tokens], responses: Sequence[Tokens]
) -> list[np.ndarray]:
    """log π(y_t | x, y_<t) in nats, (tokens,) float32 for each of `rows`."""
    logps = padded_logps(head, rows, prompts, responses)
    return _by_response(logps, np.array([len(responses[row]) for row in rows]))


def padded_logps(
    head: LogitHead, rows: list[int], prompts: Sequence[Tokens], responses: Sequence[Tokens]
) -> torch.Tensor:
    """(response tokens,) float32 in nats, of `rows` in turn, by one forward of sequences padded on the right."""
    device = head.model.device
    lengths = [len(prompts[row]) + len(responses[row]) for row in rows]
    # Under causal attention no real token attends to padding on its right. So the padding token's id does not
    # matter, and positions count from 0 in every row.
    ids = torch.zeros((len(rows), max(lengths)), dtype=torch.long)
    mask = torch.zeros((len(rows), max(lengths)), dtype=torch.long)
    predicts = torch.zeros((len(rows), max(lengths)), dtype=torch.bool)
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        ids[number, :length] = torch.from_numpy(np.concatenate([prompts[row], responses[row]]))
        mask[number, :length] = 1
        predicts[number, len(prompts[row]) - 1 : length - 1] = True
    # As indices: the number of true entries of a mask on a GPU would be read on the host.
    at, targets = predicts.flatten().nonzero()[:, 0], ids.roll(-1, dims=1)[predicts]
    ids, mask, at, targets = (to_device(part, device) for part in (ids, mask, at, targets))
    output = head.backbone(input_ids=ids, attention_mask=mask, use_cache=False)
    return head.token_logps(output.last_hidden_state.flatten(0, 1)[at], targets)


def _response_sums(logps: torch.Tensor, lengths: np.ndarray) -> list[float]:
    """Sums, in float64, of consecutive runs of `lengths` log-probabilities."""
    running = logps.cpu().double().cumsum(dim=0)
    at_ends = running[torch.from_numpy(lengths.cumsum() - 1)].numpy()
    sums: list[float] = np.diff(at_ends, prepend=0.0).tolist()
    return sums


def _by_response(logps: torch.Tensor, lengths: np.ndarray) -> list[np.ndarray]:
    """Consecutive runs of `lengths` log-probabilities, which share their memory."""
    values: np.ndarray = logps.cpu().numpy()
    return np.split(values, lengths.cumsum()[:-1])
