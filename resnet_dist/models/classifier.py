"""The net as training and a saved model hold it: stored pixels in, logits out."""

from __future__ import annotations

import torch
from torch import nn


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
