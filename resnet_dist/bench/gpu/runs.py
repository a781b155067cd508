"""Checks of whole runs: `run_worker` on a beton, and what is made of its checkpoint."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from resnet_dist.bench.gpu.data import num_threads
from resnet_dist.bench.gpu.machine import fitting_batch
from resnet_dist.bench.gpu.result import Result, largest
from resnet_dist.bench.gpu.speed import seconds_of
from resnet_dist.bench.gpu.synthetic import (
    Points,
    beton_job,
    beton_recipe,
    in_memory_run,
    local_context,
    write_synthetic_beton,
)
from resnet_dist.bench.step import Settings, advance, bare_loop, random_batches, recipe
from resnet_dist.data.order import eval_batch_size
from resnet_dist.evaluation.evaluate import EvaluationJob, open_protocol
from resnet_dist.evaluation.protocols import Protocol, make_fully_convolutional
from resnet_dist.training.device import peak_flops
from resnet_dist.training.evaluate import Evaluation
from resnet_dist.training.evaluate import evaluate as evaluate_samples
from resnet_dist.training.loop import run_worker
from resnet_dist.weights.export import export_model
from resnet_dist.weights.source import TrainedModel, load_model

_MOST_OVERHEAD = 0.02
_MOST_DIFFERENCE = 1e-2


def full_loop(device: torch.device, small: bool) -> Result:
    """A run of 60 steps on a beton, with evaluations and checkpoints, against the bare loop on one batch in memory."""
    model, size, batch_size, steps = ("resnet8", 16, 4, 6) if small else ("resnet152", 224, fitting_batch(device), 30)
    config = beton_recipe(model, size, batch_size, train={"precision": "bf16"})
    points = Points()
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_synthetic_beton(folder / "train.beton", steps * batch_size, size * 3 // 2)
        write_synthetic_beton(folder / "val.beton", 2 * batch_size + 1, size * 3 // 2, seed=1)
        job = beton_job(config, folder, steps_per_epoch=steps, log_every_steps=steps // 3, threads=num_threads())
        began_s = time.perf_counter()
        result = run_worker(job, local_context(folder, device), points)
        seconds = time.perf_counter() - began_s
        saved = sorted(path.name for path in (folder / "run").iterdir() if path.name.startswith("epoch="))
    # Without the first point, which has the warm-up. The loader's start is in the first point of the second epoch.
    speeds = points.of("speed/images_per_s")[1:]
    mfu, waits = points.of("speed/mfu"), points.of("speed/data_wait_share")[1:]
    memory = points.of("gpu/memory_peak_megabytes")
    settings = Settings(model, size, batch_size, 1, steps=4 if small else 10, rounds=4)
    _, block = bare_loop(config, settings, random_batches(settings, device), graph=device.type == "cuda")
    bare = settings.steps * batch_size / median(list(seconds_of(block, device, 4))[1:])
    ours = median(speeds)
    measured = {
        "outcome": result.outcome,
        "metrics": dict(result.metrics),
        "seconds": seconds,
        "images_per_s": speeds,
        "bare_images_per_s": bare,
        "mfu": mfu,
        "data_wait_share": waits,
        "memory_peak_mb": memory,
        "checkpoints": saved,
    }
    line = (
        f"{model}, {2 * steps} steps and 2 evaluations in {seconds:.0f} s: {ours:.0f} images/s, bare loop {bare:.0f}; "
        f"waits for data {max(waits):.1%}; {len(saved)} checkpoints"
    )
    sound = result.outcome == "finished" and result.step == 2 * steps and len(saved) == 2
    if device.type == "cpu":
        return Result(measured, sound, f"{line} (speed not judged on a CPU)")
    line += f"; MFU {f'{median(mfu):.1%}' if mfu else 'unknown'}, peak memory {max(memory, default=0):.0f} MB"
    known = peak_flops(torch.cuda.get_device_name(device), "bf16") is not None
    sound = sound and min(memory, default=0) > 0 and bool(mfu) == known and all(0 < m < 1 for m in mfu)
    if small:
        return Result(measured, sound, f"{line} (speed not judged scaled down)")
    line += f" (limit {_MOST_OVERHEAD:.0%} over the bare loop)"
    return Result(measured, sound and bare / ours - 1 <= _MOST_OVERHEAD, line)


def other_paths(device: torch.device, small: bool) -> Result:
    """Activation checkpointing against none; a checkpoint's multi-scale evaluation and its exported file on the device
    against the CPU."""
    model, size, batch_size = ("resnet8", 16, 4) if small else ("resnet18", 64, 16)
    settings = Settings(model, size, batch_size, 1, steps=3, rounds=1, micro_batches=2)
    config = recipe(settings)
    weights = []
    for recomputes in (False, True):
        with in_memory_run(config, settings, device, recompute_activations=recomputes) as trainer:
            advance(trainer, settings.steps)
            weights.append(torch.cat([p.detach().cpu().reshape(-1) for p in trainer.state.parameters]))
    recomputed = float((weights[1] - weights[0]).norm() / weights[0].norm())
    with TemporaryDirectory() as name:
        folder = Path(name)
        source = trained_checkpoint(folder, device, model, size, batch_size)
        counts, logits = multi_scale(source, folder / "val.beton", device, (size, size * 3 // 2))
        exported = exported_difference(source, folder / "model.pt2", device, size)
    measured = {"recomputed": recomputed, "counts": counts, "multi_scale": logits, "exported": exported}
    line = (
        f"weights with activation checkpointing within {recomputed:.2g}; multi-scale evaluation: top 1 and 5 right "
        f"{counts[0]} on the device, {counts[1]} on the CPU, loss within {logits:.2g}; exported .pt2: logits within "
        f"{exported:.2g} (limit {_MOST_DIFFERENCE:.0e})"
    )
    passed = largest([recomputed, logits, exported]) <= _MOST_DIFFERENCE and counts[0] == counts[1]
    return Result(measured, passed, line)


def trained_checkpoint(folder: Path, device: torch.device, model: str, size: int, batch_size: int) -> str:
    """The folder of a run of two epochs on betons in `folder`."""
    config = beton_recipe(model, size, batch_size)
    write_synthetic_beton(folder / "train.beton", 4 * batch_size, size * 3 // 2)
    write_synthetic_beton(folder / "val.beton", 2 * batch_size + 1, size * 3 // 2, seed=1)
    job = beton_job(config, folder, steps_per_epoch=4, log_every_steps=4, threads=num_threads())
    run_worker(job, local_context(folder, device), Points())
    return str(folder / "run")


def multi_scale(
    source: str, beton: Path, device: torch.device, scales: tuple[int, ...]
) -> tuple[list[list[int]], float]:
    """Samples that are right, top 1 and top 5, on the device and on the CPU; the relative difference of the losses."""
    found: list[Evaluation] = []
    for where in (device, torch.device("cpu")):
        trained: TrainedModel = load_model(source)
        make_fully_convolutional(trained.classifier, trained.recipe.data.train.size, trained.name)
        job = EvaluationJob((trained,), Protocol("multi-scale", scales=scales), beton, num_threads())
        with ExitStack() as stack:
            classifier, batches, precision = open_protocol(job, where, stack)
            found.append(
                evaluate_samples(
                    classifier.to(where),
                    batches,
                    num_samples=2 * trained.recipe.eval.batch_size + 1,
                    batch_size=eval_batch_size(trained.recipe.eval.batch_size, where.type),
                    rank=0,
                    world_size=1,
                    device=where,
                    precision=precision,
                    num_classes=trained.recipe.model.num_classes,
                )
            )
    ours, cpu = found
    return [[e.num_top1, e.num_top5] for e in found], abs(ours.loss_sum - cpu.loss_sum) / cpu.loss_sum


def exported_difference(source: str, path: Path, device: torch.device, size: int) -> float:
    """Of the logits of the exported file on the device from those of the model on the CPU, relative to the largest."""
    export_model(source, path)
    images = torch.randint(0, 256, (3, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    program: Any = torch.export.load(path)
    if device.type == "cuda":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, str(device))
    with torch.no_grad():
        theirs = load_model(source).classifier(images)
        ours = program.module()(images.to(device)).cpu()
    return float((ours - theirs).abs().max() / theirs.abs().max())
