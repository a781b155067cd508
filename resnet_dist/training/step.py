"""From a step's gradient to new weights."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from resnet_dist.config.recipe import BinaryCrossEntropy, TrainConfig
from resnet_dist.data.keyed_random import Stream, sample_keys, splitmix64
from resnet_dist.training.state import TrainState


class Update:
    """The gradient is the same on all workers, so is what happens here.

    With fp16 the loss is multiplied by a scale before its backward pass and the gradient divided by it; a gradient that
    overflowed is left out and the scale lowered (torch's GradScaler).
    """

    def __init__(self, state: TrainState, *, clip_grad_norm: float | None) -> None:
        self._state = state
        self._clip_grad_norm = clip_grad_norm
        self._parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
        self._buffers = [buffer for buffer in state.net.buffers() if buffer.is_floating_point()]

    def scaled(self, loss: Tensor) -> Tensor:
        """What the backward pass is to start from."""
        return self._state.scaler.scale(loss)

    def leaves_finite_state(self) -> bool:
        """Whether weights and batch norm's running statistics are finite. Waits for the device.

        A step's loss is computed before its update, and in training from the batch's own statistics: it tells neither.
        """
        weights = get_total_norm([parameter.detach() for parameter in self._parameters])
        # The greatest of them, not the root of their squares: a variance of 1e20 is bad but a number.
        statistics = get_total_norm(self._buffers, norm_type=math.inf) if self._buffers else weights
        return bool(weights.isfinite() & statistics.isfinite())

    def apply(self, lr: float, *, measure: bool) -> Tensor | None:
        """One optimizer step with rate `lr`.

        Returns the gradient's length before it was clipped, if `measure`: a scalar on the net's device, for which
        nothing waits here.
        """
        optimizer, scaler, norm = self._state.optimizer, self._state.scaler, None
        scaler.unscale_(optimizer)
        if measure or self._clip_grad_norm:
            norm = get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if norm is not None and self._clip_grad_norm:
            clip_grads_with_norm_(self._parameters, self._clip_grad_norm, norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if self._state.average is not None:
            self._state.average.update(self._state.net, self._state.step + 1)
        return norm if measure else None


# The loss of one micro-batch.


def training_loss(logits: Tensor, targets: Tensor, train: TrainConfig) -> Tensor:
    """Mean loss, a scalar of the targets' type. Logits and targets [N, C]; a row of targets sums to 1."""
    logits = logits.to(targets.dtype)
    if not isinstance(train.loss, BinaryCrossEntropy):
        return cross_entropy(logits, targets, label_smoothing=train.label_smoothing)
    targets = (1.0 - train.label_smoothing) * targets + train.label_smoothing / targets.shape[1]
    if train.loss.target_threshold is not None:
        targets = (targets > train.loss.target_threshold).to(targets.dtype)
    return binary_cross_entropy_with_logits(logits, targets)


# The keys of a step's random layers (drop-path, dropout): pure functions of (seed, step, micro-batch, layer).


def layer_keys(seed: int, step: int, micro_batch: int, num_layers: int) -> list[int]:
    """One signed 64-bit key for each random layer of the net, for one micro-batch of optimizer step `step`."""
    key = sample_keys(Stream.LAYER_NOISE, seed, step, [micro_batch])
    keys: list[int] = splitmix64(key, np.arange(num_layers, dtype=np.uint64)).view(np.int64).tolist()
    return keys
