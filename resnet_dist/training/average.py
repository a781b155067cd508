"""The exponential moving average of a net's weights, which is evaluated and registered in their place."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from resnet_dist.config.recipe_train import EmaConfig


class MovingAverage:
    """e = decay * e + (1 - decay) * w; batch norm's running statistics too, and its counters are copied."""

    def __init__(self, net: nn.Module, config: EmaConfig, steps_per_epoch: int) -> None:
        self.net = deepcopy(net).requires_grad_(False)
        self._every_steps = config.every_steps
        self._start_step = round(config.start_epochs * steps_per_epoch)
        self._mix = get_ema_multi_avg_fn(config.decay)

    @torch.no_grad()
    def update(self, net: nn.Module, num_steps: int) -> None:
        """After `num_steps` optimizer steps; does nothing if it is not due."""
        if num_steps % self._every_steps:
            return
        pairs = list(zip(self.net.state_dict().values(), net.state_dict().values(), strict=True))
        mixed = [pair for pair in pairs if pair[0].is_floating_point() and num_steps > self._start_step]
        for average, current in pairs if not mixed else [p for p in pairs if not p[0].is_floating_point()]:
            average.copy_(current)
        if mixed:
            averages, currents = (list(side) for side in zip(*mixed, strict=True))
            self._mix(averages, currents, 0)
