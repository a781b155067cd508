"""One optimizer step, from batch to updated weights, in the order in which it happens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from resnet_dist.config.recipe import BinaryCrossEntropy, Recipe, TrainConfig
from resnet_dist.data.batch import Batch
from resnet_dist.data.mixing import mix
from resnet_dist.data.order import micro_batch_share
from resnet_dist.models.batch_norm import BatchNormStatistics
from resnet_dist.models.keyed_noise import LaunchNoise
from resnet_dist.training.curves import MetricAccumulator
from resnet_dist.training.launches import Launches, cut, launch_numbers, merged_on_cpu
from resnet_dist.training.model import LR_FACTOR, Precision
from resnet_dist.training.reduce import FastReduction, Reduction
from resnet_dist.training.state import TrainState


class TrainStep:
    """Trains `state` by one global batch a call: micro-batches, reduction, update, counters.

    Args:
        classifier: the one around `state.net`, in training mode.
        reduction: over `classifier`, or over its compiled form.
        world_size: the number of workers.
        micro_batches_per_launch: how many of this worker's micro-batches go through the net together, at most; None:
            chosen at the first step.
        cuda_graphs: whether launches on a GPU are captured.
        log: takes one line for the user.
        warn: takes one that is a warning.
    """

    def __init__(
        self,
        recipe: Recipe,
        state: TrainState,
        classifier: nn.Module,
        reduction: Reduction,
        device: torch.device,
        *,
        rank: int = 0,
        world_size: int = 1,
        micro_batches_per_launch: int | None = None,
        cuda_graphs: bool = True,
        log: Callable[[str], None] = lambda _: None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.recipe, self.state, self.reduction, self.device = recipe, state, reduction, device
        self.rank, self.world_size = rank, world_size
        self.precision = Precision(recipe.train.precision)
        self.class_weights: Tensor | None = None
        if (weights := recipe.train.loss.class_weights) is not None:
            if weights == "balanced":
                raise ValueError("train.loss.class_weights: balanced is not resolved; see checks.with_class_weights")
            # On the device from the start: a captured launch can take nothing from the host.
            self.class_weights = torch.tensor(weights, dtype=self.precision.weights, device=device)
        self.noise = LaunchNoise(classifier)
        self.statistics = BatchNormStatistics(classifier)
        # The exact reduction needs the gradients of the micro-batches one by one.
        self.most_merged = 1 if recipe.train.reduction == "exact" else micro_batches_per_launch
        self._prepared_px = 0
        uses_graphs = cuda_graphs and device.type == "cuda" and isinstance(reduction, FastReduction)
        self.launches = Launches(
            self.forward_backward, reduction, self.statistics, uses_graphs=uses_graphs, log=log, warn=warn
        )

    def __call__(self, batches: Sequence[Batch], lr: float, metrics: MetricAccumulator, *, measure_norm: bool) -> None:
        """Does step number `state.step` with learning rate `lr`. All workers call it together.

        Never waits for the device, and for other workers only in the reduction.

        Args:
            batches: this worker's micro-batches of the step, in order, as `prepare` cut them; on the device.
            measure_norm: whether `metrics` gets the length of the gradient (before clipping).
        """
        recipe, state, step = self.recipe, self.state, self.state.step
        has_first = batches[0].micro_batches[0] == 0

        # Launches: forward and backward of some micro-batches together. One launch after the other: a larger global
        # batch takes more of them, not more memory.
        if not has_first:
            self.statistics.keep()
        for number, batch in enumerate(batches):
            self.reduction.start_launch(is_last=number == len(batches) - 1)
            metrics.add(batch.micro_batches, self.launches(batch), batch.num_replaced)
            # Only micro-batch 0 moves batch norm's running statistics: then they do not depend on the number of
            # workers. Rank 0 always has it; other ranks get them before an evaluation (`share_state`).
            if has_first and number == 0:
                self.statistics.count()
                if len(batches) > 1:
                    self.statistics.keep()
        if not has_first or len(batches) > 1:
            self.statistics.restore()

        # Reduction. After it every parameter's `grad` is that of the global batch, the same on all workers.
        self.reduction.finish()

        # Update. Every worker does it for itself: equal weights and equal gradients give equal weights.
        norm = update_weights(state, lr, clip_grad_norm=recipe.optim.clip_grad_norm, measure_norm=measure_norm)
        self.reduction.clear()
        if state.average is not None:
            state.average.update(step + 1)

        # Counters
        metrics.end_step(step, norm)
        state.step = step + 1

    def forward_backward(self, batch: Batch) -> Tensor:
        """One launch: adds to the gradients. Returns float64 [k, 2]: mean loss and number of wrong predictions of each
        of its k micro-batches.

        Never waits for the device, and reads nothing but the batch and the state: so it can be captured.
        """
        recipe, k = self.recipe, len(batch.micro_batches)
        # Random numbers come from keys, no generator carries state: the same on any worker, and when done again.
        keys, mixing = batch.numbers[: len(self.noise) * k], batch.numbers[len(self.noise) * k :]
        self.noise.set_keys(keys.view(len(self.noise), k))
        images, targets = images_and_targets(recipe, batch, mixing)
        # Each micro-batch is normalised with its own statistics: normalising over a launch, or over a worker's share,
        # would make the result depend on the hardware.
        with self.statistics.in_groups(k):
            with self.precision.autocast(self.device):
                logits = self.reduction.forward(images)
                pairs = zip(logits.chunk(k), targets.chunk(k), strict=True)
                losses = torch.stack(
                    [training_loss(mine, wanted, recipe.train, self.class_weights) for mine, wanted in pairs]
                )
            # fp16 loses small gradients: the loss is scaled up here, and the gradient down again in the update.
            self.reduction.backward(self.state.scaler.scale(losses), batch.micro_batches)
        wrong = (logits.detach().argmax(dim=1) != targets.argmax(dim=1)).view(k, -1).sum(dim=1)
        return torch.stack([losses.detach().double(), wrong.double()], dim=1)

    def prepare(self, image_px: int, heartbeat: Callable[[], None] = lambda: None) -> list[range]:
        """Before the first step with images of this size: chooses how this worker's micro-batches are merged, and
        compiles or captures the launches.

        Returns the micro-batches of each launch, in order. Raises Fault if the GPU's memory is too small.
        """
        train = self.recipe.train
        share = micro_batch_share(train.num_micro_batches, self.rank, self.world_size)
        if self.most_merged is None:
            largest_share = -(-train.num_micro_batches // self.world_size)  # so that all workers choose alike
            self.most_merged = self._choose_merge(largest_share, heartbeat)
        # What is compiled takes minutes. All workers compile the launches of all, in the same time, and none has to
        # wait long for the others in the first collective.
        ranks = range(self.world_size) if train.compile else [self.rank]
        shares = [micro_batch_share(train.num_micro_batches, rank, self.world_size) for rank in ranks]
        if train.compile or self.device.type == "cuda":
            if image_px != self._prepared_px:
                self.launches.forget()
                self._prepared_px = image_px
            for k in sorted({len(launch) for each in shares for launch in cut(each, self.most_merged)}):
                batch = self.rehearsal_batch(k, image_px)
                if not self.launches.is_rehearsed(batch):
                    self.launches.rehearse(batch)
                    heartbeat()
        return cut(share, self.most_merged)

    def _choose_merge(self, num_micro_batches: int, heartbeat: Callable[[], None]) -> int:
        # At the run's largest images, which need the most memory
        train, image_px = self.recipe.train, self.recipe.data.train.size
        if self.device.type == "cuda":
            batch_of = partial(self.rehearsal_batch, image_px=image_px)
            self._prepared_px = image_px
            return self.launches.best_merge(batch_of, num_micro_batches, compiled=train.compile, heartbeat=heartbeat)
        return merged_on_cpu(train.micro_batch_size, image_px, num_micro_batches, precision=train.precision)

    def numbers(self, step: int, micro_batches: range, image_px: int) -> NDArray[np.int64]:
        """What is drawn for a launch of step number `step`: the `numbers` of its batch."""
        return launch_numbers(self.recipe, step, micro_batches, num_layers=len(self.noise), image_px=image_px)

    def rehearsal_batch(self, k: int, image_px: int) -> Batch:
        """A batch of k micro-batches with arbitrary images, on the device."""
        num_images, micro_batches = k * self.recipe.train.micro_batch_size, range(k)
        shape = (num_images, image_px, image_px, 3)
        numbers = self.numbers(0, micro_batches, image_px)
        return Batch(
            torch.arange(math.prod(shape), device=self.device).remainder(251).to(torch.uint8).view(shape),
            torch.zeros(num_images, dtype=torch.int64, device=self.device),
            np.zeros(num_images, np.int64),
            numbers=torch.from_numpy(numbers).to(self.device),
            micro_batches=micro_batches,
        )


def images_and_targets(recipe: Recipe, batch: Batch, mixing: Tensor) -> tuple[Tensor, Tensor]:
    """What the net is trained on, after Mixup and CutMix: images [k * N, H, W, 3], grey levels, which it normalises
    itself, and targets [k * N, C]. `mixing`: what `launch_numbers` has for `data.mixing.mix`.
    """
    targets = one_hot(batch.labels, recipe.model.num_classes).to(Precision(recipe.train.precision).weights)
    if recipe.data.mixing is None:
        return batch.images, targets
    return mix(mixing, batch.images, targets, len(batch.micro_batches))


def update_weights(state: TrainState, lr: float, *, clip_grad_norm: float | None, measure_norm: bool) -> Tensor | None:
    """One optimizer step with the gradients in `grad`.

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
        # A function of the step, so no scheduler carries state
        group["lr"] = lr * group.get(LR_FACTOR, 1.0)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    return norm if measure_norm else None


def training_loss(logits: Tensor, targets: Tensor, train: TrainConfig, class_weights: Tensor | None = None) -> Tensor:
    """Mean loss of a micro-batch, a scalar of the targets' type.

    Args:
        logits, targets: [N, C]; a target sums to 1.
        class_weights: [C], of the targets' type. The loss of an image is multiplied by their mean, weighted by its
            target, and the sum is divided by N. Not by the sum of the weights, as torch does for labels: the same image
            would count more or less, depending on the others in its micro-batch.
    """
    logits = logits.to(targets.dtype)  # under autocast logits have 8 or 11 bits: too few for sums of 1000 terms
    # Before smoothing: its share of a rare class's large weight would pull all images towards that class.
    image_weights = None if class_weights is None else (targets * class_weights).sum(dim=1)
    if not isinstance(train.loss, BinaryCrossEntropy):
        if image_weights is None:
            return cross_entropy(logits, targets, label_smoothing=train.label_smoothing)
        losses = cross_entropy(logits, targets, label_smoothing=train.label_smoothing, reduction="none")
        return (losses * image_weights).mean()
    # Wightman et al. 2021, "ResNet strikes back", section 3; label smoothing as in Szegedy et al. 2016, section 7
    targets = (1.0 - train.label_smoothing) * targets + train.label_smoothing / targets.shape[1]
    if train.loss.target_threshold is not None:
        targets = (targets > train.loss.target_threshold).to(targets.dtype)
    weight = None if image_weights is None else image_weights[:, None]
    return binary_cross_entropy_with_logits(logits, targets, weight=weight)
