"""`resnet-dist plan`: estimates a recipe on given hardware, from a `Workload` to the lines that are printed."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import cache
from statistics import mean, quantiles
from typing import Any

from resnet_dist.errors import UserError
from resnet_dist.planner.hardware import BYTES_PER_IMAGE, KERNEL_S_RANGE, Links, gpu_of_name
from resnet_dist.planner.simulate import (
    CheckpointCost,
    Fleet,
    Policy,
    SimulatedRun,
    TimeSpent,
    best_interval_s,
    checkpoint_cost,
    simulate,
)
from resnet_dist.planner.step import Step, images_per_core, launches_in, mean_step, memory_gb, step_of, train_kernels
from resnet_dist.planner.workload import Workload

FORWARD_SHARE = 1 / 3
"""Cost of an evaluated image relative to a trained one."""


@dataclass(frozen=True)
class Hardware:
    gpu: str
    gpus: int
    gpus_per_node: int
    net_bytes_s: float
    cpus_per_gpu: int
    disk_bytes_s: float | None = None
    """Read bandwidth of one node; None: betons are in the page cache."""
    price_per_gpu_h: float | None = None


@dataclass(frozen=True)
class Faults:
    mtbf_h: float
    """Mean time between failures of one node."""
    repair_h: float = 4.0
    preemptions_per_day: float = 0.0
    """Preemptions of one node."""
    notice_s: float = 120.0
    spare_nodes: int = 0
    min_gpus: int | None = None
    """The smallest group that still trains; None: only all GPUs together."""
    resize_every_s: float = 600.0
    checkpoint_every_s: float | None = None
    """None: the best interval."""
    restart_s: float = 24.0
    replicas: int = 40
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    work: Workload
    hardware: Hardware
    faults: Faults
    step: Step
    """The mean of the run's steps."""
    single_images_s: float
    """One GPU alone, with the whole step."""
    single_merged: int
    """Micro-batches in that GPU's launches."""
    images_s_range: tuple[float, float]
    """Lowest and highest speed, as the fixed time of a kernel is uncertain: see `KERNEL_S_RANGE`."""
    graphs_gain: bool
    """Whether launches are CUDA graphs and started one by one would be slower."""
    launches: tuple[int, ...]
    """The micro-batches in each launch of a worker's step; of the worker with most of them, at the largest images."""
    kernels: int
    """Kernels of the largest of these launches."""
    memory_gb: float
    """Estimated, of one GPU."""
    cores_per_gpu: float
    """Needed by the loader, at the most demanding image size."""
    disk_bytes_s: float
    """Read by a node at that speed, if its betons are not in the page cache."""
    beton_bytes: float
    checkpoint: CheckpointCost
    checkpoint_every_s: float
    evaluation_s: float
    """All evaluations of the run."""
    runs: tuple[SimulatedRun, ...]

    @property
    def merged(self) -> int:
        """Micro-batches of the largest launch."""
        return max(self.launches)

    @property
    def efficiency(self) -> float:
        return self.step.images_per_s / (self.hardware.gpus * self.single_images_s)

    @property
    def ideal_h(self) -> float:
        """Without a fault."""
        return (self.work.steps * self.step.seconds + self.evaluation_s) / 3600

    @property
    def ideal_h_range(self) -> tuple[float, float]:
        slowest, fastest = self.images_s_range
        return self.ideal_h * self.step.images_per_s / fastest, self.ideal_h * self.step.images_per_s / slowest

    @property
    def hours(self) -> float:
        return mean(run.spent.wall_s for run in self.runs) / 3600

    @property
    def hours_90(self) -> tuple[float, float]:
        """The range that contains nine runs in ten."""
        cuts = quantiles((run.spent.wall_s / 3600 for run in self.runs), n=20, method="inclusive")
        return cuts[0], cuts[-1]

    @property
    def goodput(self) -> float:
        return mean(run.spent.goodput for run in self.runs)

    @property
    def gpu_hours(self) -> float:
        used_of_a_node = min(self.hardware.gpus, self.hardware.gpus_per_node)
        return mean(run.node_s for run in self.runs) * used_of_a_node / 3600

    @property
    def lost_share(self) -> float:
        """Share of the time lost to failed nodes: everything but steps, checkpoints and the first start."""
        times = [run.spent for run in self.runs]
        return mean(
            (x.redone_s + x.waiting_s + x.smaller_group_s + max(x.restart_s - self.faults.restart_s, 0.0)) / x.wall_s
            for x in times
        )

    @property
    def money(self) -> float | None:
        price = self.hardware.price_per_gpu_h
        return None if price is None else price * self.gpu_hours

    @property
    def bottleneck(self) -> str:
        """The largest loss of time, if it is at least a tenth; else the GPUs themselves."""
        step, hw, micro_batches = self.step, self.hardware, self.work.micro_batches_per_step
        as_fast = math.ceil(micro_batches / math.ceil(micro_batches / hw.gpus))  # as many GPUs with the same shares
        even = f"{as_fast} GPUs, which are as fast, or " if as_fast < hw.gpus else ""
        losses = {
            # With `as_fast` GPUs launches have the same size: that is named first.
            f"launches too small to fill the GPU: {self._larger_launches()}": 0.0 if even else step.small_launches_s,
            "the loader: more CPUs per GPU, or smaller stored images (data-prep convert --max-side)": step.loader_s,
            "the host, which starts kernels more slowly than the GPU runs them: CUDA graphs, or a larger "
            "micro-batch": step.host_s,
            f"uneven shares: {even}a number of GPUs that divides the step's "
            f"{micro_batches} micro-batches": step.uneven_s,
            "the network: more bandwidth between nodes, or more micro-batches per worker and step": step.exchange_s,
            "slow workers, for which all others wait (a warning names them; MLflow has their curves)": step.jitter_s,
        }
        shares = {what: seconds / step.seconds for what, seconds in losses.items()}
        lost = "lost nodes: checkpoint more often, keep spare nodes, or let the group shrink (--min-gpus)"
        shares[lost] = self.lost_share
        what, share = max(shares.items(), key=lambda item: item[1])
        return f"{what} ({share:.0%} of the time)" if share >= 0.1 else f"the {hw.gpu} GPUs themselves"

    def _larger_launches(self) -> str:
        work, own = self.work, math.ceil(self.work.micro_batches_per_step / self.hardware.gpus)
        larger = "a larger micro-batch, which makes it another recipe"
        if self.merged == own:
            ways = ["fewer GPUs with more micro-batches each"] if self.hardware.gpus > 1 else []
        elif work.reduction == "exact":
            ways = ["reduction: fast, which merges micro-batches"]
        else:
            ways = ["a larger micro_batches_per_launch"] if work.micro_batches_per_launch else []
        return ", or ".join([*ways, larger])


def make_plan(work: Workload, hardware: Hardware, faults: Faults) -> Plan:
    """Raises UserError for hardware that the recipe cannot use."""
    gpu = gpu_of_name(hardware.gpu)
    _require_shares(work, hardware, faults)
    links = Links(gpu.local_gb_s * 1e9, hardware.net_bytes_s, hardware.gpus_per_node, gpu.host_bus)
    by_disk = math.inf
    if hardware.disk_bytes_s is not None:
        by_disk = hardware.disk_bytes_s / min(hardware.gpus, hardware.gpus_per_node) / BYTES_PER_IMAGE

    def loader(image_px: int) -> float:
        return min(hardware.cpus_per_gpu * images_per_core(work.decoder, image_px), by_disk)

    @cache
    def step(workers: int) -> Step:
        return mean_step(work, gpu, workers, links, loader_images_s=loader)

    alone = mean_step(work, gpu, 1, links)
    whole = step(hardware.gpus)
    launches = launches_in(work, work.net, gpu, math.ceil(work.micro_batches_per_step / hardware.gpus))
    eager = mean_step(replace(work, cuda_graphs=False), gpu, hardware.gpus, links, loader_images_s=loader)
    fastest, slowest = (
        mean_step(work, replace(gpu, kernel_s=seconds), hardware.gpus, links, loader_images_s=loader).images_per_s
        for seconds in KERNEL_S_RANGE
    )
    per_gpu = {
        phase.image_px: step_of(
            work, gpu, hardware.gpus, links, net=phase.net, loader_images_s=loader(phase.image_px)
        ).images_per_s
        / hardware.gpus
        for phase in work.phases
    }
    nodes = math.ceil(hardware.gpus / hardware.gpus_per_node)
    smallest = math.ceil((faults.min_gpus or hardware.gpus) / hardware.gpus_per_node)
    cost = checkpoint_cost(work.state_bytes)
    interruptions_h = 1 / (nodes * (1 / faults.mtbf_h + faults.preemptions_per_day / 24))
    every_s = faults.checkpoint_every_s or best_interval_s(cost, interruptions_h * 3600)
    largest = per_gpu[work.phases[-1].image_px]
    evaluation_s = work.evaluations * work.val_images * FORWARD_SHARE / (largest * hardware.gpus)
    # Evaluations are simulated as additional steps.
    steps = work.steps + evaluation_s / whole.seconds
    fleet = Fleet(
        nodes=nodes + faults.spare_nodes,
        largest=nodes,
        smallest=smallest,
        mtbf_s=faults.mtbf_h * 3600,
        repair_s=faults.repair_h * 3600,
        preempted_every_s=86400 / faults.preemptions_per_day if faults.preemptions_per_day else None,
        notice_s=faults.notice_s,
    )
    policy = Policy(every_s, cost.snapshot_s, cost.write_s, faults.restart_s, faults.resize_every_s)

    def speed(used: int) -> float:
        return 1 / step(min(hardware.gpus, used * hardware.gpus_per_node)).seconds

    runs = tuple(simulate(fleet, policy, speed, steps, faults.seed + i) for i in range(faults.replicas))
    return Plan(
        work=work,
        hardware=hardware,
        faults=faults,
        step=whole,
        single_images_s=alone.images_per_s,
        single_merged=max(launches_in(work, work.net, gpu, work.micro_batches_per_step)),
        images_s_range=(slowest, fastest),
        graphs_gain=whole.images_per_s > 1.001 * eager.images_per_s,
        launches=tuple(launches),
        kernels=sum(train_kernels(work.net, half=work.half, merged=max(launches))),
        memory_gb=memory_gb(work, work.net, max(launches)),
        cores_per_gpu=max(rate / images_per_core(work.decoder, px) for px, rate in per_gpu.items()),
        disk_bytes_s=max(per_gpu.values()) * min(hardware.gpus, hardware.gpus_per_node) * BYTES_PER_IMAGE,
        beton_bytes=work.train_images * BYTES_PER_IMAGE,
        checkpoint=cost,
        checkpoint_every_s=every_s,
        evaluation_s=evaluation_s,
        runs=runs,
    )


def _require_shares(work: Workload, hardware: Hardware, faults: Faults) -> None:
    if hardware.gpus > work.micro_batches_per_step:
        raise UserError(
            f"--gpus {hardware.gpus}: a step of this recipe has {work.micro_batches_per_step} micro-batches "
            f"({work.global_batch_size} / {work.micro_batch_size}) and every GPU needs one; use fewer GPUs, or another "
            f"recipe: --set train.global_batch_size={hardware.gpus * work.micro_batch_size} and its learning rate"
        )
    if faults.min_gpus is not None and faults.min_gpus > hardware.gpus:
        raise UserError(f"--min-gpus {faults.min_gpus}: more than --gpus {hardware.gpus}")
    gpu = gpu_of_name(hardware.gpu)
    merged = max(launches_in(work, work.net, gpu, math.ceil(work.micro_batches_per_step / hardware.gpus)))
    needed = memory_gb(work, work.net, merged)
    if needed > gpu.memory_gb:
        remedy = (
            "set a lower train.micro_batch_size, which makes it another recipe"
            if merged == 1
            else "set a lower micro_batches_per_launch in the profile"
        )
        raise UserError(
            f"--gpu {hardware.gpu}: a launch of {merged * work.micro_batch_size} images needs about {needed:.0f} GB of "
            f"its {gpu.memory_gb} GB; {remedy}"
        )


# ---- a plan as text and as plain data --------------------------------------------------------------------------------


def lines(plan: Plan) -> list[str]:
    hw, step, work = plan.hardware, plan.step, plan.work
    nodes = -(-hw.gpus // hw.gpus_per_node)
    low, high = plan.hours_90
    slowest, fastest = (_two_digits(speed) for speed in plan.images_s_range)
    merged = "" if plan.single_merged == plan.merged else f" (which merges {plan.single_merged} micro-batches)"
    lost = {"start and restarts" if name == "restart" else name: share for name, share in _lost(plan).items()}
    return [
        f"{hw.gpus} x {hw.gpu} on {nodes} node{'s' * (nodes > 1)}, {work.micro_batches_per_step} micro-batches of "
        f"{work.micro_batch_size} a step, {work.steps:,} steps",
        f"launches       {_launches(plan)}",
        f"assumes        {'; '.join(assumptions(plan))}",
        "               estimated from published figures, not run on a GPU",
        f"speed          {step.images_per_s:,.0f} images/s, {1000 * step.seconds:.1f} ms a step; "
        f"{plan.efficiency:.1%} of {hw.gpus} times one GPU's {plan.single_images_s:,.0f}{merged}",
        "  of a step    " + ", ".join(f"{name} {share:.1%}" for name, share in _shares(plan).items() if share > 0.0005),
        f"bottleneck     {plan.bottleneck}",
        f"GPU memory     about {plan.memory_gb:.0f} GB",
        f"loader         {plan.cores_per_gpu:.1f} cores a GPU keep up, {hw.cpus_per_gpu} given; betons "
        f"{plan.beton_bytes / 1e9:.0f} GB a node, {plan.disk_bytes_s / 1e9:.2f} GB/s if not in memory",
        f"checkpoint     {plan.checkpoint.num_bytes / 1e6:.0f} MB every {plan.checkpoint_every_s / 60:.1f} min: "
        f"{plan.checkpoint.snapshot_s:.2f} s of a pause, {plan.checkpoint.write_s:.1f} s in the background",
        f"hours          {plan.ideal_h:.2f} without faults; {plan.hours:.2f} with "
        f"(9 of 10 runs, by faults alone: {low:.2f} to {high:.2f})",
        f"  uncertain    {' to '.join(f'{_two_digits(hours):g}' for hours in plan.ideal_h_range)} h, {slowest:,.0f} to "
        f"{fastest:,.0f} images/s: a kernel's fixed time is 5 to 27 us, as single measurements say",
        f"faults         {_mean(plan, 'failures'):.1f} failures, {_mean(plan, 'preemptions'):.1f} preemptions, "
        f"{_mean(plan, 'resizes'):.1f} resizes a run; goodput {plan.goodput:.1%}",
        "  lost         " + ", ".join(f"{name} {share:.2%}" for name, share in lost.items()),
        f"GPU hours      {plan.gpu_hours:,.0f}" + ("" if plan.money is None else f", money {plan.money:,.0f}"),
    ]


def _two_digits(number: float) -> float:
    return float(f"{number:.2g}")


def _launches(plan: Plan) -> str:
    work, number, merged = plan.work, len(plan.launches), plan.merged
    how = "one CUDA graph" if work.uses_graphs else "started one by one"
    if work.uses_graphs and not plan.graphs_gain:
        how += ", which gains nothing: the host keeps up"
    smaller = f"{merged - 1} or " if min(plan.launches) < merged else ""
    return (
        f"{number} per worker and step, {'each ' * (number > 1)}of {smaller}{merged} micro-batch{'es' * (merged > 1)} "
        f"({'up to ' * bool(smaller)}{merged * work.micro_batch_size} images): {plan.kernels:,} kernels, {how}"
    )


def assumptions(plan: Plan) -> list[str]:
    """What a reader has to know who compares the plan with a run."""
    work = plan.work
    if work.reduction != "fast":
        key = "gradient_compression" if work.reduction == "powersgd" else "reduction"
        graphs = f"no CUDA graphs ({key}: {work.reduction})"
    else:
        graphs = "CUDA graphs" if work.cuda_graphs else "no CUDA graphs (cuda_graphs: false)"
    if work.reduction == "exact":
        merging = "micro-batches not merged (reduction: exact)"
    elif work.micro_batches_per_launch is None:
        merging = "micro-batches merged where that is faster"
    elif (most := work.micro_batches_per_launch) == 1:
        merging = "micro-batches not merged (micro_batches_per_launch: 1)"
    else:
        merging = f"at most {most} micro-batches merged (micro_batches_per_launch: {most})"
    compiled = "torch.compile, whose gain is not counted" if work.compiled else "no torch.compile"
    recomputes = ["activations computed again, which is not counted: a third slower"] if work.recomputes else []
    many_nodes = plan.hardware.gpus > plan.hardware.gpus_per_node
    net = [f"a network of {8e-9 * plan.hardware.net_bytes_s:g} Gb/s a node"] if many_nodes else []
    return [graphs, merging, compiled, *recomputes, *net]


def as_data(plan: Plan) -> dict[str, Any]:
    low, high = plan.hours_90
    return {
        "images_per_s": plan.step.images_per_s,
        "step_s": plan.step.seconds,
        "efficiency": plan.efficiency,
        "bottleneck": plan.bottleneck,
        "assumes": assumptions(plan),
        "launches_per_step": len(plan.launches),
        "micro_batches_per_launch": plan.merged,
        "kernels_per_launch": plan.kernels,
        "step_shares": _shares(plan),
        "cores_per_gpu": plan.cores_per_gpu,
        "disk_bytes_s_per_node": plan.disk_bytes_s,
        "checkpoint_bytes": plan.checkpoint.num_bytes,
        "checkpoint_every_s": plan.checkpoint_every_s,
        "memory_gb": plan.memory_gb,
        "hours_without_faults": plan.ideal_h,
        "hours_without_faults_range": plan.ideal_h_range,
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
        "GPU per image": step.compute_s,
        "GPU per kernel": step.kernels_s,
        "host": step.host_s,
        "uneven shares": step.uneven_s,
        "all-reduce not hidden": step.exchange_s,
        "slow workers": step.jitter_s,
        "loader": step.loader_s,
    }
    return {name: seconds / step.seconds for name, seconds in parts.items()}


def _lost(plan: Plan) -> dict[str, float]:
    """Shares of the time that did not go into steps at the largest group's speed."""
    names = [field.name for field in fields(TimeSpent) if field.name != "useful_s"]
    shares = {name: mean(getattr(run.spent, name) / run.spent.wall_s for run in plan.runs) for name in names}
    return {name.removesuffix("_s").replace("_", " "): share for name, share in shares.items()}


def _mean(plan: Plan, name: str) -> float:
    return mean(getattr(run, name) for run in plan.runs)
