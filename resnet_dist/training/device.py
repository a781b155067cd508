"""Measurements on a worker's device: time on its own clock, peak memory, utilisation."""

from __future__ import annotations

import re
import time

import torch

from resnet_dist.config.recipe import Recipe, train_size
from resnet_dist.models.summary import summarise

MACS_PER_TRAINED_MAC = 3
"""A training step does each multiply-add of the forward pass three times: forward, gradient of the input, gradient of
the weights (Chowdhery et al. 2022, PaLM, appendix B). Counts the first layer's unneeded input gradient too."""

_PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
# Words of the device's name, then dense TFLOP/s in the order of _PRECISIONS (fp32 without TF32; None: no units for the
# format). A more specific name comes first: "NVIDIA H100 PCIe" before "NVIDIA H100 80GB HBM3". Data sheets that list
# figures with sparsity are halved; GeForce with FP32 accumulation, which is half of the FP16 figure on the box.
PEAKS: tuple[tuple[str, float, float | None, float, float | None], ...] = (
    # V100 (sm_70) needs a PyTorch built for it: the wheel of requirements.lock begins with sm_75.
    ("v100 pcie", 14.0, None, 112, None),  # NVIDIA V100 datasheet, 2020
    ("v100", 15.7, None, 125, None),  # NVIDIA V100 datasheet, 2020 (SXM2)
    ("t4", 8.1, None, 65, None),  # NVIDIA T4 datasheet, 2019
    ("a100", 19.5, 156, 312, 312),  # NVIDIA A100 datasheet, 2021
    ("a30", 10.3, 82, 165, 165),  # NVIDIA A30 datasheet, 2022
    ("a10", 31.2, 62.5, 125, 125),  # NVIDIA A10 datasheet, 2021
    ("a40", 37.4, 74.8, 149.7, 149.7),  # NVIDIA A40 datasheet, 2021
    ("l4", 30.3, 60, 121, 121),  # NVIDIA L4 datasheet, 2023
    ("l40s", 91.6, 183, 362.05, 362.05),  # NVIDIA L40S datasheet, 2023
    ("h100 pcie", 51.0, 378, 756, 756),  # NVIDIA H100 datasheet, 2022
    ("h100 nvl", 60.0, 417.5, 835.5, 835.5),  # NVIDIA H100 datasheet, 2024
    ("h100", 67.0, 494.5, 989.5, 989.5),  # NVIDIA H100 datasheet, 2024 (SXM)
    ("h200 nvl", 60.0, 417.5, 835.5, 835.5),  # NVIDIA H200 datasheet, 2024
    ("h200", 67.0, 494.5, 989.5, 989.5),  # NVIDIA H200 datasheet, 2024 (SXM)
    ("gb200", 80.0, 1250, 2500, 2500),  # NVIDIA GB200 NVL72 datasheet, 2024
    ("b200", 75.0, 1125, 2250, 2250),  # NVIDIA HGX B200 datasheet, 2024
    ("rtx 3090", 35.6, 35.6, 71, 71),  # NVIDIA GA102 whitepaper, 2021
    ("rtx 4090", 82.6, 82.6, 165.2, 165.2),  # NVIDIA Ada whitepaper, 2023
)


class DeviceTimer:
    """Seconds spent in one kind of work, on the clock of the device that does it.

    `begin` and `end` go around every span; nothing waits for the device before `take_s`.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._began_s: float | None = None
        self._total_s = 0.0
        self._began: torch.cuda.Event | None = None
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self) -> None:
        if self._on_gpu:
            # The host returns at once; the work is done later on the current stream, whose time the event records.
            self._began = _record_event()
        else:
            self._began_s = time.perf_counter()

    def end(self) -> None:
        """Does nothing if no span has begun."""
        if self._began is not None:
            self._spans.append((self._began, _record_event()))
            self._began = None
        elif self._began_s is not None:
            self._total_s += time.perf_counter() - self._began_s
            self._began_s = None

    def take_s(self) -> float:
        """Seconds in all spans since the last call."""
        for began, ended in self._spans:
            ended.synchronize()
            self._total_s += began.elapsed_time(ended) / 1000
        total_s = self._total_s
        self._spans, self._total_s = [], 0.0
        return total_s


def _record_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class DeviceUse:
    """Model FLOPs utilisation and peak memory of this worker's GPU; nothing on a CPU.

    Assumes that the other workers' GPUs are of the same kind: a group of several kinds has no single MFU.
    """

    def __init__(self, recipe: Recipe, device: torch.device, world_size: int) -> None:
        self._device = device
        self._data, self._total_epochs = recipe.data, recipe.train.total_epochs
        self._flops: float | None = None  # per second, of all workers' GPUs
        if device.type == "cuda":
            flops = peak_flops(torch.cuda.get_device_name(device), recipe.train.precision)
            self._flops = None if flops is None else flops * world_size
            self._macs_per_image = summarise(side=recipe.data.train.size, **recipe.model.build_options()).macs

    def metrics(self, images_per_s: float, epoch: int) -> dict[str, float]:
        """Since the last call, at this speed of all workers together; empty on a CPU, no MFU on an unknown GPU.

        `gpu/memory_peak_megabytes` is the peak of PyTorch's tensors, without the allocator's reserve.
        """
        if self._device.type != "cuda":
            return {}
        values = {"gpu/memory_peak_megabytes": torch.cuda.max_memory_allocated(self._device) / 1e6}
        torch.cuda.reset_peak_memory_stats(self._device)
        if self._flops is not None:
            # Images may grow with the epochs; a convolution's cost is proportional to the number of pixels.
            share = train_size(self._data, epoch, self._total_epochs) / self._data.train.size
            macs = round(self._macs_per_image * share**2)
            values["speed/mfu"] = model_flops_utilisation(images_per_s, macs, self._flops)
        return values


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense FLOP/s of one device for matrix products in `precision`; None if they are not in the table. A MIG slice has
    its share of the whole GPU's.

    >>> peak_flops("NVIDIA A100-SXM4-40GB", "bf16")
    312000000000000.0
    """
    # Whole words: an A10G is not an A10, an L40 is not an L4.
    words = set(device_name.lower().replace("-", " ").split())
    for name, *tera_flops in PEAKS:
        if set(name.split()) <= words:
            peak = dict(zip(_PRECISIONS, tera_flops, strict=True)).get(precision)
            return None if peak is None else peak * 1e12 * _mig_share(device_name, 4 if name == "a30" else 7)
    return None


def _mig_share(device_name: str, num_slices: int) -> float:
    """Of a GPU's multiprocessors, by the name of its MIG slice: "... MIG 3g.40gb", or "... MIG 1c.3g.40gb" for one of
    that slice's compute instances. 1 for a whole GPU. `num_slices`: of the whole GPU (NVIDIA MIG user guide)."""
    found = re.search(r"\bMIG (?:(\d)c\.)?(\d)g\.", device_name)
    return 1.0 if found is None else int(found[1] or found[2]) / num_slices


def model_flops_utilisation(images_per_s: float, macs_per_image: int, flops: float) -> float:
    """MFU in [0, 1]: the share of the peak `flops` (FLOP/s, of all devices) that the model's own arithmetic takes.

    `macs_per_image`: multiply-adds of one forward pass, 2 FLOP each. What activation checkpointing computes again does
    not count (Chowdhery et al. 2022, appendix B).
    """
    return images_per_s * 2 * MACS_PER_TRAINED_MAC * macs_per_image / flops
