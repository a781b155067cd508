"""What a run has to remember: weights, optimizer, and where it stands. There is no RNG state and no loader state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class TrainState:
    """The fields are the checkpoint's keys. `net` is the bare network: its keys are torchvision's."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    """Optimizer steps done."""
    evaluated_step: int = 0
    """The step after which the last evaluation was done; a resumed run does a missing one before it trains on."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "evaluated_step": self.evaluated_step,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.net.load_state_dict(saved["net"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step = saved["step"]
        self.evaluated_step = saved["evaluated_step"]
