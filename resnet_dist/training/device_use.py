"""How well the device is used: model FLOPs utilisation and peak memory, with every point of the curves; GPUs only."""

from __future__ import annotations

import torch

from resnet_dist.accelerators import model_flops_utilisation, peak_flops
from resnet_dist.config.image_size import train_size
from resnet_dist.config.recipe import Recipe
from resnet_dist.models.summary import summarise

_MB = 1e6


class DeviceUse:
    """This worker's device. The others are taken to be like it: a group with several kinds of GPU has no one MFU."""

    def __init__(self, recipe: Recipe, device: torch.device, world_size: int) -> None:
        self._device = device
        self._data, self._total_epochs = recipe.data, recipe.train.total_epochs
        self._macs_per_image = 0
        self._flops: float | None = None
        if device.type == "cuda":
            flops = peak_flops(torch.cuda.get_device_name(device), recipe.train.precision)
            self._flops = None if flops is None else flops * world_size
            options = recipe.model.build_options()
            self._macs_per_image = summarise(side=recipe.data.train.size, **options).macs if flops else 0

    def metrics(self, images_per_s: float, epoch: int) -> dict[str, float]:
        """Since the last call, at this speed of all workers together; empty on a CPU, no MFU on an unknown GPU.

        Where images grow with the epochs, a smaller one is taken to cost as its pixels.

        `gpu/memory_peak_megabytes` is what PyTorch's tensors took at most, without the allocator's reserve.
        """
        if self._device.type != "cuda":
            return {}
        values = {"gpu/memory_peak_megabytes": torch.cuda.max_memory_allocated(self._device) / _MB}
        torch.cuda.reset_peak_memory_stats(self._device)
        if self._flops is not None:
            share = train_size(self._data, epoch, self._total_epochs) / self._data.train.size
            values["speed/mfu"] = model_flops_utilisation(
                images_per_s, round(self._macs_per_image * share**2), self._flops
            )
        return values
