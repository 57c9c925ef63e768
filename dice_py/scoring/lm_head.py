"""Hidden states to log-probabilities of given tokens, in tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from dice_py.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_TILE = {"cpu": 2**20, "cuda": 2**26}  # logits at one time: what a core's cache holds; what keeps a GPU busy


class LogitHead:
    """Hidden states to log-probabilities of given tokens, a tile of positions and vocabulary at a time.

    Handles what models do to their logits after the last matrix product, as their configs say: a factor
    (`logit_scale`, `logits_scaling`) and soft capping. `check` compares it with the model's own logits once,
    so that an architecture which does something else is refused, not scored wrongly.
    """

    def __init__(self, model: PreTrainedModel, chunk: int) -> None:
        text = model.config.get_text_config()
        scale = getattr(text, "logit_scale", None)
        if scale is None and getattr(text, "logits_scaling", None):
            scale = 1.0 / text.logits_scaling
        self.model = model
        # Of a model whose prefix names no part of it (Llama4), the base is the whole.
        self.backbone = model.base_model if model.base_model is not model else getattr(model, "model", model)
        self.head = model.get_output_embeddings()
        self.scale = 1.0 if scale is None else float(scale)
        self.cap = getattr(text, "final_logit_softcapping", None)
        self.chunk = chunk
        self.tile = max(1, _TILE.get(model.device.type, _TILE["cuda"]) // chunk)

    def _finished(self, products: torch.Tensor) -> torch.Tensor:
        """What the model does after the matrix product, in float32."""
        logits = products.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.cap:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits

    def logits(self, hidden: torch.Tensor, tokens: slice = slice(None)) -> torch.Tensor:
        """(positions, hidden) to float32 (positions, those tokens)."""
        bias = self.head.bias
        products = torch.nn.functional.linear(hidden, self.head.weight[tokens], None if bias is None else bias[tokens])
        return self._finished(products)

    def token_logps(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """float32 log-probability of each token (positions,) under its hidden state (positions, hidden)."""
        weight, bias = self.head.weight, self.head.bias
        parts = []
        for start in range(0, len(tokens), self.chunk):
            rows, wanted = hidden[start : start + self.chunk], tokens[start : start + self.chunk]
            # Its own dot product, in float32: the one logit whose rounding no sum evens out.
            picked = (rows.float() * weight[wanted].float()).sum(dim=-1)
            if bias is not None:
                picked = picked + bias[wanted].float()
            picked = self._finished(picked)
            total: torch.Tensor | None = None
            for first in range(0, len(weight), self.tile):
                logits = self.logits(rows, slice(first, first + self.tile))
                # In the sum too: of a likely token it is most of the sum, and no log-probability may exceed 0.
                at = (wanted - first).clamp(0, logits.shape[1] - 1)[:, None]
                here = at == (wanted - first)[:, None]
                logits.scatter_(1, at, torch.where(here, picked[:, None], logits.gather(1, at)))
                part = torch.logsumexp(logits, dim=-1)
                total = part if total is None else torch.logaddexp(total, part)
            assert total is not None
            parts.append(picked - total)
        return torch.cat(parts)

    def check(self, token_ids: Sequence[int]) -> None:
        """Compares with the model's own logits on one short sequence.

        Raises:
            DataError: they differ by more than the type's rounding.
        """
        device = self.model.device
        ids = torch.tensor([list(token_ids[:32])], device=device)
        with torch.inference_mode():
            own = self.model(input_ids=ids, use_cache=False).logits[0].float()
            ours = self.logits(self.backbone(input_ids=ids, use_cache=False).last_hidden_state[0])
        allowed = (1e-4 if self.model.dtype == torch.float32 else 0.05) * max(1.0, own.abs().max().item())
        apart = (own - ours).abs().max().item()
        if not apart <= allowed:
            raise DataError(
                f"{type(self.model).__name__} changes its logits in a way that the scorer does not know "
                f"(largest difference {apart:.3g}); its rewards would be wrong, so it is not scored"
            )
