"""Utilisation of the device: absent on a CPU, present on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resnet_dist.accelerators import peak_flops
from resnet_dist.config.loading import load_recipe
from resnet_dist.config.recipe import Recipe
from resnet_dist.training.metrics import DeviceUse


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe(Path("resnet_dist/recipes/resnet152_90ep.yaml"), [])


def test_a_cpu_has_none(recipe: Recipe) -> None:
    assert DeviceUse(recipe, torch.device("cpu"), 2).metrics(100.0, 0) == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_memory_and_utilisation(recipe: Recipe) -> None:
    device = torch.device("cuda")
    use = DeviceUse(recipe, device, 1)
    torch.empty(50_000_000, dtype=torch.uint8, device=device)
    values = use.metrics(100.0, 0)
    assert values["gpu/memory_peak_megabytes"] >= 50.0
    assert ("speed/mfu" in values) == (peak_flops(torch.cuda.get_device_name(), recipe.train.precision) is not None)
