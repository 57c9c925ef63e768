"""What most parts import, imported once in the process that forks them. Nothing here may start CUDA."""

from __future__ import annotations

import accelerate  # noqa: F401
import datasets  # noqa: F401
import peft  # noqa: F401
import torch  # noqa: F401
import trl.trainer.dpo_trainer  # noqa: F401
from transformers import (  # noqa: F401
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    MistralForCausalLM,
    Trainer,
)
