"""One optimizer step on W workers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from resnet_dist.planner.compute import host_s, image_s
from resnet_dist.planner.constants import BACKWARD_SHARE, JITTER
from resnet_dist.planner.gpus import Gpu
from resnet_dist.planner.jitter import expected_maximum
from resnet_dist.planner.loading import throttled
from resnet_dist.planner.network import Links
from resnet_dist.planner.overlap import Produced, exchange
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


def step_of(work: Workload, gpu: Gpu, workers: int, links: Links, *, loader_images_s: float | None = None) -> Step:
    """`workers` at most the step's micro-batches. `loader_images_s`: what one worker's loader delivers."""
    on_gpu = work.micro_batch_size * image_s(work.net, gpu, half=work.half)
    micro_s = max(on_gpu, host_s(work.net))
    share = work.micro_batches_per_step / workers
    own = math.ceil(share)
    # Gradients of earlier micro-batches are accumulated; only the last backward pass hides the all-reduce.
    exchanged = (
        exchange(produced(work.net, micro_s, work.gradient_bytes), workers, links, overlapped=not work.exact)
        if workers > 1
        else exchange((), 1, links)
    )
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


def produced(net: Net, micro_s: float, gradient_bytes: int = 4) -> list[Produced]:
    """The backward pass of one micro-batch, last part first; its time goes by multiply-adds."""
    total = net.macs
    return [
        Produced(BACKWARD_SHARE * micro_s * part.macs / total, gradient_bytes * part.parameters)
        for part in reversed(net.parts)
    ]
