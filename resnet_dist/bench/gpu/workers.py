"""Checks of what workers send each other, in a process group of one: NCCL, or gloo, as a run on a cluster has it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

from resnet_dist.bench.gpu.result import Result, Skipped, largest
from resnet_dist.bench.gpu.steps import difference, disabled_graphs, updates
from resnet_dist.bench.step import Settings, recipe
from resnet_dist.gpus.device import collective_backend
from resnet_dist.training.collectives import Vote, from_rank_0

_MOST_DIFFERENCE = 1e-10


@contextmanager
def group_of_one(device: torch.device) -> Iterator[None]:
    """The process group of a worker, with the backend of a run."""
    if device.type == "cuda":
        if not dist.is_nccl_available():
            raise Skipped("this PyTorch has no NCCL")
        torch.cuda.set_device(device)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # or it looks up the machine's name, which may not be known
    with TemporaryDirectory() as folder:
        backend = collective_backend(1 if device.type == "cuda" else 0)
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def agreement(device: torch.device, small: bool) -> Result:
    """A vote while the device is busy, for which the host does not wait, and a broadcast as for batch norm's statistics
    and checkpoints."""
    with group_of_one(device):
        matrix = torch.ones((64, 64) if small else (4096, 4096), device=device)
        matrix = matrix @ matrix  # the first one loads the library
        vote = Vote()
        began_s = time.perf_counter()
        vote.send([True, False]).result()
        connected_s = time.perf_counter() - began_s
        statistics = from_rank_0(torch.arange(4.0))
        began_s = time.perf_counter()
        for _ in range(50):
            matrix = matrix @ matrix
        flags = vote.send([True, False])
        sent_s = time.perf_counter() - began_s
        counts = flags.result()
        arrived_s = time.perf_counter() - began_s
    is_right = counts == [1.0, 0.0] and statistics.tolist() == [0.0, 1.0, 2.0, 3.0]
    unjudged = " (not judged on a CPU)" if device.type == "cpu" else " (not judged scaled down)" if small else ""
    waited = not unjudged and sent_s > arrived_s / 2
    line = (
        f"a vote and a broadcast on {device.type}: {'both arrived' if is_right else 'LOST'}, connected in "
        f"{connected_s:.2f} s; behind {arrived_s:.3f} s of work the host was free after {sent_s:.3f} s"
        f"{': it WAITED' if waited else unjudged}"
    )
    seconds = {"connected_s": connected_s, "sent_s": sent_s, "arrived_s": arrived_s}
    return Result(seconds, is_right and not waited, line)


def reduction(device: torch.device, small: bool) -> Result:
    """Steps of the first of two workers, whose gradients go through the group, against one worker's without a group. In
    a group of one process the sum over the workers is the first worker's part, and twice the learning rate makes up for
    its half.
    """
    model, side = ("resnet8", 16) if small else ("resnet50", 64)
    found: dict[str, float] = {}
    notes: list[str] = []
    for compression in ("none", "bf16", "powersgd"):
        for graphs in (False, True) if device.type == "cuda" and compression != "powersgd" else (False,):
            changes = []
            for world_size in (1, 2):
                settings = Settings(model, side, 4, world_size, steps=3, rounds=1, micro_batches=2)
                config = recipe(
                    settings,
                    train={"precision": "fp64", "gradient_compression": compression},
                    optim={"lr": 0.05 * world_size, "weight_decay": 0.0},
                )
                with group_of_one(device) if world_size > 1 else nullcontext():
                    changes.append(updates(config, settings, device, on_line=notes.append, cuda_graphs=graphs))
            found[f"{compression}{', graph' if graphs else ''}"] = difference(changes[1], changes[0])
    line = "; ".join(f"{name} {value:.2g}" for name, value in found.items())
    return Result(
        {"differences": found, "notes": notes},
        largest(found.values()) <= _MOST_DIFFERENCE and not disabled_graphs(notes),
        f"difference of fp64 updates through the group from one worker's without: {line} (limit {_MOST_DIFFERENCE:.0e})"
        + "".join(f"; {note}" for note in dict.fromkeys(notes)),
    )
