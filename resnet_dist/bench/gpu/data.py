"""Checks of the loader on the device: the same bits as on a CPU, and copies that hide behind kernels."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from resnet_dist.bench.gpu.machine import fitting_batch, synchronize
from resnet_dist.bench.gpu.profiled import gpu_work, hidden_share, merged, start_profiler, total
from resnet_dist.bench.gpu.result import Result, Skipped
from resnet_dist.bench.gpu.synthetic import Points, beton_job, beton_recipe, local_context, write_synthetic_beton
from resnet_dist.bench.step import advance
from resnet_dist.config.recipe import RandomResizedCrop
from resnet_dist.data.decoder import ImageSettings
from resnet_dist.data.loader import BetonLoader
from resnet_dist.training.feed import open_data
from resnet_dist.training.loop import Trainer
from resnet_dist.training.model import set_backends

_LEAST_HIDDEN = 0.90


def num_threads() -> int:
    """For the loader: the cores of this process but one, which starts kernels."""
    return max(1, len(os.sched_getaffinity(0)) - 1)


def loader(device: torch.device, small: bool) -> Result:
    """The batches that a slow consumer gets on the device, against those of a quick one on the CPU."""
    size, batch_size, num_batches = (32, 4, 8) if small else (224, 64, 44)
    settings = ImageSettings(RandomResizedCrop(kind="random_resized_crop", size=size), seed=7)
    kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    with TemporaryDirectory() as name, ExitStack() as stack:
        beton = write_synthetic_beton(Path(name) / "train.beton", num_batches * batch_size - 1, size * 3 // 2)
        cpu, tested = (
            stack.enter_context(
                closing(BetonLoader(beton, settings, batch_size=batch_size, num_threads=n, device=where))
            )
            for where, n in ((torch.device("cpu"), 1), (device, num_threads()))
        )
        ids = np.random.default_rng(0).permutation(cpu.num_samples)
        began_s = time.perf_counter()
        for number, batch in enumerate(tested.epoch(0, ids)):
            if number % 8 == 7:  # lets the loader fill all that it may fill ahead
                time.sleep(0.01 if small else 0.2)
            if device.type == "cuda":  # and the device is slow too: some 10 ms until it reads the batch
                torch.cuda._sleep(20_000_000)
            kept.append((batch.images, batch.images.clone(), batch.labels))
        synchronize(device)
        seconds = time.perf_counter() - began_s
        differing = []
        for number, (expected, found) in enumerate(zip(cpu.epoch(0, ids), kept, strict=True)):
            on_device = all(tensor.device.type == device.type for tensor in found)
            pairs = zip((expected.images, expected.images, expected.labels), found, strict=True)
            if not on_device or not all(torch.equal(theirs, ours.cpu()) for theirs, ours in pairs):
                differing.append(number)
    measured = {"batches": num_batches, "batch_size": batch_size, "differing": differing, "seconds": seconds}
    line = f"{num_batches} batches of {batch_size}, a slow consumer on {device.type} against a quick one on the CPU: "
    return Result(measured, not differing, line + (f"batches {differing} differ" if differing else "equal bits"))


def copies(device: torch.device, small: bool) -> Result:
    """The share of the time of copies to the device during which kernels run, from the profiler."""
    model, size, batch_size, steps = ("resnet18", 64, 16, 6) if small else ("resnet152", 224, fitting_batch(device), 15)
    config = beton_recipe(model, size, batch_size, train={"precision": "bf16"})
    set_backends(config.train)
    start_profiler()
    with TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        write_synthetic_beton(folder / "train.beton", 2 * steps * batch_size, size * 3 // 2)
        write_synthetic_beton(folder / "val.beton", batch_size, size * 3 // 2)
        job = beton_job(config, folder, steps_per_epoch=2 * steps, log_every_steps=10**6, threads=num_threads())
        trainer = Trainer(job, local_context(folder, device), Points(), *open_data(job, device, stack))
        advance(trainer, steps)
        synchronize(device)
        work = gpu_work(lambda: advance(trainer, steps))  # to the end of the epoch, which ends the loader's thread
    to_device = [span for name, span in work.copies if "HtoD" in name]
    if not to_device:
        raise Skipped("the profiler sees no copy to the device")
    running = merged([span for _, span in work.kernels])
    share, busy = hidden_share(to_device, running), total(running) / (running[-1][1] - running[0][0])
    pageable = sum("HtoD" in name and "Pageable" in name for name, _ in work.copies)
    measured = {"hidden": share, "copies": len(to_device), "copies_us": total(to_device), "pageable": pageable}
    measured["busy"] = busy
    line = (
        f"{share:.1%} of the time of {len(to_device)} copies is under kernels (limit {_LEAST_HIDDEN:.0%}), "
        f"{pageable} of them from pageable memory; kernels run {busy:.1%} of the time"
    )
    return Result(measured, share >= _LEAST_HIDDEN, line)
