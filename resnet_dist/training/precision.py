"""Number formats: what `train.precision` means for weights and for the forward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Precision:
    name: Literal["fp32", "bf16", "fp64"]

    @property
    def weights(self) -> torch.dtype:
        return torch.float64 if self.name == "fp64" else torch.float32

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        """Around the forward pass and the loss. bf16 needs no loss scaling: its range is fp32's."""
        if self.name == "bf16":
            return torch.autocast(device.type, dtype=torch.bfloat16)
        return nullcontext()
