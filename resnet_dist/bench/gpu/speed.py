"""Checks of speed: the step beside a bare loop of the same kind, and its parts."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resnet_dist.bench.gpu import runner
from resnet_dist.bench.gpu.machine import synchronize
from resnet_dist.bench.gpu.profiled import layout_kernels
from resnet_dist.bench.gpu.result import Clock, Result
from resnet_dist.bench.gpu.steps import EAGER, described, disabled_graphs, relative
from resnet_dist.bench.gpu.synthetic import Points, in_memory_run
from resnet_dist.bench.step import (
    Settings,
    advance,
    bare_loop,
    host_s_per_kernel,
    random_batches,
    recipe,
)
from resnet_dist.errors import Fault
from resnet_dist.models.batch_norm import BatchNorm2d
from resnet_dist.models.summary import summarise
from resnet_dist.planner.step import train_kernels
from resnet_dist.training.model import build_classifier, build_optimizer, set_backends

_LEAST_OF_BARE = 0.90
_MOST_COMPILED = 1e-3


# Compiled steps


def compile(device: torch.device, small: bool) -> Result:
    """Graphs and seconds of a compiled step, and its losses against the uncompiled step's."""
    from torch._dynamo.utils import counters  # takes seconds, and no other check needs it

    settings = Settings("resnet8" if small else "resnet18", 8 if small else 224, 2 if small else 64, 1, 4, 1, 2)
    with (
        TemporaryDirectory(ignore_cleanup_errors=True) as cache,
        environment_variable("TORCHINDUCTOR_CACHE_DIR", cache),
        compiler(small),
    ):
        uncompiled, _, _ = first_steps(settings, device, compiled=False)
        torch._dynamo.reset()
        counters.clear()
        losses, first_s, kernels = first_steps(settings, device, compiled=True)
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    difference = relative(losses, uncompiled)
    measured = {"graphs": graphs, "graph_breaks": dict(counters["graph_break"]), "first_step_s": first_s}
    measured |= {"losses": losses, "losses_uncompiled": uncompiled, "difference": difference, "layout_kernels": kernels}
    line = (
        f"{settings.model}: graphs {graphs} (expected 1), breaks {breaks}, first step {first_s:.1f} s, losses within "
        f"{difference:.2g} of the uncompiled step's (limit {_MOST_COMPILED:.0e})"
    )
    if kernels is not None:
        line += f", kernels that change the layout: {described(kernels)}"
    return Result(measured, graphs == 1 and difference <= _MOST_COMPILED and not kernels, line)


def first_steps(
    settings: Settings, device: torch.device, *, compiled: bool
) -> tuple[list[float], float, dict[str, int] | None]:
    """The losses, the seconds of the first step, and the kernels that change the layout in one more."""
    points = Points()
    config = recipe(settings, train={"compile": compiled}, optim={"lr": 1e-4})  # rounding grows with it
    # Merged as given, or a GPU would compile one micro-batch first: every number of merged ones has its own graph.
    merged = settings.micro_batches
    with in_memory_run(
        config, settings, device, tracker=points, log_every_steps=1, micro_batches_per_launch=merged
    ) as trainer:
        first_s = next(iter(seconds_of(partial(advance, trainer, 1), device, 1)))
        advance(trainer, settings.steps - 1)
        seen = compiled and device.type == "cuda"
        kernels = layout_kernels(lambda: advance(trainer, 1)) if seen else None
    return points.of("train/loss"), first_s, kernels


@contextmanager
def compiler(small: bool) -> Iterator[None]:
    """For tests, one that finds the same graphs but generates no code for them, which takes minutes on a CPU."""
    generating = torch.compile
    if small:
        torch.compile = partial(generating, backend="aot_eager")
    try:
        yield
    finally:
        torch.compile = generating


@contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


# Images per second


class Arm(NamedTuple):
    """One way to train steps of 256 images."""

    name: str
    sizes: tuple[int, ...]
    """Micro-batches that it is measured with."""
    bare: bool = False
    graph: bool = False
    """Of the bare loop; ours has its graphs by default."""
    benchmark: bool = True
    """cuDNN chooses its algorithms by timing them."""
    job: dict[str, Any] = {}  # noqa: RUF012 - never written


_ONE_BY_ONE, _ALL = {"micro_batches_per_launch": 1}, {"micro_batches_per_launch": 10**6}
_SIZES = (256, 32, 128, 64)
"""In the order in which they are measured, while there is time."""


def speed_eager(device: torch.device, small: bool) -> Result:
    arms = [
        Arm("bare", (256, 32), bare=True),
        Arm("one by one", _SIZES, job={**EAGER, **_ONE_BY_ONE}),
        Arm("merged", (32, 128), job={**EAGER, **_ALL}),
        Arm("no cudnn.benchmark", (256,), benchmark=False, job={**EAGER, **_ONE_BY_ONE}),
    ]
    return compared(device, small, "bf16", arms[:2] if small else arms)


def speed_graphs(device: torch.device, small: bool) -> Result:
    arms = [
        Arm("bare", (256, 32), bare=True, graph=True),
        Arm("one by one", _SIZES, job=_ONE_BY_ONE),
        Arm("merged", (32, 64, 128), job=_ALL),
    ]
    return compared(device, small, "bf16", arms)


def speed_fp16(device: torch.device, small: bool) -> Result:
    arms = [
        Arm("bare", (256, 32), bare=True, graph=True),
        Arm("one by one", _SIZES, job=_ONE_BY_ONE),
        Arm("merged", (32, 128), job=_ALL),
    ]
    return compared(device, small, "fp16", arms)


def speed_compiled(device: torch.device, small: bool) -> Result:
    """Of a smaller net, which compiles within a check's minute."""
    arms = [Arm("bare", (256,), bare=True), Arm("merged", (256, 32), job=_ALL)]
    return compared(device, small, "bf16", arms, "resnet18", compile=True)


def compared(
    device: torch.device, small: bool, precision: str, arms: Sequence[Arm], model: str = "resnet152", **train: Any
) -> Result:
    """Images per second of steps of 256 images, in micro-batches of several sizes; our fastest against the bare loop's
    fastest."""
    model, side, images, steps = ("resnet8", 16, 256, 1) if small else (model, 224, 256, 4)
    cells: dict[str, dict[int, float | str]] = {arm.name: {} for arm in arms}
    notes: list[str] = []
    clock = Clock()
    for size in _SIZES[:1] if small else _SIZES:
        for arm in (arm for arm in arms if size in arm.sizes):
            if clock.expired():
                cells[arm.name][size] = "no time"
                continue
            settings = Settings(model, side, size, 1, steps, rounds=3, micro_batches=images // size)
            cells[arm.name][size] = speed_or_reason(partial(speed, device, settings, arm, precision, train, notes))
    best = {arm.name: max((v for v in cells[arm.name].values() if isinstance(v, float)), default=0.0) for arm in arms}
    bare, ours = best["bare"], max(value for name, value in best.items() if name != "bare")
    measured = {"images_per_s": cells, "notes": notes}
    if not bare or not ours:
        return Result(measured, None, f"nothing to compare: {rows_of(cells)}")
    line = f"{model} {precision}, images/s (micro-batch): {rows_of(cells)}; our best is {ours / bare:.1%} of bare"
    if disabled := disabled_graphs(notes):
        line += f"; {disabled[0]}"
    if small:
        return Result(measured, None, line)
    return Result(measured, ours >= _LEAST_OF_BARE * bare, f"{line} (limit {_LEAST_OF_BARE:.0%})")


def rows_of(cells: Mapping[str, Mapping[int, float | str]]) -> str:
    """`bare 1500 (256), 900 (32); merged ...`"""
    rows = {
        name: ", ".join(f"{v if isinstance(v, str) else round(v)} ({size})" for size, v in row.items())
        for name, row in cells.items()
    }
    return "; ".join(f"{name} {row}" for name, row in rows.items() if row)


def speed_or_reason(measure: Callable[[], float]) -> float | str:
    try:
        return measure()
    except (torch.OutOfMemoryError, Fault) as error:
        return "memory" if "memory" in str(error) else runner.one_line(str(error))
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def speed(
    device: torch.device, settings: Settings, arm: Arm, precision: str, train: dict[str, Any], notes: list[str]
) -> float:
    """Images per second: the median of the blocks of steps after the first."""
    config = recipe(settings, train={"precision": precision, **train})
    set_backends(config.train)
    with ExitStack() as stack:
        if arm.bare:
            block: Callable[[], Any] = bare_loop(config, settings, random_batches(settings, device), graph=arm.graph)[1]
        else:
            trainer = stack.enter_context(in_memory_run(config, settings, device, on_line=notes.append, **arm.job))
            block = partial(advance, trainer, settings.steps)
        torch.backends.cudnn.benchmark = arm.benchmark
        times = list(seconds_of(block, device, settings.rounds))
    return settings.steps * settings.global_batch_size / median(times[1:])


def seconds_of(
    block: Callable[[], Any], device: torch.device, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> Iterable[float]:
    for _ in range(repeats):
        synchronize(device)
        began_s = clock()
        block()
        synchronize(device)
        yield clock() - began_s


# Parts of a step


def median_ms(run: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of a call: the median of ten, after three to warm up.

    On a CPU it is CPU time, which does not count other programs', with one thread: several spin while they wait for
    each other.
    """
    clock = time.perf_counter
    if device.type == "cpu":
        clock = time.process_time
        torch.set_num_threads(1)
    return 1e3 * median(list(seconds_of(run, device, 13, clock))[3:])


def host_share(device: torch.device, small: bool) -> Result:
    """The host's time to start a step, from images so small that the device always waits for the host; against the
    time of a step of 32 images."""
    if device.type == "cpu":
        kernel_us = 1e6 * host_s_per_kernel(1)
        return Result({"kernel_us": kernel_us}, None, f"{kernel_us:.0f} us of CPU time for a kernel of a step")
    model, side = ("resnet20", 32) if small else ("resnet152", 224)
    kernels = sum(train_kernels(summarise(model), half=True))
    notes: list[str] = []
    measured: dict[str, Any] = {"kernels": kernels, "notes": notes}
    for name, job in {"eager": EAGER, "graph": {}}.items():
        for what, px, images in (("host_s", 32, 2), ("step_s", side, 32)):
            settings = Settings(model, px, images, 1, steps=10, rounds=4)
            measured[f"{name}_{what}"] = images / speed(device, settings, Arm(name, (), job=job), "bf16", {}, notes)
    measured["kernel_us"] = 1e6 * measured["eager_host_s"] / kernels
    line = "; ".join(
        f"{name} starts in {1e3 * measured[f'{name}_host_s']:.1f} ms, with 32 images of {side} px it takes "
        f"{1e3 * measured[f'{name}_step_s']:.1f} ms"
        for name in ("eager", "graph")
    )
    return Result(measured, None, f"a step of {model}: {line}; {measured['kernel_us']:.1f} us for each eager kernel")


def optimizers(device: torch.device, small: bool) -> Result:
    """Milliseconds of an update of all weights, by optimizer and by the gradients' layout."""
    config = recipe(Settings("resnet20" if small else "resnet152", 32 if small else 224, 1, 1, 1, 1))
    model = build_classifier(config).to(device)
    nhwc = [torch.randn_like(p) for p in model.parameters()]
    nchw = [gradient.contiguous() for gradient in nhwc]

    def sgd(**kernel: bool) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=1e-4, **kernel)

    arms: dict[str, tuple[Callable[[], torch.optim.Optimizer], Sequence[torch.Tensor]]] = {
        "ours": (lambda: build_optimizer(model.net, config.optim), nhwc),
        "SGD foreach": (lambda: sgd(foreach=True), nhwc),
        "SGD foreach, NCHW gradients": (lambda: sgd(foreach=True), nchw),  # which the fused one refuses
        "SGD fused": (lambda: sgd(fused=True), nhwc),
        "LAMB": (lambda: build_optimizer(model.net, config.optim.model_copy(update={"name": "lamb"})), nhwc),
    }
    found: dict[str, float | str] = {}
    for name, (build, gradients) in arms.items():
        try:
            optimizer = build()
        except ModuleNotFoundError as error:
            found[name] = f"{error.name} is not installed"
            continue
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone(memory_format=torch.preserve_format)
        found[name] = median_ms(optimizer.step, device)
    shown = ", ".join(f"{name} {ms:.2f}" if isinstance(ms, float) else f"{name}: {ms}" for name, ms in found.items())
    return Result({"ms": found}, None, f"an update of {config.model.name}, ms: {shown}")


def batch_norm(device: torch.device, small: bool) -> Result:
    """Milliseconds of batch norm and ReLU, forward and backward: by number format, in groups, compiled."""
    shape = (8, 8, 8, 8) if small else (128, 256, 56, 56)
    found: dict[str, float | str] = {}
    for dtype, groups, compiled in (
        (torch.bfloat16, 1, False),
        (torch.bfloat16, 4, False),
        (torch.float16, 1, False),
        (torch.float16, 4, False),
        (torch.float32, 1, False),
        *([] if small else [(torch.bfloat16, 1, True), (torch.bfloat16, 4, True)]),
    ):
        norm = BatchNorm2d(shape[1])
        norm.num_groups = groups
        layer: Any = nn.Sequential(norm, nn.ReLU(inplace=True)).to(device)
        layer = torch.compile(layer, dynamic=False) if compiled else layer
        x = torch.randn(shape, device=device, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
        name = f"{str(dtype).removeprefix('torch.')}{f' in {groups} groups' if groups > 1 else ''}"
        name += " compiled" if compiled else ""
        run = partial(_forward_backward, layer, x, torch.randn_like(x))
        try:
            found[name] = median_ms(run, device)
        except Exception as error:  # noqa: BLE001 - a compiler raises anything; the others are measured
            found[name] = runner.one_line(f"{type(error).__name__}: {error}")[:80]
    shown = ", ".join(f"{name} {ms:.2f}" if isinstance(ms, float) else f"{name}: {ms}" for name, ms in found.items())
    return Result({"ms": found, "shape": shape}, None, f"batch norm and ReLU of {list(shape)}, ms: {shown}")


def _forward_backward(layer: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> None:
    x.grad = None  # or the gradient is added to the last one's, which takes longer
    layer(x).backward(gradient)
