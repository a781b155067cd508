"""Which GPU is meant by a name, and utilisation by hand-computed cases."""

from __future__ import annotations

import pytest

from resnet_dist.accelerators import PEAKS, model_flops_utilisation, peak_flops
from resnet_dist.planner.hardware import GPUS


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("NVIDIA A100-SXM4-40GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156),
        ("NVIDIA H100 NVL", "fp16", 835.5),
        ("NVIDIA H200", "bf16", 989.5),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-PCIE-32GB", "fp16", 112),
        ("Tesla T4", "fp32", 8.1),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GB200", "bf16", 2500),
    ],
)
def test_a_gpu_is_known_by_its_own_name(name: str, precision: str, tera: float) -> None:
    assert peak_flops(name, precision) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("NVIDIA A10G", "bf16"),  # not an A10
        ("NVIDIA L40", "bf16"),  # not an L4
        ("Tesla V100-SXM2-16GB", "bf16"),  # has no units for it
        ("NVIDIA A100-SXM4-40GB", "fp64"),
        ("Tesla T4", "tf32"),
        ("Some GPU of 2031", "bf16"),
        ("", "fp32"),
    ],
)
def test_what_is_not_known_is_not_guessed(name: str, precision: str) -> None:
    assert peak_flops(name, precision) is None


def test_no_name_hides_a_more_specific_one() -> None:
    for index, peak in enumerate(PEAKS):
        assert not [later.words for later in PEAKS[index + 1 :] if set(peak.words) < set(later.words)]


@pytest.mark.parametrize(
    ("planned", "device"),
    [
        ("v100", "Tesla V100-SXM2-32GB"),
        ("a100", "NVIDIA A100-SXM4-80GB"),
        ("h100", "NVIDIA H100 80GB HBM3"),
        ("h100-pcie", "NVIDIA H100 PCIe"),
        ("h200", "NVIDIA H200"),
        ("b200", "NVIDIA B200"),
        ("l4", "NVIDIA L4"),
        ("l40s", "NVIDIA L40S"),
        ("a10", "NVIDIA A10"),
        ("t4", "Tesla T4"),
        ("rtx3090", "NVIDIA GeForce RTX 3090"),
        ("rtx4090", "NVIDIA GeForce RTX 4090"),
    ],
)
def test_the_planner_has_the_same_peaks(planned: str, device: str) -> None:
    gpu = GPUS[planned]
    assert peak_flops(device, "fp16") == pytest.approx(gpu.half_tflops * 1e12, rel=2e-3)
    assert peak_flops(device, "fp32") == pytest.approx(gpu.fp32_tflops * 1e12, rel=2e-3)


def test_utilisation() -> None:
    # ResNet-50: 4.09 GMACs. 2,500 images/s on one A100 in bf16: 6 x 4.09e9 x 2500 / 312e12.
    assert model_flops_utilisation(2500, 4_090_000_000, 312e12) == pytest.approx(0.19663, rel=1e-4)
    # A device that does nothing but the model's arithmetic.
    assert model_flops_utilisation(1.0, 10, 60.0) == 1.0
