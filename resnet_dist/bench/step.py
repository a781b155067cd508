"""`resnet-dist bench step`: a training step of this project beside a bare PyTorch DDP loop. And `bench host`.

Both use the same model, batch, optimizer and process layout; the loops and `exact` take turns in the same processes.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from resnet_dist.bench.paired import Subject, markdown, print_result, ratios, rotated
from resnet_dist.config.recipe import Recipe
from resnet_dist.data.batch import Batch
from resnet_dist.data.loader import Numbers
from resnet_dist.models.registry import build_model
from resnet_dist.models.summary import KernelCounter
from resnet_dist.storage.folder import FolderStorage
from resnet_dist.tracking.tracker import Spool, Tracker
from resnet_dist.training.checkpoint import CheckpointMetadata, Identity, write_checkpoint
from resnet_dist.training.context import LocalContext, TrainingJob
from resnet_dist.training.feed import OpenSplit
from resnet_dist.training.loop import Trainer
from resnet_dist.training.model import Precision, build_classifier, build_optimizer, compile_model
from resnet_dist.training.schedule import RunPlan

_CPU = torch.device("cpu")
_NAMES = {
    "bare": "bare PyTorch DDP loop",
    "fast": "this project, reduction: fast, one micro-batch a launch",
    "merged": "this project, reduction: fast, all micro-batches in one launch",
    "exact": "this project, reduction: exact",
}


def bench_step(settings: Settings) -> str:
    """A Markdown table. Raises Fault if a process fails."""
    return table(settings, run_processes(settings))


def run_processes(settings: Settings) -> dict[str, list[float]]:
    """Seconds a step of every round, by arm, as rank 0 saw them."""
    with tempfile.TemporaryDirectory(prefix="resnet-dist-bench-") as folder, ExitStack() as stack:
        ranks = [
            stack.enter_context(
                Subject(f"rank {rank}", "resnet_dist.bench.step", json.dumps(settings), str(rank), f"{folder}/store")
            )
            for rank in range(settings.world_size)
        ]
        return ranks[0].answer()


def table(settings: Settings, times: Mapping[str, Sequence[float]]) -> str:
    """Median step, and the median over the rounds of its ratio to the bare loop's, with the quartiles."""
    layout = (
        f"{settings.world_size} workers of one thread, {settings.model} at {settings.image_size} px, a step of "
        f"{settings.micro_batches} x {settings.micro_batch_size} images a worker, {settings.rounds} rounds of "
        f"{settings.steps} steps"
    )
    rows = []
    for arm in settings.arms:
        to_bare = ratios(times[arm], times["bare"])
        quarter = len(to_bare) // 4
        spread = f" ({to_bare[quarter]:.3f} to {to_bare[-1 - quarter]:.3f})" if arm != "bare" else ""
        rows.append([_NAMES[arm], f"{1e3 * median(times[arm]):.1f}", f"{median(to_bare):.3f}{spread}"])
    return f"{layout}\n\n{markdown(['', 'step, ms', 'relative to the bare loop (quartiles over rounds)'], rows)}"


# What the host costs a step and a checkpoint: two of the planner's constants

_BLOCKS = 150


def bench_host(folder: Path, rounds: int) -> str:
    """A Markdown table. `folder`: where checkpoints are written."""
    kernel_us = 1e6 * host_s_per_kernel(rounds)
    num_bytes, write_s = checkpoint_write(folder, rounds)
    rows = [
        ["CPU time of an operation that computes almost nothing, us", f"{kernel_us:.1f}"],
        ["checkpoint of ResNet-152 with SGD, MB", f"{num_bytes / 1e6:.0f}"],
        ["written, fsynced and digested, s", f"{write_s:.2f}"],
        ["that is, MB/s", f"{num_bytes / write_s / 1e6:.0f}"],
    ]
    return markdown(["", ""], rows)


def host_s_per_kernel(rounds: int) -> float:
    """CPU seconds of a forward and backward pass of layers that compute almost nothing, by its number of operations.

    In fp32: PyTorch's bf16 convolutions on a CPU take several times as long, and none of it on a GPU's host.
    """
    torch.set_num_threads(1)
    net = nn.Sequential(
        *(
            layer
            for _ in range(_BLOCKS)
            for layer in (nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        )
    )
    images = torch.zeros(2, 4, 2, 2)

    def forward_backward() -> None:
        net.zero_grad()
        net(images).mean().backward()

    with KernelCounter() as kernels:
        forward_backward()
    times = []
    for _ in range(5 * rounds):
        begin = time.process_time()
        forward_backward()
        times.append(time.process_time() - begin)
    return median(times[rounds:]) / kernels.total


def checkpoint_write(folder: Path, rounds: int) -> tuple[int, float]:
    """(bytes, seconds) of one checkpoint of ResNet-152 and SGD's momentum."""
    net = build_model("resnet152", 1000).state_dict()
    state = {"net": net, "momentum": {name: torch.zeros_like(value) for name, value in net.items()}}
    metadata = CheckpointMetadata(epoch=0, step=0, identity=Identity("", ""), recipe={}, metrics={}, files={})
    times = []
    for _ in range(rounds):
        with TemporaryDirectory(dir=folder) as name:
            begin = time.perf_counter()
            write_checkpoint(Path(name), state=state, metadata=metadata)
            times.append(time.perf_counter() - begin)
            num_bytes = sum(path.stat().st_size for path in Path(name).iterdir())
    return num_bytes, median(times)


# One worker of the step benchmark: the bare loop and ours in turns, in one process group

OURS: dict[str, tuple[Literal["fast", "exact"], int]] = {
    "fast": ("fast", 1),
    "merged": ("fast", 10**6),
    "exact": ("exact", 1),
}
"""`train.reduction`, and how many micro-batches are in a launch at most."""


class Settings(NamedTuple):
    model: str
    image_size: int
    micro_batch_size: int
    world_size: int
    steps: int
    """In a block."""
    rounds: int
    micro_batches: int = 1
    """A worker's, in each step."""

    @property
    def arms(self) -> list[str]:
        """A bare DDP loop, and this project's in several forms."""
        return ["bare", *(name for name in OURS if name != "merged" or self.micro_batches > 1)]

    @property
    def global_batch_size(self) -> int:
        return self.world_size * self.micro_batches * self.micro_batch_size


class InMemory:
    """Gives the same micro-batches in every step, on their device: the loader is measured elsewhere (`bench loader`).

    `batches`: a worker's in a step, in order.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches

    def epoch(
        self,
        epoch: int,
        sample_ids: NDArray[np.int64],
        *,
        sizes: Sequence[int] | None = None,
        numbers: Numbers | None = None,
    ) -> Generator[Batch, None, None]:
        """`sizes` that are whole micro-batches."""
        micro_batch_size = len(self._batches[0].labels)
        batches, given = cycle(self._batches), 0
        for index, size in enumerate(cycle(sizes or [micro_batch_size])):
            if given >= len(sample_ids):
                return
            given += size
            merged = list(islice(batches, size // micro_batch_size))
            images, labels = torch.cat([b.images for b in merged]), torch.cat([b.labels for b in merged])
            drawn = torch.from_numpy(numbers(index) if numbers else np.zeros(0, np.int64))
            if images.is_cuda and len(drawn):  # from pinned memory the host need not wait for the copy
                drawn = drawn.pin_memory().to(images.device, non_blocking=True)
            yield Batch(images, labels, np.arange(size), numbers=drawn.to(images.device))


def random_batches(settings: Settings, device: torch.device = _CPU, seed: int = 0) -> list[Batch]:
    """A worker's micro-batches of one step: noise with random labels, on the device."""
    generator = torch.Generator().manual_seed(seed)
    number, side = settings.micro_batch_size, settings.image_size
    images = torch.randint(
        0, 256, (settings.micro_batches, number, side, side, 3), dtype=torch.uint8, generator=generator
    )
    labels = torch.randint(0, 10, (settings.micro_batches, number), generator=generator)
    return [Batch(*pair, np.arange(number)) for pair in zip(images.to(device), labels.to(device), strict=True)]


def recipe(settings: Settings, **sections: Mapping[str, Any]) -> Recipe:
    """`sections` are added to the recipe's own."""
    side = settings.image_size
    tree: dict[str, dict[str, Any]] = {
        "model": {"name": settings.model, "num_classes": 1000 if side > 64 else 10},
        "data": {
            "dataset": "memory",
            "train": {"kind": "pad_crop", "size": side},
            "eval": {"kind": "center_crop", "size": side, "resize": side},
            "mean": [100, 100, 100],
            "std": [60, 60, 60],
        },
        "train": {
            "global_batch_size": settings.global_batch_size,
            "micro_batch_size": settings.micro_batch_size,
            "total_epochs": settings.rounds + 1,
        },
        "optim": {"name": "sgd", "lr": 0.01, "weight_decay": 1e-4},
        "schedule": {"kind": "cosine"},
        "eval": {"batch_size": 64},
    }
    merged = {name: section | dict(sections.get(name, {})) for name, section in tree.items()}
    return Recipe.model_validate({"seed": 0, **merged})


def bare_loop(
    config: Recipe, settings: Settings, batches: Sequence[Batch], *, graph: bool = False
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The loop that one would write by hand: DDP, a schedule, and the loss read every ten steps. Only the last
    micro-batch's backward pass synchronises gradients. On the batches' device.

    Args:
        graph: a step's forward and backward passes are one CUDA graph.

    Returns the model, and a function that runs one block of steps and returns the last micro-batch's loss.
    """
    device, precision = batches[0].images.device, Precision(config.train.precision)
    model = build_classifier(config).to(device, precision.weights)
    optimizer, scaler = build_optimizer(model.net, config.optim), precision.scaler(device)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps * (settings.rounds + 1))
    ddp: nn.Module = compile_model(model) if config.train.compile else model
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext
    if settings.world_size > 1:
        ddp = parallel = DistributedDataParallel(ddp, broadcast_buffers=False, gradient_as_bucket_view=True)
        no_sync = parallel.no_sync
    ddp.train()

    def backward(batch: Batch) -> Tensor:
        with precision.autocast(device):
            loss = cross_entropy(ddp(batch.images).to(precision.weights), batch.labels) / len(batches)
        scaler.scale(loss).backward()
        return loss.detach()

    def gradients() -> Tensor:
        for batch in batches[:-1]:
            with no_sync():
                backward(batch)
        return backward(batches[-1])

    do_gradients = captured(gradients, model) if graph else gradients

    def block() -> Tensor:
        for step in range(settings.steps):
            optimizer.zero_grad(set_to_none=not graph)  # a graph adds to the same memory in every replay
            loss = do_gradients()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            if (step + 1) % 10 == 0:
                loss.item()
        return loss

    return model, block


def captured(gradients: Callable[[], Tensor], model: nn.Module) -> Callable[[], Tensor]:
    """`gradients` as one CUDA graph: three calls on a side stream to warm up, as PyTorch's notes on CUDA graphs have
    it, then the capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            gradients()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        loss = gradients()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def our_loop(
    config: Recipe,
    settings: Settings,
    batches: Sequence[Batch],
    folder: Path,
    *,
    rank: int = 0,
    tracker: Tracker | None = None,
    log_every_steps: int = 10,
    on_line: Callable[[str], object] = lambda _: None,
    **job: Any,
) -> Trainer:
    """Everything in a run except Ray and the loader: metrics, divergence checks, spool, stop votes. On the batches'
    device. An epoch is one block of steps.

    Args:
        tracker: a spool in the folder by default.
        on_line: takes one line for the user.
        job: further fields of the `TrainingJob`.
    """
    total = settings.steps * (settings.rounds + 1)
    plan = RunPlan(
        steps_per_epoch=settings.steps,
        total_steps=total,
        last_step=total,
        eval_every_epochs=10**6,
        save_every_epochs=10**6,
        save_every_steps=None,
        log_every_steps=log_every_steps,
    )
    training = TrainingJob(config, plan, Identity("r", "d"), folder, folder, loader_threads=1, **job)
    device = batches[0].images.device
    ctx = LocalContext(FolderStorage(folder), device, rank=rank, world_size=settings.world_size, on_line=on_line)
    split = OpenSplit(InMemory(batches), settings.steps * settings.global_batch_size)
    return Trainer(training, ctx, tracker or Spool(folder / "spool"), split, split)


def advance(trainer: Trainer, steps: int) -> None:
    for _ in range(steps):
        trainer.advance()


def measure(settings: Settings, rank: int) -> dict[str, list[float]]:
    """Seconds a step of every round, by arm."""
    batches = random_batches(settings, seed=rank)
    blocks: dict[str, Callable[[], Any]] = {"bare": bare_loop(recipe(settings), settings, batches)[1]}
    with tempfile.TemporaryDirectory(prefix="resnet-dist-bench-") as folder:
        for arm in settings.arms[1:]:
            reduction, merged = OURS[arm]
            (Path(folder) / arm).mkdir()
            config = recipe(settings, train={"reduction": reduction})
            trainer = our_loop(
                config, settings, batches, Path(folder) / arm, rank=rank, micro_batches_per_launch=merged
            )
            blocks[arm] = partial(advance, trainer, settings.steps)
        times: dict[str, list[float]] = {arm: [] for arm in settings.arms}
        for number in range(settings.rounds + 1):
            for arm in rotated(settings.arms, number):
                if settings.world_size > 1:
                    dist.barrier()
                began_s = time.perf_counter()
                blocks[arm]()
                if number:  # the first round warms up
                    times[arm].append((time.perf_counter() - began_s) / settings.steps)
    return times


def main(settings: Settings, rank: int, store: str) -> None:
    torch.set_num_threads(1)
    if settings.world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=settings.world_size)
    times = measure(settings, rank)
    if rank == 0:
        print_result(times)
    if settings.world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Settings(*json.loads(sys.argv[1])), int(sys.argv[2]), sys.argv[3])
