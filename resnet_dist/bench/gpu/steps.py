"""Checks of the training step: no waits, one layout, the right numbers, the same bits again and after a restart."""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from resnet_dist.bench.gpu.machine import synchronize
from resnet_dist.bench.gpu.profiled import layout_kernels
from resnet_dist.bench.gpu.result import Clock, Result, Skipped, largest
from resnet_dist.bench.gpu.synthetic import (
    Points,
    beton_job,
    beton_recipe,
    first_difference,
    in_memory_run,
    local_context,
    write_synthetic_beton,
)
from resnet_dist.bench.step import Settings, advance, bare_loop, our_loop, random_batches, recipe
from resnet_dist.config.recipe import Recipe
from resnet_dist.errors import Fault, UserError
from resnet_dist.training.launches import NO_GRAPHS
from resnet_dist.training.loop import Trainer, run_worker
from resnet_dist.training.model import set_backends

_CPU = torch.device("cpu")
EAGER: dict[str, Any] = {"cuda_graphs": False}
_MOST_FP64, _MOST_FP32 = 1e-10, 1e-3
_SLOW = {"lr": 1e-4}
"""At higher rates rounding grows too fast for a comparison of losses: to 3 % in 20 steps of ResNet-18 at 0.01."""


# Waits


def host_syncs(device: torch.device, small: bool) -> Result:
    """Operations that make the host wait for the device, in 20 steps between two points of the curves."""
    recipes: dict[str, dict[str, dict[str, Any]]] = {
        "plain": {"train": {"precision": "bf16"}},
        "mix": {"train": {"precision": "bf16"}, "data": {"mixing": {"mixup_alpha": 0.2, "cutmix_alpha": 1.0}}},
        "fp16": {"train": {"precision": "fp16"}},
    }
    model, side = ("resnet20", 32) if small else ("resnet50", 128)
    settings = Settings(model, side, 16, 1, steps=64, rounds=1, micro_batches=2)
    found = {}
    for name, sections in recipes.items():
        config = recipe(settings, **sections)
        with in_memory_run(config, settings, device, log_every_steps=10**6) as trainer:
            advance(trainer, 10)
            synchronize(device)
            found[name] = syncs_of(trainer, 20)
    line = "; ".join(f"{name}: {described(counts)}" for name, counts in found.items())
    return Result({"syncs": found}, not any(found.values()), f"host waits in 20 steps: {line}")


def syncs_of(trainer: Trainer, steps: int) -> dict[str, int]:
    """By `file:line`, as PyTorch reports them; unlike its mode "error", "warn" finds all of them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            advance(trainer, steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchronizing" in str(w.message)]
    return dict(Counter(f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}" for w in waits))


def described(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{where} ({count}x)" for where, count in counts.items()) or "none"


# Layout


def layout(device: torch.device, small: bool) -> Result:
    """Which layers give outputs that are not NHWC; on a GPU, kernels that change the layout."""
    model, side = ("resnet8", 16) if small else ("resnet50", 224)
    settings = Settings(model, side, 8, 1, steps=4, rounds=1)
    wrong: Counter[str] = Counter()
    outputs = 0

    def see(module: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal outputs
        if output.dim() == 4:
            outputs += 1
            if not output.is_contiguous(memory_format=torch.channels_last):
                wrong[type(module).__name__] += 1

    with in_memory_run(recipe(settings, train={"precision": "bf16"}), settings, device, **EAGER) as trainer:
        leaves = [module for module in trainer.classifier.net.modules() if not list(module.children())]
        hooks = [module.register_forward_hook(see) for module in leaves]
        advance(trainer, 1)
        for hook in hooks:
            hook.remove()
        kernels = None if device.type == "cpu" else layout_kernels(lambda: advance(trainer, 1))
    measured = {"outputs": outputs, "not_nhwc": dict(wrong), "layout_kernels": kernels}
    line = f"{outputs} outputs, {sum(wrong.values())} not NHWC{f' ({described(wrong)})' if wrong else ''}"
    if kernels is not None:
        line += f"; kernels that change the layout in a step: {described(kernels)}"
    return Result(measured, outputs > 0 and not wrong and not kernels, line)


# Numbers


def numbers(device: torch.device, small: bool) -> Result:
    """Two steps in float64 on the device against the bare loop's on the CPU; 20 losses in float32 against float64's."""
    side = 16 if small else 64
    settings = Settings("resnet8" if small else "resnet50", side, 4 if small else 8, 1, 2, 1, micro_batches=2)
    threads = 1 if small else len(os.sched_getaffinity(0))  # for the CPU's part
    config = recipe(settings, train={"precision": "fp64", "cpu_threads": threads}, optim={"lr": 0.1})
    set_backends(config.train)
    model, block = bare_loop(config, settings, random_batches(settings))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    block()
    theirs = {name: value.detach() - before[name] for name, value in model.named_parameters()}
    ours = {f"net.{name}": value for name, value in updates(config, settings, device).items()}
    off = difference(ours, theirs)
    settings = settings._replace(steps=20)
    if not small:
        settings = settings._replace(model="resnet18", micro_batch_size=16)
    losses = {}
    for precision, where in (("fp64", _CPU), ("fp32", device)):
        train = {"precision": precision, "cpu_threads": threads}
        losses[precision] = losses_of(recipe(settings, train=train, optim=_SLOW), settings, where)[0]
    drift = relative(losses["fp32"], losses["fp64"])
    measured = {"fp64": off, "fp32": drift, "losses": losses}
    line = (
        f"fp64 update of {config.model.name}: difference {off:.2g} from a bare loop's on the CPU "
        f"(limit {_MOST_FP64:.0e}); 20 fp32 losses: {drift:.2g} "
        f"from the CPU's in fp64 (limit {_MOST_FP32:.0e})"
    )
    return Result(measured, off <= _MOST_FP64 and drift <= _MOST_FP32, line)


# Bits

_FAMILIES: dict[str, dict[str, Any]] = {
    "resnet20": {},
    "resnet20 drop-path": {"drop_path": 0.2, "dropout": 0.2},
    "resnet20 gate": {"gate": "exclusive"},
    "resnet164": {},
    "resnet20 pre": {"activation_order": "pre"},
    "plain20": {},
    "resnet18": {},
    "resnet50": {},
    "resnet50 pre": {"activation_order": "pre"},
    "resnet50 rs": {"stem": "deep_strided", "pooled_projection": True, "se_ratio": 0.25, "drop_path": 0.1},
    "resnet50 blur": {"blur_pool": True},
    "resnext50_32x4d": {},
    "vgg16": {},
    "googlenet": {},
}
CIFAR_NETS = ("resnet20", "resnet164", "plain20")
_SMALL_FAMILIES = ("resnet20 drop-path", "resnet18")


def exact(device: torch.device, small: bool) -> Result:
    """Three steps of every family of nets with `reduction: exact`, twice."""
    found: dict[str, str] = {}
    clock = Clock()
    for family, options in _FAMILIES.items():
        if small and family not in _SMALL_FAMILIES:
            continue
        name = family.split()[0]
        side = 32 if name in CIFAR_NETS else 64
        settings = Settings(name, side, 2 if small else 4, 1, steps=3, rounds=1, micro_batches=2)
        try:
            if clock.expired():
                raise Skipped("no time")
            config = exact_recipe(settings, model=options)
            first, again = (trained_states(config, settings, device, [3])[0] for _ in range(2))
        except Skipped as reason:
            found[family] = f"skipped: {reason}"
            continue
        except ModuleNotFoundError as error:
            found[family] = f"skipped: {error.name} is not installed"
            continue
        except (RuntimeError, UserError, Fault) as error:  # names an operation without a deterministic kernel
            found[family] = f"FAIL: {error}"
            continue
        differing = first_difference(first, again)
        found[family] = "equal" if differing is None else f"FAIL: differs in {differing}"
    bad = {family: text for family, text in found.items() if text.startswith("FAIL")}
    left_out = [text for text in found.values() if text.startswith("skipped")]
    line = f"two runs of {len(found) - len(left_out)} nets: "
    line += "; ".join(f"{family}: {text}" for family, text in bad.items()) or "equal bits"
    return Result({"nets": found}, not bad, line + (f"; {len(left_out)} nets {left_out[0]}" if left_out else ""))


def resume(device: torch.device, small: bool) -> Result:
    """Ten steps against five, a checkpoint, a new trainer that restores it and five more; with `reduction: exact`."""
    model = "resnet8" if small else "resnet50"
    settings = Settings(model, 16 if small else 64, 4, 1, steps=10, rounds=1, micro_batches=2)
    found: dict[str, str] = {}
    for name, optim in {"sgd": {}, "lamb": {"name": "lamb"}}.items():
        config = exact_recipe(settings, optim=optim, train={"ema": {"decay": 0.9}})
        try:
            through = trained_states(config, settings, device, [10])[0]
            resumed = trained_states(config, settings, device, [5, 10])[1]
        except ModuleNotFoundError as error:
            found[name] = f"skipped: {error.name} is not installed"
            continue
        differing = first_difference(through, resumed)
        found[name] = "equal bits" if differing is None else f"FAIL: differs in {differing}"
    line = "10 steps against 5, a checkpoint and 5: " + "; ".join(f"{k}: {text}" for k, text in found.items())
    return Result(found, not any(text.startswith("FAIL") for text in found.values()), line)


def exact_recipe(settings: Settings, **sections: Mapping[str, Any]) -> Recipe:
    sections = {**sections, "train": {"reduction": "exact", **sections.get("train", {})}}
    config = recipe(settings, **sections)
    set_backends(config.train)
    return config


def trained_states(
    config: Recipe, settings: Settings, device: torch.device, stops: Sequence[int], **job: Any
) -> list[dict[str, Any]]:
    """The state after each of the steps `stops`, each with a trainer of its own that restores the checkpoint before."""
    batches, states = random_batches(settings, device), []
    with TemporaryDirectory() as folder:
        for stop in stops:
            trainer = our_loop(config, settings, batches, Path(folder), tracker=Points(), **job)
            trainer.restore()
            advance(trainer, stop - trainer.state.step)
            if stop != stops[-1]:
                trainer.checkpoints.save({})
            states.append(trainer.state.snapshot())
    return states


# Launches


_WAYS: dict[str, dict[str, Any]] = {
    "merged": {**EAGER, "micro_batches_per_launch": 4},
    "graph": {"cuda_graphs": True, "micro_batches_per_launch": 1},
    "merged graph": {"cuda_graphs": True, "micro_batches_per_launch": 4},
}


def merged(device: torch.device, small: bool) -> Result:
    """Two steps of four micro-batches in float64: merged into one launch, and as CUDA graphs, against one by one."""
    nets: dict[str, dict[str, Any]] = {
        "resnet20": {"drop_path": 0.2, "dropout": 0.2},
        "resnet18": {},
        "resnet50": {"stem": "deep_strided", "pooled_projection": True, "se_ratio": 0.25, "drop_path": 0.1},
    }
    if small:
        nets = {"resnet8": nets["resnet20"]}
    found: dict[str, float] = {}
    notes: list[str] = []
    for name, options in nets.items():
        side = 16 if small else 64
        settings = Settings(name, side, 4, 1, steps=2, rounds=1, micro_batches=4)
        config = recipe(
            settings,
            model=options,
            train={"precision": "fp64"},
            data={"mixing": {"mixup_alpha": 0.2, "cutmix_alpha": 1.0}},
            optim={"lr": 0.1},
        )
        apart = updates(config, settings, device, **EAGER, micro_batches_per_launch=1)
        for way, job in _WAYS.items():
            if job["cuda_graphs"] and device.type == "cpu":
                continue
            together = updates(config, settings, device, on_line=notes.append, **job)
            found[f"{name}, {way}"] = difference(together, apart)
    worst, disabled = largest(found.values()), disabled_graphs(notes)
    names = [name for name, value in found.items() if value == worst or math.isnan(value)]
    line = f"fp64 updates within {worst:.2g} of those one by one (worst: {names[0]}; limit {_MOST_FP64:.0e})"
    if disabled:
        line += f"; {disabled[0]}"
    return Result({"differences": found, "notes": notes}, worst <= _MOST_FP64 and not disabled, line)


def updates(config: Recipe, settings: Settings, device: torch.device, **options: Any) -> dict[str, Tensor]:
    """By how much `settings.steps` steps change each parameter, and batch norm's running statistics after them."""
    with in_memory_run(config, settings, device, **options) as trainer:
        net = trainer.classifier.net
        before = {name: value.detach().cpu().clone() for name, value in net.named_parameters()}
        advance(trainer, settings.steps)
        after = {name: value.detach().cpu() for name, value in net.state_dict().items() if value.is_floating_point()}
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest, over the tensors, of the length of the difference relative to the length of `theirs`."""
    return largest(float((ours[name] - value).norm() / value.norm().clamp_min(1e-30)) for name, value in theirs.items())


def graphs(device: torch.device, small: bool) -> Result:
    """Losses with CUDA graphs against without, also with images that grow, and with a net that cannot be captured."""
    model, side = ("resnet20", 32) if small else ("resnet18", 96)
    settings = Settings(model, side, 16, 1, steps=20, rounds=1, micro_batches=2)
    config = recipe(settings, data={"mixing": {"mixup_alpha": 0.2}}, optim=_SLOW)
    drift, notes = {}, {}
    eager, _ = losses_of(config, settings, device, **EAGER)
    for way, captures in {"graph": True, "fallback": False}.items():
        losses, notes[way] = losses_of(config, settings, device, captures=captures)
        drift[way] = relative(losses, eager)
    grown, notes["growing"] = growing_losses(device, small, cuda_graphs=True)
    drift["growing"] = relative(grown, growing_losses(device, small, cuda_graphs=False)[0])
    missed = disabled_graphs(notes["graph"] + notes["growing"])
    fell_back = bool(disabled_graphs(notes["fallback"]))
    line = (
        f"losses with graphs within {drift['graph']:.2g} of those without, with growing images {drift['growing']:.2g}; "
        f"graphs of a net that cannot be captured {'are disabled' if fell_back else 'ARE NOT DISABLED'}, "
        f"{drift['fallback']:.2g} (limit {_MOST_FP32:.0e})"
    )
    if missed:
        line = f"{missed[0]}; {line}"
    passed = not missed and fell_back and largest(drift.values()) <= _MOST_FP32
    return Result({"drift": drift, "notes": notes}, passed, line)


def disabled_graphs(notes: Sequence[str]) -> list[str]:
    """The lines that say that CUDA graphs are not used, and why."""
    return [note for note in notes if note.startswith(NO_GRAPHS)]


def losses_of(
    config: Recipe, settings: Settings, device: torch.device, *, captures: bool = True, **options: Any
) -> tuple[list[float], list[str]]:
    """The losses of `settings.steps` steps, and the lines for the user."""

    def wait(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output[0, 0].item()  # waits for the device, which no capture allows

    points, notes = Points(), list[str]()
    with in_memory_run(
        config, settings, device, tracker=points, log_every_steps=1, on_line=notes.append, **options
    ) as trainer:
        if not captures:
            trainer.classifier.net.register_forward_hook(wait)
        advance(trainer, settings.steps + 1)
    return points.of("train/loss"), notes


def growing_losses(device: torch.device, small: bool, **job: Any) -> tuple[list[float], list[str]]:
    """The losses of two epochs on a beton with images of another size in each, and the lines for the user."""
    size, batch_size, steps = (32, 4, 3) if small else (96, 16, 8)
    progressive = {"progressive_size": {"start_size": size // 2, "ramp": [0.0, 0.5], "multiple": 16}}
    config = beton_recipe("resnet18", size, batch_size, micro_batches=2, data=progressive, optim={"lr": 3e-5})
    points, notes = Points(), list[str]()
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_synthetic_beton(folder / "train.beton", 2 * steps * batch_size, size * 3 // 2)
        write_synthetic_beton(folder / "val.beton", batch_size, size * 3 // 2)
        planned = beton_job(config, folder, steps_per_epoch=steps, log_every_steps=1, threads=2)
        ctx = replace(local_context(folder, device), on_line=notes.append)
        run_worker(replace(planned, **job), ctx, points)
    return points.of("train/loss"), notes


def relative(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest difference, relative to `theirs`."""
    return largest(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
