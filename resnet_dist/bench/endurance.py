"""`resnet-dist bench endurance`: what a loader holds after every epoch. Nothing of it may grow."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import NamedTuple

import torch

from data_prep.beton.manifest import load_manifest
from resnet_dist.bench.peers import anonymous_bytes
from resnet_dist.config.recipe import RandomResizedCrop
from resnet_dist.data.loader import BetonLoader
from resnet_dist.data.order import epoch_permutation


class Held(NamedTuple):
    memory_bytes: int
    """That belongs to no file."""
    threads: int
    handles: int


def bench_endurance(beton: Path, *, num_epochs: int, num_threads: int, size: int) -> str:
    """A Markdown table: what is held after the first epoch, in the middle and at the end; every other epoch is left
    half-way, as at a stop."""
    manifest = load_manifest(beton)
    loader = BetonLoader(
        beton,
        manifest,
        RandomResizedCrop(kind="random_resized_crop", size=size),
        decoder="native",
        batch_size=64,
        seed=0,
        num_threads=num_threads,
        device=torch.device("cpu"),
    )
    told = sorted({1, 2, num_epochs // 4, num_epochs // 2, 3 * num_epochs // 4, num_epochs})
    lines = ["| after epoch | memory, MB | threads | file handles |", "|---|---|---|---|"]
    for epoch in range(1, num_epochs + 1):
        batches = loader.epoch(epoch, epoch_permutation(manifest.num_samples, 0, epoch))
        for number, _ in enumerate(batches):
            if epoch % 2 and number * 128 >= manifest.num_samples:
                break
        batches.close()
        if epoch in told:
            memory_bytes, threads, handles = _held()
            lines.append(f"| {epoch} | {memory_bytes / 1e6:.1f} | {threads} | {handles} |")
    loader.close()
    return "\n".join(lines)


def _held() -> Held:
    gc.collect()
    return Held(anonymous_bytes(), len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")))  # noqa: PTH208
