"""What a step asks of a GPU, counted on fake tensors: kernels, and waits for the device."""

from __future__ import annotations

from typing import Any

import pytest
import small_run as small
import torch
from fake_cuda import Operations, fake_cuda, on_fake_cuda

from resnet_dist.config.recipe import Recipe
from resnet_dist.training.curves import MetricAccumulator
from resnet_dist.training.device import DeviceTimer
from resnet_dist.training.launches import cut
from resnet_dist.training.model import Precision, build_optimizer
from resnet_dist.training.reduce import build_reduction
from resnet_dist.training.state import TrainState
from resnet_dist.training.step import TrainStep

MIXING = {"mixing": {"mixup_alpha": 0.2, "cutmix_alpha": 1.0}}


def counted(recipe: Recipe, merged: int, *, precision: str = "bf16") -> Operations:
    """The operations of the second step, with six micro-batches."""
    with fake_cuda() as device:
        classifier, chosen = on_fake_cuda(recipe).train(), Precision(precision)  # type: ignore[arg-type]
        reduction = build_reduction("fast", classifier, rank=0, world_size=1, num_micro_batches=6, compression="none")
        state = TrainState(
            classifier.net, build_optimizer(classifier, recipe.optim), scaler=chosen.scaler(torch.device("cpu"))
        )
        step = TrainStep(
            recipe, state, classifier, reduction, device, micro_batches_per_launch=merged, cuda_graphs=False
        )
        batches = [step.rehearsal_batch(len(launch), small.SIZE) for launch in cut(range(6), merged)]
        metrics = MetricAccumulator(6, 4, 0, 1, DeviceTimer(torch.device("cpu")))
        for _ in range(2):
            with Operations() as operations:
                step(batches, 0.1, metrics, measure_norm=False)
        return operations


@pytest.mark.parametrize("name", ["resnet20", "resnet50"])
def test_merging_starts_fewer_kernels(name: str) -> None:
    recipe = small.recipe("bf16", model={"name": name})
    alone, merged = (counted(recipe, k) for k in (1, 6))
    assert not alone.syncs
    assert not merged.syncs
    # Norms and losses are started for every micro-batch, everything else once.
    alone_total, merged_total = (operations.launches.total() for operations in (alone, merged))
    assert merged_total < alone_total / 2
    assert alone.launches["cat"] == 6  # logits: norms of a single micro-batch copy nothing
    assert merged.launches["convolution"] * 6 == alone.launches["convolution"]
    assert merged.launches["convolution_backward"] * 6 == alone.launches["convolution_backward"]


@pytest.mark.parametrize(
    "sections",
    [{}, {"data": MIXING}, {"model": {"drop_path": 0.1, "dropout": 0.1}}, {"train": {"loss": {"kind": "bce"}}}],
    ids=["plain", "mixing", "masks", "bce"],
)
@pytest.mark.parametrize("merged", [1, 4])
def test_a_step_never_waits_for_the_device(sections: dict[str, Any], merged: int) -> None:
    assert not counted(small.recipe("bf16", **sections), merged).syncs


def test_counters_and_statistics_of_all_norms_cost_a_few_kernels_together() -> None:
    launches = counted(small.recipe("bf16"), 1).launches
    assert launches["_foreach_add_"] == 1
    assert launches["_foreach_copy_"] == 2  # kept after micro-batch 0, and restored after the last one
