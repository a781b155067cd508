"""One optimizer step on W workers: GPU, host, loader, slowest worker, all-reduce, and the sum of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise
from statistics import NormalDist
from typing import NamedTuple

from resnet_dist.models.summary import Summary, summarise
from resnet_dist.planner.hardware import (
    BACKWARD_SHARE,
    BYTES_PER_ACTIVATION_KEPT,
    CONTENTION,
    FP32,
    GPUS,
    GRAPH_LAUNCHES,
    HALF,
    IMAGES_PER_CORE,
    JITTER,
    KERNEL_S,
    KERNELS_PER_RANDOM_LAYER,
    LAUNCH_S,
    LOADER_SHARPNESS,
    LOSS_KERNELS,
    SMALL_KERNEL_S,
    UPDATE_LAUNCHES,
    Gpu,
    Links,
    all_reduce,
)
from resnet_dist.planner.workload import Workload
from resnet_dist.training.launches import GPU_IMAGES, MEMORY_SHARE, cut, merged_on_gpu
from resnet_dist.training.reduce import BUCKET_BYTES

# ---- a launch: forward and backward pass of one or several merged micro-batches --------------------------------------


class Kernels(NamedTuple):
    """What a launch runs on the GPU, as numbers of kernels."""

    main: int
    """Over activations: `Gpu.kernel_s` each beyond the time that grows with the images."""
    small: int
    """Over parameters or less: `SMALL_KERNEL_S` each."""

    def seconds(self, kernel_s: float = KERNEL_S) -> float:
        return self.main * kernel_s + self.small * SMALL_KERNEL_S


def train_kernels(net: Summary, *, half: bool, merged: int = 1) -> Kernels:
    """Of forward pass, loss and backward pass of `merged` micro-batches. A test counts them in the real step."""
    both_passes = 2 * net.kernels + net.convolutions  # a convolution's backward pass is two products
    # Each batch norm runs once for every micro-batch; then the gradients of its input are put together, and those of
    # its weight and bias added up.
    norms = net.norms * (2 * (merged - 1) + 1) if merged > 1 else 0
    norm_sums = 4 * net.norms if merged > 1 else 0
    casts = 2 * net.convolutions if half else 0  # of their weights, and of the gradients back to fp32
    random = KERNELS_PER_RANDOM_LAYER * net.random_layers
    # Every gradient is added to those of earlier launches.
    return Kernels(both_passes + norms, casts + norm_sums + random + net.parameter_tensors + LOSS_KERNELS)


def roofline_s(net: Summary, gpu: Gpu, *, half: bool) -> float:
    """GPU seconds of training per image from the data sheet, apart from its kernels' fixed times: see `Roofline`."""
    roofline, tflops = (HALF, gpu.half_tflops) if half else (FP32, gpu.fp32_tflops)
    arithmetic = 6 * net.macs / (tflops * 1e12 * roofline.efficiency)
    traffic = net.activations * roofline.bytes_per_activation / (gpu.bandwidth_gb_s * 1e9)
    return arithmetic + traffic


def image_s(net: Summary, gpu: Gpu, *, half: bool) -> float:
    """As `roofline_s`, scaled so that ResNet-50 has its published speed on the GPU.

    A GPU without a published figure is scaled like the A100 (fp32: the V100).
    """
    known = gpu
    if (gpu.resnet50_half if half else gpu.resnet50_fp32) is None:
        known = GPUS["a100" if half else "v100"]
    published = known.resnet50_half if half else known.resnet50_fp32
    assert published is not None
    resnet50 = summarise("resnet50")
    resnet50_s = 1 / published.images_s - train_kernels(resnet50, half=half).seconds(gpu.kernel_s) / published.batch
    return roofline_s(net, gpu, half=half) * resnet50_s / roofline_s(resnet50, known, half=half)


@dataclass(frozen=True)
class Launch:
    images_s: float
    """GPU time that grows with the number of images."""
    kernels_s: float
    """GPU time that does not: see `Kernels`."""
    host_s: float
    """The host's time to start the kernels."""

    @property
    def gpu_s(self) -> float:
        return self.images_s + self.kernels_s


def launch_of(work: Workload, net: Summary, gpu: Gpu, merged: int) -> Launch:
    """A launch of `merged` micro-batches."""
    images = merged * work.micro_batch_size
    # Compiled code normalises all micro-batches in one kernel. Otherwise the gradients of each norm's input are put
    # together in a copy: written and read.
    parts = 1 if work.compiled else merged
    copied = 2 * (2 if work.half else 4) * net.activations if parts > 1 else 0
    kernels = train_kernels(net, half=work.half, merged=parts)
    return Launch(
        images_s=images * (image_s(net, gpu, half=work.half) + copied / (gpu.bandwidth_gb_s * 1e9)),
        kernels_s=kernels.seconds(gpu.kernel_s),
        host_s=(GRAPH_LAUNCHES if work.uses_graphs else sum(kernels)) * LAUNCH_S,
    )


def memory_gb(work: Workload, net: Summary, merged: int) -> float:
    """GPU memory, estimated: activations, weights with the optimizer's state, gradients."""
    return (merged * _micro_batch_bytes(work, net) + work.state_bytes + 8 * net.parameters) / 1e9


def _micro_batch_bytes(work: Workload, net: Summary) -> float:
    return BYTES_PER_ACTIVATION_KEPT[work.precision] * net.activations * work.micro_batch_size


def launches_in(work: Workload, net: Summary, gpu: Gpu, share: int) -> list[int]:
    """The micro-batches in each launch of a worker that has `share` of a step's micro-batches: by training's rule."""
    return [len(launch) for launch in cut(range(share), _merged_at_most(work, net, gpu, share))]


def _merged_at_most(work: Workload, net: Summary, gpu: Gpu, share: int) -> int:
    if work.most_merged is not None:
        return work.most_merged
    free_bytes = 1e9 * (gpu.memory_gb - memory_gb(work, net, 0))
    most = merged_on_gpu(
        work.micro_batch_size,
        share,
        launch_bytes=int(_micro_batch_bytes(work, net)),
        free_bytes=int(MEMORY_SHARE * free_bytes),
    )
    if work.compiled:
        return most
    launches = {k: launch_of(work, net, gpu, k) for k in (1, most)}
    # Training measures which of the two is faster.
    return min(launches, key=lambda k: max(launches[k].gpu_s, launches[k].host_s) / k)


# ---- the loader, and the slowest worker ------------------------------------------------------------------------------


def images_per_core(decoder: str, image_px: int) -> float:
    """Images that one core decodes and crops in a second: interpolated between the measured sizes."""
    table = sorted(IMAGES_PER_CORE[decoder].items())
    if image_px <= table[0][0]:
        return table[0][1]
    for (low, slow), (high, fast) in pairwise(table):
        if image_px <= high:
            return slow + (fast - slow) * (image_px - low) / (high - low)
    last_px, last = table[-1]
    return last * (last_px / image_px) ** 2


def throttled(rate: float, limit: float) -> float:
    """The speed of a stage of `rate` behind one of `limit`, with a short queue between them."""
    p = LOADER_SHARPNESS
    return (rate**-p + limit**-p) ** (-1 / p)


@cache
def expected_maximum(n: int) -> float:
    """The mean of the largest of n standard normal variables, by numerical integration: int_0^1 quantile(u) n u^(n-1)
    du, u = v^(1/n)."""
    if n == 1:
        return 0.0
    normal, points = NormalDist(), 4096
    return sum(normal.inv_cdf(math.exp(math.log((i + 0.5) / points) / n)) for i in range(points)) / points


# ---- the all-reduce, behind the backward pass ------------------------------------------------------------------------


@dataclass(frozen=True)
class Produced:
    """A part of the net in the backward pass: its time and the bytes of its gradients."""

    seconds: float
    num_bytes: float


@dataclass(frozen=True)
class Exchange:
    total_s: float
    """All-reduce of all gradients."""
    exposed_s: float
    """The part that the backward pass does not hide, contention included."""


def exchange(parts: Sequence[Produced], workers: int, links: Links, *, overlapped: bool = True) -> Exchange:
    """The all-reduce of one backward pass in buckets; unless `overlapped`, in one piece after it."""
    if workers == 1:
        return Exchange(0.0, 0.0)
    if not overlapped:
        seconds = all_reduce(sum(p.num_bytes for p in parts), workers, links).seconds
        return Exchange(seconds, seconds)
    backward_s = sum(p.seconds for p in parts)
    free_at = total = between_nodes = 0.0
    for ready_at, num_bytes in buckets(parts):
        cost = all_reduce(num_bytes, workers, links)
        free_at = max(free_at, ready_at) + cost.seconds
        total += cost.seconds
        between_nodes += cost.net_s
    tail = max(0.0, free_at - backward_s)
    hidden_between_nodes = max(0.0, between_nodes - tail)
    return Exchange(total, tail + CONTENTION * hidden_between_nodes)


def buckets(parts: Sequence[Produced]) -> list[tuple[float, float]]:
    """For each bucket: (seconds from the start of the backward pass to its last gradient, its bytes)."""
    found: list[tuple[float, float]] = []
    filled, clock = 0.0, 0.0
    for part in parts:
        left = part.num_bytes
        while left > 0:
            room = BUCKET_BYTES - filled
            taken = min(room, left)
            filled += taken
            left -= taken
            clock += part.seconds * taken / part.num_bytes
            if taken == room:
                found.append((clock, filled))
                filled = 0.0
        if part.num_bytes == 0:
            clock += part.seconds
    if filled:
        found.append((clock, filled))
    return found


def produced(net: Summary, launch_s: float, gradient_bytes: int = 4) -> list[Produced]:
    """The backward pass of one launch, last part first; its time is shared out by multiply-adds."""
    total = net.macs
    return [
        Produced(BACKWARD_SHARE * launch_s * part.macs / total, gradient_bytes * part.parameters)
        for part in reversed(net.parts)
    ]


# ---- the step --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """The parts of one step's time, for all workers together; they add up to `seconds`."""

    compute_s: float
    """GPU time for the step's images if shares are equal."""
    kernels_s: float
    """GPU time that its kernels take whatever the number of images: see `KERNEL_S`."""
    small_launches_s: float
    """The part of it that launches of `GPU_IMAGES` images would not take."""
    host_s: float
    """Waiting for the host to start kernels."""
    uneven_s: float
    """Workers with one micro-batch less wait for the rest."""
    exchange_s: float
    """All-reduce that the backward pass does not hide."""
    jitter_s: float
    loader_s: float
    images: float
    all_reduce_s: float
    """All all-reduce time, hidden or not."""

    @property
    def seconds(self) -> float:
        busy_s = self.compute_s + self.kernels_s + self.host_s + self.uneven_s
        return busy_s + self.exchange_s + self.jitter_s + self.loader_s

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds


def mean_step(
    work: Workload, gpu: Gpu, workers: int, links: Links, *, loader_images_s: Callable[[int], float] | None = None
) -> Step:
    """The mean of a run's steps. `loader_images_s`: the speed of one worker's loader, by the images' side in px."""
    means = dict.fromkeys((field.name for field in fields(Step)), 0.0)
    for phase in work.phases:
        loader = loader_images_s and loader_images_s(phase.image_px)
        step = step_of(work, gpu, workers, links, net=phase.net, loader_images_s=loader)
        means = {name: mean + phase.share * getattr(step, name) for name, mean in means.items()}
    return Step(**means)


def step_of(
    work: Workload,
    gpu: Gpu,
    workers: int,
    links: Links,
    *,
    net: Summary | None = None,
    loader_images_s: float | None = None,
) -> Step:
    """One step at the images' largest size, or at the size of `net`.

    `workers`: at most the step's micro-batches. `loader_images_s`: the speed of one worker's loader.
    """
    net = net or work.net
    share = work.micro_batches_per_step / workers
    own = math.ceil(share)
    launches = [launch_of(work, net, gpu, merged) for merged in launches_in(work, net, gpu, own)]
    on_gpu = sum(launch.gpu_s for launch in launches)
    starting = sum(launch.host_s for launch in launches) + UPDATE_LAUNCHES[work.optimizer] * LAUNCH_S
    waiting = max(0.0, starting - on_gpu)
    # Gradients of earlier launches are accumulated; only the last backward pass hides the all-reduce.
    exchanged = _exchange(work, net, launches[-1].gpu_s + waiting / len(launches), workers, links)
    busy = on_gpu + waiting + exchanged.exposed_s
    jitter = (on_gpu + waiting) * JITTER / math.sqrt(own) * expected_maximum(workers)
    loader = 0.0
    if loader_images_s is not None:
        rate = own * work.micro_batch_size / (busy + jitter)
        loader = own * work.micro_batch_size / throttled(rate, loader_images_s) - (busy + jitter)
    even = share / own
    kernels_s = sum(launch.kernels_s for launch in launches)
    full = max(1, GPU_IMAGES // work.micro_batch_size)
    return Step(
        compute_s=even * sum(launch.images_s for launch in launches),
        kernels_s=even * kernels_s,
        small_launches_s=even * max(0.0, kernels_s - own / full * launch_of(work, net, gpu, full).kernels_s),
        host_s=even * waiting,
        uneven_s=(1 - even) * (on_gpu + waiting),
        exchange_s=exchanged.exposed_s,
        jitter_s=jitter,
        loader_s=loader,
        images=work.global_batch_size,
        all_reduce_s=exchanged.total_s,
    )


def _exchange(work: Workload, net: Summary, launch_s: float, workers: int, links: Links) -> Exchange:
    if work.messages_bytes is None:
        return exchange(produced(net, launch_s, work.gradient_bytes), workers, links)
    seconds = sum(all_reduce(num_bytes, workers, links).seconds for num_bytes in work.messages_bytes)
    return Exchange(seconds, seconds)
