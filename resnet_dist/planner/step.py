"""One optimizer step on W workers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from resnet_dist.planner.compute import host_s, image_s
from resnet_dist.planner.constants import BACKWARD_SHARE, JITTER
from resnet_dist.planner.gpus import Gpu
from resnet_dist.planner.jitter import expected_maximum
from resnet_dist.planner.loading import throttled
from resnet_dist.planner.network import Links, all_reduce
from resnet_dist.planner.overlap import Exchange, Produced, exchange
from resnet_dist.planner.workload import Net, Workload


@dataclass(frozen=True)
class Step:
    """Seconds of one step of the whole group, by where they go. They add up to `seconds`."""

    compute_s: float
    """What the GPUs need for the step's images if shares are equal."""
    host_s: float
    """Waiting for the host to start kernels: small micro-batches on fast GPUs."""
    uneven_s: float
    """Workers with a micro-batch less wait for the others."""
    exchange_s: float
    """All-reduce that the backward pass does not hide."""
    jitter_s: float
    loader_s: float
    images: int
    all_reduce_s: float
    """All of it, hidden or not."""

    @property
    def seconds(self) -> float:
        return self.compute_s + self.host_s + self.uneven_s + self.exchange_s + self.jitter_s + self.loader_s

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds


def mean_step(
    work: Workload, gpu: Gpu, workers: int, links: Links, *, loader_images_s: Callable[[int], float] | None = None
) -> Step:
    """The mean of a run's steps. `loader_images_s`: what one worker's loader delivers, by the images' side in px."""
    shares = [phase.share for phase in work.phases]
    steps = []
    for phase in work.phases:
        loader = loader_images_s and loader_images_s(phase.image_px)
        steps.append(step_of(work, gpu, workers, links, net=phase.net, loader_images_s=loader))

    def mean(seconds: Callable[[Step], float]) -> float:
        return sum(share * seconds(step) for share, step in zip(shares, steps, strict=True))

    return Step(
        compute_s=mean(lambda step: step.compute_s),
        host_s=mean(lambda step: step.host_s),
        uneven_s=mean(lambda step: step.uneven_s),
        exchange_s=mean(lambda step: step.exchange_s),
        jitter_s=mean(lambda step: step.jitter_s),
        loader_s=mean(lambda step: step.loader_s),
        images=work.global_batch_size,
        all_reduce_s=mean(lambda step: step.all_reduce_s),
    )


def step_of(
    work: Workload,
    gpu: Gpu,
    workers: int,
    links: Links,
    *,
    net: Net | None = None,
    loader_images_s: float | None = None,
) -> Step:
    """One step at the images' largest size, or with `net`, which is the net at another one.

    `workers` at most the step's micro-batches. `loader_images_s`: what one worker's loader delivers."""
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


def _exchange(work: Workload, net: Net, micro_s: float, workers: int, links: Links) -> Exchange:
    if work.messages_bytes is None:
        return exchange(produced(net, micro_s, work.gradient_bytes), workers, links)
    seconds = sum(all_reduce(num_bytes, workers, links).seconds for num_bytes in work.messages_bytes)
    return Exchange(seconds, seconds)


def produced(net: Net, micro_s: float, gradient_bytes: int = 4) -> list[Produced]:
    """The backward pass of one micro-batch, last part first; its time goes by multiply-adds."""
    total = net.macs
    return [
        Produced(BACKWARD_SHARE * micro_s * part.macs / total, gradient_bytes * part.parameters)
        for part in reversed(net.parts)
    ]
