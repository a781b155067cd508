"""A recipe's worker decides what the libraries below PyTorch would otherwise choose."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from resnet_dist.config.recipe import TrainConfig
from resnet_dist.training.model import set_backends


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    torch.set_num_threads(threads)


def config(**changes: object) -> TrainConfig:
    return TrainConfig.model_validate({"global_batch_size": 8, "micro_batch_size": 4, "total_epochs": 1, **changes})


def test_fp32_is_not_tf32() -> None:
    torch.backends.cudnn.allow_tf32 = True
    set_backends(config())
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("reduction", ["fast", "exact"])
def test_exact_asks_for_deterministic_kernels_and_fast_does_not(reduction: str) -> None:
    set_backends(config(reduction=reduction))
    assert torch.are_deterministic_algorithms_enabled() == (reduction == "exact")
    assert torch.backends.cudnn.deterministic == (reduction == "exact")


def test_threads_are_the_recipes() -> None:
    set_backends(config(cpu_threads=2))
    assert torch.get_num_threads() == 2
