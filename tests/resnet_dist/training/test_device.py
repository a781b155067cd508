"""Use of the device: which GPU a name means, and utilisation by hand-computed cases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resnet_dist.config.loading import load_recipe
from resnet_dist.planner.hardware import GPUS
from resnet_dist.training.device import PEAKS, DeviceUse, model_flops_utilisation, peak_flops

RECIPE = Path("resnet_dist/recipes/resnet152_90ep.yaml")


def test_a_cpu_has_none() -> None:
    assert DeviceUse(load_recipe(RECIPE), torch.device("cpu"), 2).metrics(100.0, 0) == {}


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("NVIDIA A100-SXM4-40GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 NVL", "fp16", 835.5),
        ("Tesla V100-PCIE-32GB", "fp16", 112),
        ("NVIDIA GB200", "bf16", 2500),
        ("NVIDIA H100 80GB HBM3 MIG 7g.80gb", "bf16", 989.5),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", "bf16", 989.5 * 3 / 7),
        ("NVIDIA A100-SXM4-40GB MIG 1c.3g.20gb", "fp32", 19.5 / 7),
        ("NVIDIA A30 MIG 1g.6gb", "bf16", 165 / 4),
        ("NVIDIA A10G", "bf16", None),  # not an A10
        ("NVIDIA L40", "bf16", None),  # not an L4
        ("Tesla V100-SXM2-16GB", "bf16", None),  # has no units for it
        ("NVIDIA A100-SXM4-40GB", "fp64", None),
        ("Tesla T4", "tf32", None),
        ("Some GPU of 2031", "bf16", None),
        ("", "fp32", None),
    ],
)
def test_a_gpu_is_known_by_its_own_name_and_others_are_not_guessed(
    name: str, precision: str, tera: float | None
) -> None:
    assert peak_flops(name, precision) == (None if tera is None else pytest.approx(tera * 1e12))


def test_no_name_hides_a_more_specific_one() -> None:
    names = [set(name.split()) for name, *_ in PEAKS]
    assert not [later for index, name in enumerate(names) for later in names[index + 1 :] if name < later]


PLANNED = {
    "v100": "Tesla V100-SXM2-32GB",
    "a100": "NVIDIA A100-SXM4-80GB",
    "h100": "NVIDIA H100 80GB HBM3",
    "h100-pcie": "NVIDIA H100 PCIe",
    "h200": "NVIDIA H200",
    "b200": "NVIDIA B200",
    "l4": "NVIDIA L4",
    "l40s": "NVIDIA L40S",
    "a10": "NVIDIA A10",
    "t4": "Tesla T4",
    "rtx3090": "NVIDIA GeForce RTX 3090",
    "rtx4090": "NVIDIA GeForce RTX 4090",
}


@pytest.mark.parametrize("planned", PLANNED)
def test_the_planner_has_the_same_peaks(planned: str) -> None:
    gpu, device = GPUS[planned], PLANNED[planned]
    assert peak_flops(device, "fp16") == pytest.approx(gpu.half_tflops * 1e12, rel=2e-3)
    assert peak_flops(device, "fp32") == pytest.approx(gpu.fp32_tflops * 1e12, rel=2e-3)


def test_utilisation() -> None:
    # ResNet-50: 4.09 GMACs. 2,500 images/s on one A100 in bf16: 6 x 4.09e9 x 2500 / 312e12.
    assert model_flops_utilisation(2500, 4_090_000_000, 312e12) == pytest.approx(0.19663, rel=1e-4)
    # A device that does nothing but the model's arithmetic.
    assert model_flops_utilisation(1.0, 10, 60.0) == 1.0
