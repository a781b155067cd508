"""Peak FLOP/s of GPUs by device name, the denominator of every utilisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_TERA = 1e12
MACS_PER_TRAINED_MAC = 3
"""A training step does each multiply-add of the forward pass three times: forward, gradient of the input, gradient of
the weights. Chowdhery et al. 2022 (PaLM), appendix B; the first layer's unneeded input gradient is counted too."""


@dataclass(frozen=True)
class Peak:
    words: tuple[str, ...]
    """All of them are in the device's name, as whole words."""
    flops: Mapping[str, float | None]
    """FLOP/s without structured sparsity, by `train.precision`; None where the hardware has no units for the format."""
    source: str


def _peak(words: str, fp32: float, tf32: float | None, fp16: float | None, bf16: float | None, source: str) -> Peak:
    """From TFLOP/s; `fp32` without TF32."""
    tera = {"fp32": fp32, "tf32": tf32, "fp16": fp16, "bf16": bf16}
    return Peak(tuple(words.split()), {name: value and value * _TERA for name, value in tera.items()}, source)


# The more specific name first: "NVIDIA H100 PCIe" before "NVIDIA H100 80GB HBM3". Sheets that list figures with
# sparsity are halved. GeForce: with FP32 accumulation, which is half of the FP16 figure on the box.
PEAKS = (
    _peak("V100 PCIE", 14.0, None, 112, None, "NVIDIA V100 datasheet, 2020"),
    _peak("V100", 15.7, None, 125, None, "NVIDIA V100 datasheet, 2020 (SXM2)"),
    _peak("T4", 8.1, None, 65, None, "NVIDIA T4 datasheet, 2019"),
    _peak("A100", 19.5, 156, 312, 312, "NVIDIA A100 datasheet, 2021"),
    _peak("A30", 10.3, 82, 165, 165, "NVIDIA A30 datasheet, 2022"),
    _peak("A10", 31.2, 62.5, 125, 125, "NVIDIA A10 datasheet, 2021"),
    _peak("A40", 37.4, 74.8, 149.7, 149.7, "NVIDIA A40 datasheet, 2021"),
    _peak("L4", 30.3, 60, 121, 121, "NVIDIA L4 datasheet, 2023"),
    _peak("L40S", 91.6, 183, 362.05, 362.05, "NVIDIA L40S datasheet, 2023"),
    _peak("H100 PCIe", 51.0, 378, 756, 756, "NVIDIA H100 datasheet, 2022"),
    _peak("H100 NVL", 60.0, 417.5, 835.5, 835.5, "NVIDIA H100 datasheet, 2024"),
    _peak("H100", 67.0, 494.5, 989.5, 989.5, "NVIDIA H100 datasheet, 2024 (SXM)"),
    _peak("H200 NVL", 60.0, 417.5, 835.5, 835.5, "NVIDIA H200 datasheet, 2024"),
    _peak("H200", 67.0, 494.5, 989.5, 989.5, "NVIDIA H200 datasheet, 2024 (SXM)"),
    _peak("GB200", 80.0, 1250, 2500, 2500, "NVIDIA GB200 NVL72 datasheet, 2024"),
    _peak("B200", 75.0, 1125, 2250, 2250, "NVIDIA HGX B200 datasheet, 2024"),
    _peak("RTX 3090", 35.6, 35.6, 71, 71, "NVIDIA GA102 whitepaper, 2021"),
    _peak("RTX 4090", 82.6, 82.6, 165.2, 165.2, "NVIDIA Ada whitepaper, 2023"),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s of one device for matrix products in `precision`; None if it is not in the table.

    `device_name`: as `torch.cuda.get_device_name` gives it, for example "NVIDIA A100-SXM4-40GB".
    """
    words = set(device_name.lower().replace("-", " ").split())
    for peak in PEAKS:
        if {word.lower() for word in peak.words} <= words:
            return peak.flops.get(precision)
    return None


def model_flops_utilisation(images_per_s: float, macs_per_image: int, flops: float) -> float:
    """MFU in [0, 1]: the share of `flops` FLOP/s that the model's own arithmetic takes, at this training speed.

    `macs_per_image`: multiply-adds of one forward pass; `flops`: the sum over all devices that share the images. What
    is recomputed to save memory does not count (Chowdhery et al. 2022, appendix B).
    """
    return images_per_s * 2 * MACS_PER_TRAINED_MAC * macs_per_image / flops
