"""Log-probabilities of given tokens from hidden states, computed in tiles of positions × vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from dice_py.errors import DataError
from dice_py.models.head import float32_logits
from dice_py.models.logits import logit_transform

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TILE_LOGITS = {"cpu": 2**20, "cuda": 2**26}  # fits a CPU core's cache; keeps a GPU busy


class LogitHead:
    """The language-model head of one model, applied to a tile of positions and vocabulary at a time.

    Products of 16-bit states and weights are not rounded to 16 bits (models/head.py). The logits are then transformed
    as the model's config declares: by a factor (`logit_scale`, `logits_scaling`) and by soft capping
    (`final_logit_softcapping`). `check` compares the result with the model's own logits, so a model that does anything
    else is refused instead of scored wrongly.

    TRL's fused head (trl.kernels.chunked_logprob) is not used. On a CPU, with a vocabulary of 32,000, it takes 2.6
    times as long in float32, and needs 2 GiB instead of 50 MiB. In bfloat16 it rounds the logits.

    Args:
        model: a causal language model in evaluation mode, on its device.
        chunk: positions in a tile.
    """

    def __init__(self, model: PreTrainedModel, chunk: int) -> None:
        self.model = model
        # Where a model's prefix names none of its attributes (Llama4), `base_model` is the model itself.
        self.backbone = model.base_model if model.base_model is not model else getattr(model, "model", model)
        self.head = model.get_output_embeddings()
        self.scale, self.cap = logit_transform(model.config)
        self.chunk = chunk
        self.tile = max(1, _TILE_LOGITS.get(model.device.type, _TILE_LOGITS["cuda"]) // chunk)

    def _transform(self, logits: torch.Tensor) -> torch.Tensor:
        """Applies the factor and the capping of the model's config to float32 products of the head."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.cap:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits

    def logits(self, hidden: torch.Tensor, vocabulary: slice = slice(None)) -> torch.Tensor:
        """(positions, hidden) in the model's dtype → (positions, tokens of the slice) float32."""
        weight, bias = self.head.weight[vocabulary], self.head.bias
        return self._transform(float32_logits(hidden, weight, None if bias is None else bias[vocabulary]))

    def token_logps(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """(positions, hidden) in the model's dtype and (positions,) int64 tokens → (positions,) float32, in nats."""
        chunks = []
        for start in range(0, len(tokens), self.chunk):
            rows, targets = hidden[start : start + self.chunk], tokens[start : start + self.chunk, None]
            target_logits, normalizer = targets.new_zeros(len(targets), dtype=torch.float32), None
            for first in range(0, len(self.head.weight), self.tile):
                logits = self.logits(rows, slice(first, first + self.tile))
                columns = (targets - first).clamp(0, logits.shape[1] - 1)
                in_tile = (columns == targets - first)[:, 0]
                target_logits = torch.where(in_tile, logits.gather(1, columns)[:, 0], target_logits)
                of_tile = torch.logsumexp(logits, dim=-1)
                normalizer = of_tile if normalizer is None else torch.logaddexp(normalizer, of_tile)
            assert normalizer is not None
            chunks.append(target_logits - normalizer)
        return torch.cat(chunks)

    def check(self, token_ids: Sequence[int]) -> None:
        """Compares with the model's own logits on one short sequence.

        Raises:
            DataError: they differ by more than the rounding of the model's dtype, or are not numbers.
        """
        device = self.model.device
        ids = torch.tensor([list(token_ids[:32])], device=device)
        with torch.inference_mode():
            expected = self.model(input_ids=ids, use_cache=False).logits[0].float()
            logits = self.logits(self.backbone(input_ids=ids, use_cache=False).last_hidden_state[0])
        if not bool(expected.isfinite().all()):
            dtype = str(self.model.dtype).removeprefix("torch.")
            raise DataError(
                f"{type(self.model).__name__}: the model's logits are NaN or infinite in {dtype} on "
                f"{ids.shape[1]} tokens; set model.dtype to float32 or bfloat16 if it is float16 (its range is small), "
                "else config.json does not fit the weights (norms, positions)"
            )
        tolerance = (1e-4 if self.model.dtype == torch.float32 else 0.05) * max(1.0, expected.abs().max().item())
        max_abs_diff = (expected - logits).abs().max().item()
        if not max_abs_diff <= tolerance:
            raise DataError(
                f"{type(self.model).__name__} transforms its logits in a way that the scorer does not support "
                f"(largest difference {max_abs_diff:.3g}), so its rewards would be wrong; score a model whose config "
                "declares the transformation as logit_scale, logits_scaling or final_logit_softcapping"
            )
