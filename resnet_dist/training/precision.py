"""Number formats: what `train.precision` means for weights, for the forward pass and for the scale of the loss."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    name: Literal["fp32", "tf32", "bf16", "fp16", "fp64"]

    @property
    def weights(self) -> torch.dtype:
        return torch.float64 if self.name == "fp64" else torch.float32

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        """Around the forward pass and the loss."""
        dtype = _AUTOCAST.get(self.name)
        return torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """Keeps small gradients within fp16's range. Does nothing for the others: bf16's range is fp32's."""
        return torch.amp.GradScaler(device.type, enabled=self.name == "fp16")
