"""Compute, all-reduce, overlap, jitter and loader: exact values and what must not depend on each other."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_dist.config.loading import load_recipe
from resnet_dist.config.recipe import Recipe
from resnet_dist.errors import UserError
from resnet_dist.models.registry import build_model
from resnet_dist.models.summary import KernelCounter, summarise
from resnet_dist.planner.hardware import (
    GPUS,
    IMAGES_PER_CORE,
    Links,
    all_reduce,
    parse_net,
)
from resnet_dist.planner.step import (
    Produced,
    buckets,
    exchange,
    expected_maximum,
    image_s,
    images_per_core,
    launch_of,
    launches_in,
    mean_step,
    memory_gb,
    produced,
    step_of,
    throttled,
    train_kernels,
)
from resnet_dist.planner.workload import Workload, workload_of
from resnet_dist.training.reduce import BUCKET_BYTES, FastReduction, PowerSgdReduction
from resnet_dist.training.step import TrainStep
from tests.resnet_dist.training.fake_cuda import fake_cuda, on_fake_cuda

RECIPES = Path(__file__).parents[3] / "resnet_dist/recipes"
NVLINK = Links(local_bytes_s=235e9, net_bytes_s=50e9, gpus_per_node=8)
SLOW = Links(local_bytes_s=235e9, net_bytes_s=1e9, gpus_per_node=8)


@pytest.fixture(scope="module")
def work() -> Workload:
    return workload_of(load_recipe(RECIPES / "resnet152_90ep.yaml"))


def test_the_workload_is_the_recipes(work: Workload) -> None:
    assert (work.steps, work.micro_batches_per_step, work.evaluations) == (90 * (1_281_167 // 256), 8, 90)
    assert (work.net.parameters, work.net.activations) == (60_192_808, 22_555_112)
    assert (work.net.convolutions, work.net.norms, work.net.parameter_tensors) == (156, 155, 467)
    assert work.state_bytes == 2 * 4 * 60_192_808


def test_a_gpu_with_a_published_figure_gives_it_back() -> None:
    for gpu in GPUS.values():
        if gpu.resnet50_half:
            images_s, batch = gpu.resnet50_half
            net = summarise("resnet50")
            launch_s = batch * image_s(net, gpu, half=True) + train_kernels(net, half=True).seconds()
            assert batch / launch_s == pytest.approx(images_s)


def kernels_of_a_launch(recipe: Recipe, merged: int) -> int:
    """Counted in the real step on fake CUDA tensors."""
    with fake_cuda() as device, patch("torch.cuda.is_current_stream_capturing", lambda: True):
        classifier = on_fake_cuda(recipe).train()
        reduction = FastReduction(classifier, 2, recipe.train.num_micro_batches, "none")
        state = SimpleNamespace(scaler=torch.amp.GradScaler("cuda", enabled=False))
        step = TrainStep(recipe, state, classifier, reduction, device, cuda_graphs=False)  # type: ignore[arg-type]
        batch = step.rehearsal_batch(merged, recipe.data.train.size)
        reduction.start_launch(is_last=False)
        with KernelCounter() as kernels:
            step.forward_backward(batch)
    return kernels.total


@pytest.mark.parametrize(
    ("name", "sets", "merged", "tolerance"),
    [
        ("resnet152_90ep", [], 1, 0.05),
        ("resnet50_goyal", [], 4, 0.05),
        ("resnet152_90ep", ["model.name=resnet34"], 1, 0.07),
        ("resnet152_rsb_a2", ["model.name=resnet50"], 2, 0.07),  # drop-path
        ("resnet152_rs", ["model.name=resnet50"], 1, 0.15),  # squeeze-and-excitation: biases and sums are left out
    ],
)
def test_kernels_are_those_of_the_real_step(name: str, sets: list[str], merged: int, tolerance: float) -> None:
    small = ["train.micro_batch_size=2", "train.global_batch_size=8"]
    recipe = load_recipe(RECIPES / f"{name}.yaml", [*sets, *small])
    expected = sum(train_kernels(workload_of(recipe).net, half=True, merged=merged))
    assert kernels_of_a_launch(recipe, merged) == pytest.approx(expected, rel=tolerance)


def test_merging_and_graphs_pay_where_launches_are_small() -> None:
    recipe = load_recipe(RECIPES / "resnet152_90ep.yaml")
    speeds = {
        (most, graphs): step_of(
            replace(workload_of(recipe), micro_batches_per_launch=most, cuda_graphs=graphs), GPUS["h100"], 1, NVLINK
        ).images_per_s
        for most in (1, 8)
        for graphs in (True, False)
    }
    assert speeds[8, True] > 1.2 * speeds[1, True]
    assert all(speeds[most, True] >= speeds[most, False] for most in (1, 8))
    automatic = step_of(workload_of(recipe), GPUS["h100"], 1, NVLINK).images_per_s
    assert automatic == pytest.approx(max(speeds.values()))


def test_exact_sums_merge_nothing_and_use_no_graph() -> None:
    recipe = load_recipe(RECIPES / "resnet152_90ep.yaml", ["train.reduction=exact"])
    work = workload_of(recipe)
    assert launches_in(work, work.net, GPUS["h100"], 4) == [1, 1, 1, 1]
    assert launch_of(work, work.net, GPUS["h100"], 1).host_s > 0.02


def test_merging_stops_at_the_memory() -> None:
    recipe = load_recipe(RECIPES / "resnet152_90ep.yaml")
    work = workload_of(recipe)
    assert launches_in(work, work.net, replace(GPUS["h100"], memory_gb=12), 8) == [2] * 4
    assert launches_in(work, work.net, GPUS["h100"], 8) == [8]
    assert memory_gb(work, work.net, 8) < 80


def test_a_ring_on_one_node_is_the_textbooks() -> None:
    cost = all_reduce(240e6, 8, NVLINK)
    assert cost.net_s == 0
    assert cost.local_s == pytest.approx(2 * 7 / 8 * 240e6 / 235e9, rel=0.05)


def test_a_thousand_nodes_use_a_tree() -> None:
    ring_latency = 2 * 1023 * 15e-6
    assert all_reduce(1e6, 8192, NVLINK).net_s < ring_latency / 10


def test_a_bus_that_is_shared_is_slower_with_every_gpu() -> None:
    shared = replace(NVLINK, local_bytes_s=6.6e9, local_shared=True)
    two, eight = all_reduce(1e8, 2, shared).seconds, all_reduce(1e8, 8, shared).seconds
    assert eight / two == pytest.approx(7, rel=0.01)  # 2 (n-1) S / bandwidth


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 400_000_000)), min_size=1, max_size=8),
)
def test_buckets_hold_all_bytes_in_order_and_none_is_ready_after_the_end(parts: list[tuple[float, int]]) -> None:
    found = buckets([Produced(s, b) for s, b in parts])
    assert sum(b for _, b in found) == pytest.approx(sum(b for _, b in parts))
    assert all(b <= BUCKET_BYTES for _, b in found)
    times = [t for t, _ in found]
    assert times == sorted(times)
    assert not times or times[-1] <= sum(s for s, _ in parts) + 1e-9


def test_overlap_hides_what_fits_into_the_backward_pass() -> None:
    parts = produced(summarise("resnet152"), 0.2)
    alone = exchange(parts, 16, NVLINK, overlapped=False)
    hidden = exchange(parts, 16, NVLINK)
    assert hidden.exposed_s < 0.75 * alone.exposed_s
    # A network that is slower than the backward pass stays visible by the difference, at least.
    backward_s = sum(p.seconds for p in parts)
    slow = exchange(parts, 16, SLOW)
    assert slow.exposed_s >= slow.total_s - backward_s - 1e-9


def test_the_expected_maximum_is_the_textbooks() -> None:
    # Order statistics of the normal distribution (Teichroew 1956).
    for n, value in ((2, 0.56419), (8, 1.42360), (20, 1.86748), (100, 2.50759)):
        assert expected_maximum(n) == pytest.approx(value, abs=0.004)


def test_the_loader_takes_over_where_it_is_the_slower_one() -> None:
    assert throttled(100, 1e9) == pytest.approx(100)
    assert throttled(1e9, 100) == pytest.approx(100)
    assert throttled(100, 100) == pytest.approx(91.7, abs=0.1)
    assert images_per_core("native", 192) == pytest.approx((1149 + 1001) / 2)  # half-way from 160 to 224 px


def test_images_per_core_are_those_of_the_loader_bench() -> None:
    results = (RECIPES.parent / "bench/results/loader_cpu2_202611.md").read_text()
    sections = re.findall(r"### training: [^\n]*, (\d+) px, 2 threads\n(.*?)(?=\n###? )", results, re.DOTALL)
    for decoder, label in (("native", "native"), ("ffcv", "ours on libffcv")):
        rows = {int(px): re.search(rf"^\| {label} \| (\d+) ", table, re.MULTILINE) for px, table in sections}
        assert {px: int(row[1]) for px, row in rows.items() if row} == IMAGES_PER_CORE[decoder]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 64), st.sampled_from(sorted(GPUS)), st.sampled_from(["fast", "exact"]))
def test_a_steps_parts_add_up(workers: int, name: str, sums: str) -> None:
    work = _work64(sums)
    step = step_of(work, GPUS[name], workers, NVLINK, loader_images_s=5000)
    parts = (step.compute_s, step.kernels_s, step.host_s, step.uneven_s, step.exchange_s, step.jitter_s, step.loader_s)
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(step.seconds)
    launches = [
        launch_of(work, work.net, GPUS[name], merged)
        for merged in launches_in(work, work.net, GPUS[name], -(-64 // workers))
    ]
    on_gpu = sum(launch.gpu_s for launch in launches)
    assert step.compute_s + step.kernels_s + step.host_s + step.uneven_s >= on_gpu * (1 - 1e-9)


@cache
def _work64(reduction: str) -> Workload:
    sets = ["train.global_batch_size=2048", f"train.reduction={reduction}"]
    return workload_of(load_recipe(RECIPES / "resnet152_90ep.yaml", sets))


def test_compressed_gradients_take_half_the_wire() -> None:
    recipe = load_recipe(RECIPES / "resnet152_90ep.yaml", ["train.gradient_compression=bf16"])
    half, whole = workload_of(recipe), workload_of(load_recipe(RECIPES / "resnet152_90ep.yaml"))
    slow = replace(SLOW, gpus_per_node=1)
    times = [step_of(work, GPUS["a100"], 8, slow).all_reduce_s for work in (half, whole)]
    assert times[0] / times[1] == pytest.approx(0.5, rel=0.02)


def test_low_rank_factors_are_two_messages_after_the_backward_pass() -> None:
    recipe = load_recipe(RECIPES / "resnet152_90ep.yaml", ["train.gradient_compression=powersgd"])
    work = workload_of(recipe)
    model = build_model("resnet152", 1000)
    reduction = PowerSgdReduction(model, rank=0, world_size=2, num_micro_batches=1)
    sent: list[int] = []
    reduction._sum_over_workers = lambda tensors: sent.append(sum(4 * t.numel() for t in tensors)) or tensors  # type: ignore[func-returns-value, assignment, method-assign]
    reduction.finish()
    assert work.messages_bytes == tuple(sent)
    assert sum(sent) < 4 * work.net.parameters / 50
    step = step_of(work, GPUS["a100"], 8, SLOW)
    assert step.exchange_s == step.all_reduce_s == sum(all_reduce(size, 8, SLOW).seconds for size in sent)


def test_growing_images_make_the_mean_of_their_sizes_steps() -> None:
    sets = ["train.total_epochs=10", "data.progressive_size.ramp=[0.5,0.5]"]
    work = workload_of(load_recipe(RECIPES / "resnet152_ffcv.yaml", sets))
    assert [(phase.image_px, phase.share) for phase in work.phases] == [
        (160, pytest.approx(0.6)),
        (192, pytest.approx(0.4)),
    ]
    small, large = (
        step_of(work, GPUS["a100"], 8, NVLINK, net=phase.net, loader_images_s=20.0 * phase.image_px)
        for phase in work.phases
    )
    found = mean_step(work, GPUS["a100"], 8, NVLINK, loader_images_s=lambda px: 20 * px)
    assert found.seconds == pytest.approx(0.6 * small.seconds + 0.4 * large.seconds)
    assert small.seconds < found.seconds < large.seconds


def test_a_run_that_ends_early_has_the_sizes_of_its_own_steps() -> None:
    work = workload_of(load_recipe(RECIPES / "resnet152_ffcv.yaml", ["train.max_steps=10"]))
    assert [(phase.image_px, phase.share) for phase in work.phases] == [(160, 1.0)]


@pytest.mark.parametrize(("text", "bytes_s"), [("100Gbps", 12.5e9), ("8x400Gbps", 400e9), ("25 gbit/s", 3.125e9)])
def test_networks(text: str, bytes_s: float) -> None:
    assert parse_net(text) == bytes_s


@pytest.mark.parametrize("text", ["", "fast", "100", "0Gbps", "100GB/s", "-1Gbps", "0x400Gbps"])
def test_an_invalid_network_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--net"):
        parse_net(text)
