"""One optimizer step on W workers: GPU, host, loader, slowest worker, all-reduce, and the sum of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise
from statistics import NormalDist

from resnet_dist.models.summary import Summary, summarise
from resnet_dist.planner.hardware import (
    BACKWARD_SHARE,
    BUCKET_BYTES,
    CONTENTION,
    FIRST_BUCKET_BYTES,
    FP32,
    GPUS,
    HALF,
    HOST_S_PER_LAYER,
    IMAGES_PER_CORE,
    JITTER,
    LOADER_SHARPNESS,
    Gpu,
    Links,
    all_reduce,
)
from resnet_dist.planner.workload import Workload

# ---- the GPU and the host --------------------------------------------------------------------------------------------


def roofline_s(net: Summary, gpu: Gpu, *, half: bool) -> float:
    """Seconds of training per image from the data sheet alone: arithmetic plus memory traffic (see `Roofline`)."""
    roofline, tflops = (HALF, gpu.half_tflops) if half else (FP32, gpu.fp32_tflops)
    arithmetic = 6 * net.macs / (tflops * 1e12 * roofline.efficiency)
    traffic = net.activations * roofline.bytes_per_activation / (gpu.bandwidth_gb_s * 1e9)
    return arithmetic + traffic


def image_s(net: Summary, gpu: Gpu, *, half: bool) -> float:
    """Seconds of training per image: the data sheet's, scaled so that ResNet-50 has its published speed on the GPU.

    A GPU without a published figure is scaled like the A100 (fp32: the V100).
    """
    known = gpu
    if (gpu.resnet50_half if half else gpu.resnet50_fp32) is None:
        known = GPUS["a100" if half else "v100"]
    published = known.resnet50_half if half else known.resnet50_fp32
    assert published is not None
    return roofline_s(net, gpu, half=half) / (published * roofline_s(summarise("resnet50"), known, half=half))


def host_s(net: Summary) -> float:
    """The host's time to start the kernels of one micro-batch, which never takes less."""
    return net.layers * HOST_S_PER_LAYER


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
    """The all-reduce of one backward pass in DDP's buckets; unless `overlapped`, in one piece after it."""
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
            room = (BUCKET_BYTES if found else FIRST_BUCKET_BYTES) - filled
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


def produced(net: Summary, micro_s: float, gradient_bytes: int = 4) -> list[Produced]:
    """The backward pass of one micro-batch, last part first; its time is shared out by multiply-adds."""
    total = net.macs
    return [
        Produced(BACKWARD_SHARE * micro_s * part.macs / total, gradient_bytes * part.parameters)
        for part in reversed(net.parts)
    ]


# ---- the step --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """The parts of one step's time, for all workers together; they add up to `seconds`."""

    compute_s: float
    """GPU time for the step's images if shares are equal."""
    host_s: float
    """Waiting for the host to start kernels: small micro-batches on fast GPUs."""
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
        return self.compute_s + self.host_s + self.uneven_s + self.exchange_s + self.jitter_s + self.loader_s

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
    on_gpu = work.micro_batch_size * image_s(net, gpu, half=work.half)
    micro_s = max(on_gpu, host_s(net))
    share = work.micro_batches_per_step / workers
    own = math.ceil(share)
    # Gradients of earlier micro-batches are accumulated; only the last backward pass hides the all-reduce.
    exchanged = _exchange(work, net, micro_s, workers, links)
    busy = own * micro_s + exchanged.exposed_s
    jitter = own * micro_s * JITTER / math.sqrt(own) * expected_maximum(workers)
    loader = 0.0
    if loader_images_s is not None:
        rate = own * work.micro_batch_size / (busy + jitter)
        loader = own * work.micro_batch_size / throttled(rate, loader_images_s) - (busy + jitter)
    return Step(
        compute_s=share * on_gpu,
        host_s=share * (micro_s - on_gpu),
        uneven_s=(own - share) * micro_s,
        exchange_s=exchanged.exposed_s,
        jitter_s=jitter,
        loader_s=loader,
        images=work.global_batch_size,
        all_reduce_s=exchanged.total_s,
    )


def _exchange(work: Workload, net: Summary, micro_s: float, workers: int, links: Links) -> Exchange:
    if work.messages_bytes is None:
        return exchange(produced(net, micro_s, work.gradient_bytes), workers, links)
    seconds = sum(all_reduce(num_bytes, workers, links).seconds for num_bytes in work.messages_bytes)
    return Exchange(seconds, seconds)
