"""Points of the training curves, stragglers, and the use of the device."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_dist.config.loading import load_recipe
from resnet_dist.config.recipe import Recipe
from resnet_dist.planner.hardware import GPUS
from resnet_dist.training.collectives import Stopwatch
from resnet_dist.training.curves import (
    PEAKS,
    SLOW_FACTOR,
    SLOW_POINTS,
    DeviceUse,
    MetricAccumulator,
    RankTimes,
    Stragglers,
    model_flops_utilisation,
    peak_flops,
    slowness,
)

CPU = torch.device("cpu")


def filled(*losses: float) -> MetricAccumulator:
    """Steps of two micro-batches of two images; in each micro-batch one prediction is wrong."""
    accumulator = MetricAccumulator(2, 2, rank=0, world_size=1, gradient_wait=Stopwatch(CPU))
    for step in range(0, len(losses), 2):
        for micro_batch in (0, 1):
            logits = torch.tensor([[2.0, 1.0], [2.0, 1.0]])
            accumulator.add(micro_batch, torch.tensor(losses[step + micro_batch]), logits, torch.eye(2))
        accumulator.end_step(step // 2)
    return accumulator


def test_means_over_the_steps_of_the_accumulator() -> None:
    result = filled(1.0, 2.0, 3.0, 6.0).take(0.25, next_step=2)
    assert result.metrics["train/loss"] == 3.0
    assert result.metrics["train/top1_error"] == 50.0
    assert result.metrics["train/lr"] == 0.25
    assert result.metrics["speed/images_per_s"] > 0
    assert result.diverged_step is None


def test_a_accumulator_starts_empty_after_it_closed() -> None:
    accumulator = filled(1.0, 2.0)
    accumulator.take(0.1, next_step=1)
    accumulator.add(0, torch.tensor(5.0), torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    accumulator.add(1, torch.tensor(7.0), torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    accumulator.end_step(0)
    assert accumulator.take(0.1, next_step=1).metrics["train/loss"] == 6.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_a_divergence(bad: float) -> None:
    assert filled(1.0, bad).take(0.1, next_step=1).diverged_step == 0


def test_a_state_that_is_not_finite_is_the_next_steps_divergence() -> None:
    assert filled(1.0, 2.0).take(0.1, next_step=5, state_is_finite=False).diverged_step == 5


def test_waiting_for_data_is_measured() -> None:
    accumulator = filled(1.0, 1.0)
    with accumulator.waiting_for_data():
        pass
    assert accumulator.data_wait_s > 0


def test_every_rank_has_its_times() -> None:
    accumulator = filled(1.0, 1.0)
    accumulator.gradient_wait.begin()
    accumulator.gradient_wait.end()
    accumulator.data_wait_s = 0.5
    with accumulator.saving():
        pass
    result = accumulator.take(0.1, next_step=1)
    (times,) = result.ranks
    assert times.data_wait_s == 0.5
    assert 0 < times.all_reduce_wait_s < times.step_s + 1
    assert 0 < result.metrics["speed/checkpoint_wait_share"] < 1
    assert accumulator.data_wait_s == accumulator.checkpoint_wait_s == accumulator.gradient_wait.take_s() == 0.0


# Stragglers


def step_of(*busy_s: float) -> list[RankTimes]:
    """A step that ends for all when the slowest is done."""
    return [RankTimes(max(busy_s), 0.0, max(busy_s) - mine) for mine in busy_s]


def test_the_slow_one_is_who_does_not_wait() -> None:
    assert slowness(step_of(1.0, 1.0, 2.0), [1, 1, 1]) == [pytest.approx(1 / 1.5), pytest.approx(1 / 1.5), 2.0]
    assert slowness(step_of(1.0, 2.0), [1, 1]) == [0.5, 2.0]


def test_waiting_for_data_counts_as_slow() -> None:
    fed, starved = RankTimes(2.0, 0.0, 1.0), RankTimes(2.0, 1.0, 0.0)
    assert slowness([fed, starved], [1, 1]) == [0.5, 2.0]


def test_whoever_has_more_micro_batches_is_not_slow() -> None:
    assert slowness(step_of(2.0, 1.0, 1.0), [2, 1, 1]) == [1.0, 1.0, 1.0]


def test_a_single_worker_is_never_slow() -> None:
    assert slowness([RankTimes(9.0, 8.0, 0.0)], [4]) == [1.0]


def newly_slow(*points: list[RankTimes]) -> list[dict[int, float]]:
    stragglers = Stragglers([1, 1], 4)
    return [stragglers.newly_slow(times) for times in points]


def test_a_worker_is_a_straggler_after_three_slow_points_in_a_row() -> None:
    slow, fine = step_of(1.0, 2.0), step_of(1.0, 1.0)
    assert SLOW_POINTS == 3
    assert newly_slow(fine, slow, slow, slow) == [{}, {}, {}, {1: 2.0}]
    assert newly_slow(slow, slow, fine, slow) == [{}] * 4
    assert newly_slow(step_of(1.0, 1.6), step_of(1.0, 3.0), step_of(1.0, 1.9))[-1] == {1: pytest.approx(1.6)}


def test_a_straggler_is_reported_once_and_again_after_it_was_fast() -> None:
    slow, fine = step_of(1.0, 2.0), step_of(1.0, 1.0)
    reported = [bool(found) for found in newly_slow(*[slow] * 5, fine, *[slow] * 3)]
    assert reported == [False, False, True, False, False, False, False, False, True]


@given(st.lists(st.floats(0.001, 100.0), min_size=2, max_size=16), st.floats(0.01, 100.0))
def test_it_is_a_ratio(busy_s: list[float], factor: float) -> None:
    """In other units the same; and as fast as all others is never slow."""
    shares = [1] * len(busy_s)
    scaled = slowness(step_of(*(factor * b for b in busy_s)), shares)
    assert scaled == pytest.approx(slowness(step_of(*busy_s), shares), rel=1e-6, abs=1e-6)
    same = slowness(step_of(*[busy_s[0]] * len(busy_s)), shares)
    assert max(same) < SLOW_FACTOR


def test_speed_of_each_worker_alone() -> None:
    """Two micro-batches of 4 in 2 s, one in 1 s: both do 4 images a second; the waits do not count."""
    values = Stragglers([2, 1], 4).metrics(step_of(2.0, 1.0))
    assert values["worker/0/images_per_s"] == values["worker/1/images_per_s"] == 4.0
    assert values["worker/1/all_reduce_wait_s"] == 1.0
    assert RankTimes(2.0, 0.5, 1.0).metrics(3, 8) == {
        "worker/3/step_s": 2.0,
        "worker/3/data_wait_s": 0.5,
        "worker/3/all_reduce_wait_s": 1.0,
        "worker/3/images_per_s": 8.0,
    }
    assert "worker/0/images_per_s" not in Stragglers([1], 4).metrics([RankTimes(0.0, 0.0, 0.0)])


# Use of the device


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


# Which GPU is meant by a name, and utilisation by hand-computed cases


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
def test_unknown_names_are_not_guessed(name: str, precision: str) -> None:
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
