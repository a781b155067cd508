"""One optimizer step, from batch to updated weights, in the order in which it happens."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from resnet_dist.config.recipe import BinaryCrossEntropy, Recipe, TrainConfig
from resnet_dist.data.batch import Batch
from resnet_dist.data.keyed_random import Stream, sample_keys, splitmix64
from resnet_dist.data.mixing import mix, mix_numbers
from resnet_dist.models.classifier import BatchNormStatistics
from resnet_dist.models.keyed_noise import StepNoise
from resnet_dist.training.curves import MetricAccumulator
from resnet_dist.training.model import Precision
from resnet_dist.training.reduce import Reduction
from resnet_dist.training.state import TrainState


class TrainStep:
    """Trains `state` by one global batch a call: micro-batches, reduction, update, counters.

    Args:
        classifier: the one around `state.net`, in training mode.
        reduction: over `classifier`, or over its compiled form.
    """

    def __init__(
        self, recipe: Recipe, state: TrainState, classifier: nn.Module, reduction: Reduction, device: torch.device
    ) -> None:
        self.recipe, self.state, self.reduction, self.device = recipe, state, reduction, device
        self.precision = Precision(recipe.train.precision)
        self.noise = StepNoise(classifier)
        self.statistics = BatchNormStatistics(classifier)

    def __call__(
        self, batches: Mapping[int, Batch], lr: float, metrics: MetricAccumulator, *, measure_norm: bool
    ) -> None:
        """Does step number `state.step` with learning rate `lr`. All workers call it together.

        Never waits for the device, and for other workers only in the reduction.

        Args:
            batches: this worker's micro-batches of the step under their numbers, in order; on the device.
            measure_norm: whether `metrics` gets the length of the gradient (before clipping).
        """
        recipe, state, step = self.recipe, self.state, self.state.step
        mixing, last = recipe.data.mixing, max(batches)

        # Micro-batches. One after the other: a larger global batch takes more passes, not more memory.
        for micro_batch, batch in batches.items():
            # Random numbers come from keys, no generator carries state: the same on any worker, and when done again.
            self.noise.set_keys(layer_keys(recipe.seed, step, micro_batch, len(self.noise)))
            # Images are uint8 [N, H, W, 3], targets [N, C]; the net normalises.
            images, targets = batch.images, one_hot(batch.labels, recipe.model.num_classes).to(self.precision.weights)
            if mixing is not None:
                drawn = range(micro_batch, micro_batch + 1)
                numbers = mix_numbers(mixing, recipe.seed, step, drawn, len(images), images.shape[1])
                images, targets = mix(torch.from_numpy(numbers).to(self.device), images, targets, 1)
            # Each micro-batch is normalised with its own statistics: normalising over a worker's share would depend on
            # the number of workers. For the same reason only micro-batch 0 moves the running statistics. Rank 0 always
            # has it; other ranks get the statistics before an evaluation (`share_buffers`).
            with self.statistics.updating(micro_batch == 0), self.reduction.accumulating(is_last=micro_batch == last):
                with self.precision.autocast(self.device):
                    logits = self.reduction.forward(images)
                    loss = training_loss(logits, targets, recipe.train)
                # fp16 loses small gradients: the loss is scaled up here, and the gradient down again in the update.
                self.reduction.backward(state.scaler.scale(loss), micro_batch)
            metrics.add(micro_batch, loss, logits, targets, batch.num_replaced)

        # Reduction. After it every parameter's `grad` is that of the global batch, the same on all workers.
        self.reduction.finish()

        # Update. Every worker does it for itself: equal weights and equal gradients give equal weights.
        norm = update_weights(state, lr, clip_grad_norm=recipe.optim.clip_grad_norm, measure_norm=measure_norm)
        if state.average is not None:
            state.average.update(state.net, step + 1)

        # Counters
        metrics.end_step(step, norm)
        state.step = step + 1


def update_weights(state: TrainState, lr: float, *, clip_grad_norm: float | None, measure_norm: bool) -> Tensor | None:
    """One optimizer step with the gradients in `grad`, which are gone afterwards.

    Returns the gradient's length before clipping if `measure_norm`: a scalar on the net's device.
    """
    parameters, norm = state.parameters, None
    # Divides by the scale of the loss. If the gradient overflowed, `step` below leaves the weights as they are and
    # `update` lowers the scale.
    state.scaler.unscale_(state.optimizer)
    if measure_norm or clip_grad_norm:
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if norm is not None and clip_grad_norm:
        clip_grads_with_norm_(parameters, clip_grad_norm, norm)
    for group in state.optimizer.param_groups:
        group["lr"] = lr  # a function of the step, so no scheduler carries state
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    return norm if measure_norm else None


def training_loss(logits: Tensor, targets: Tensor, train: TrainConfig) -> Tensor:
    """Mean loss of a micro-batch, a scalar of the targets' type. Logits and targets [N, C]; a target sums to 1."""
    logits = logits.to(targets.dtype)  # under autocast logits have 8 or 11 bits: too few for sums of 1000 terms
    if not isinstance(train.loss, BinaryCrossEntropy):
        return cross_entropy(logits, targets, label_smoothing=train.label_smoothing)
    # Wightman et al. 2021, "ResNet strikes back", section 3; label smoothing as in Szegedy et al. 2016, section 7
    targets = (1.0 - train.label_smoothing) * targets + train.label_smoothing / targets.shape[1]
    if train.loss.target_threshold is not None:
        targets = (targets > train.loss.target_threshold).to(targets.dtype)
    return binary_cross_entropy_with_logits(logits, targets)


def layer_keys(seed: int, step: int, micro_batch: int, num_layers: int) -> list[int]:
    """The keys of the random layers (drop-path, dropout) for one micro-batch: a signed 64-bit number each."""
    key = sample_keys(Stream.LAYER_NOISE, seed, step, [micro_batch])
    keys: list[int] = splitmix64(key, np.arange(num_layers, dtype=np.uint64)).view(np.int64).tolist()
    return keys
