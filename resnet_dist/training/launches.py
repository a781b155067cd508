"""How a worker's micro-batches are cut into launches; rehearsing launches; CUDA graphs of them.

A launch is one forward and backward pass of k merged micro-batches. Merging changes results by rounding only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resnet_dist.config.recipe import Recipe
from resnet_dist.data.batch import Batch
from resnet_dist.data.keyed_random import Stream, sample_keys, splitmix64
from resnet_dist.data.mixing import mix_numbers
from resnet_dist.errors import Fault
from resnet_dist.models.batch_norm import BatchNormStatistics
from resnet_dist.training.reduce import FastReduction, Reduction

CPU_PIXELS = 1 << 17
"""Pixels of a launch on a CPU, at most: as many as were measured to gain (bench/results/step_cpu2_202611.md)."""
CPU_MICRO_BATCH = 16
"""Micro-batches of this many images, or more, are not merged on a CPU: they were slower together, and four images
faster."""
GPU_IMAGES = 512
"""Images of a launch on a GPU, at most: with more, ResNets gain nothing."""
MEMORY_SHARE = 0.8
"""Of the GPU's free memory: the rest is for the optimizer's state, evaluation and fragments."""
NO_GRAPHS = "CUDA graphs are disabled (slower, same results)"
"""The beginning of the line that says why."""
_WARM_UP_LAUNCHES, _TIMED_LAUNCHES = 3, 5
_CLEARLY = 1.03
"""One micro-batch a launch is taken only if it is this many times as fast: all workers should choose alike."""


def cut(share: range, most: int) -> list[range]:
    """A worker's micro-batches, in launches of at most `most`, as equal as possible.

    >>> cut(range(4, 9), 2)
    [range(4, 5), range(5, 7), range(7, 9)]
    """
    count = -(-len(share) // most)
    bounds = [len(share) * i // count for i in range(count + 1)]
    return [share[start:stop] for start, stop in pairwise(bounds)]


def merged_on_cpu(micro_batch_size: int, image_px: int, num_micro_batches: int, *, precision: str) -> int:
    """How many of a worker's micro-batches are merged on a CPU: by rule, so that it is the same after a restart."""
    if micro_batch_size >= CPU_MICRO_BATCH or precision == "fp64":
        return 1
    return max(1, min(num_micro_batches, CPU_PIXELS // (micro_batch_size * image_px**2)))


def merged_on_gpu(micro_batch_size: int, num_micro_batches: int, *, launch_bytes: int, free_bytes: int) -> int:
    """How many of a worker's micro-batches are merged on a GPU, as far as its memory goes.

    Args:
        launch_bytes: memory that a launch of one micro-batch takes while it runs.
        free_bytes: memory that launches may take.
    """
    fits = free_bytes // max(1, launch_bytes)
    return max(1, min(num_micro_batches, GPU_IMAGES // micro_batch_size, fits))


def launch_numbers(
    recipe: Recipe, step: int, micro_batches: range, *, num_layers: int, image_px: int
) -> NDArray[np.int64]:
    """What is drawn for a launch, in the form in which it travels to the device: the random layers' keys
    [num_layers, k], then what `data.mixing.mix` takes. A function of (seed, step, micro-batch) alone.
    """
    keys = layer_keys(recipe.seed, step, micro_batches, num_layers).reshape(-1)
    if recipe.data.mixing is None:
        return keys
    size = recipe.train.micro_batch_size
    return np.concatenate([keys, mix_numbers(recipe.data.mixing, recipe.seed, step, micro_batches, size, image_px)])


def layer_keys(seed: int, step: int, micro_batches: range, num_layers: int) -> NDArray[np.int64]:
    """The keys of the random layers (drop-path, dropout): [num_layers, micro-batches]."""
    keys = sample_keys(Stream.LAYER_NOISE, seed, step, list(micro_batches))
    layers = np.arange(num_layers, dtype=np.uint64)
    return np.stack([splitmix64(key, layers) for key in keys[:, None]], axis=1).view(np.int64)


class Launches:
    """Runs launches: `forward_backward` itself, or a CUDA graph of it.

    A graph is one call from the host instead of some thousand, so a GPU need not wait for Python. It reads and writes
    the same memory every time: inputs are copied into its own batch, gradients are added to the reduction's buckets.

    Args:
        forward_backward: takes a batch of k micro-batches, adds to the gradients, returns [k, 2].
        uses_graphs: whether to capture graphs. Only with a `FastReduction` on a GPU.
        log: takes one line for the user.
        warn: takes one that is a warning.
    """

    def __init__(
        self,
        forward_backward: Callable[[Batch], Tensor],
        reduction: Reduction,
        statistics: BatchNormStatistics,
        *,
        uses_graphs: bool,
        log: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self._forward_backward, self._reduction, self._statistics = forward_backward, reduction, statistics
        self._log, self._warn = log, warn
        self._uses_graphs = uses_graphs
        self._pool: Any = None
        """The graphs' shared memory: that of the first one, since the others never run at the same time."""
        self._rehearsed: dict[torch.Size, tuple[Batch, Graph] | None] = {}
        """By the shape of the images: the batch that a graph reads, and the graph."""

    def __call__(self, batch: Batch) -> Tensor:
        """float64 [k, 2]: mean loss and number of wrong predictions of each micro-batch."""
        rehearsed = self._rehearsed.get(batch.images.shape)
        if rehearsed is None:
            return self._forward_backward(batch)
        inputs, graph = rehearsed
        for own, given in (
            (inputs.images, batch.images),
            (inputs.labels, batch.labels),
            (inputs.numbers, batch.numbers),
        ):
            own.copy_(given)
        return graph.replay().clone()

    def is_rehearsed(self, batch: Batch) -> bool:
        return batch.images.shape in self._rehearsed

    def forget(self) -> None:
        """Frees the graphs and their memory, before images get another size."""
        if any(self._rehearsed.values()) and torch.cuda.is_available():
            torch.cuda.synchronize()  # none of them runs any more
        self._rehearsed.clear()
        self._pool = None  # a pool ends with its last graph

    def rehearse(self, batch: Batch) -> None:
        """Runs a launch of this shape, whose results are thrown away: what is compiled, tuned or captured for it is
        ready afterwards. No collective is called, so no other worker waits meanwhile.

        Raises Fault if the GPU's memory is too small.
        """
        try:
            self._rehearse(batch)
        except torch.OutOfMemoryError:
            k, (num_images, image_px) = len(batch.micro_batches), batch.images.shape[:2]
            raise Fault(
                f"{num_images} images of {image_px} px (micro-batches: {k}) do not fit the memory of the GPU; "
                + "in the profile, "
                + (f"set micro_batches_per_launch below {k}, or " if k > 1 else "set ")
                + "recompute_activations: true"
            ) from None

    def _rehearse(self, batch: Batch) -> None:
        run = partial(self._forward_backward, batch)
        with self._aside():
            warm_up(run, batch.images.device)
            self._rehearsed[batch.images.shape] = None
            if self._uses_graphs:
                self._capture(batch, run)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Within the context launches leave no trace, in gradients or in batch norm's statistics."""
        self._statistics.keep()
        self._reduction.start_launch(is_last=False)
        try:
            yield
        finally:
            self._reduction.clear()
            self._statistics.restore()

    def _capture(self, batch: Batch, run: Callable[[], Tensor]) -> None:
        assert isinstance(self._reduction, FastReduction)
        try:
            self._reduction.start_graphs()
            graph = capture(run, self._pool)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError) as error:  # TypeError: this PyTorch has no external events
            self._uses_graphs = False
            # Also those captured before: a failed capture may have taken memory with it that they use.
            shapes = list(self._rehearsed)
            self.forget()
            self._rehearsed.update(dict.fromkeys(shapes))
            self._reduction.end_graphs()
            reason = " ".join(str(error).split())[:300]
            self._warn(f"{NO_GRAPHS}: {reason}")
            return
        self._pool = graph.pool()
        self._rehearsed[batch.images.shape] = batch, graph
        if not self._reduction.is_recorded_in_time(graph.replay):
            self._reduction.end_graphs()
            self._warn("gradients are sent after each CUDA graph instead of during it: its events fire too early")

    def best_merge(
        self,
        batch_of: Callable[[int], Batch],
        num_micro_batches: int,
        *,
        compiled: bool,
        heartbeat: Callable[[], None] = lambda: None,
    ) -> int:
        """How many micro-batches to merge on this GPU: as many as its memory takes, or one if that is clearly faster.

        Args:
            batch_of: a batch of that many micro-batches.
            num_micro_batches: this worker's share of a step.
            compiled: then without a measurement, since every size is compiled for minutes.
        """
        single = batch_of(1)
        device, micro_batch_size = single.images.device, len(single.images)
        self.rehearse(single)
        heartbeat()
        speeds = {} if compiled else {1: micro_batch_size / self._launch_s(single)}
        launch_bytes = self._launch_bytes(single)
        self.forget()
        torch.cuda.empty_cache()
        free_bytes = int(MEMORY_SHARE * torch.cuda.mem_get_info(device)[0])
        most = merged_on_gpu(micro_batch_size, num_micro_batches, launch_bytes=launch_bytes, free_bytes=free_bytes)
        while most > 1 and not self._fits(merged := batch_of(most)):
            most //= 2  # the estimate was too high: a merged launch may use other kernels
        heartbeat()
        if most == 1 or compiled:
            if num_micro_batches > 1:
                self._log(f"micro-batches in a launch: {most} of a worker's {num_micro_batches}, which fit the memory")
            return most
        speeds[most] = most * micro_batch_size / self._launch_s(merged)
        best = most if speeds[most] * _CLEARLY > speeds[1] else 1
        measured = ", ".join(f"{k}: {speed:,.0f} images/s" for k, speed in speeds.items())
        self._log(f"micro-batches in a launch: {best} of a worker's {num_micro_batches} ({measured})")
        if best == 1:
            self.forget()
        return best

    def _fits(self, batch: Batch) -> bool:
        """Rehearses a launch. Whether the memory was enough."""
        with suppress(torch.OutOfMemoryError):
            self._rehearse(batch)
            return True
        self.forget()  # after the error is gone, which holds the launch's tensors
        torch.cuda.empty_cache()
        return False

    def _launch_s(self, batch: Batch) -> float:
        """Seconds that a rehearsed launch takes."""
        with self._aside():
            torch.cuda.synchronize()
            began_s = time.perf_counter()
            for _ in range(_TIMED_LAUNCHES):
                self(batch)
            torch.cuda.synchronize()
            return (time.perf_counter() - began_s) / _TIMED_LAUNCHES

    def _launch_bytes(self, batch: Batch) -> int:
        """The memory that a rehearsed launch needs while it runs: without that of cuDNN's trials, which were before."""
        device = batch.images.device
        with self._aside():
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._forward_backward(batch)
            return torch.cuda.max_memory_allocated(device) - before


# CUDA graphs, as in PyTorch's "CUDA semantics" notes, section "Whole-network capture". Not run: there was no GPU.


class Graph(NamedTuple):
    cuda: torch.cuda.CUDAGraph
    output: Tensor

    def replay(self) -> Tensor:
        """The next replay overwrites what this one returns."""
        self.cuda.replay()
        return self.output

    def pool(self) -> Any:
        return self.cuda.pool()


def capture(run: Callable[[], Tensor], pool: Any) -> Graph:
    """A graph of what `run` does on the current device, in memory that all graphs of `pool` share."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # thread_local: the loader's thread and NCCL's may use the GPU meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = run()
    finally:
        torch.cuda.set_stream(stream)  # after some errors torch stays on the stream of the capture
    return Graph(graph, output)


def warm_up(run: Callable[[], object], device: torch.device) -> None:
    """Runs it as often as what is compiled or tuned at first use needs; on a GPU in a stream of its own, since a graph
    must find nothing from the stream in which it is captured later."""
    if device.type != "cuda":
        run()
        return
    here, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(here)
    try:
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_LAUNCHES):
                run()
    finally:
        here.wait_stream(stream)
