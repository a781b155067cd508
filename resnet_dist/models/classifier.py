"""The net as training and a saved model hold it: stored pixels in, logits out, batch-norm statistics under control."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class ImageClassifier(nn.Module):
    """uint8 images [N, H, W, 3] (RGB) -> logits [N, num_classes] of `net`. Nothing else normalises images, so a saved
    model takes them as they are stored.

    Args:
        mean, std: per channel, in grey levels 0..255. Not in the state dict, so `classifier.net` has the keys of the
            net alone. They and the arithmetic have the type of the parameters: float32, also under bf16 autocast, or
            float64 after `.double()`.
        channels_last: lays the net's weights and its input out as NHWC. Images are stored that way, so no copy is
            needed; the other layout would need one.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        net: nn.Module,
        *,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        channels_last: bool,
    ) -> None:
        super().__init__()
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.net = net.to(memory_format=layout)
        self.channels_last = channels_last
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = ((images - self.mean) / self.std).permute(0, 3, 1, 2)
        return self.net(pixels if self.channels_last else pixels.contiguous())


class BatchNormStatistics:
    """Which micro-batches count for batch norm's running statistics.

    The workers share a step's micro-batches, however many workers there are. Only micro-batch 0 may move the running
    statistics; then they do not depend on the number of workers. The others still normalise with their own statistics.
    A switch costs one attribute write per norm (155 in ResNet-152).
    """

    def __init__(self, model: nn.Module) -> None:
        self._norms = [norm for norm in model.modules() if isinstance(norm, _BatchNorm) and norm.track_running_stats]

    @contextmanager
    def updating(self, update: bool) -> Iterator[None]:
        """Within the context: whether forward passes in training mode move the running statistics.

        With `update=False` they leave `running_mean`, `running_var` and `num_batches_tracked` untouched bit for bit.
        Outputs and gradients are the same either way; evaluation mode is not affected.
        """
        # torch consults this flag in training mode only; without it the kernel gets no buffers at all.
        for norm in self._norms:
            norm.track_running_stats = update
        try:
            yield
        finally:
            for norm in self._norms:
                norm.track_running_stats = True

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Within the context: forward passes see and move copies, which are then thrown away.

        For repeating a forward pass: autograd keeps the statistics that a norm was given, so under `updating(False)`
        the second pass would not save the same tensors as the first.
        """
        kept = [dict(norm._buffers) for norm in self._norms]
        for norm in self._norms:
            norm._buffers.update({key: None if b is None else b.clone() for key, b in norm._buffers.items()})
        try:
            yield
        finally:
            for norm, buffers in zip(self._norms, kept, strict=True):
                norm._buffers.update(buffers)
