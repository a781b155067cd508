"""A plan as lines of text, and as plain data."""

from __future__ import annotations

from dataclasses import fields
from statistics import mean
from typing import Any

from resnet_dist.planner.fleet import Ledger
from resnet_dist.planner.plan import Plan


def lines(plan: Plan) -> list[str]:
    hw, step, work = plan.hardware, plan.step, plan.work
    nodes = -(-hw.gpus // hw.gpus_per_node)
    low, high = plan.hours_90
    return [
        f"{hw.gpus} x {hw.gpu} on {nodes} node{'s' * (nodes > 1)}, {work.micro_batches_per_step} micro-batches of "
        f"{work.micro_batch_size} a step, {work.steps} steps",
        f"speed          {step.images_per_s:,.0f} images/s, {1000 * step.seconds:.1f} ms a step; "
        f"{plan.efficiency:.1%} of {hw.gpus} times one GPU's {plan.single_images_s:,.0f}",
        "  of a step    " + ", ".join(f"{name} {share:.1%}" for name, share in _shares(plan).items() if share > 0.0005),
        f"bottleneck     {plan.bottleneck}",
        f"GPU memory     about {plan.memory_gb:.0f} GB",
        f"loader         {plan.cores_per_gpu:.1f} cores a GPU keep up, {hw.cpus_per_gpu} given; betons "
        f"{plan.beton_bytes / 1e9:.0f} GB a node, {plan.disk_bytes_s / 1e9:.2f} GB/s if not in memory",
        f"checkpoint     {plan.checkpoint.num_bytes / 1e6:.0f} MB every {plan.checkpoint_every_s / 60:.1f} min: "
        f"{plan.checkpoint.snapshot_s:.2f} s of a pause, {plan.checkpoint.write_s:.1f} s in the background",
        f"hours          {plan.ideal_h:.2f} without faults; {plan.hours:.2f} with "
        f"(9 of 10 runs: {low:.2f} to {high:.2f})",
        f"faults         {_mean(plan, 'failures'):.1f} failures, {_mean(plan, 'preemptions'):.1f} preemptions, "
        f"{_mean(plan, 'resizes'):.1f} resizes a run; goodput {plan.goodput:.1%}",
        "  lost         " + ", ".join(f"{name} {share:.2%}" for name, share in _lost(plan).items()),
        f"GPU hours      {plan.gpu_hours:,.0f}" + ("" if plan.money is None else f", money {plan.money:,.0f}"),
    ]


def as_data(plan: Plan) -> dict[str, Any]:
    low, high = plan.hours_90
    return {
        "images_per_s": plan.step.images_per_s,
        "step_s": plan.step.seconds,
        "efficiency": plan.efficiency,
        "bottleneck": plan.bottleneck,
        "step_shares": _shares(plan),
        "cores_per_gpu": plan.cores_per_gpu,
        "disk_bytes_s_per_node": plan.disk_bytes_s,
        "checkpoint_bytes": plan.checkpoint.num_bytes,
        "checkpoint_every_s": plan.checkpoint_every_s,
        "memory_gb": plan.memory_gb,
        "hours_without_faults": plan.ideal_h,
        "hours": plan.hours,
        "hours_5_percent": low,
        "hours_95_percent": high,
        "failures": _mean(plan, "failures"),
        "preemptions": _mean(plan, "preemptions"),
        "resizes": _mean(plan, "resizes"),
        "goodput": plan.goodput,
        "lost": _lost(plan),
        "gpu_hours": plan.gpu_hours,
        "money": plan.money,
    }


def _shares(plan: Plan) -> dict[str, float]:
    step = plan.step
    parts = {
        "GPU": step.compute_s,
        "host": step.host_s,
        "uneven shares": step.uneven_s,
        "all-reduce not hidden": step.exchange_s,
        "slow workers": step.jitter_s,
        "loader": step.loader_s,
    }
    return {name: seconds / step.seconds for name, seconds in parts.items()}


def _lost(plan: Plan) -> dict[str, float]:
    names = [field.name for field in fields(Ledger) if field.name != "useful_s"]
    return {
        name.removesuffix("_s").replace("_", " "): mean(
            getattr(o.ledger, name) / o.ledger.wall_s for o in plan.outcomes
        )
        for name in names
    }


def _mean(plan: Plan, name: str) -> float:
    return mean(getattr(outcome, name) for outcome in plan.outcomes)
